"""The training step on a mesh that need not be here: abstract arguments, lowered and compiled."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, use_abstract_mesh
from jax.stages import Compiled

from crosscoder_jax.sharding import Shardings
from crosscoder_jax.training.config import TrainConfig
from crosscoder_jax.training.state import TrainState, init_state
from crosscoder_jax.training.step import train_step

AXES = ("data", "latent")


def abstract_mesh(data: int, latent: int) -> AbstractMesh:
    """Return the explicit mesh of this package without devices."""
    return AbstractMesh((data, latent), AXES, axis_types=(AxisType.Explicit,) * 2)


def abstract_state(
    recipe: TrainConfig, mesh: AbstractMesh, *, is_optimizer_spread: bool = False
) -> TrainState:
    """Return the state that :func:`init_state` makes, as shapes with the shardings of the mesh."""
    shardings = Shardings.data_latent(*AXES, is_optimizer_spread=is_optimizer_spread)
    with use_abstract_mesh(mesh):
        return jax.eval_shape(functools.partial(init_state, recipe, shardings=shardings))


def compile_step(recipe: TrainConfig, mesh: Mesh, *, is_optimizer_spread: bool = False) -> Compiled:
    """Compile the function that training calls, for devices that need not be here.

    Args:
        recipe: compiled in.
        mesh: explicit, with the axes ``data`` and ``latent``.
        is_optimizer_spread: as in the options of a run.
    """

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, _spec(leaf)))

    shapes = abstract_state(recipe, mesh.abstract_mesh, is_optimizer_spread=is_optimizer_spread)
    state = jax.tree.map(placed, shapes)
    shape = (recipe.batch_size, recipe.crosscoder.sources.width)
    acts = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, jax.P("data", None)))
    with use_abstract_mesh(mesh.abstract_mesh):
        return train_step.trace(state, acts, config=recipe).lower().compile()


def _spec(leaf: jax.ShapeDtypeStruct) -> jax.P:
    sharding = leaf.sharding
    return sharding.spec if isinstance(sharding, NamedSharding) else jax.P()


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """The parts of a training state in bytes."""

    weights: int
    """Encoder, decoder, biases."""
    moments: int
    """Of the optimiser."""
    statistics: int
    """Normaliser, thresholds, counters of silence."""

    @property
    def total(self) -> int:
        """All of it: about what a checkpoint takes on disk."""
        return self.weights + self.moments + self.statistics


def state_bytes(state: TrainState, mesh: AbstractMesh) -> tuple[StateBytes, StateBytes]:
    """Return what a state takes on one chip, and altogether.

    Args:
        state: shapes, from :func:`abstract_state`.
        mesh: the same one.
    """

    def sizes(of_leaf: Callable[[jax.ShapeDtypeStruct], int]) -> StateBytes:
        total = _summed(state, of_leaf)
        weights, moments = _summed(state.params, of_leaf), _summed(state.opt_state, of_leaf)
        return StateBytes(weights, moments, total - weights - moments)

    return sizes(lambda leaf: _bytes(leaf) // _shards(leaf, mesh)), sizes(_bytes)


def _summed(tree: object, of_leaf: Callable[[jax.ShapeDtypeStruct], int]) -> int:
    return sum(of_leaf(leaf) for leaf in jax.tree.leaves(tree))


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    # A key has a dtype of its own, which numpy does not know; it is two numbers of 4 bytes.
    itemsize = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return math.prod(leaf.shape) * itemsize


def _shards(leaf: jax.ShapeDtypeStruct, mesh: AbstractMesh) -> int:
    names = [name for entry in _spec(leaf) for name in (entry if isinstance(entry, tuple) else (entry,))]
    return math.prod(mesh.shape[name] for name in names if name is not None)
