"""Which room may import what, and what `import crosscoder_jax` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "crosscoder_jax"

ROOMS = [
    "lazy",
    "typing",
    "configs",
    "outputs",
    "sources",
    "sharding",
    "groups",
    "sparsity",
    "kernels",
    "crosscoder",
    "objectives",
    "metrics",
    "activations",
    "publishing",
    "training",
    "diffing",
    "language_models",
    "interop",
    "planning",
    "report",
    "commands",
    "arguments",
    "terminal",
    "cli",
]
"""From the bottom to the top: a module may import its own room and those before it."""

EVERYWHERE = {"numpy", "jax", "jaxtyping"}
ALLOWED = {
    "crosscoder": {"flax"},
    "activations": {"tensorstore", "grain", "ml_dtypes"},
    "training": {"flax", "optax", "orbax", "tensorboardX"},
    "diffing": {"flax", "pyarrow", "scipy"},
    "language_models": {"torch", "transformers", "datasets", "jinja2", "safetensors"},
    "publishing": {"flax", "safetensors"},
    "interop": {"flax", "safetensors", "huggingface_hub", "yaml", "pyarrow", "ml_dtypes"},
    "planning": {"flax", "libtpu"},
    "report": {"plotly", "jinja2", "pyarrow", "scipy"},
    "arguments": {"tyro"},
    "terminal": {"rich"},
    "cli": {"rich"},
}
"""What a room may use beyond the standard library and EVERYWHERE."""

HEAVY = {
    *("torch", "transformers", "datasets", "tensorstore", "grain", "orbax", "plotly", "pandas", "pyarrow"),
    *("safetensors", "rich", "tyro", "jinja2", "tensorboardX"),
}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree):
    """Every module that a file names in an import, at any depth: functions and conditions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "crosscoder_jax":
                yield from (f"crosscoder_jax.{alias.name}" for alias in node.names)
            else:
                yield node.module


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
MODULES = {path: list(imported_modules(ast.parse(path.read_text()))) for path in FILES}
over_all_files = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


@over_all_files
def test_every_file_stands_in_a_known_room(path):
    assert room_of(path) in ROOMS


@over_all_files
def test_a_room_imports_only_itself_and_rooms_before_it(path):
    room = room_of(path)
    for module in MODULES[path]:
        if module.startswith("crosscoder_jax."):
            target = module.split(".")[1]
            assert ROOMS.index(target) <= ROOMS.index(room), f"{room} imports {module}"


@over_all_files
def test_files_of_crosscoders_take_nothing_of_the_store_but_atomic_writes(path):
    # What copies other libraries' activations writes a store; crosscoders are loaded without one.
    if room_of(path) in ("interop", "publishing") and "caches" not in path.parts:
        taken = {module for module in MODULES[path] if module.startswith("crosscoder_jax.activations")}
        assert taken <= {"crosscoder_jax.activations.atomic"}


@over_all_files
def test_a_room_uses_only_the_libraries_it_may(path):
    used = {module.split(".")[0] for module in MODULES[path]} - {"crosscoder_jax"}
    foreign = used - set(sys.stdlib_module_names) - EVERYWHERE
    assert foreign <= ALLOWED.get(room_of(path), set())


def test_imports_inside_functions_are_seen():
    tree = ast.parse("def f():\n    if True:\n        from torch import nn\n    import crosscoder_jax.cli")
    assert set(imported_modules(tree)) == {"torch", "crosscoder_jax.cli"}


def run_fresh(code):
    """Run code in a process that has imported nothing; return what it prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent).stdout


def modules_after(statement):
    names = run_fresh(f"{statement}; import sys; print(*sys.modules)").split()
    return {name.split(".")[0] for name in names}


def test_importing_the_package_brings_in_no_heavy_library():
    # flax and optax may bring some in themselves; the package adds none to those.
    ours = modules_after("import crosscoder_jax")
    theirs = modules_after("import jax, flax, optax")
    assert "crosscoder_jax" in ours
    assert (ours - theirs) & HEAVY == set()
    assert ours & {"torch", "transformers", "datasets", "grain", "plotly", "pandas", "pyarrow"} == set()


def test_loading_a_crosscoder_brings_in_no_store():
    ours = modules_after("import crosscoder_jax; crosscoder_jax.load")
    assert "safetensors" in ours
    assert ours & {"torch", "tensorstore", "grain", "pyarrow"} == set()


def seconds_to_import(modules):
    # Processor time: what else the machine is doing does not count.
    code = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"
    return float(run_fresh(code.format(modules)))


def test_importing_the_package_takes_little_longer_than_importing_jax():
    # The least of five ratios of neighbours: what comes in from outside slows one or the other at random,
    # what the package imports slows it always. Measured: 1.7 times as long, of which flax and optax are 0.4.
    ratios = [seconds_to_import("crosscoder_jax") / seconds_to_import("jax") for _ in range(5)]
    assert min(ratios) <= 2.5, f"{ratios} times as long as importing jax"


@pytest.mark.parametrize("name", ["ActivationStore", "load", "save", "push_to_hub"])
def test_lazy_names_are_listed_and_come_from_their_rooms(name):
    import crosscoder_jax as cc

    assert name in dir(cc)
    assert getattr(cc, name).__name__ == name


def test_unknown_names_are_refused_as_by_any_module():
    import crosscoder_jax as cc

    with pytest.raises(AttributeError, match="module 'crosscoder_jax' has no attribute 'encoder'"):
        cc.encoder  # noqa: B018 - the access is the test
