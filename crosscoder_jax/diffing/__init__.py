"""Pure analysis of a crosscoder: decoder norms and classes, Latent Scaling, evidence, one table."""

from crosscoder_jax.diffing.decoder_norms import Cutoffs as Cutoffs
from crosscoder_jax.diffing.decoder_norms import LatentClass as LatentClass
from crosscoder_jax.diffing.decoder_norms import class_labels as class_labels
from crosscoder_jax.diffing.decoder_norms import classify_latents as classify_latents
from crosscoder_jax.diffing.decoder_norms import decoder_cosine as decoder_cosine
from crosscoder_jax.diffing.decoder_norms import decoder_norms as decoder_norms
from crosscoder_jax.diffing.decoder_norms import delta_norm as delta_norm
from crosscoder_jax.diffing.latent_scaling import LatentScaling as LatentScaling
from crosscoder_jax.diffing.latent_scaling import ScalingSums as ScalingSums
from crosscoder_jax.diffing.latent_scaling import finalize_scaling as finalize_scaling
from crosscoder_jax.diffing.latent_scaling import init_scaling as init_scaling
from crosscoder_jax.diffing.latent_scaling import jackknife_groups as jackknife_groups
from crosscoder_jax.diffing.latent_scaling import latent_scaling as latent_scaling
from crosscoder_jax.diffing.latent_scaling import scaling_decoders as scaling_decoders
from crosscoder_jax.diffing.latent_scaling import update_scaling as update_scaling
from crosscoder_jax.diffing.verdicts import Verdict as Verdict
from crosscoder_jax.diffing.verdicts import verdicts as verdicts
