"""What the tables call classes and verdicts, in the order in which the page shows them."""

from crosscoder_jax.diffing.decoder_norms import LatentClass
from crosscoder_jax.diffing.verdicts import Verdict

BASE_ONLY = LatentClass.BASE_ONLY.label
SHARED = LatentClass.SHARED.label
CHAT_ONLY = LatentClass.CHAT_ONLY.label
OTHER = LatentClass.OTHER.label
DEAD = LatentClass.DEAD.label

CLASSES = tuple(latent_class.label for latent_class in LatentClass)
EXCLUSIVE_CLASSES = (CHAT_ONLY, BASE_ONLY)
"""What is new in the chat model comes first."""

CONFIRMED = Verdict.CONFIRMED.value
SHRINKAGE = Verdict.SHRINKAGE.value
DECOUPLING = Verdict.DECOUPLING.value
BOTH = Verdict.BOTH.value
UNDETERMINED = Verdict.UNDETERMINED.value
ARTEFACTS = tuple(verdict.value for verdict in Verdict if verdict.is_artefact)
"""Verdicts that refute a claim."""
NOT_TESTED = "not tested"
"""What the page says of a claimed latent of a diff without Latent Scaling, which has no verdict."""

VERDICTS = (*(verdict.value for verdict in Verdict if verdict is not Verdict.NONE), NOT_TESTED)
