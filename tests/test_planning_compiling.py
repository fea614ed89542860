"""Compiling in another process, for CPU devices that this process does not have."""

import importlib.util

import pytest

from crosscoder_jax.planning import PlanConfig, Topology, compiling, make_plan
from crosscoder_jax.planning.compiling import compiled_steps

CPU = PlanConfig(Topology.parse("cpu:6"), (12, 20), 96, k=4.0, batch_size=48, meshes=((2, 3),))


def test_a_step_is_compiled_for_devices_that_are_not_here():
    (mesh,) = make_plan(CPU).meshes
    assert mesh.basis == "compiled"
    assert mesh.is_fitting
    weights = 4 * (2 * 32 * 32 + 32 + 32)  # a third of the latents
    assert mesh.bytes_per_chip.weights == weights
    # Arguments: weights, moments, this half of the batch, and the few numbers of the rest.
    assert 4 * 24 * 32 < mesh.bytes_per_chip.batch < 4 * 24 * 32 + 4 * 32 + 1024
    # Every product once at least: 10 FLOPs a latent, coordinate and token.
    assert mesh.flops > mesh.model_flops == 10 * 96 * 32 * 48
    # The contract of the sharded step: reconstructions over the latents, gradients over the batch.
    assert {one.kind for one in mesh.collectives} == {"all-reduce"}
    assert {one.axes for one in mesh.collectives} >= {("data",), ("latent",)}
    assert all(one.axes for one in mesh.collectives)
    over_latent = [one for one in mesh.collectives if one.axes == ("latent",)]
    assert max(one.num_bytes for one in over_latent) == 4 * 24 * 32
    # A CPU has no peak that is known, and its compiler estimates no time.
    assert mesh.tokens_per_s is None


def test_a_failure_is_told_with_what_the_compiler_said(monkeypatch):
    monkeypatch.setattr(compiling, "_WORKER", "crosscoder_jax.planning.no_such_module")
    with pytest.raises(ValueError, match=r"topology='cpu:6' could not be compiled for: .*no_such_module"):
        list(compiled_steps(CPU.recipe(), CPU.topology, [(2, 3)]))


def test_without_the_compiler_of_tpus_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"'v5e:2x2' needs .* pip install 'crosscoder-jax\[tpu\]'"):
        next(compiled_steps(CPU.recipe(), Topology.parse("v5e:2x2"), [(1, 4)]))
