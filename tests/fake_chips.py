"""TPU chips that are not here, as far as meshes of them go."""

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX asks of a device to make a mesh of it."""

    id: int
    coords: tuple[int, int, int]
    process_index: int = 0
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0


def block(*shape: int, slice_index: int = 0) -> list[Chip]:
    """Return the chips of a block of the wiring, x first, four neighbours a host."""
    places = itertools.product(*(range(size) for size in reversed(shape)))
    return [Chip(i, place[::-1], i // 4, slice_index) for i, place in enumerate(places)]
