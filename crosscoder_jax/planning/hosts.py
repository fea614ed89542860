"""What of every batch the hosts of a mesh read."""

import dataclasses

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Hosts:
    """How hosts share the rows of a batch: those that differ only along the latents read the same ones."""

    number: int
    """All together."""
    data_shards: int
    """Shards of the data that chips of one host hold, of the host that holds most."""
    lanes: int
    """The least ``--lanes`` with which no host reads more than the rows that it holds."""

    @classmethod
    def of(cls, processes: Int[np.ndarray, "data latent"]) -> "Hosts":
        """Return how the hosts of a mesh share a batch.

        Args:
            processes: the number of the host that each chip belongs to.

        Examples:
            >>> Hosts.of(np.array([[0, 0, 1, 1], [2, 2, 3, 3]]))
            Hosts(number=4, data_shards=1, lanes=2)
        """
        data = len(processes)
        held = [np.flatnonzero(np.any(processes == host, axis=1)) for host in np.unique(processes)]
        lanes = next(
            number
            for number in range(1, data + 1)
            if data % number == 0 and all(_is_all_read_held(shards, data // number) for shards in held)
        )
        return cls(len(held), max(len(shards) for shards in held), lanes)


def _is_all_read_held(shards: Int[np.ndarray, "held"], shards_of_lane: int) -> bool:
    """Tell whether a host holds all shards of every lane that it must read."""
    return len(np.unique(shards // shards_of_lane)) * shards_of_lane == len(shards)
