"""Crosscoders in JAX: which concepts belong to one of two language models only.

The names here are what research code needs. Rooms that need more than numpy, jax, flax and optax
(the store, the language models, the report) are imported when first touched.
"""

from typing import TYPE_CHECKING

from crosscoder_jax.crosscoder import Crosscoder as Crosscoder
from crosscoder_jax.crosscoder import CrosscoderConfig as CrosscoderConfig
from crosscoder_jax.crosscoder import fold_normalization as fold_normalization
from crosscoder_jax.diffing import classify_latents as classify_latents
from crosscoder_jax.diffing import decoder_cosine as decoder_cosine
from crosscoder_jax.diffing import decoder_norms as decoder_norms
from crosscoder_jax.diffing import delta_norm as delta_norm
from crosscoder_jax.diffing import latent_scaling as latent_scaling
from crosscoder_jax.groups import LatentGroup as LatentGroup
from crosscoder_jax.groups import causal_groups as causal_groups
from crosscoder_jax.groups import exclusive_groups as exclusive_groups
from crosscoder_jax.lazy import lazy_members
from crosscoder_jax.metrics import explained_variance as explained_variance
from crosscoder_jax.metrics import l0 as l0
from crosscoder_jax.metrics import reconstruction_sums as reconstruction_sums
from crosscoder_jax.objectives import AuxK as AuxK
from crosscoder_jax.objectives import DeltaLoss as DeltaLoss
from crosscoder_jax.objectives import ErrorNorm as ErrorNorm
from crosscoder_jax.objectives import L0Penalty as L0Penalty
from crosscoder_jax.objectives import L1OfNorms as L1OfNorms
from crosscoder_jax.objectives import Matryoshka as Matryoshka
from crosscoder_jax.objectives import MeanSquaredError as MeanSquaredError
from crosscoder_jax.objectives import SquaredError as SquaredError
from crosscoder_jax.sharding import Shardings as Shardings
from crosscoder_jax.sharding import make_mesh as make_mesh
from crosscoder_jax.sources import Source as Source
from crosscoder_jax.sources import Sources as Sources
from crosscoder_jax.sources import difference as difference
from crosscoder_jax.sparsity import BatchTopK as BatchTopK
from crosscoder_jax.sparsity import Decoupled as Decoupled
from crosscoder_jax.sparsity import Gated as Gated
from crosscoder_jax.sparsity import JumpReLU as JumpReLU
from crosscoder_jax.sparsity import MixedNorms as MixedNorms
from crosscoder_jax.sparsity import NormOfConcatenation as NormOfConcatenation
from crosscoder_jax.sparsity import ReLU as ReLU
from crosscoder_jax.sparsity import SumOfNorms as SumOfNorms
from crosscoder_jax.sparsity import TopK as TopK
from crosscoder_jax.sparsity import Unweighted as Unweighted
from crosscoder_jax.training.adam import Adam as Adam
from crosscoder_jax.training.config import TrainConfig as TrainConfig
from crosscoder_jax.training.laws import CorrectedThreshold as CorrectedThreshold
from crosscoder_jax.training.laws import DelayedThreshold as DelayedThreshold
from crosscoder_jax.training.laws import MeanNorm as MeanNorm
from crosscoder_jax.training.laws import Resampling as Resampling
from crosscoder_jax.training.laws import RootMeanSquareNorm as RootMeanSquareNorm
from crosscoder_jax.training.laws import WarmStart as WarmStart
from crosscoder_jax.training.muon import Muon as Muon
from crosscoder_jax.training.state import TrainState as TrainState
from crosscoder_jax.training.state import init_state as init_state
from crosscoder_jax.training.step import eval_step as eval_step
from crosscoder_jax.training.step import train_step as train_step

if TYPE_CHECKING:
    from crosscoder_jax.activations.store import ActivationStore as ActivationStore
    from crosscoder_jax.interop.formats import load as load
    from crosscoder_jax.interop.formats import save as save
    from crosscoder_jax.interop.hub import push_to_hub as push_to_hub

__getattr__, __dir__ = lazy_members(
    __name__,
    {
        "ActivationStore": "activations.store",
        "load": "interop.formats",
        "push_to_hub": "interop.hub",
        "save": "interop.formats",
    },
)
