import pytest

from crosscoder_jax.diffing.config import DiffConfig


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": 0},
        {"num_groups": 1},
        {"snippet_context": -1},
        {"snippets_per_latent": 0},
        {"num_snippet_latents": -1},
        {"min_active_tokens": -1},
    ],
)
def test_config_refuses_nonsense(bad):
    (name, value), *_ = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value} must be at least {value + 1}"):
        DiffConfig(**bad)


def test_the_least_of_everything_is_accepted():
    least = {
        **{"batch_size": 1, "num_groups": 2, "num_snippet_latents": 0},
        **{"snippets_per_latent": 1, "snippet_context": 0, "min_active_tokens": 0},
    }
    config = DiffConfig(**least)
    assert {name: getattr(config, name) for name in least} == least


def test_the_published_limits_are_the_defaults():
    assert DiffConfig().limits == {"max_nu_error": 0.2, "max_nu_recon": 0.5}
