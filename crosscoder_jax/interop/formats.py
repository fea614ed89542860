"""Load and save crosscoders in any known format."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crosscoder_jax import publishing
from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.interop import (
    crosscode,
    dedicated,
    dictionary_learning,
    hub,
    kissane,
    openmoss,
    saelens,
    sparsify,
)
from crosscoder_jax.interop.format import Format, Hints
from crosscoder_jax.interop.tensor_file import TensorFile
from crosscoder_jax.outputs import check_vacant, made_folder
from crosscoder_jax.sharding import Shardings
from crosscoder_jax.sources import Sources

OWN = publishing.FORMAT
"""Name of the package's own format, the only one that keeps everything."""
_OWN_FILE = "crosscoder.safetensors"
_CONFIGS = ("config.json", "cfg.json", "model_cfg.yaml")
"""What formats call the file beside their tensors."""

FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        dictionary_learning.HUB,
        dictionary_learning.TORCH,
        sparsify.FORMAT,
        openmoss.FORMAT,
        crosscode.FORMAT,
        dedicated.FORMAT,
        kissane.FORMAT,
        saelens.FORMAT,
    )
}
"""The formats of other libraries; a file is of the first one that it matches."""


def load(
    path: str | Path,
    *,
    sources: Sources | Sequence[str] | None = None,
    scales: Sequence[float] | None = None,
    format: str | None = None,
    revision: str | None = None,
    shardings: Shardings = Shardings(),
) -> Crosscoder:
    """Read a crosscoder of this package or of another library.

    Args:
        path: folder, file, or Hub repository ``owner/name``, also with a folder inside it.
        sources: what the crosscoder reads, or names for it, where a file does not tell; ``base`` and
            ``chat`` by default where there are two.
        scales: what each source's raw activations are multiplied by before they are encoded, for
            files that do not tell.
        format: one of :data:`FORMATS`; recognised by the names of the tensors if not given.
        revision: branch, tag or commit on the Hub.
        shardings: layout of the mesh that is set, to put the crosscoder there.

    Raises:
        ValueError: naming the file and what is wrong with it: unknown, truncated, a tensor missing
            or of another shape, or something that no crosscoder here can express.
        ModuleNotFoundError: if torch is needed for a torch file, or huggingface_hub for the Hub.

    Examples:
        >>> import tempfile, jax, crosscoder_jax as cc
        >>> config = cc.CrosscoderConfig(cc.Sources((cc.Source("a", 4), cc.Source("b", 4))), num_latents=8)
        >>> crosscoder = cc.Crosscoder(config, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load(save(crosscoder, folder, format="dictionary_learning"), sources=("a", "b"))
        >>> again.config == config
        True
    """
    place = locate(path, revision=revision)
    if format == OWN or (format is None and _is_own(place)):
        if sources is not None or scales is not None:
            raise ValueError(f"{place}: tells its sources and their scales: leave sources and scales out")
        return publishing.load(place if place.is_dir() else place.parent, shardings=shardings)
    file = TensorFile.read(place if place.is_file() else _only_file(place, format))
    found = _format_of(file, format)
    if scales is not None and not found.takes_scales:
        raise ValueError(f"{file.path}: tells how its inputs are scaled: leave scales out")
    crosscoder = found.read(file, Hints(sources, scales))
    if shardings == Shardings():
        return crosscoder
    tensors = publishing.tensors_of(crosscoder)
    return publishing.assemble(crosscoder.config, tensors, shardings=shardings, where=str(file.path))


def save(
    crosscoder: Crosscoder,
    folder: str | Path,
    *,
    format: str = OWN,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a crosscoder in this package's format or another library's.

    The own format reads back bit for bit and keeps everything. Others keep the function, in float32
    and without names of sources, annealing of k and compute type; where one cannot hold the
    crosscoder it is refused, never approximated.

    Args:
        crosscoder: what to save.
        folder: made if missing; a crosscoder of the same format that was saved there is replaced, nothing
            else is.
        format: ``"crosscoder_jax"`` or one of :data:`FORMATS`.
        provenance: plain data about models, layer, tokens and recipe; in the own format only.

    Returns:
        The folder.

    Raises:
        ValueError: if the format is unknown or cannot hold the crosscoder, saying why, or the folder
            holds something else; nothing is then written.
        OSError: if a file cannot be written.
    """
    if format == OWN:
        return publishing.save(crosscoder, folder, provenance=provenance)
    if provenance is not None:
        raise ValueError(f"provenance cannot be kept by {format!r}: leave it out, or save as {OWN!r}")
    writer = _named(format)
    folder = Path(folder)
    if not _holds_only(writer, folder):
        check_vacant(folder)
    with made_folder(folder):
        writer.write(crosscoder, folder)
    return folder


def load_provenance(path: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """Read what :func:`save` was told about where a crosscoder comes from; empty for other formats."""
    place = locate(path, revision=revision)
    return publishing.load_provenance(place if place.is_dir() else place.parent) if _is_own(place) else {}


def locate(path: str | Path, *, revision: str | None = None) -> Path:
    """Return a local folder or file as it is, or download a Hub repository's files and return their folder.

    Raises:
        ValueError: if there is neither.
    """
    place = Path(path)
    if place.exists():
        return place
    if not hub.is_repository(str(path)):
        raise ValueError(f"{path}: there is no such file or folder, nor is it a Hub repository owner/name")
    return hub.download(str(path), _hub_files(), revision=revision)


def _hub_files() -> list[str]:
    return [_OWN_FILE, *_CONFIGS, *(name for known in FORMATS.values() for name in known.files)]


def _is_own(place: Path) -> bool:
    if place.is_file():
        return place.name == _OWN_FILE
    return (place / _OWN_FILE).is_file() or publishing.is_saved(place)


def _holds_only(format: Format, folder: Path) -> bool:
    """Tell whether a folder holds a crosscoder of a format, by the names of its files, and nothing beside."""
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return bool(held & {*format.files}) and held <= {*format.files, *_CONFIGS}


def _only_file(folder: Path, format: str | None) -> Path:
    known = FORMATS.values() if format is None else (_named(format),)
    names = dict.fromkeys(name for one in known for name in one.files)
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        listed = ", ".join(path.name for path in found)
        raise ValueError(f"{folder}: holds {listed}: name the file to load")
    if not found:
        raise ValueError(f"{folder}: holds no file of a crosscoder{_near_misses(folder)}")
    return found[0]


def _near_misses(folder: Path) -> str:
    """Say what the user may have meant: a file of another name, or a folder inside."""
    here, inside = (
        sorted(path for path in folder.glob(pattern) if path.suffix in (".pt", ".safetensors"))
        for pattern in ("*", "*/*")
    )
    if here:
        return f" under a known name: name the file to load, such as {here[0]}"
    return f", but the folder {inside[0].parent.name} inside it may" if inside else ""


def _format_of(file: TensorFile, format: str | None) -> Format:
    if format is not None:
        return _named(format)
    for known in FORMATS.values():
        if known.matches(file.shapes):
            return known
    names = ", ".join(sorted(file.shapes)[:4])
    raise ValueError(
        f"{file.path}: its tensors ({names}, ...) are of no known crosscoder: there are "
        f"{', '.join((OWN, *FORMATS))}"
    )


def _named(format: str) -> Format:
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown: there are {', '.join((OWN, *FORMATS))}")
    return FORMATS[format]
