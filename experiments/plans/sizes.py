"""The runs that are planned for."""

import dataclasses

from crosscoder_jax.objectives import AuxK
from crosscoder_jax.planning import PlanConfig, Topology

MINDER = {"widths": (2304, 2304), "num_latents": 73_728, "k": 100.0}
"""Gemma 2 2B, arXiv 2504.02922."""
MILLION = {"widths": (4096, 4096), "num_latents": 1_048_576, "k": 128.0}
TEN_MILLION = {"widths": (4096, 4096), "num_latents": 10_485_760, "k": 128.0}
"""10^7 and what makes them a multiple of 2^20."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A run, its chips, and the splits worth trying."""

    product: str
    """What the chips are called where they are rented: v5p counts cores, two of which are a chip."""
    topology: str
    """Their shape."""
    run: dict[str, object]
    """Widths, latents and k."""
    batch_size: int
    """Tokens per step."""
    meshes: tuple[tuple[int, int], ...]
    """Shards of the batch and of the latents."""

    def config(self, *, is_reviving: bool) -> PlanConfig:
        """Return what to plan for, with AuxK or without."""
        return PlanConfig(
            topology=Topology.parse(self.topology),
            batch_size=self.batch_size,
            dtype="bfloat16",
            precision="default",
            aux_k_weight=AuxK.weight if is_reviving else 0.0,
            meshes=self.meshes,
            **self.run,  # pyright: ignore[reportArgumentType]
        )


SIZES = (
    Size("v5e-8", "v5e:2x4", MINDER, 2048, ((1, 8), (2, 4))),
    Size("v5e-8", "v5e:2x4", MINDER, 16_384, ((1, 8), (2, 4))),
    Size("v6e-8", "v6e:2x4", MINDER, 2048, ((1, 8), (2, 4))),
    Size("v6e-8", "v6e:2x4", MINDER, 32_768, ((1, 8), (2, 4))),
    Size("v5p-128", "v5p:4x4x4", MILLION, 65_536, ((4, 16), (8, 8))),
    Size("v5e-256", "v5e:16x16", MILLION, 65_536, ((4, 64), (8, 32))),
    Size("v5p-64", "v5p:2x4x4", TEN_MILLION, 4096, ((1, 32),)),
    Size("v5e-256", "v5e:16x16", TEN_MILLION, 16_384, ((1, 256), (2, 128))),
)
