"""What a training run carries from step to step."""

import dataclasses
import functools
import typing
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Int, Key

from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.sharding import Shardings
from crosscoder_jax.training.config import TrainConfig
from crosscoder_jax.training.laws import RunningMean
from crosscoder_jax.training.optimizer import make_optimizer, spread_moments
from crosscoder_jax.typing import Threshold


class Held(NamedTuple):
    """The weights of a warm start that stay as they are: those of these latents in these sources."""

    latents: Bool[Array, "latent"]
    width: Bool[Array, "width"]


# JAX rebuilds the state with leaves that are no arrays (shapes, shardings, NumPy arrays), which
# runtime type checkers would refuse.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, optimiser and running statistics; a pytree, replaced and never changed."""

    step: Int[Array, ""]
    """Steps done."""
    params: nnx.State
    """Weights and biases of the crosscoder, float32 (float64 in float64), normalised units."""
    fixed: nnx.State
    """Its normaliser (and the threshold it began with)."""
    opt_state: optax.OptState
    """The optimiser's moments."""
    running_threshold: RunningMean
    """Of the smallest kept scores."""
    tokens_since_fired: Int[Array, "latent"]
    """Tokens seen since each latent last fired in a training batch."""
    key: Key[Array, ""]
    """Randomness for steps that need any."""
    held: Held | None
    """Of a frozen warm start; else ``None``."""
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    """Structure of the crosscoder."""

    @property
    def threshold(self) -> Threshold:
        """The running inference threshold, in units of scores; 0 before the first step."""
        return self.running_threshold.value

    def crosscoder(self) -> Crosscoder:
        """Return the crosscoder as it stands, with the running threshold.

        It shares the state's arrays: use it before the next step, which donates them.
        """
        crosscoder = nnx.merge(self.graphdef, self.params, self.fixed, copy=True)
        crosscoder.threshold[...] = self.threshold
        return crosscoder


def init_state(
    config: TrainConfig,
    *,
    mean: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    b_dec: np.ndarray | None = None,
    shardings: Shardings = Shardings(),
) -> TrainState:
    """Make the state before the first step, every array created where it will live.

    Args:
        config: the recipe.
        mean: of each coordinate, raw activation units; see :func:`data_statistics`.
        scale: factor of each source after centring.
        b_dec: initial decoder bias, normalised units.
        shardings: layout of the mesh that is set.

    Raises:
        ValueError: if an array has another shape than the sources need, or the recipe's dtype is float64 and
            JAX has 64-bit floats switched off.
    """
    width, num_sources = config.crosscoder.sources.width, len(config.crosscoder.sources)
    dtype = config.crosscoder.param_dtype
    mean = np.zeros(width, dtype) if mean is None else np.asarray(mean, dtype)
    scale = np.ones(num_sources, dtype) if scale is None else np.asarray(scale, dtype)
    b_dec = np.zeros(width, dtype) if b_dec is None else np.asarray(b_dec, dtype)
    unseeded = config.without_seeds()
    return _make_state(jax.random.key(config.seed), mean, scale, b_dec, config=unseeded, shardings=shardings)


@functools.partial(jax.jit, static_argnames=("config", "shardings"))
def _make_state(
    key: Array, mean: Array, scale: Array, b_dec: Array, *, config: TrainConfig, shardings: Shardings
) -> TrainState:
    init_key, step_key = jax.random.split(key)
    crosscoder = Crosscoder(
        config.crosscoder,
        key=init_key,
        decoder_norm=config.decoder_norm,
        mean=mean,
        scale=scale,
        shardings=shardings,
    )
    crosscoder.b_dec[...] = b_dec
    graphdef, params, fixed = nnx.split(crosscoder, nnx.Param, ...)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        fixed=fixed,
        opt_state=spread_moments(make_optimizer(config).init(params), shardings),
        running_threshold=RunningMean(*(jnp.zeros_like(crosscoder.threshold[...]) for _ in range(2))),
        tokens_since_fired=jnp.zeros_like(crosscoder.b_enc[...], dtype=jnp.int32),
        key=step_key,
        held=_nothing_held(crosscoder) if config.start is not None and config.start.is_frozen else None,
        graphdef=graphdef,
    )


def _nothing_held(crosscoder: Crosscoder) -> Held:
    return Held(*(jnp.zeros_like(one[...], dtype=bool) for one in (crosscoder.b_enc, crosscoder.b_dec)))
