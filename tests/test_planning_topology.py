"""Topologies as they are written on the command line."""

import pytest

from crosscoder_jax.planning import CHIPS, Topology


@pytest.mark.parametrize(
    ("text", "platform", "num_chips", "chip"),
    [
        ("v5p:4x4x8", "tpu", 128, "v5p"),
        ("v5e:16x16", "tpu", 256, "v5e"),
        ("v6e:2x4", "tpu", 8, "v6e"),
        ("v4:2x2x1", "tpu", 4, "v4"),
        ("8xH100-80GB", "gpu", 8, "H100-80GB"),
        ("2xh200-141gb", "gpu", 2, "H200-141GB"),
        ("cpu:8", "cpu", 8, None),
    ],
)
def test_what_is_written_is_understood(text, platform, num_chips, chip):
    topology = Topology.parse(text)
    assert (topology.platform, topology.num_chips) == (platform, num_chips)
    assert topology.chip is (CHIPS[chip] if chip else None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v5q:4x4", "topology='v5q:4x4' is not known, perhaps 'v5.': write it as v5p:4x4x8"),
        ("tpu", "topology='tpu' is not known: write it as"),
        ("", "topology='' is not known"),
        ("v5p:4x4", "chips of v5p are wired in 3 dimensions: write v5p:4x4x4"),
        ("v5e:4x4x4", "chips of v5e are wired in 2 dimensions: write v5e:4x4"),
        ("v5e:4x", "chips of v5e are wired in 2 dimensions"),
        ("v5e:0x4", "has no chip"),
        ("cpu:0", "has no chip"),
        ("0xH100-80GB", "has no chip"),
        ("cpu:many", "topology='cpu:many' is not known"),
        ("8xH100", "names no GPU that is known: use one of A100-40GB, A100-80GB, H100-80GB"),
        ("v5p-128", "a product name, which counts cores, 64 chips, .* write the shape, such as v5p:4x4x4"),
        ("v5e-8", "a product name, which counts chips, .* such as v5e:2x4"),
    ],
)
def test_what_is_no_topology_is_refused_with_what_would_be_one(text, says):
    with pytest.raises(ValueError, match=says):
        Topology.parse(text)


def test_clocks_are_those_of_the_matrix_units():
    # Multiplications and additions of all matrix units in one cycle: of two cores with four units of
    # 128 x 128 (v4, v5p), of one such core (v5e), of four units of 256 x 256 (v6e).
    per_cycle = {
        "v4": 2 * 4 * 128**2 * 2,
        "v5p": 2 * 4 * 128**2 * 2,
        "v5e": 4 * 128**2 * 2,
        "v6e": 4 * 256**2 * 2,
    }
    for name, operations in per_cycle.items():
        chip = CHIPS[name]
        assert chip.clock_hz is not None
        assert operations * chip.clock_hz == pytest.approx(chip.peak_flops, rel=0.005)
