"""Compile steps in a process of their own: ``python -m crosscoder_jax.planning.worker``.

Reads one request from standard input and writes a line for every mesh to standard output. The compiler
of TPUs is loaded here, with an environment in which it does not look for a TPU, and whatever it does to
its process it does to this one.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from crosscoder_jax.configs import config_from_json
from crosscoder_jax.planning.step import compile_step
from crosscoder_jax.sharding import mesh_of
from crosscoder_jax.training.config import TrainConfig

_ONE_DEVICE_A_CHIP = {"v4": {"chip_config_name": "megacore"}}
"""As TPUs come up where they are; a topology of v4 else has a device for each of a chip's two cores."""


def main() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    recipe = config_from_json(TrainConfig, request["recipe"])
    devices = _devices(request["platform"], request["topology"])
    for data, latent in request["meshes"]:
        try:
            mesh = mesh_of(devices, data, latent)
        except ValueError as error:  # what training would say of it
            facts = {"no_mesh": str(error)}
        else:
            facts = _facts(recipe, mesh, request["is_optimizer_spread"])
        answer = {"mesh": [data, latent], **facts}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _devices(platform: str, topology: str) -> list[Any]:
    if platform == "cpu":
        return jax.devices("cpu")
    from jax.experimental import topologies

    options = _ONE_DEVICE_A_CHIP.get(topology.partition(":")[0], {})
    return list(topologies.get_topology_desc(platform=platform, topology_name=topology, **options).devices)


def _facts(recipe: TrainConfig, mesh: Mesh, is_optimizer_spread: bool) -> Mapping[str, Any]:
    processes = [[device.process_index for device in row] for row in mesh.devices]
    try:
        compiled = compile_step(recipe, mesh, is_optimizer_spread=is_optimizer_spread)
    except jax.errors.JaxRuntimeError as error:
        # Out of memory is an answer; every other failure is the parent's to tell.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"processes": processes, "refusal": str(error)}
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None
    assert costs is not None
    return {
        "processes": processes,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
        "flops": costs.get("flops"),
        "optimal_seconds": costs.get("optimal_seconds"),
        "text": compiled.as_text(),
    }


if __name__ == "__main__":
    main()
