"""From pre-activations to a sparse code: pure functions, each a small frozen dataclass with one call."""

from crosscoder_jax.sparsity.batch_top_k import BatchTopK as BatchTopK
from crosscoder_jax.sparsity.code_norms import CodeNorm as CodeNorm
from crosscoder_jax.sparsity.code_norms import Decoupled as Decoupled
from crosscoder_jax.sparsity.code_norms import MixedNorms as MixedNorms
from crosscoder_jax.sparsity.code_norms import NormOfConcatenation as NormOfConcatenation
from crosscoder_jax.sparsity.code_norms import SumOfNorms as SumOfNorms
from crosscoder_jax.sparsity.code_norms import Unweighted as Unweighted
from crosscoder_jax.sparsity.contract import SparsityContract as SparsityContract
from crosscoder_jax.sparsity.gated import Gate as Gate
from crosscoder_jax.sparsity.gated import Gated as Gated
from crosscoder_jax.sparsity.jump_relu import JumpReLU as JumpReLU
from crosscoder_jax.sparsity.relu import ReLU as ReLU
from crosscoder_jax.sparsity.selection import SparseCode as SparseCode
from crosscoder_jax.sparsity.selection import apply_threshold as apply_threshold
from crosscoder_jax.sparsity.selection import ranking_scores as ranking_scores
from crosscoder_jax.sparsity.selection import top_scores_cut as top_scores_cut
from crosscoder_jax.sparsity.selection import top_scores_per_row as top_scores_per_row
from crosscoder_jax.sparsity.top_k import TopK as TopK

Sparsity = BatchTopK | TopK | JumpReLU | Gated | ReLU
"""Every sparsity a crosscoder can be trained with; each keeps the :class:`SparsityContract`."""
