"""Pure analysis of a crosscoder: decoder norms and classes, Latent Scaling, evidence, one table.

The functions on arrays need numpy and jax only; those that read a store, write files or need SciPy are
imported when first touched.
"""

from typing import TYPE_CHECKING

from crosscoder_jax.diffing.decoder_norms import Cutoffs as Cutoffs
from crosscoder_jax.diffing.decoder_norms import LatentClass as LatentClass
from crosscoder_jax.diffing.decoder_norms import class_labels as class_labels
from crosscoder_jax.diffing.decoder_norms import classify_latents as classify_latents
from crosscoder_jax.diffing.decoder_norms import decoder_cosine as decoder_cosine
from crosscoder_jax.diffing.decoder_norms import decoder_norms as decoder_norms
from crosscoder_jax.diffing.decoder_norms import delta_norm as delta_norm
from crosscoder_jax.diffing.documents import DocumentCounts as DocumentCounts
from crosscoder_jax.diffing.documents import init_documents as init_documents
from crosscoder_jax.diffing.documents import room_for_documents as room_for_documents
from crosscoder_jax.diffing.documents import update_documents as update_documents
from crosscoder_jax.diffing.evidence import ActivitySums as ActivitySums
from crosscoder_jax.diffing.evidence import TopActivations as TopActivations
from crosscoder_jax.diffing.evidence import finalize_activity as finalize_activity
from crosscoder_jax.diffing.evidence import init_activity as init_activity
from crosscoder_jax.diffing.evidence import init_top as init_top
from crosscoder_jax.diffing.evidence import update_activity as update_activity
from crosscoder_jax.diffing.evidence import update_top as update_top
from crosscoder_jax.diffing.interventions import decoder_change as decoder_change
from crosscoder_jax.diffing.interventions import patched_acts as patched_acts
from crosscoder_jax.diffing.latent_scaling import LatentScaling as LatentScaling
from crosscoder_jax.diffing.latent_scaling import ScalingSums as ScalingSums
from crosscoder_jax.diffing.latent_scaling import finalize_scaling as finalize_scaling
from crosscoder_jax.diffing.latent_scaling import init_scaling as init_scaling
from crosscoder_jax.diffing.latent_scaling import jackknife_groups as jackknife_groups
from crosscoder_jax.diffing.latent_scaling import latent_scaling as latent_scaling
from crosscoder_jax.diffing.latent_scaling import scaling_decoders as scaling_decoders
from crosscoder_jax.diffing.latent_scaling import update_scaling as update_scaling
from crosscoder_jax.diffing.trajectories import appearance as appearance
from crosscoder_jax.diffing.trajectories import turning as turning
from crosscoder_jax.diffing.verdicts import Verdict as Verdict
from crosscoder_jax.diffing.verdicts import verdicts as verdicts
from crosscoder_jax.lazy import lazy_members

if TYPE_CHECKING:
    from crosscoder_jax.diffing.config import DiffConfig as DiffConfig
    from crosscoder_jax.diffing.diff import diff_run as diff_run
    from crosscoder_jax.diffing.intervals import errors_in_half_interval as errors_in_half_interval
    from crosscoder_jax.diffing.intervals import is_beyond_interval as is_beyond_interval
    from crosscoder_jax.diffing.matching import Matches as Matches
    from crosscoder_jax.diffing.matching import Recurrence as Recurrence
    from crosscoder_jax.diffing.matching import match_latents as match_latents
    from crosscoder_jax.diffing.matching import matching_decoders as matching_decoders
    from crosscoder_jax.diffing.matching import recurrence as recurrence
    from crosscoder_jax.diffing.table import DiffResult as DiffResult
    from crosscoder_jax.diffing.table import write_diff as write_diff

__getattr__, __dir__ = lazy_members(
    __name__,
    {
        "DiffConfig": "config",
        "diff_run": "diff",
        "errors_in_half_interval": "intervals",
        "is_beyond_interval": "intervals",
        "Matches": "matching",
        "Recurrence": "matching",
        "match_latents": "matching",
        "matching_decoders": "matching",
        "recurrence": "matching",
        "DiffResult": "table",
        "write_diff": "table",
    },
)
