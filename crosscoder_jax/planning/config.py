"""What to plan for."""

import dataclasses
from typing import Literal

from crosscoder_jax.crosscoder import CrosscoderConfig, Precision
from crosscoder_jax.objectives import AuxK
from crosscoder_jax.planning.topology import Topology
from crosscoder_jax.sources import Source, Sources
from crosscoder_jax.sparsity import BatchTopK
from crosscoder_jax.training.adam import Adam
from crosscoder_jax.training.config import TrainConfig
from crosscoder_jax.training.muon import Muon

STORED_BYTES = {"bfloat16": 2, "float32": 4, "float16": 2}
"""Of one number on disk."""


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """A run and the chips to run it on.

    Raises:
        ValueError: if a size is not positive, the topology is not known, or a mesh is none.
    """

    topology: Topology
    """The chips."""
    widths: tuple[int, ...]
    """Of each source."""
    num_latents: int
    """Size of the dictionary."""
    k: float = 100.0
    """Mean number of active latents per token (BatchTopK)."""
    batch_size: int = 2048
    """Tokens per step, over all chips."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What encoder and decoder products are computed in."""
    precision: Precision = "highest"
    """Of products of which a side is float32; "default" is one pass in bfloat16 on TPU."""
    aux_k_weight: float = AuxK.weight
    """Weight of the loss that revives dead latents; 0 plans without."""
    optimizer: Adam | Muon = Adam()
    """Moments, and what they are kept in."""
    micro_batches: int = 1
    """Parts of a batch that are decoded one after the other."""
    is_rematerialized: bool = False
    """Whether codes are made anew for the backward pass."""
    pre_acts: Literal["full", "bfloat16"] = "full"
    """What the encoder's output is kept in."""
    is_optimizer_spread: bool = False
    """Whether moments are spread over the shards of the data, too."""
    meshes: tuple[tuple[int, int], ...] = ()
    """Splits to try, as shards of the data and of the latents; all that use every chip if empty."""
    stored_dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Of the activations on disk."""

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"sources={self.widths} must be the positive widths of at least one source")
        for name in ("num_latents", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for data, latent in self.meshes:
            if data < 1 or latent < 1 or data * latent > self.topology.num_chips:
                raise ValueError(
                    f"meshes={data}x{latent} needs {data * latent} chips, and {self.topology.name} has "
                    f"{self.topology.num_chips}: choose data x latent within that"
                )
            for size, name, shards in self._shared(data, latent):
                if size % shards:
                    raise ValueError(
                        f"meshes={data}x{latent}: {name}={size} does not spread over {shards} shards: use "
                        f"{size - size % shards or shards} or {size - size % shards + shards}"
                    )

    def _shared(self, data: int, latent: int) -> tuple[tuple[int, str, int], ...]:
        shared = [
            (self.num_latents, "num_latents", latent),
            (self.batch_size, "batch_size", data * self.micro_batches),
        ]
        if self.is_optimizer_spread:
            shared.append((sum(self.widths), "width of all sources", data))
        return tuple(shared)

    def recipe(self) -> TrainConfig:
        """Return the recipe whose step is compiled: that of ``train``, on sources of these widths.

        Raises:
            ValueError: if it makes no run.
        """
        sources = Sources(tuple(Source(f"source{i}", width) for i, width in enumerate(self.widths)))
        crosscoder = CrosscoderConfig(
            sources,
            self.num_latents,
            sparsity=BatchTopK(self.k),
            dtype=self.dtype,
            precision=self.precision,
        )
        aux_k = AuxK(self.aux_k_weight) if self.aux_k_weight else None
        return TrainConfig(
            crosscoder,
            num_steps=100_000,
            batch_size=self.batch_size,
            aux_k=aux_k,
            optimizer=self.optimizer,
            micro_batches=self.micro_batches,
            is_rematerialized=self.is_rematerialized,
            pre_acts=self.pre_acts,
        )

    def splits(self) -> tuple[tuple[int, int], ...]:
        """Return the meshes to try, as shards of the data and of the latents.

        Raises:
            ValueError: if batch and latents spread over the chips in no way.
        """
        if self.meshes:
            return self.meshes
        chips = self.topology.num_chips
        splits = tuple(
            (data, chips // data)
            for data in range(1, chips + 1)
            if chips % data == 0
            and all(size % shards == 0 for size, _, shards in self._shared(data, chips // data))
        )
        if not splits:
            raise ValueError(
                f"num_latents={self.num_latents} and batch_size={self.batch_size} spread over the {chips} "
                f"chips of {self.topology.name} in no way: make one of them a multiple of {chips}, such as "
                f"num_latents={-(-self.num_latents // chips) * chips}"
            )
        return splits
