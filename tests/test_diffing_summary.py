import dataclasses

import jax.numpy as jnp
import numpy as np
from diffing_cases import pair, planted, two_model_columns, write_store

from crosscoder_jax.diffing.comparison import Comparison
from crosscoder_jax.diffing.config import DiffConfig
from crosscoder_jax.diffing.decoder_norms import Cutoffs
from crosscoder_jax.diffing.documents import init_documents
from crosscoder_jax.diffing.evidence import finalize_activity, init_activity
from crosscoder_jax.diffing.summary import class_summary, diff_summary
from crosscoder_jax.diffing.sums import DiffSums
from crosscoder_jax.sources import Source, Sources


def test_class_summary_by_hand():
    summary = class_summary(two_model_columns())
    assert summary["counts"] == {"base-only": 1, "shared": 1, "chat-only": 3, "other": 2, "dead": 1}
    assert (summary["claimed"], summary["confirmed"]) == (4, 2)
    assert summary["confirmed_by_class"] == {"base-only": 1, "chat-only": 1}
    assert summary["verdicts"]["undetermined"] == 1
    assert summary["verdicts"]["latent decoupling"] == 0
    assert summary["too_little_evidence"] == 3
    counts = summary["delta_norm_histogram"]["counts"]
    # Bins are 0.02 wide; 1.0 belongs to the last one, and the dead latent's 0.99 is not counted.
    assert (sum(counts), counts[2], counts[25], counts[49]) == (7, 1, 1, 1)


def test_what_is_exclusive_by_design_is_counted_apart():
    columns = two_model_columns()
    # One confirmed chat-only latent, an undecided one, and one that is dead.
    columns["by_design"] = np.isin(columns["latent"], [4, 6, 7])
    columns["is_beyond_interval"] = np.isin(columns["latent"], [1, 6])
    summary = class_summary(columns)
    assert summary["claimed_by_design"] == 2
    assert summary["by_design"] == {
        "counts": {"base-only": 0, "chat-only": 2},
        "confirmed_by_class": {"base-only": 0, "chat-only": 1},
    }
    assert summary["confirmed_beyond_interval"] == 1  # latent 1 is not confirmed, 2 not beyond


def test_without_verdicts_nothing_is_said_of_confirmation():
    columns = two_model_columns()
    del columns["verdict"]
    assert set(class_summary(columns)) == {"counts", "claimed", "delta_norm_histogram"}


def summarised(tmp_path, sources, **changes):
    """The summary of eight latents of which none was measured on any token."""
    acts, *_, documents, labels = planted(num_tokens=30)
    store = write_store(tmp_path / "store", acts, documents, labels)
    sums = DiffSums(init_activity(8, 2), init_documents(8), None)
    space = Comparison(sources, jnp.zeros((8, sources.width)), jnp.zeros(sources.width))
    return diff_summary(
        two_model_columns(), finalize_activity(sums.activity), sums, store, space, DiffConfig(**changes)
    )


def test_the_cutoffs_that_were_used_are_stated(tmp_path):
    cutoffs = Cutoffs(0.05, 0.3, 0.7, 0.95)
    changes = {"max_nu_error": 0.1, "max_nu_recon": 0.4, "min_active_tokens": 7, "num_groups": 5}
    summary = summarised(tmp_path, pair(8), cutoffs=cutoffs, **changes)
    assert summary["cutoffs"] == dataclasses.asdict(cutoffs) | {"max_nu_error": 0.1, "max_nu_recon": 0.4}
    assert summary["latent_scaling"] == {
        "is_done": True,
        "why_not": "",
        "min_active_tokens": 7,
        "num_groups": 5,
        "groups_with_tokens": 0,
    }
    assert (summary["num_latents"], summary["num_tokens"], summary["num_dead"]) == (8, 0, 8)
    assert summary["num_documents"] == 0
    assert summary["tokens_by_label"] == {"prose": 0, "novel": 0}
    assert summary["models"]["base"]["model"] == "org/base"


def test_of_one_source_no_classes_are_counted(tmp_path):
    summary = summarised(tmp_path, Sources((Source("difference", 8),)))
    assert summary["sources"] == ["difference"]
    assert not {"cutoffs", "latent_scaling", "counts", "claimed"} & set(summary)
