"""The text around a latent's strongest activations."""

import codecs
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer

from crosscoder_jax.activations.store import ActivationStore
from crosscoder_jax.diffing.evidence import TopActivations
from crosscoder_jax.sharding import to_host

Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From stored activations ``[token, width]`` and latents ``[selected]`` to codes ``[token, selected]``."""


@dataclasses.dataclass(frozen=True)
class Snippet:
    """A piece of one document around a token on which a latent fires strongly."""

    tokens: tuple[str, ...]
    """Text of each token; a character that spans several tokens is shown at its last one."""
    activations: tuple[float, ...]
    """The latent's activation on each token."""
    peak: int
    """Which of the tokens it was chosen for."""
    value: float
    """Activation there."""
    document: int
    position: int
    """Position in the document."""
    label: str
    """Which text it is from."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``snippets.json``."""
        return dataclasses.asdict(self)


def decode_tokens(
    tokens: Sequence[int] | Integer[np.ndarray, "token"], vocabulary: Mapping[int, bytes]
) -> list[str]:
    """Return the text of each token of a run; joined, they are the text of the run.

    Tokens may hold parts of a UTF-8 character, which then appears at the token that completes it.
    Bytes that are no UTF-8, such as half a character at the edge of the run, become U+FFFD. A token
    that the vocabulary lacks is shown as its number in brackets.

    Examples:
        >>> decode_tokens([0, 1, 2], {0: b"caf", 1: bytes([0xC3]), 2: bytes([0xA9])})
        ['caf', '', 'é']
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts: list[str] = []
    for token in tokens:
        if int(token) in vocabulary:
            texts.append(decoder.decode(vocabulary[int(token)]))
        else:
            texts.append(decoder.decode(b"", final=True) + f"[{int(token)}]")
            decoder.reset()
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


def context_range(
    read_documents: Callable[[int, int], np.ndarray], num_tokens: int, token: int, context: int
) -> tuple[int, int]:
    """Return the tokens from ``context`` before to ``context`` after ``token``, within its document.

    Args:
        read_documents: gives the document index of tokens ``start`` to ``stop``.
        num_tokens: of the store.
        token: index in the store.
        context: at most so many on either side.
    """
    start, stop = max(0, token - context), min(num_tokens, token + context + 1)
    documents = read_documents(start, stop)
    # Documents are contiguous, so those of the same index are one run around the token.
    same = np.flatnonzero(documents == documents[token - start])
    return start + int(same[0]), start + int(same[-1]) + 1


def read_snippets(
    store: ActivationStore,
    top: TopActivations,
    selected: Int[np.ndarray, "selected"],
    encode: Encode,
    *,
    context: int,
) -> dict[int, list[Snippet]]:
    """Read and encode the text around the strongest activations of the selected latents.

    Args:
        store: where the tokens are from.
        top: strongest activations, in the order of ``selected``.
        selected: the latents.
        encode: gives the codes of any tokens' activations.
        context: tokens shown before and after, at most.

    Returns:
        Latent -> snippets, strongest first.

    Raises:
        StoreError: if a file is damaged.
    """
    peaks = to_host(top.tokens)
    ranges = {
        token: context_range(store.documents, store.num_tokens, token, context)
        for token in np.unique(peaks[peaks >= 0]).tolist()
    }
    if not ranges:
        return {int(latent): [] for latent in selected}
    wanted = np.unique(np.concatenate([np.arange(start, stop) for start, stop in ranges.values()]))
    codes = encode(store.read_rows(wanted), selected)
    vocabulary = store.vocabulary()

    def snippet(place: int, token: int) -> Snippet:
        start, stop = ranges[token]
        rows = np.searchsorted(wanted, np.arange(start, stop))
        return _snippet(store, vocabulary, start, token, codes[rows, place])

    return {
        int(latent): [snippet(place, int(token)) for token in peaks[place] if token >= 0]
        for place, latent in enumerate(selected)
    }


def _snippet(
    store: ActivationStore,
    vocabulary: Mapping[int, bytes],
    start: int,
    token: int,
    activations: Float[np.ndarray, "token"],
) -> Snippet:
    texts = decode_tokens(store.tokens(start, start + len(activations)), vocabulary)
    peak = token - start
    if not texts[peak]:
        # The peak is on part of a character: show the character here, so that there is something to mark.
        whole = next((i for i in range(peak, len(texts)) if texts[i]), peak)
        texts[peak], texts[whole] = texts[whole], texts[peak]
    return Snippet(
        tokens=tuple(texts),
        activations=tuple(round(float(value), 4) for value in activations),
        peak=peak,
        value=float(activations[peak]),
        document=int(store.documents(token, token + 1)[0]),
        position=int(store.positions(token, token + 1)[0]),
        label=store.manifest.labels[int(store.labels(token, token + 1)[0])],
    )
