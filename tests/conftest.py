"""Eight CPU devices for every test, set before any of them is touched, and room for what they compile."""

import gc
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

_MAPS = Path("/proc/self/maps")
_MAX_MAPS = 20_000
"""Linux gives a process 65,530 mappings by default; every compiled program holds a few, and past the limit
threads cannot start and XLA crashes."""


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Forget what the tests of a module compiled before the process runs out of mappings."""
    yield
    if _MAPS.is_file() and _MAPS.read_bytes().count(b"\n") > _MAX_MAPS:
        jax.clear_caches()
        gc.collect()
