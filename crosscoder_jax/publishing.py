"""A published crosscoder: one folder with ``crosscoder.safetensors`` and ``config.json``.

The folder is self-contained: weights, normaliser, inference threshold, k, source names and where
they came from. Loading reads tensors and plain data only; nothing in a file is executed.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from crosscoder_jax.activations.atomic import (
    as_read_back,
    is_temporary,
    read_json,
    write_bytes_atomically,
    write_json_atomically,
)
from crosscoder_jax.configs import config_from_json, config_to_json
from crosscoder_jax.crosscoder import RULE_PARAMETERS, Crosscoder, CrosscoderConfig
from crosscoder_jax.outputs import check_folder, listed
from crosscoder_jax.sharding import Shardings, check_divisible, from_first, place, to_host

FORMAT = "crosscoder_jax"
"""What ``config.json`` calls the package's own format."""
FORMAT_VERSION = 1
_SPREAD = {
    "w_enc": "w_enc_wl",
    "b_enc": "per_latent_l",
    "w_dec": "w_dec_lw",
    **dict.fromkeys(RULE_PARAMETERS, "per_latent_l"),
}
"""Tensors with the latent axis, and the field of the shardings that says where each lives."""
_WEIGHTS = "crosscoder.safetensors"
_STAGED = f"{_WEIGHTS}.next"
"""Where a save puts weights until ``config.json`` names them; only a save that was stopped leaves it."""
_TENSORS = ("w_enc", "b_enc", "w_dec", "b_dec", "mean", "scale", "threshold")


def save(crosscoder: Crosscoder, folder: str | Path, *, provenance: Mapping[str, Any] | None = None) -> Path:
    """Write a crosscoder so that :func:`load` gives the same function back, bit for bit.

    Weights are saved in the units they are in, with the normaliser beside them; save
    ``fold_normalization(crosscoder)`` for weights in raw activation units. ``config.json`` names the
    weights it belongs to by their hash and is replaced in one step, so that a save that is stopped at
    any moment leaves the old crosscoder or the new one, and :func:`load` finds its weights. In a run of
    several processes all of them call this, and the first one writes.

    Args:
        crosscoder: what to save; every tensor in its own dtype.
        folder: made if missing; a crosscoder that was saved there is replaced, nothing else is.
        provenance: plain data about models, layer, tokens and recipe, kept in ``config.json``.

    Returns:
        The folder.

    Raises:
        ValueError: if the provenance is not plain data, or the folder holds anything but a crosscoder that
            was saved there; nothing is then written.
        OSError: if a file cannot be written.
    """
    folder = Path(folder)
    _refuse_strangers(folder)
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "crosscoder": config_to_json(crosscoder.config),
        "provenance": as_read_back(dict(provenance or {})),
    }
    tensors = tensors_of(crosscoder)

    def write() -> bytes:
        data = serialize(tensors)
        document["weights_sha256"] = hashlib.sha256(data).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        _finish_stopped_save(folder)
        write_bytes_atomically(folder / _STAGED, data)
        write_json_atomically(folder / "config.json", document)
        (folder / _STAGED).replace(folder / _WEIGHTS)
        return b""

    from_first(write)
    return folder


def load(folder: str | Path, *, shardings: Shardings = Shardings()) -> Crosscoder:
    """Read a crosscoder written by :func:`save`.

    Args:
        folder: of the crosscoder.
        shardings: layout of the mesh that is set; every tensor goes straight to where it lives there.

    Raises:
        ValueError: naming the file and what is wrong with it: not ours, truncated, not the weights
            that ``config.json`` was written for, a tensor missing or of another shape. Or if the latents
            do not spread evenly over the mesh.

    Examples:
        >>> import tempfile, crosscoder_jax as cc, jax.numpy as jnp
        >>> sources = cc.Sources((cc.Source("base", 4), cc.Source("chat", 4)))
        >>> crosscoder = cc.Crosscoder(cc.CrosscoderConfig(sources, num_latents=8), key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load(save(crosscoder, folder))
        >>> bool((again(jnp.ones((1, 8))) == crosscoder(jnp.ones((1, 8)))).all())
        True
    """
    published = read_published(folder)
    return assemble(published.config, published.tensors, shardings=shardings, where=published.where)


class Published(NamedTuple):
    """A saved crosscoder on the host, whole: no device holds any of it."""

    config: CrosscoderConfig
    tensors: Mapping[str, np.ndarray]
    """By the names of its variables."""
    where: str = "tensors"
    """What to call the tensors in errors."""

    @classmethod
    def of(cls, crosscoder: Crosscoder) -> "Published":
        """Return what :func:`save` would write of a crosscoder."""
        return cls(crosscoder.config, tensors_of(crosscoder))


def read_published(folder: str | Path) -> Published:
    """Read what :func:`load` puts together; raises as it does."""
    folder = Path(folder)
    document = _read_document(folder)
    config = config_from_json(
        CrosscoderConfig, document["crosscoder"], where=f"{folder / 'config.json'}: crosscoder"
    )
    path = _find_weights(folder, document["weights_sha256"])
    return Published(config, _read_tensors(path), str(path))


def assemble(
    config: CrosscoderConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    shardings: Shardings = Shardings(),
    where: str = "tensors",
) -> Crosscoder:
    """Put a crosscoder together from its tensors, each straight where it lives on the mesh that is set.

    Args:
        config: of the crosscoder.
        tensors: by the names of its variables.
        shardings: layout of the mesh.
        where: what to call the tensors in errors.

    Raises:
        ValueError: if a tensor is missing or of another shape, or the latents do not spread evenly.
    """
    if shardings.per_latent_l is not None:
        mesh, axis = jax.sharding.get_mesh(), shardings.per_latent_l[0]
        check_divisible("num_latents", config.num_latents, mesh, axis)
    crosscoder = nnx.eval_shape(lambda: Crosscoder(config, key=jax.random.key(0), shardings=shardings))
    for name in _names(crosscoder):
        variable = getattr(crosscoder, name)
        if name not in tensors:
            raise ValueError(f"{where}: has no tensor {name!r}: save the crosscoder again")
        if tensors[name].shape != variable.shape:
            raise ValueError(
                f"{where}: {name} has shape {tensors[name].shape}, but config.json beside it describes "
                f"{variable.shape}: the two files belong to different crosscoders"
            )
        spec = getattr(shardings, _SPREAD[name]) if name in _SPREAD else None
        value = place(tensors[name].astype(variable.dtype, copy=False), spec)
        setattr(crosscoder, name, type(variable)(value))
    return crosscoder


def tensors_of(crosscoder: Crosscoder) -> dict[str, np.ndarray]:
    """Return a crosscoder's tensors on the host, by the names of its variables; see :func:`to_host`."""
    return {name: to_host(getattr(crosscoder, name)[...]) for name in _names(crosscoder)}


def load_provenance(folder: str | Path) -> dict[str, Any]:
    """Read what :func:`save` was told about where a crosscoder comes from."""
    return dict(_read_document(Path(folder)).get("provenance", {}))


def weights_sha256(folder: str | Path) -> str:
    """Return the hash of a saved crosscoder's weights, normaliser and thresholds: its identity."""
    return str(_read_document(Path(folder))["weights_sha256"])


def is_saved(folder: Path) -> bool:
    """Tell whether a folder holds a crosscoder that :func:`save` wrote, sound or not."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    document = read_json(path)
    return isinstance(document, dict) and document.get("format") == FORMAT


def _refuse_strangers(folder: Path) -> None:
    """Refuse a folder that holds anything but a saved crosscoder or what a stopped save left."""
    check_folder(folder)
    if not folder.is_dir() or is_saved(folder):
        return
    names = sorted(path.name for path in folder.iterdir() if not is_temporary(path) and path.name != _STAGED)
    if names:
        raise ValueError(
            f"{folder}: holds {listed(names)} and no saved crosscoder to replace: choose another folder"
        )


def _names(crosscoder: Crosscoder) -> tuple[str, ...]:
    return (*_TENSORS, *crosscoder.config.rule_parameters)


def _read_document(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: is missing: {folder} holds no saved crosscoder")
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path}: is not a crosscoder saved by this package")
    if document.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: has format_version {document.get('format_version')!r}, this release reads "
            f"{FORMAT_VERSION}: update crosscoder-jax"
        )
    for name in ("crosscoder", "weights_sha256"):
        if name not in document:
            raise ValueError(f"{path}: has no {name!r}: save the crosscoder again")
    return document


def _find_weights(folder: Path, sha256: str) -> Path:
    """Return the file with the weights of this hash, wherever a save that was stopped left it."""
    for path in (folder / _STAGED, folder / _WEIGHTS):
        with contextlib.suppress(FileNotFoundError):
            if _file_sha256(path) == sha256:
                return path
    path = folder / _WEIGHTS
    if not path.is_file():
        raise ValueError(f"{path}: is missing: save the crosscoder again")
    _read_tensors(path)  # a file that was cut off says so
    raise ValueError(
        f"{path}: holds other weights than config.json beside it was written for (files of two "
        "crosscoders, or a damaged one): save or copy both again"
    )


def _finish_stopped_save(folder: Path) -> None:
    """Put weights that ``config.json`` already names in their place: staging others would lose them."""
    staged = folder / _STAGED
    with contextlib.suppress(ValueError, FileNotFoundError):  # no config of ours or nothing staged
        if _read_document(folder)["weights_sha256"] == _file_sha256(staged):
            staged.replace(folder / _WEIGHTS)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path}: is not a whole safetensors file ({error}): copy it again") from error
