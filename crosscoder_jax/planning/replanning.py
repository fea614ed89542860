"""The command that plans the same run anew, for the chips that are here."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from crosscoder_jax.planning.chips import CHIPS
from crosscoder_jax.planning.config import PlanConfig
from crosscoder_jax.training.muon import Muon

_UNKNOWN = "TOPOLOGY"
"""Stands in the command for what cannot be told, as FOLDER does elsewhere."""
_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
"""What JAX calls each kind."""


def options_of(config: PlanConfig) -> str:
    """Return the options of ``crosscoder-jax plan`` for a run, but the topology and the meshes to try."""
    optimizer = "muon" if isinstance(config.optimizer, Muon) else "adam"
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values |= {"sources": ",".join(map(str, config.widths)), "optimizer": optimizer}
    values |= {"first_moment": config.optimizer.first_moment}
    values |= {"second_moment": getattr(config.optimizer, "second_moment", "full")}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    defaults |= {"optimizer": "adam", "first_moment": "full", "second_moment": "full"}
    # The command has another default for the data type.
    needed = ("sources", "num_latents", "k", "batch_size", "dtype")
    left_out = ("topology", "widths", "meshes", *needed)
    names = [*needed, *(name for name in values if name not in left_out and values[name] != defaults[name])]
    return " ".join(_option(name, values[name]) for name in names)


def _option(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"


def topology_of(devices: Sequence[Any], hosts: int) -> str:
    """Return the topology of hosts that each have these devices, as ``plan`` takes it.

    Args:
        devices: of JAX, of one kind.
        hosts: that have as many.
    """
    kind, number = devices[0].device_kind, len(devices) * hosts
    if devices[0].platform == "cpu":
        return f"cpu:{number}"
    if devices[0].platform == "gpu":
        gpu = _gpu(kind)
        return _UNKNOWN if gpu is None else f"{number}x{gpu}"
    # Where other hosts' chips lie is not known here.
    if kind not in _TPU_KINDS or hosts > 1:
        return _UNKNOWN
    return f"{_TPU_KINDS[kind]}:{_shape(_TPU_KINDS[kind], devices)}"


def _gpu(kind: str) -> str | None:
    """Return the GPU that is meant: its model is in the name, and its memory where there are several."""
    names = [chip.name for chip in CHIPS.values() if chip.clock_hz is None]
    models = [name for name in names if name.split("-")[0] in kind]
    sized = [name for name in models if name.split("-")[1] in kind.replace(" ", "")]
    return next(iter(sized or models), None)


def _shape(kind: str, devices: Sequence[Any]) -> str:
    coords = [device.coords for device in devices]
    sizes = [max(axis) - min(axis) + 1 for axis in zip(*coords, strict=True)]
    return "x".join(map(str, sizes[: 3 if kind in ("v4", "v5p") else 2]))
