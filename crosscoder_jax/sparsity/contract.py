"""What every sparsity can do, said once."""

from typing import Any, Protocol

from jaxtyping import Array, Int

from crosscoder_jax.sparsity.selection import SparseCode
from crosscoder_jax.typing import Latents, PerLatent


class SparsityContract(Protocol):
    """From pre-activations to a sparse code, in training and at inference.

    A latent's *score* is ``relu(pre) * weight``, by which latents are ranked and compared with thresholds.
    Every sparsity takes all arguments, so that a crosscoder need not know which one it has, and ignores
    those that play no part in it.
    """

    def __call__(
        self,
        pre_acts: Latents,
        score_weights: PerLatent,
        *,
        step: Int[Array, ""] | int | None = None,
        threshold: Any = None,
    ) -> SparseCode:
        """Return the code of a batch in training, and its smallest kept score.

        The score is 0 where there is none to estimate a threshold from.

        Args:
            pre_acts: encoder outputs in normalised units.
            score_weights: what each latent's activation is multiplied by for ranking.
            step: training step, for what is annealed; the end of training by default.
            threshold: the running one, in units of scores; one, or one per latent.
        """
        ...

    def at_inference(self, pre_acts: Latents, score_weights: PerLatent, threshold: Any) -> Latents:
        """Return the code at inference, in which a token's code depends on that token alone.

        Args:
            pre_acts: encoder outputs in normalised units.
            score_weights: as in training.
            threshold: the cut on scores, float32; one, or one per latent.
        """
        ...
