"""What the tests of the core modules share: small crosscoders, meshes, golden weights and HLO."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import crosscoder_jax as cc
from experiments.parity.golden import concatenated, golden_crosscoder, read, tensors

MESHES = [(1, 8), (8, 1), (2, 4)]
"""(data, latent) shards of the eight devices."""
PARAMETERS = ("w_enc", "b_enc", "w_dec", "b_dec")
VARIABLES = (*PARAMETERS, "mean", "scale", "threshold")


NO_MESH = cc.Shardings()


def two_sources(base=3, chat=3):
    return cc.Sources((cc.Source("base", base), cc.Source("chat", chat)))


def config(sources=None, num_latents=16, **changes):
    return cc.CrosscoderConfig(sources or two_sources(), num_latents=num_latents, **changes)


def random_crosscoder(seed=0, *, shardings=NO_MESH, threshold=0.0, **changes):
    """A crosscoder in which nothing is zero, one or tied; nothing is compiled to make it."""
    the_config = config(**changes)
    crosscoder = nnx.eval_shape(lambda: cc.Crosscoder(the_config, key=jax.random.key(0), shardings=shardings))
    rng = np.random.default_rng(seed)
    places = [shardings.w_enc_wl, shardings.per_latent_l, shardings.w_dec_lw, None, None, None, None]
    for name, place in zip(VARIABLES, places, strict=True):
        variable = getattr(crosscoder, name)
        value = np.float32(rng.normal(size=variable.shape))
        if name == "scale":
            value = np.float32(rng.uniform(0.2, 3, size=variable.shape))
        if name == "threshold":
            value = np.full(variable.shape, threshold, np.float32)
        setattr(crosscoder, name, type(variable)(jax.device_put(value, place)))
    for name in the_config.rule_parameters:
        drawn = np.float32(rng.uniform(0.2, 3, size=the_config.num_latents))
        setattr(crosscoder, name, nnx.Param(jax.device_put(drawn, shardings.per_latent_l)))
    return crosscoder


def arrays(crosscoder):
    """All variables as float64 NumPy arrays, for oracles."""
    return {name: np.asarray(getattr(crosscoder, name)[...], np.float64) for name in VARIABLES}


def golden(kind, **changes):
    """A crosscoder with golden weights, and the arrays of the file."""
    data = read("forward")
    # The weights of two of the three are the last ones of the training runs.
    weights = tensors(data, "aux") if kind == "aux" else tensors(read(f"training_{kind}_float32"), "after100")
    the_config = config(two_sources(32, 32), 256, **changes)
    crosscoder = golden_crosscoder(the_config, weights, data.get(f"{kind}/threshold", 0.0))
    return crosscoder, data, jnp.asarray(concatenated(data["X"]))


def collectives(hlo):
    """(operation, result shapes) of every collective in an HLO text."""
    names = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    found = re.findall(rf"= (\(.*?\)|\S+) ({names})(?:-start)?\(", hlo)
    return [(name, re.findall(r"\w+\[([\d,]*)\]", shape)) for shape, name in found]


def assert_only_scalars_are_reduced(hlo):
    found = collectives(hlo)
    assert found, "nothing crosses the devices: the computation is not sharded"
    assert {name for name, _ in found} == {"all-reduce"}
    # Numbers, or as many as there are cuts.
    assert {shape for _, shapes in found for shape in shapes} <= {"", "6"}
