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

    A crosscoder that reads a basis of stored sources, such as before and after - before, is
    compared as before and after: its decoders are carried back, whatever else the store holds. One
    that reads a combination alone, such as a difference, keeps its own space.

    Args:
        crosscoder: with its normaliser.
        stored: the sources of the store.

    Raises:
        ValueError: if the crosscoder reads two sources that are combined of stored ones and do not
            determine them: no decoder norm in them is that of a model; or the store lacks one of those.
    """
    own = crosscoder.config.sources
    w_dec, b_dec = crosscoder.raw_decoder()
    if not own.is_derived:
        return Comparison(own, w_dec, b_dec)
    made_of = own.made_of(stored)
    if own.is_basis_of(made_of):
        bias = own.to_stored_decoder(b_dec[None], made_of)[0]
        return Comparison(made_of, own.to_stored_decoder(w_dec, made_of), bias)
    if len(own) == 2:
        raise ValueError(
            f"sources {own.names} do not determine {made_of.names}, of which they are made, so their "
            "decoders compare no two models: train on a basis, such as before and after - before, or on one "
            "combination alone"
        )
    return Comparison(own, w_dec, b_dec)
