"""Model cards: front matter that is YAML, tables that hold what was recorded, and no markup from names."""

import re

import pytest
import yaml
from core_cases import random_crosscoder, two_sources

import crosscoder_jax as cc
from crosscoder_jax.configs import config_to_json
from crosscoder_jax.interop import model_card
from crosscoder_jax.training.config import TrainConfig

STORE = {
    "base": {"model": "org/model", "revision": "abc123", "hook_point": "blocks.13.resid_post"},
    "chat": {"model": "../tuned", "revision": None, "hook_point": "blocks.13.resid_post"},
}


def card(crosscoder=None, **changes):
    given = {"repo_id": "me/first", "provenance": {}, "metrics": {}}
    return model_card(crosscoder or random_crosscoder(), **(given | changes))


def front_matter(text):
    _, matter, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(matter), body


def rows(text, heading):
    """Cells of the table under a heading, escapes undone."""
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in lines]
    return [[re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in cells if row[0] != "---"]


def test_front_matter_is_yaml_with_licence_and_models_of_the_hub():
    matter, body = front_matter(card(provenance={"store": STORE}, license="mit"))
    assert matter["library_name"] == "crosscoder_jax"
    assert matter["license"] == "mit"
    # The other was a folder of somebody's machine.
    assert matter["base_model"] == ["org/model"]
    assert "crosscoder" in matter["tags"]
    assert body.startswith("\n\n# me/first\n")


def test_what_is_not_known_is_left_out():
    text = card()
    matter, _ = front_matter(text)
    assert not {"license", "base_model"} & set(matter)
    assert "## Recipe" not in text
    assert "## Metrics" not in text


def test_front_matter_cannot_be_broken_out_of():
    hostile = 'x"\n---\nlicense: stolen'
    store = {"base": {"model": hostile, "revision": hostile}}
    matter, _ = front_matter(card(provenance={"store": store}, license=hostile))
    assert matter["license"] == hostile
    assert matter["base_model"] == [hostile]


def test_sources_are_listed_with_what_was_recorded():
    text = card(provenance={"store": STORE})
    assert rows(text, "Sources") == [
        ["source", "width", "model", "revision", "hook point"],
        ["base", "3", "org/model", "abc123", "blocks.13.resid_post"],
        ["chat", "3", "../tuned", "", "blocks.13.resid_post"],
    ]
    assert "A crosscoder with 16 latents that reads base, chat." in text


def test_a_derived_source_shows_its_terms():
    sources = cc.Sources((cc.difference(cc.Source("chat", 4), cc.Source("base", 4)),))
    text = card(random_crosscoder(sources=sources))
    assert rows(text, "Sources")[1] == ["difference", "4", "+1 chat -1 base", "", ""]
    assert "A sparse autoencoder with 16 latents" in text


def test_config_and_recipe_are_shown_field_by_field():
    crosscoder = random_crosscoder(sparsity=cc.BatchTopK(k=3))
    recipe = TrainConfig(crosscoder=crosscoder.config, num_steps=40, batch_size=64, warmup_steps=4)
    text = card(crosscoder, provenance={"train": config_to_json(recipe)})
    shown = dict(rows(text, "Crosscoder"))
    assert shown["num_latents"] == "16"
    assert shown["sparsity"].startswith("BatchTopK(k=3, anneal_steps=0")
    assert shown["code_norm"] == "SumOfNorms"
    assert "sources" not in shown
    recorded = dict(rows(text, "Recipe"))
    assert recorded["num_steps"] == "40"
    assert recorded["loss"] == "ErrorNorm"
    assert set(recorded) == {"field", *config_to_json(recipe)} - {"type", "crosscoder"}


def test_metrics_are_shown_to_four_digits():
    text = card(metrics={"fve": 0.87654, "num_tokens": 1234567, "dead": 0.0})
    assert rows(text, "Metrics")[1:] == [["fve", "0.8765"], ["num_tokens", "1.235e+06"], ["dead", "0"]]


def test_the_example_loads_what_is_published():
    text = card(random_crosscoder(sources=two_sources(2, 5)))
    assert 'crosscoder = cc.load("me/first")' in text
    assert "[token, 7]" in text


@pytest.mark.parametrize(
    "name",
    ["<script>alert(1)</script>", "a | b", "[link](https://x.y)", "# head\n## Metrics", "`code`", "*b*"],
)
def test_names_show_as_they_are_and_are_never_markup(name):
    sources = cc.Sources((cc.Source(name, 3), cc.Source("chat", 3)))
    text = card(random_crosscoder(sources=sources), provenance={"store": {"chat": {"model": name}}})
    plain = " ".join(name.split())
    assert rows(text, "Sources")[1][0] == plain
    assert rows(text, "Sources")[2][2] == plain
    outside_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)[<`*\[]", outside_code.split("---\n\n", 1)[1])
    assert text.count("\n## ") == 2
