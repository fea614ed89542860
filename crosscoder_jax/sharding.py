"""Meshes with the axes ``data`` and ``latent``, one PartitionSpec per tensor, and several processes."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array, Int, Shaped

HEARTBEAT_SECONDS = 20
"""Without a sign of life for so long a process counts as dead, and all others end."""
_SHUTDOWN_SECONDS = 60
_TELLABLE = (ValueError, OSError)
"""Mistakes of the user and of the disk, which one process tells the others."""


def start_processes(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join this process with the others of a run; call it before anything touches a device.

    What is not given is taken from the environment variables ``JAX_COORDINATOR_ADDRESS``,
    ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, and what is not there either JAX finds out by itself on TPU
    pods, under Slurm, Open MPI and other launchers that it knows. When a process dies, all others end within
    half a minute: start the same command again.

    Args:
        coordinator: ``host:port`` of the first process.
        num_processes: of the run.
        process_id: of this one, from 0.

    Raises:
        ValueError: if something is missing that JAX does not find, or a number is none.
    """
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
            _number("JAX_NUM_PROCESSES") if num_processes is None else num_processes,
            _number("JAX_PROCESS_ID") if process_id is None else process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            f"coordinator={coordinator}, num_processes={num_processes}, process_id={process_id}: {error} "
            "Under a launcher that JAX does not know give all three, or set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def _number(name: str) -> int | None:
    given = os.environ.get(name)
    if given is not None and not given.isdecimal():
        raise ValueError(f"{name}={given!r} must be a number: set it to one, or unset it")
    return None if given is None else int(given)


def is_first_process() -> bool:
    """Tell whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def from_first(make: Callable[[], bytes]) -> bytes:
    """Return on every process what the first one makes; all of them must call this.

    Raises:
        ValueError: if the first process cannot make it, on all of them; or an OSError on the first.
    """
    if jax.process_count() == 1:
        return make()
    made, error = b"", None
    if is_first_process():
        try:
            made = make()
        except _TELLABLE as refused:
            made, error = str(refused).encode(), refused
    told = np.array([error is not None, len(made)], np.int32)
    has_failed, length = (int(number) for number in multihost_utils.broadcast_one_to_all(told))
    padded = np.frombuffer(made, np.uint8) if is_first_process() else np.zeros(length, np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes() if length else b""
    if error is not None:
        raise error
    if has_failed:
        raise ValueError(received.decode())
    return received


def to_host(values: np.ndarray | Array) -> Shaped[np.ndarray, "..."]:
    """Return an array on the host, whole.

    Where it is spread over several processes all of them must call this; it is handed on shard by shard, so
    that no device holds more than one besides its own.
    """
    if isinstance(values, np.ndarray) or values.is_fully_addressable or values.is_fully_replicated:
        return np.array(values)
    whole = np.empty(values.shape, values.dtype)
    owners = {}
    for device, index in values.sharding.devices_indices_map(values.shape).items():
        owner = owners.setdefault(_bounds(index), device)
        if device.process_index < owner.process_index:
            owners[_bounds(index)] = device
    ours = {_bounds(shard.index): shard for shard in values.addressable_shards}
    for bounds in sorted(owners):
        index = tuple(slice(*ends) for ends in bounds)
        is_source = owners[bounds].process_index == jax.process_index()
        piece = np.array(ours[bounds].data) if is_source else np.empty_like(whole[index])
        # As bytes, which are added to zeros exactly: minus zero, NaN and every type stay what they are.
        flat = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        received = np.asarray(multihost_utils.broadcast_one_to_all(flat, is_source=is_source))
        whole[index] = received.view(values.dtype).reshape(piece.shape)
    return whole


def _bounds(index: tuple[slice, ...]) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((part.start or 0, part.stop) for part in index)


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
    moments_wl: P | None = None
    """Of the optimiser's moments of the encoder."""
    moments_lw: P | None = None
    """Of those of the decoder."""

    @classmethod
    def data_latent(
        cls, data: str = "data", latent: str = "latent", *, is_optimizer_spread: bool = False
    ) -> "Shardings":
        """Return the layout of this package on an explicit mesh with these axis names.

        Args:
            data: axis of the tokens.
            latent: axis of the latents.
            is_optimizer_spread: whether the moments of encoder and decoder are spread over the data, too, by
                their width.
        """
        of_moments = data if is_optimizer_spread else None
        return cls(
            moments_wl=P(of_moments, latent),
            moments_lw=P(latent, of_moments),
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
    def for_mesh(cls, mesh: Mesh | None, *, is_optimizer_spread: bool = False) -> "Shardings":
        """Return the layout for ``mesh``, or no constraints without one."""
        return cls() if mesh is None else cls.data_latent(is_optimizer_spread=is_optimizer_spread)


def make_mesh(data: int, latent: int) -> Mesh:
    """Make an explicit mesh of ``data * latent`` devices.

    Args:
        data: number of shards of the tokens of a batch.
        latent: number of shards of the latents.

    Raises:
        ValueError: if there are fewer devices, a process of the run would have none of them, or they are
            wired in another shape.
    """
    available = jax.device_count()
    if data < 1 or latent < 1 or data * latent > available:
        raise ValueError(
            f"data={data} x latent={latent} needs {data * latent} devices, and there are {available}: "
            "choose a smaller mesh"
        )
    devices = jax.devices()[: data * latent]
    if idle := set(range(jax.process_count())) - {device.process_index for device in devices}:
        raise ValueError(
            f"data={data} x latent={latent} leaves the processes {sorted(idle)} of {jax.process_count()} "
            f"without a device: spread over all {available} devices, or start fewer processes"
        )
    return mesh_of(jax.devices(), data, latent)


def mesh_of(devices: Sequence[Any], data: int, latent: int) -> Mesh:
    """Make an explicit mesh of the first ``data * latent`` of some devices, which need not be here.

    Raises:
        ValueError: as :func:`device_array`.
    """
    placed = device_array(devices, data, latent)
    return Mesh(placed, ("data", "latent"), axis_types=(AxisType.Explicit,) * 2)


def device_array(devices: Sequence[Any], data: int, latent: int) -> Shaped[np.ndarray, "data latent"]:
    """Return the first ``data * latent`` of some devices as their mesh has them.

    On TPU neighbours in the mesh are chips that are wired to each other, as far as that goes: where a
    dimension of the wiring must be divided between both axes it is, which ``jax.make_mesh`` refuses on
    v5p and v6e.

    Args:
        devices: in the order in which JAX lists them.
        data: number of shards of the tokens of a batch.
        latent: number of shards of the latents.

    Raises:
        ValueError: if these devices are no block of the wiring, or of several TPU slices, naming meshes that
            can be made.
    """
    placed = _wired(devices[: data * latent], data, latent)
    if placed is None:
        raise ValueError(
            f"data={data} x latent={latent}: the first {data * latent} of {len(devices)} TPU chips are no "
            f"block of one slice's wiring: {_meshes_of_all(devices)}"
        )
    return placed


def _wired(devices: Sequence[Any], data: int, latent: int) -> np.ndarray | None:
    # Of GPUs JAX calls each host a slice, and their order is right on any number of them.
    is_tpu = devices[0].platform == "tpu"
    if is_tpu and len({getattr(device, "slice_index", None) for device in devices}) > 1:
        return None
    try:
        return mesh_utils.create_device_mesh((data, latent), devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):
        return None


def _meshes_of_all(devices: Sequence[Any]) -> str:
    splits = [(data, len(devices) // data) for data in range(1, len(devices) + 1) if len(devices) % data == 0]
    made = [f"{data}x{latent}" for data, latent in splits if _wired(devices, data, latent) is not None]
    return f"use {', '.join(made)}" if made else "start on the chips of one slice"


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[object]:
    """Set the mesh for a block, or nothing without one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def place(values: np.ndarray | Array, spec: P | None) -> Array:
    """Put host data where the mesh that is set wants it, or on the default device without one.

    Every process of a run gives the same data, of which its devices take what they hold.
    """
    if spec is None:
        return jnp.asarray(values)
    if jax.process_count() == 1:
        return jax.device_put(values, spec)
    host, sharding = np.asarray(values), NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@dataclasses.dataclass(frozen=True, eq=False)
class BatchShare:
    """What the devices of this process hold of every batch."""

    batch_size: int
    """Tokens of the batch, over all processes."""
    mesh: Mesh | None
    """Whose axis ``data`` the tokens are spread over; one device without it."""

    @property
    def rows(self) -> Int[np.ndarray, "rows"]:
        """The rows of the batch, in ascending order."""
        if self.mesh is None:
            return np.arange(self.batch_size)
        held = NamedSharding(self.mesh, P("data")).addressable_devices_indices_map((self.batch_size,))
        return np.unique(np.concatenate([np.arange(self.batch_size)[index] for index in held.values()]))

    def place(self, acts: Shaped[np.ndarray, "rows width"]) -> Array:
        """Make the global batch ``[batch, width]`` from the rows that every process holds."""
        if self.mesh is None:
            return jnp.asarray(acts)
        rows, sharding = self.rows, NamedSharding(self.mesh, P("data", None))

        def held(index: Any) -> np.ndarray:
            start = int(np.searchsorted(rows, index[0].start or 0))
            stop = self.batch_size if index[0].stop is None else index[0].stop
            return acts[start : start + stop - (index[0].start or 0)]

        return jax.make_array_from_callback((self.batch_size, acts.shape[1]), sharding, held)


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
