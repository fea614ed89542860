"""The crosscoder: one sparse code shared by all sources, one decoder per source."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from crosscoder_jax.groups import LatentGroup, Layout
from crosscoder_jax.sharding import Shardings
from crosscoder_jax.sources import Sources
from crosscoder_jax.sparsity import (
    BatchTopK,
    CodeNorm,
    Decoupled,
    Gate,
    Gated,
    JumpReLU,
    ReLU,
    SparseCode,
    Sparsity,
    SumOfNorms,
    TopK,
    Unweighted,
)
from crosscoder_jax.typing import (
    Acts,
    Code,
    Count,
    DecoderWeights,
    Latents,
    PerLatent,
    PerWidth,
    PRNGKey,
    ScoreWeights,
    Threshold,
)

Precision = Literal["default", "high", "highest"]


@dataclasses.dataclass(frozen=True)
class CrosscoderConfig:
    """Shape and rules of a crosscoder.

    Raises:
        ValueError: if a size is not positive, the dtype cannot be computed in, the sparsity cannot
            rank latents in each source on its own, or the groups do not fit latents and sources.
    """

    sources: Sources
    """What is read and reconstructed, in this order on the width axis."""
    num_latents: int
    """Size of the dictionary."""
    sparsity: Sparsity = BatchTopK(k=100.0)
    """How the code is made sparse in training; 100 per token is the published recipe."""
    code_norm: CodeNorm = SumOfNorms()
    """How latents are weighed against each other when they are ranked."""
    groups: tuple[LatentGroup, ...] = ()
    """Latents under rules of their own, in this order on the latent axis; those of no group come last."""
    dtype: str = "float32"
    """What encoder and decoder products are computed in: float32 or bfloat16, which accumulate in float32
    and have float32 weights, or float64 for everything but the threshold; that needs ``jax_enable_x64``.
    Of the gradients' products one side stays float32: bfloat16 speeds up two of the five of a step."""
    precision: Precision = "highest"
    """Precision of float32 products; "default" means bf16 passes on TPU and TF32 on GPU."""

    def __post_init__(self) -> None:
        if self.num_latents <= 0:
            raise ValueError(f"num_latents={self.num_latents} must be positive")
        if self.dtype not in ("float32", "bfloat16", "float64"):
            raise ValueError(f"dtype={self.dtype!r} must be 'float32', 'bfloat16' or 'float64'")
        if self.precision not in ("default", "high", "highest"):
            raise ValueError(f"precision={self.precision!r} must be 'default', 'high' or 'highest'")
        _ = self.layout  # groups that fit neither latents nor sources are refused
        if self.is_decoupled and isinstance(self.sparsity, ReLU | Gated):
            raise ValueError(
                f"code_norm=Decoupled() with sparsity={self.sparsity} would give every source the same code: "
                "use SumOfNorms()"
            )
        if self.is_decoupled and isinstance(self.sparsity, JumpReLU):
            raise ValueError(
                "code_norm=Decoupled() ranks latents in every source, and JumpReLU() has one threshold for a "
                "latent: use SumOfNorms()"
            )
        self._check_budgets()

    def _check_budgets(self) -> None:
        for budget in self.layout.budgets:
            if budget.k is None:
                continue
            if not isinstance(self.sparsity, BatchTopK | TopK):
                raise ValueError(
                    f"k={budget.k} of group {budget.name!r} with sparsity={self.sparsity}, which has no k: "
                    "use BatchTopK, or leave the group's k out"
                )
            if self.is_decoupled:
                raise ValueError(
                    f"k={budget.k} of group {budget.name!r} with code_norm=Decoupled(), which ranks latents "
                    "in every source: use SumOfNorms()"
                )
            self.sparsity.with_k(budget.k)  # what the sparsity cannot keep is refused

    @property
    def threshold_names(self) -> tuple[str, ...]:
        """Whose the thresholds are: of each source or of each budget of latents; empty if there is one."""
        if self.is_decoupled:
            return self.sources.names
        return tuple(budget.name for budget in self.layout.budgets)

    @property
    def param_dtype(self) -> str:
        """What weights, the normaliser and sums are kept in: float32, or float64 if ``dtype`` is."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def layout(self) -> Layout:
        """Where the groups lie on the latent axis."""
        return Layout(self.groups, self.sources, self.num_latents)

    @property
    def rule_parameters(self) -> tuple[str, ...]:
        """Names of what the sparsity learns, one number per latent each."""
        if isinstance(self.sparsity, Gated):
            return Gate._fields
        return ("latent_threshold",) if isinstance(self.sparsity, JumpReLU) else ()

    @property
    def is_decoupled(self) -> bool:
        """Whether each source has a code and a threshold of its own."""
        return isinstance(self.code_norm, Decoupled)


RULE_PARAMETERS = ("latent_threshold", *Gate._fields)
"""All that any sparsity learns; a crosscoder has those that its own does, and ``None`` for the others."""


class Fixed(nnx.Variable):
    """Part of a crosscoder that no gradient changes: the normaliser and the threshold."""


class Crosscoder(nnx.Module):
    """Encode activations of all sources into one sparse code and decode it for each source.

    ``normalised = (acts - mean) * scale`` happens inside, so users give and get raw activations.
    Weights are in normalised units; :meth:`raw_decoder` and :func:`fold_normalization` give raw ones.

    Args:
        config: shape and rules.
        key: for the initial directions.
        decoder_norm: L2 norm of each latent's decoder in each source, normalised units.
        mean: raw activation units; zero if not given.
        scale: what each source's centred activations are multiplied by; one if not given.
        shardings: where the tensors live; give the layout of the mesh that is set.

    Raises:
        ValueError: if the mean or the scale does not fit the sources, or the dtype is float64 and
            ``jax_enable_x64`` is off.

    The initial encoder is the transposed decoder, and sources of one width start from the same
    directions, so that no latent begins as belonging to one source.

    References:
        Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders; Minder et al. 2025,
        arXiv 2504.02922.

    Examples:
        >>> from crosscoder_jax.sources import Source, Sources
        >>> config = CrosscoderConfig(Sources((Source("base", 8), Source("chat", 8))), num_latents=32)
        >>> crosscoder = Crosscoder(config, key=jax.random.key(0))
        >>> recon = crosscoder(jnp.ones((4, 16)))
        >>> recon.shape
        (4, 16)
    """

    def __init__(
        self,
        config: CrosscoderConfig,
        *,
        key: PRNGKey,
        decoder_norm: float = 1.0,
        mean: PerWidth | np.ndarray | None = None,
        scale: Float[Array, "source"] | np.ndarray | None = None,
        shardings: Shardings = Shardings(),
    ) -> None:
        sources, dtype = config.sources, config.param_dtype
        _check_x64(config)
        _check_shape("mean", mean, (sources.width,))
        _check_shape("scale", scale, (len(sources),))
        w_dec = initial_decoder(config, key=key, decoder_norm=decoder_norm, shardings=shardings)
        thresholds = (len(config.threshold_names),) if config.threshold_names else ()
        zeros = jnp.zeros((config.num_latents,), dtype, out_sharding=shardings.per_latent_l)
        self.config = nnx.static(config)
        self.shardings = nnx.static(shardings)
        self.w_enc = nnx.Param(w_dec.T)
        self.b_enc = nnx.Param(zeros)
        self.w_dec = nnx.Param(w_dec)
        self.b_dec = nnx.Param(jnp.zeros((sources.width,), dtype))
        self.mean = Fixed(jnp.zeros((sources.width,), dtype) if mean is None else jnp.asarray(mean, dtype))
        self.scale = Fixed(jnp.ones((len(sources),), dtype) if scale is None else jnp.asarray(scale, dtype))
        self.threshold = Fixed(jnp.zeros(thresholds, jnp.float32))
        self.latent_threshold = self.log_gain = self.shift = nnx.data(None)
        if isinstance(config.sparsity, JumpReLU):
            self.latent_threshold = nnx.Param(zeros + config.sparsity.initial_threshold)
        if isinstance(config.sparsity, Gated):
            self.log_gain, self.shift = nnx.Param(zeros), nnx.Param(zeros)
        self.constrain()
        self.equalise_norms()

    def constrain(self) -> None:
        """Put encoder and decoder, or gradients in their place, where the groups allow them, in place."""
        layout = self.config.layout
        if layout.groups:
            self.w_enc[...] = layout.constrain_encoder(self.w_enc[...], self.shardings)
            self.w_dec[...] = layout.constrain_decoder(self.w_dec[...], self.shardings)

    def equalise_norms(self) -> None:
        """Bring the decoders of latents whose norms are tied to one norm for all sources, in place."""
        self.w_dec[...] = self.config.layout.equalise_norms(self.w_dec[...], self.shardings)

    def normalize(self, acts: Acts) -> Acts:
        """Return ``(acts - mean) * scale`` in the weights' dtype from raw activations."""
        centred = acts.astype(self.config.param_dtype) - self.mean[...]
        return centred * self.config.sources.per_source(self.scale[...])

    def denormalize(self, normalized: Acts) -> Acts:
        """Return raw activations from normalised ones.

        The exact way back; the code behind arXiv 2504.02922 adds 1e-8 to the scale here and not before.
        """
        return normalized / self.config.sources.per_source(self.scale[...]) + self.mean[...]

    def pre_acts(self, normalized: Acts) -> Latents:
        """Return the encoder's output before the sparsity from *normalised* activations."""
        return self._matmul(normalized, self.w_enc[...], self.shardings.code_bl) + self.b_enc[...]

    def decode_normalized(self, code: Code) -> Acts:
        """Return the reconstruction in *normalised* units."""
        return self.decode_without_bias(code) + self.b_dec[...]

    def decode_without_bias(self, code: Code) -> Acts:
        """Return the sum of the code's decoders in *normalised* units."""
        if code.ndim == 2:
            return self._matmul(code, self.w_dec[...], self.shardings.acts_bw)
        decoders = self.config.sources.split(self.w_dec[...])
        parts = [self._matmul(code[:, s], part, self.shardings.acts_bw) for s, part in enumerate(decoders)]
        return jnp.concatenate(parts, axis=-1)

    def decoder_norms(self) -> Float[Array, "source latent"]:
        """Return each latent's decoder norm in each source, *normalised* units."""
        return self.config.sources.norms(self.w_dec[...])

    def code_norms(self) -> ScoreWeights:
        """Return how large a unit of each latent's activation is in what it writes, whatever its cost."""
        return self.config.code_norm(self.decoder_norms())

    def score_weights(self) -> ScoreWeights:
        """Return what each latent's activation is multiplied by for ranking: its norms over its cost."""
        weights = self.code_norms()
        return weights / self._costs() if self.config.groups else weights

    def penalty_weights(self) -> ScoreWeights:
        """Return what an L1 penalty multiplies each latent's activation by: its norms times its cost."""
        weights = self.code_norms()
        return weights * self._costs() if self.config.groups else weights

    def _costs(self) -> PerLatent:
        return self.config.layout.costs(self.shardings)

    def training_code(
        self, pre_acts: Latents, *, step: Count | int | None = None, threshold: Threshold | None = None
    ) -> SparseCode:
        """Return the code of a batch at the training rule.

        Args:
            pre_acts: from :meth:`pre_acts`.
            step: training step; ``None`` stands for the end of training.
            threshold: the running one; saves passes, changes nothing.
        """
        if self.config.layout.budgets:
            return self._training_code_by_budget(pre_acts, step, threshold)

        def select(weights: Array, rule: Any) -> tuple[Array, Array]:
            sparse = self.config.sparsity(pre_acts, weights, step=step, threshold=rule)
            return sparse.code, sparse.smallest_score

        rule = self._rule(threshold)
        if self.config.is_decoupled:
            of_rule = None if rule is None else 0
            select = jax.vmap(select, in_axes=(0, of_rule), out_axes=(1, 0))
        return SparseCode(*select(self.score_weights(), rule))

    def inference_code(self, pre_acts: Latents, *, threshold: Threshold | None = None) -> Code:
        """Return the code at the inference rule from :meth:`pre_acts`.

        Args:
            pre_acts: in normalised units.
            threshold: another than the crosscoder's own.
        """
        threshold = self.threshold[...] if threshold is None else threshold
        if self.config.layout.budgets:
            return self._inference_code_by_budget(pre_acts, threshold)
        select = self.config.sparsity.at_inference
        if self.config.is_decoupled:
            select = jax.vmap(select, in_axes=(None, 0, 0), out_axes=1)
        return select(pre_acts, self.score_weights(), self._rule(threshold))

    def _rule(self, threshold: Threshold | None) -> Any:
        """Return what the sparsity decides by: what it has learned, or else the one threshold."""
        learned = [getattr(self, name)[...] for name in self.config.rule_parameters]
        if isinstance(self.config.sparsity, Gated):
            return Gate(*learned)
        return learned[0] if learned else threshold

    def _training_code_by_budget(
        self, pre_acts: Latents, step: Count | int | None, threshold: Threshold | None
    ) -> SparseCode:
        weights, parts = self.score_weights(), []
        for number, (rule, own) in enumerate(self._budgets(pre_acts)):
            cut = None if threshold is None else threshold[number]
            parts.append(rule(own, weights, step=step, threshold=cut))
        code = functools.reduce(jnp.add, (part.code for part in parts))
        return SparseCode(code, jnp.stack([part.smallest_score for part in parts]))

    def _inference_code_by_budget(self, pre_acts: Latents, threshold: Threshold) -> Code:
        weights = self.score_weights()
        codes = (
            rule.at_inference(own, weights, threshold[number])
            for number, (rule, own) in enumerate(self._budgets(pre_acts))
        )
        return functools.reduce(jnp.add, codes)

    def _budgets(self, pre_acts: Latents) -> list[tuple[BatchTopK | TopK, Latents]]:
        """Return the rule of each budget and its pre-activations: 0, never kept, for other latents."""
        layout, sparsity = self.config.layout, self.config.sparsity
        assert isinstance(sparsity, BatchTopK | TopK)  # the config refuses others
        budget_of = layout.budget_of(self.shardings)
        return [
            (
                sparsity if budget.k is None else sparsity.with_k(budget.k),
                jnp.where(budget_of == number, pre_acts, jnp.zeros_like(pre_acts)),
            )
            for number, budget in enumerate(layout.budgets)
        ]

    def encode(self, acts: Acts) -> Code:
        """Return the inference code of raw activations, zero where a score is not above the threshold.

        A token's code does not depend on the other tokens.
        """
        return self.inference_code(self.pre_acts(self.normalize(acts)))

    def decode(self, code: Code) -> Acts:
        """Return the reconstruction in raw activation units."""
        return self.denormalize(self.decode_normalized(code))

    def __call__(self, acts: Acts) -> Acts:
        """Return the reconstruction of raw activations from their inference code."""
        return self.decode(self.encode(acts))

    def held(self) -> "Crosscoder":
        """Return the same crosscoder held still: no gradient reaches its parameters."""
        graphdef, state = nnx.split(self)
        return nnx.merge(graphdef, jax.tree.map(lax.stop_gradient, state))

    def raw_decoder(self) -> tuple[DecoderWeights, PerWidth]:
        """Return decoder and bias in raw activation units: ``decode(f) = f @ w_dec + b_dec``."""
        scale = self.config.sources.per_source(self.scale[...])
        return self.w_dec[...] / scale, self.b_dec[...] / scale + self.mean[...]

    def _matmul(self, left: Array, right: Array, out_sharding: jax.P | None) -> Array:
        dtype = jnp.dtype(self.config.dtype)
        return jnp.einsum(
            "ij,jk->ik",
            left.astype(dtype),
            right.astype(dtype),
            precision=lax.Precision(self.config.precision),
            preferred_element_type=self.config.param_dtype,
            out_sharding=out_sharding,
        )


def _check_x64(config: CrosscoderConfig) -> None:
    if config.dtype == "float64" and jnp.zeros(()).dtype != jnp.float64:
        raise ValueError(
            "dtype='float64' needs 64-bit floats, which JAX has switched off: set JAX_ENABLE_X64=1 or call "
            "jax.config.update('jax_enable_x64', True) first"
        )


def _check_shape(name: str, value: Array | np.ndarray | None, expected: tuple[int, ...]) -> None:
    if value is not None and value.shape != expected:
        raise ValueError(f"{name} has shape {value.shape}, but the sources need {expected}")


def require_one_code(crosscoder: Crosscoder, what: str) -> None:
    """Refuse a crosscoder in which each source has its own code.

    Raises:
        ValueError: naming ``what`` asked.
    """
    if crosscoder.config.is_decoupled:
        raise ValueError(
            f"{what} needs one code for all sources, and code_norm=Decoupled() gives each its own: "
            "use a crosscoder with another code norm, or crosscoder.encode for the codes themselves"
        )


def initial_decoder(
    config: CrosscoderConfig, *, key: PRNGKey, decoder_norm: float, shardings: Shardings
) -> DecoderWeights:
    """Draw isotropic decoder directions of one norm; sources of equal width share theirs.

    (The code behind arXiv 2504.02922 draws from a cube and shares directions on request.)
    """

    def draw(source_key: PRNGKey, width: int) -> Array:
        shape = (config.num_latents, width)
        rows = jax.random.normal(source_key, shape, config.param_dtype, out_sharding=shardings.w_dec_lw)
        return decoder_norm * rows / jnp.linalg.norm(rows, axis=1, keepdims=True)

    return jnp.concatenate([draw(jax.random.fold_in(key, w), w) for w in config.sources.widths], axis=1)


def fold_normalization(crosscoder: Crosscoder) -> Crosscoder:
    """Return the same crosscoder with weights for raw activations and no normaliser.

    Scores of the folded crosscoder are its activations as they are: each latent's code is
    multiplied by its score weight and its decoder divided by it, so that one scalar threshold
    stays exact although the sources were scaled differently. Reconstructions are equal; codes are
    ``code * score_weights`` of the original. With the code norm ``Decoupled`` each source has its own
    threshold, which is divided by the source's scale as its decoder norms are, and codes stay equal.
    Latents of groups keep what they read and write; their costs are in the codes, and decoders that were
    tied are so no longer, as sources differ in scale.
    A bfloat16 crosscoder computes in float32 once folded, and any at highest precision, because raw
    activations, whose means can be far larger than what varies, do not survive bfloat16, be it in passes.
    """
    is_decoupled = crosscoder.config.is_decoupled
    weights = jnp.ones_like(crosscoder.b_enc[...]) if is_decoupled else crosscoder.score_weights()
    # A latent with zero decoders reconstructs nothing: its weight is 0 and it must stay silent.
    safe = jnp.where(weights > 0, weights, 1.0)
    scale = crosscoder.config.sources.per_source(crosscoder.scale[...])
    w_enc = crosscoder.w_enc[...] * scale[:, None]
    shift = jnp.matmul(crosscoder.mean[...] * scale, crosscoder.w_enc[...], precision=lax.Precision.HIGHEST)
    b_enc = crosscoder.b_enc[...] - shift
    w_dec, b_dec = crosscoder.raw_decoder()
    code_norm = Decoupled() if is_decoupled else Unweighted()
    dtype = crosscoder.config.param_dtype
    groups = tuple(
        dataclasses.replace(group, is_tied=False, is_norm_tied=False, cost=1.0)
        for group in crosscoder.config.groups
    )
    config = dataclasses.replace(
        crosscoder.config, code_norm=code_norm, groups=groups, dtype=dtype, precision="highest"
    )
    folded = nnx.eval_shape(lambda: Crosscoder(config, key=jax.random.key(0), shardings=crosscoder.shardings))
    folded.w_enc = nnx.Param(w_enc * weights)
    folded.b_enc = nnx.Param(b_enc * weights)
    folded.w_dec = nnx.Param(w_dec / safe[:, None])
    folded.b_dec = nnx.Param(b_dec)
    folded.mean = Fixed(jnp.zeros_like(crosscoder.mean[...]))
    folded.scale = Fixed(jnp.ones_like(crosscoder.scale[...]))
    threshold = crosscoder.threshold[...]
    folded.threshold = Fixed(threshold / crosscoder.scale[...] if is_decoupled else threshold)
    for name in crosscoder.config.rule_parameters:
        learned = getattr(crosscoder, name)
        # A gate's shift is in units of activations; the others are of scores, or of nothing.
        setattr(folded, name, nnx.Param(learned[...] * weights) if name == "shift" else learned)
    return folded
