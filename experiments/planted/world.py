"""Paired activations with planted features: what a crosscoder should find is known exactly.

A token's activations in a model are the sum of the features that fire on it, each a direction times a
strength, and a little noise. Features differ in how the two models hold them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from crosscoder_jax.sources import Source, Sources

KINDS = ("same", "rotated", "rescaled", "weak in base", "split in base", "chat-only", "base-only")
SPLIT, CHAT_ONLY, BASE_ONLY = (KINDS.index(kind) for kind in ("split in base", "chat-only", "base-only"))


@dataclasses.dataclass(frozen=True)
class World:
    """How many features of each kind there are, and how they fire."""

    width: int = 128
    """Coordinates of each model."""
    num_same: int = 210
    """One direction, one strength in both models."""
    num_rotated: int = 80
    """Their direction in base is turned by ``angle`` from that in chat."""
    num_rescaled: int = 40
    """Half as strong in one of the models, every other one in base."""
    num_weak: int = 40
    """``weak_strength`` as strong in base as in chat: an L1 penalty may shrink base's decoder to nothing."""
    num_split: int = 40
    """One direction in chat, one of two in base, each ``angle`` from chat's: a chat-only latent and two
    base-only ones cost an L1 penalty as much as two shared latents."""
    num_exclusive: int = 51
    """In chat only, and as many in base only."""
    mean_l0: float = 10.0
    """Features that fire on a token, on average."""
    is_ranked: bool = True
    """Whether feature r of a ranking fires in proportion to 1 / (r + 10), kinds in random order; else all
    fire equally often."""
    exclusive_frequency: float | None = None
    """Share of tokens on which each exclusive feature fires; ``None`` treats them as the others."""
    exclusive_strength: float = 1.0
    """Strength of exclusive features next to that of the others."""
    num_topics: int = 1
    """Features belong to topics at random, and each token has one."""
    topic_boost: float = 1.0
    """How many times more often than on average a feature fires within its topic."""
    strength_spread: float = 0.5
    """Standard deviation of the logarithm of a firing feature's strength; the median is 1."""
    angle: float = 45.0
    """Degrees."""
    weak_strength: float = 0.3
    """Base's share of chat's strength."""
    chat_gain: float = 1.0
    """What every activation of chat is multiplied by."""
    noise: float = 0.02
    """Energy of the white noise as a share of that of the features."""

    def __post_init__(self) -> None:
        if not 1 <= self.topic_boost <= self.num_topics:
            raise ValueError(
                f"topic_boost={self.topic_boost} must lie between 1 and num_topics={self.num_topics}: "
                "outside their topic features would fire less than never"
            )

    @property
    def counts(self) -> tuple[int, ...]:
        """Features of each of the ``KINDS``."""
        shared = (self.num_same, self.num_rotated, self.num_rescaled, self.num_weak, self.num_split)
        return (*shared, self.num_exclusive, self.num_exclusive)

    @property
    def sources(self) -> Sources:
        """The two models."""
        return Sources((Source("base", self.width), Source("chat", self.width)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Truth:
    """The planted features; directions are scaled by the strength of the model."""

    base: Float[Array, "variant feature width"]
    """Directions in base: two variants, which differ for split features only."""
    chat: Float[Array, "feature width"]
    frequency: Float[Array, "feature"]
    """Share of the tokens on which each fires."""
    topic: Int[Array, "feature"]
    kind: Int[Array, "feature"]
    """Index into ``KINDS``."""


def plant(world: World, key: Key[Array, ""]) -> Truth:
    """Draw the features of a world."""
    num_features = sum(world.counts)
    kind = jnp.asarray(np.repeat(np.arange(len(KINDS)), world.counts))
    keys = jax.random.split(key, 5)
    chat = _unit(jax.random.normal(keys[0], (num_features, world.width)))
    turned = jnp.stack([_turn(chat, world.angle, k) for k in jax.random.split(keys[1])])
    is_turned = (kind == KINDS.index("rotated")) | (kind == SPLIT)
    # The two variants of a rotated feature are one and the same.
    variants = jnp.where((kind == SPLIT)[:, None], turned, turned[0])
    base = jnp.where(is_turned[:, None], variants, chat)
    strength = _strengths(world, kind)
    return Truth(
        base=base * strength[0][:, None],
        chat=chat * strength[1][:, None],
        frequency=_frequencies(world, kind, keys[2]),
        topic=jax.random.randint(keys[3], (num_features,), 0, world.num_topics),
        kind=kind,
    )


def sample(truth: Truth, key: Key[Array, ""], num_tokens: int, world: World) -> Float[Array, "token width"]:
    """Draw activations of both models, base first, on tokens that are independent of each other."""
    return sample_with_strengths(truth, key, num_tokens, world)[0]


def sample_with_strengths(
    truth: Truth, key: Key[Array, ""], num_tokens: int, world: World
) -> tuple[Float[Array, "token width"], Float[Array, "token feature"]]:
    """Draw activations as :func:`sample` does; return with them how strongly each feature fires."""
    keys = jax.random.split(key, 5)
    fires = _fires(truth, keys[0], num_tokens, world)
    spread = world.strength_spread * jax.random.normal(keys[1], fires.shape)
    strength = jnp.where(fires, jnp.exp(spread), 0.0)
    is_first = jax.random.bernoulli(keys[2], shape=fires.shape)
    base = (
        jnp.where(is_first, strength, 0.0) @ truth.base[0]
        + jnp.where(is_first, 0.0, strength) @ truth.base[1]
    )
    acts = jnp.concatenate([base, strength @ truth.chat], axis=1)
    energy = jnp.mean(jnp.square(acts))
    return acts + jnp.sqrt(world.noise * energy) * jax.random.normal(keys[3], acts.shape), strength


def _fires(truth: Truth, key: Array, num_tokens: int, world: World) -> Bool[Array, "token feature"]:
    topic_key, fire_key = jax.random.split(key)
    topic = jax.random.randint(topic_key, (num_tokens, 1), 0, world.num_topics)
    elsewhere = (world.num_topics - world.topic_boost) / max(world.num_topics - 1, 1)
    factor = jnp.where(topic == truth.topic, world.topic_boost, elsewhere)
    return jax.random.uniform(fire_key, (num_tokens, truth.kind.size)) < truth.frequency * factor


def _strengths(world: World, kind: Array) -> tuple[Array, Array]:
    """Return each feature's strength in base and in chat."""
    is_rescaled, is_even = kind == KINDS.index("rescaled"), jnp.arange(kind.size) % 2 == 0
    base = jnp.where(is_rescaled & is_even, 0.5, 1.0)
    base = jnp.where(kind == KINDS.index("weak in base"), world.weak_strength, base)
    chat = jnp.where(is_rescaled & ~is_even, 0.5, 1.0)
    base = jnp.where(kind == BASE_ONLY, world.exclusive_strength, base)
    chat = jnp.where(kind == CHAT_ONLY, world.exclusive_strength, chat)
    return jnp.where(kind == CHAT_ONLY, 0.0, base), world.chat_gain * jnp.where(kind == BASE_ONLY, 0.0, chat)


def _frequencies(world: World, kind: Array, key: Array) -> Array:
    weights = 1 / (jnp.arange(kind.size) + 10.0) if world.is_ranked else jnp.ones(kind.size)
    ranked = jax.random.permutation(key, weights)
    if world.exclusive_frequency is None:
        return world.mean_l0 * ranked / jnp.sum(ranked)
    is_exclusive = (kind == CHAT_ONLY) | (kind == BASE_ONLY)
    shared = jnp.where(is_exclusive, 0.0, ranked)
    left = world.mean_l0 - jnp.sum(is_exclusive) * world.exclusive_frequency
    return jnp.where(is_exclusive, world.exclusive_frequency, left * shared / jnp.sum(shared))


def _turn(directions: Array, degrees: float, key: Array) -> Array:
    """Turn each unit vector by an angle, each in a random plane."""
    other = jax.random.normal(key, directions.shape)
    other = _unit(other - jnp.sum(other * directions, axis=1, keepdims=True) * directions)
    radians = jnp.deg2rad(degrees)
    return jnp.cos(radians) * directions + jnp.sin(radians) * other


def _unit(rows: Array) -> Array:
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


_SMALL = World(
    width=64,
    num_same=53,
    num_rotated=20,
    num_rescaled=10,
    num_weak=10,
    num_split=10,
    num_exclusive=13,
    mean_l0=5.0,
)
WORLDS = {
    "small": _SMALL,
    "hard": dataclasses.replace(_SMALL, exclusive_frequency=0.005, num_topics=8, topic_boost=4.0),
    "reference": World(),
}
"""``reference`` has the size on which the reference library was measured; ``small`` is a quarter of it;
``hard`` is small with every exclusive feature rare and features that fire together."""

sample_jit = functools.partial(jax.jit, static_argnames=("num_tokens", "world"))(sample)
