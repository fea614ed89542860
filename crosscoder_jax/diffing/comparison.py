"""Where two models' decoders are compared: in the raw space of what the store holds, if they reach it."""

import dataclasses

from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.sources import Sources
from crosscoder_jax.typing import DecoderWeights, PerWidth


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Raw decoders and the sources they write to."""

    sources: Sources
    w_dec: DecoderWeights
    b_dec: PerWidth
    is_stored_space: bool
    """Whether ``sources`` are all those of the store, in its order."""

    @property
    def is_pair(self) -> bool:
        """Whether two models are compared."""
        return len(self.sources) == 2

    @property
    def why_no_scaling(self) -> str:
        """Why Latent Scaling does not apply; empty if it does."""
        if not self.is_pair:
            return f"it compares two sources, and there are {len(self.sources)}"
        if self.sources.widths[0] != self.sources.widths[1]:
            return f"the sources have different widths, {self.sources.widths}"
        return ""


def comparison(crosscoder: Crosscoder, stored: Sources) -> Comparison:
    """Return the decoders in the space where the models are compared, raw activation units.

    A crosscoder that reads a basis of the stored sources, such as before and after - before, is
    compared as before and after: its decoders are carried back. One that reads a combination
    alone, such as a difference, keeps its own space.

    Args:
        crosscoder: with its normaliser.
        stored: the sources of the store.
    """
    own = crosscoder.config.sources
    w_dec, b_dec = crosscoder.raw_decoder()
    if own.is_derived and len(own) == len(stored):
        try:
            bias = own.to_stored_decoder(b_dec[None], stored)[0]
            return Comparison(stored, own.to_stored_decoder(w_dec, stored), bias, is_stored_space=True)
        except ValueError:
            # Dependent combinations: there is no way back, so they are compared as they are.
            pass
    return Comparison(own, w_dec, b_dec, is_stored_space=False)
