"""Which chips a plan is for: ``v5p:4x4x8``, ``v5e:16x16``, ``8xH100-80GB`` or ``cpu:8``."""

import dataclasses
import difflib
import math
import re
from typing import Literal

from crosscoder_jax.planning.chips import CHIPS, Chip

_EXAMPLES = "v5p:4x4x8, v5e:16x16, v6e:2x4, 8xH100-80GB or cpu:8"
_DIMENSIONS = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}
_CORES_NAMED = {"v4", "v5p"}
"""TPUs whose product names, such as v5p-128, count cores, of which a chip has two."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that are wired to each other, here or not."""

    name: str
    """As it was given."""
    platform: Literal["tpu", "gpu", "cpu"]
    """Which compiler it needs."""
    num_chips: int
    """All together; each is one device of the mesh."""
    chip: Chip | None
    """What each of them is; ``None`` for CPU devices, which share the memory of a machine."""

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Read a topology.

        Raises:
            ValueError: if it is none, naming what comes nearest.

        Examples:
            >>> Topology.parse("v5p:4x4x8").num_chips
            128
        """
        text = text.strip()
        if found := re.fullmatch(r"(\d+)x([A-Za-z][\w-]*)", text):
            return cls(text, "gpu", _positive(text, found[1]), _gpu(text, found[2]))
        kind, colon, shape = text.partition(":")
        if kind == "cpu" and re.fullmatch(r"\d+", shape):
            return cls(text, "cpu", _positive(text, shape), None)
        if kind in _DIMENSIONS:
            return cls(text, "tpu", _tpu_chips(text, kind, shape), CHIPS[kind])
        if product := re.fullmatch(r"(v4|v5p|v5e|v6e)-(\d+)", text):
            raise ValueError(_name_shape(text, product[1], int(product[2])))
        close = difflib.get_close_matches(kind, [*CHIPS, "cpu"], n=1) if colon else []
        hint = f", perhaps {close[0]!r}" if close else ""
        raise ValueError(f"topology={text!r} is not known{hint}: write it as {_EXAMPLES}")


def _gpu(text: str, name: str) -> Chip:
    known = {chip.name.lower(): chip for chip in CHIPS.values() if chip.clock_hz is None}
    if name.lower() not in known:
        names = ", ".join(chip.name for chip in known.values())
        raise ValueError(f"topology={text!r} names no GPU that is known: use one of {names}")
    return known[name.lower()]


def _tpu_chips(text: str, kind: str, shape: str) -> int:
    dimensions = _DIMENSIONS[kind]
    pattern = r"\d+" + r"x\d+" * (dimensions - 1)
    if not re.fullmatch(pattern, shape):
        example = f"{kind}:" + "x".join(["4"] * dimensions)
        raise ValueError(
            f"topology={text!r}: chips of {kind} are wired in {dimensions} dimensions: write {example}"
        )
    return math.prod(_positive(text, size) for size in shape.split("x"))


def _positive(text: str, number: str) -> int:
    if int(number) < 1:
        raise ValueError(f"topology={text!r} has no chip: every number in it must be at least 1")
    return int(number)


def _name_shape(text: str, kind: str, number: int) -> str:
    chips = number // 2 if kind in _CORES_NAMED else number
    counted = f"cores, {chips} chips" if kind in _CORES_NAMED else "chips"
    example = "4x4x4" if _DIMENSIONS[kind] == 3 else "2x4"
    return (
        f"topology={text!r} is a product name, which counts {counted}, and does not tell how they are wired: "
        f"write the shape, such as {kind}:{example}"
    )
