"""What a report is made from."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReportConfig:
    """Say which runs a report shows and how much of each.

    Raises:
        ValueError: no run is given, the names do not match the runs, or a number of cards, snippets or
            tokens is not positive.
    """

    runs: tuple[Path, ...]
    """Run folders, the main crosscoder first; then a difference SAE and others to stand beside it."""
    title: str = "What changed between two language models"
    """Headline of the page."""
    names: tuple[str, ...] = ()
    """Display names of the runs in the same order; by default each is named after its method."""
    num_cards: int = 8
    """Latents shown with their snippets, per method and direction."""
    num_snippets: int = 5
    """Snippets shown on a card; further ones can be unfolded."""
    tokens_before: int = 28
    """Tokens shown before the peak of a snippet."""
    tokens_after: int = 14
    """Tokens shown after the peak of a snippet."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError(
                "runs=() names no run folder: give at least one that `crosscoder-jax diff` has read"
            )
        if self.names and len(self.names) != len(self.runs):
            raise ValueError(
                f"names={self.names!r} has {len(self.names)} names for {len(self.runs)} runs: give one each"
            )
        for field in ("num_cards", "num_snippets"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        for field in ("tokens_before", "tokens_after"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative")
