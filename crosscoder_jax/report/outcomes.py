"""What Latent Scaling says of latents that look exclusive: confirmed, refuted, or neither."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from crosscoder_jax.report.files import LatentTable
from crosscoder_jax.report.names import ARTEFACTS, CONFIRMED, NOT_TESTED, UNDETERMINED, VERDICTS


@dataclass(frozen=True)
class Outcomes:
    """How many latents of some that look exclusive have each verdict; the verdicts add up to all of them."""

    verdicts: Mapping[str, int]
    """Every one of `VERDICTS` -> number."""
    beyond: int | None
    """Confirmed latents whose 95 % intervals lie below the cut-offs as a whole; `None` in older tables."""

    @property
    def claimed(self) -> int:
        """Count all of them."""
        return sum(self.verdicts.values())

    @property
    def confirmed(self) -> int:
        """Count those that are really exclusive, as far as the estimates tell."""
        return self.verdicts[CONFIRMED]

    @property
    def refuted(self) -> int:
        """Count those that only look exclusive, because of the training loss."""
        return sum(self.verdicts[verdict] for verdict in ARTEFACTS)

    @property
    def undetermined(self) -> int:
        """Count those with too little evidence for either."""
        return self.verdicts[UNDETERMINED]

    @property
    def untested(self) -> int:
        """Count those of a diff without Latent Scaling."""
        return self.verdicts[NOT_TESTED]

    def __add__(self, other: "Outcomes") -> "Outcomes":
        is_known = self.beyond is not None and other.beyond is not None
        return Outcomes(
            {verdict: self.verdicts[verdict] + other.verdicts[verdict] for verdict in VERDICTS},
            (self.beyond or 0) + (other.beyond or 0) if is_known else None,
        )


def count_outcomes(latents: LatentTable, is_counted: np.ndarray) -> Outcomes:
    """Count the verdicts of the rows that are meant."""
    words = verdict_words(latents)
    return Outcomes(
        {verdict: int(np.sum(is_counted & (words == verdict))) for verdict in VERDICTS},
        int(np.sum(is_counted & is_beyond(latents) & (words == CONFIRMED)))
        if latents.has("is_beyond_interval")
        else None,
    )


def verdict_words(latents: LatentTable) -> np.ndarray:
    """Give each latent's verdict; one that is empty was not tested."""
    words = latents.words("verdict")
    return np.where(np.isin(words.astype(str), VERDICTS), words, NOT_TESTED)


def is_beyond(latents: LatentTable) -> np.ndarray:
    """Tell which latents' verdicts hold anywhere in the 95 % intervals of their ratios."""
    return latents.numbers("is_beyond_interval") == 1


def is_by_design(latents: LatentTable) -> np.ndarray:
    """Tell which latents a group of the recipe lets write to one model alone, whatever they hold."""
    return latents.numbers("by_design") == 1
