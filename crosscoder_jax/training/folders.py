"""The folder of a training run: whose it is, and what is recorded in it of where its weights come from."""

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crosscoder_jax.activations.atomic import read_json, remove_temporary_files, write_json_atomically
from crosscoder_jax.activations.setting import lock_folder
from crosscoder_jax.activations.store import ActivationStore
from crosscoder_jax.configs import config_differences, config_from_json, config_to_json
from crosscoder_jax.publishing import weights_sha256
from crosscoder_jax.sharding import from_first, is_first_process
from crosscoder_jax.training.config import TrainConfig
from crosscoder_jax.training.laws import WarmStart
from crosscoder_jax.training.options import RunOptions

_BEFORE_IT_WAS_RECORDED = {"lanes": 1}
"""What runs did when their ``config.json`` did not say."""


def run_identity(config: TrainConfig, store: ActivationStore, options: RunOptions) -> dict[str, Any]:
    """Return as plain data everything that decides the weights of a run."""
    return {
        "train": config_to_json(config),
        "split": config_to_json(options.split),
        "window_tokens": options.window_tokens,
        "lanes": options.lanes,
        "null": config_to_json(options.null),
        "store_identity": {"fingerprint": store.manifest.fingerprint(), **store.manifest.identity()},
    }


def provenance(config: TrainConfig, store: ActivationStore, options: RunOptions) -> dict[str, Any]:
    """Return where a crosscoder comes from: stored sources, their texts, null data or not, the recipe."""
    return {
        "store": store.manifest.identity(),
        "stored_sources": config_to_json(store.sources),
        "harvest": store.manifest.provenance,
        "num_tokens": store.num_tokens,
        "null": config_to_json(options.null),
        "train": config_to_json(config),
        "versions": library_versions(),
    }


def library_versions() -> dict[str, str]:
    """Return the versions of what decides the numbers of a run."""
    names = ("crosscoder-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def refuse_other_run(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a folder that holds a run of another identity.

    Raises:
        ValueError: listing what differs.
    """
    path = folder / "config.json"
    if not path.exists():
        return
    recorded = read_json(path)
    theirs = {name: recorded.get(name, _BEFORE_IT_WAS_RECORDED.get(name)) for name in identity}
    # A recipe that was written before a field existed has its default.
    train = config_from_json(TrainConfig, theirs["train"], where=f"{path}: train")
    differences = config_differences(identity, {**theirs, "train": config_to_json(train)})
    if differences:
        raise ValueError(
            f"{folder} holds another run: {'; '.join(differences)}: "
            "choose another output folder, or give the old settings to go on"
        )


def claim_folder(
    folder: Path, identity: Mapping[str, Any], store: ActivationStore, start: WarmStart | None
) -> None:
    """Write what the run is, once it has what it needs to start: a faulty recipe claims no folder."""
    path = folder / "config.json"
    if is_first_process() and not path.exists():
        record: dict[str, Any] = {"store_path": str(store.path.absolute()), "versions": library_versions()}
        if start is not None:
            record["start_weights_sha256"] = weights_sha256(start.crosscoder)
        write_json_atomically(path, {**identity, **record})


def refuse_store_folder(folder: Path, store: ActivationStore) -> None:
    """Refuse a folder that is the store's, or lies in it: the files of a run are none of a store's.

    Raises:
        ValueError: naming both.
    """
    if folder.resolve().is_relative_to(store.path.resolve()):
        raise ValueError(f"output={folder} lies in the store {store.path}: choose a folder beside it")


@contextlib.contextmanager
def locked_folder(folder: Path, work: str) -> Iterator[None]:
    """Keep others off a run: they would take the files that this one is writing for leftovers.

    The first process of a run of several holds the lock.

    Args:
        folder: of the run; made if missing.
        work: what is done with the run, for the error that the others get.

    Raises:
        ValueError: if another run's process has the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:

        def take() -> bytes:
            held.callback(os.close, lock_folder(folder, work=f"{work} this run"))
            return b""

        from_first(take)
        yield


def clear_folder(folder: Path) -> None:
    """Make the folders of a run and remove what a killed process left half-written."""
    for path in (folder, folder / "crosscoder"):
        path.mkdir(parents=True, exist_ok=True)
        if is_first_process():
            remove_temporary_files(path)
