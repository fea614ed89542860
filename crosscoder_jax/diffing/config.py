"""How a crosscoder is diffed: cut-offs and sizes."""

import dataclasses

from crosscoder_jax.diffing.decoder_norms import Cutoffs
from crosscoder_jax.diffing.latent_scaling import MIN_ACTIVE_TOKENS, NUM_GROUPS
from crosscoder_jax.diffing.verdicts import MAX_NU_ERROR, MAX_NU_RECON


@dataclasses.dataclass(frozen=True)
class DiffConfig:
    """How a crosscoder is diffed.

    Raises:
        ValueError: if a number is out of range.
    """

    cutoffs: Cutoffs = Cutoffs()  # noqa: RUF009 - a frozen value
    """Where the classes end."""
    max_nu_error: float = MAX_NU_ERROR
    """An exclusive latent is confirmed below this ..."""
    max_nu_recon: float = MAX_NU_RECON
    """... and below this."""
    min_active_tokens: int = MIN_ACTIVE_TOKENS
    """A latent that fires on fewer held-out tokens has too little evidence."""
    num_groups: int = NUM_GROUPS
    """Groups of documents for the jackknife standard errors."""
    batch_size: int = 1024
    """Tokens per step; does not change the result."""
    num_snippet_latents: int = 24
    """Latents whose strongest snippets are kept; 0 for none, which saves the second pass."""
    snippets_per_latent: int = 6
    """Snippets of each."""
    snippet_context: int = 16
    """Tokens shown on either side of a peak, within its document."""
    is_one_snippet_per_document: bool = True
    """Keep only a document's strongest token, for variety."""

    @property
    def limits(self) -> dict[str, float]:
        """The cut-offs of Latent Scaling, named as :func:`~crosscoder_jax.diffing.verdicts.verdicts` does."""
        return {"max_nu_error": self.max_nu_error, "max_nu_recon": self.max_nu_recon}

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("num_groups", 2),
            ("num_snippet_latents", 0),
            ("snippets_per_latent", 1),
            ("snippet_context", 0),
            ("min_active_tokens", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
