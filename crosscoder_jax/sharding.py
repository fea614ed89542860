"""Meshes with the axes ``data`` and ``latent``, and one PartitionSpec per tensor."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.sharding import Mesh
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Shardings:
    """Where every tensor lives on the mesh; the default leaves all of them where they are.

    Field names say tensor and axes: b = batch, w = width, l = latent, g = group.
    Latents are spread over ``latent``, tokens over ``data``; no array with the latent axis is ever
    gathered. Without a mesh every field is ``None``, and the same code runs on one device.
    """

    acts_bw: P | None = None
    code_bl: P | None = None
    w_enc_wl: P | None = None
    w_dec_lw: P | None = None
    per_batch_b: P | None = None
    per_latent_l: P | None = None
    per_group_gl: P | None = None
    replicated: P | None = None

    @classmethod
    def data_latent(cls, data: str = "data", latent: str = "latent") -> "Shardings":
        """Return the layout of this package on an explicit mesh with these axis names."""
        return cls(
            acts_bw=P(data, None),
            code_bl=P(data, latent),
            w_enc_wl=P(None, latent),
            w_dec_lw=P(latent, None),
            per_batch_b=P(data),
            per_latent_l=P(latent),
            per_group_gl=P(None, latent),
            replicated=P(),
        )

    @classmethod
    def for_mesh(cls, mesh: Mesh | None) -> "Shardings":
        """Return the layout for ``mesh``, or no constraints without one."""
        return cls() if mesh is None else cls.data_latent()


def make_mesh(data: int, latent: int) -> Mesh:
    """Make an explicit mesh of ``data * latent`` devices.

    Args:
        data: number of shards of the tokens of a batch.
        latent: number of shards of the latents.

    Raises:
        ValueError: if there are fewer devices.
    """
    available = jax.device_count()
    if data < 1 or latent < 1 or data * latent > available:
        raise ValueError(
            f"data={data} x latent={latent} needs {data * latent} devices, and there are {available}: "
            "choose a smaller mesh"
        )
    return jax.make_mesh((data, latent), ("data", "latent"), devices=jax.devices()[: data * latent])


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[object]:
    """Set the mesh for a block, or nothing without one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def place(values: np.ndarray | Array, spec: P | None) -> Array:
    """Put host data where the mesh that is set wants it, or on the default device without one."""
    return jnp.asarray(values) if spec is None else jax.device_put(values, spec)


def reshard(values: Array, spec: P | None) -> Array:
    """Lay values out anew within a compiled function, or leave them without a mesh."""
    return values if spec is None else jax.reshard(values, spec)


def check_divisible(name: str, value: int, mesh: Mesh | None, axis: str) -> None:
    """Refuse a size that does not spread evenly over a mesh axis.

    Raises:
        ValueError: naming the size, the axis and the nearest sizes that fit.
    """
    shards = 1 if mesh is None else mesh.shape[axis]
    if value % shards:
        below, above = value - value % shards, value + shards - value % shards
        fits = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"{name}={value} must be divisible by the {axis!r} mesh axis (size {shards}): use {fits}"
        )
