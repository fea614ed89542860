"""The activation store on disk: write, read, verify, split, and batches in a fixed order.

What reads and writes arrays needs TensorStore and is imported when first touched.
"""

from typing import TYPE_CHECKING

from crosscoder_jax.activations.atomic import read_json as read_json
from crosscoder_jax.activations.atomic import write_bytes_atomically as write_bytes_atomically
from crosscoder_jax.activations.atomic import write_json_atomically as write_json_atomically
from crosscoder_jax.activations.manifest import Manifest as Manifest
from crosscoder_jax.activations.manifest import StoredSource as StoredSource
from crosscoder_jax.activations.manifest import StoreError as StoreError
from crosscoder_jax.activations.manifest import describe_differences as describe_differences
from crosscoder_jax.activations.schedule import BatchSchedule as BatchSchedule
from crosscoder_jax.activations.statistics import SourceStatistics as SourceStatistics
from crosscoder_jax.lazy import lazy_members

if TYPE_CHECKING:
    from crosscoder_jax.activations.batches import Batches as Batches
    from crosscoder_jax.activations.batches import StoredBatch as StoredBatch
    from crosscoder_jax.activations.batches import sequential_batches as sequential_batches
    from crosscoder_jax.activations.nulls import NullStore as NullStore
    from crosscoder_jax.activations.nulls import SameModel as SameModel
    from crosscoder_jax.activations.nulls import SwapCoordinates as SwapCoordinates
    from crosscoder_jax.activations.nulls import SwapDocuments as SwapDocuments
    from crosscoder_jax.activations.split import Split as Split
    from crosscoder_jax.activations.store import ActivationStore as ActivationStore
    from crosscoder_jax.activations.view import TokenView as TokenView
    from crosscoder_jax.activations.view import spread_sample as spread_sample
    from crosscoder_jax.activations.writer import StoreWriter as StoreWriter

__getattr__, __dir__ = lazy_members(
    __name__,
    {
        "Batches": "batches",
        "StoredBatch": "batches",
        "sequential_batches": "batches",
        "NullStore": "nulls",
        "SameModel": "nulls",
        "SwapCoordinates": "nulls",
        "SwapDocuments": "nulls",
        "Split": "split",
        "ActivationStore": "store",
        "TokenView": "view",
        "spread_sample": "view",
        "StoreWriter": "writer",
    },
)
