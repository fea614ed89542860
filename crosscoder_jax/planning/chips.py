"""What one chip of each kind holds and does at most, as its maker publishes it."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator; peaks are the maker's, which no program reaches."""

    name: str
    """As in a topology, such as ``v5p``."""
    memory_bytes: int
    """High-bandwidth memory."""
    peak_flops: float
    """bfloat16 operations per second, multiplications and additions both counted."""
    memory_bytes_per_s: float
    """Of its own memory."""
    link_bytes_per_s: float
    """To the other chips, over all its links together."""
    per_host: int
    """Chips of one host."""
    clock_hz: float | None = None
    """Of a TPU, in whose cycles its compiler estimates; ``None`` where no compiler does."""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1228e9, 300e9, 4, 1.05e9),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9, 4, 1.5e9),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9, 4, 1.75e9),
        Chip("v6e", 32 * GIB, 918e12, 1640e9, 448e9, 4, 1.75e9),
        Chip("A100-40GB", 40 * 10**9, 312e12, 1555e9, 600e9, 8),
        Chip("A100-80GB", 80 * 10**9, 312e12, 2039e9, 600e9, 8),
        Chip("H100-80GB", 80 * 10**9, 989e12, 3350e9, 900e9, 8),
        Chip("H200-141GB", 141 * 10**9, 989e12, 4800e9, 900e9, 8),
        Chip("B200-180GB", 180 * 10**9, 2250e12, 7700e9, 1800e9, 8),
    )
}
"""By name. TPUs: cloud.google.com/tpu/docs/system-architecture-tpu-vm; GPUs: NVIDIA's data sheets, dense
bfloat16 of the SXM modules. The clock of a TPU is its peak over what its matrix units do in a cycle."""
