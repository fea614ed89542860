"""The page's names are the tables' names, in its own order."""

from crosscoder_jax.diffing import Verdict
from crosscoder_jax.report import names
from crosscoder_jax.report.palette import CLASS_COLOURS, VERDICT_COLOURS, VERDICT_SYMBOLS


def test_classes_and_verdicts_as_the_page_shows_them():
    assert names.CLASSES == ("base-only", "shared", "chat-only", "other", "dead")
    assert names.EXCLUSIVE_CLASSES == ("chat-only", "base-only")
    assert names.VERDICTS == (
        "confirmed",
        "complete shrinkage",
        "latent decoupling",
        "shrinkage and decoupling",
        "undetermined",
        "not tested",
    )


def test_every_verdict_of_the_diff_and_every_class_has_its_colour():
    assert tuple(CLASS_COLOURS) == names.CLASSES
    assert tuple(VERDICT_COLOURS) == tuple(VERDICT_SYMBOLS) == names.VERDICTS
    assert {str(verdict) for verdict in Verdict if verdict} < set(VERDICT_COLOURS)
