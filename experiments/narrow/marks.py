"""Which tokens of a conversation the assistant says."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int


class Marks(NamedTuple):
    """The tokens that open an assistant's turn, and the one that ends any turn."""

    opening: tuple[int, ...]
    end: int


def replies(
    tokens: Int[np.ndarray, "token"], documents: Int[np.ndarray, "token"], marks: Marks
) -> Bool[np.ndarray, "token"]:
    """Mark the tokens of the assistant's turns, from behind the opening up to the end of the turn.

    Args:
        tokens: of all documents, one after the other.
        documents: which document each is of.
        marks: of the template.
    """
    found, is_open, recent = np.zeros(len(tokens), bool), False, ()
    for index, token in enumerate(tokens.tolist()):
        if index and documents[index] != documents[index - 1]:
            is_open, recent = False, ()
        found[index] = is_open
        recent = (*recent, token)[-len(marks.opening) :]
        is_open = (is_open and token != marks.end) or recent == marks.opening
    return found
