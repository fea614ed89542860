"""What is wrong with this machine for a training run, each finding with the line that mends it."""

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from crosscoder_jax.activations.atomic import read_json
from crosscoder_jax.configs import config_from_json
from crosscoder_jax.kernels import native
from crosscoder_jax.planning.config import PlanConfig
from crosscoder_jax.planning.replanning import options_of, topology_of
from crosscoder_jax.sharding import from_first, is_first_process
from crosscoder_jax.training.checkpoint import KEPT

_READ_AT_ONCE = 1 << 14
_SHARED_FILESYSTEMS = re.compile(r"nfs|lustre|gpfs|beegfs|ceph|cifs|smb|9p|fuse|wekafs|afs|gluster|virtiofs")
_LONGEST_TO_APPEAR = 10.0
"""Seconds in which a file that one host writes must be there on another: they keep what they saw a while."""
_USABLE_SHARE = 0.95
"""Of a GPU's memory; CUDA itself needs the rest."""
_SLOW_SCATTER = ((0, 10, 2), (0, 11, 0))
_SCATTER_REMEDY = "-nvptx-allow-ftz-atomics"
_HARMFUL = {
    "JAX_DISABLE_JIT": "runs every operation by itself, a hundred times slower",
    "JAX_DEBUG_NANS": "runs the step operation by operation once a NaN appears, and copies what is donated",
    "JAX_CHECK_TRACER_LEAKS": "slows down every compilation",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    """What it is."""
    state: Literal["ok", "warning", "broken"]
    """A run starts with a warning; it does not, or not as planned, with what is broken."""
    says: str
    """What was found."""
    remedy: str = ""
    """The line that mends it."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a plan asks of each host and chip; zero where there is no plan."""

    store_bytes_per_s: float = 0.0
    """That the store must deliver to each host."""
    checkpoint_bytes: int = 0
    """Of one checkpoint."""
    chip_bytes: int = 0
    """Of one chip's memory."""
    chips: int = 0
    """Of the mesh."""
    hosts: int = 1
    """That these chips belong to."""
    options: str = ""
    """Of the command that made the plan, but the topology."""

    @classmethod
    def read(cls, path: Path) -> "Needs":
        """Read what ``plan --json`` printed, of its cheapest mesh.

        Raises:
            ValueError: if the file is no plan, or nothing in it fits.
        """
        plan = read_json(path)
        try:
            if plan["cheapest"] is None:
                raise ValueError(f"plan={path}: no mesh of it fits: plan for more chips or a smaller batch")
            meshes = {(mesh["data"], mesh["latent"]): mesh for mesh in plan["meshes"]}
            mesh = meshes[tuple(plan["cheapest"])]
            return cls(
                store_bytes_per_s=mesh["store_bytes_per_s"] or 0.0,
                checkpoint_bytes=plan["checkpoint_bytes"],
                chip_bytes=mesh["bytes_per_chip"]["total"],
                chips=mesh["chips"],
                hosts=mesh["hosts"],
                options=options_of(config_from_json(PlanConfig, plan["config"], where=f"{path}: config")),
            )
        except (LookupError, TypeError) as error:
            remedy = f"write one with crosscoder-jax plan ... --json > {path}"
            raise ValueError(f"plan={path} is no plan: {remedy}") from error


def examine(
    *,
    store: Path | None = None,
    output: Path | None = None,
    needs: Needs = Needs(),
    hosts: int | None = None,
    seconds: float = 3.0,
) -> Iterator[Finding]:
    """Look at versions, settings, devices, store, disk and compile cache; yield what is found.

    One of several processes looks at its own machine, and with the others at the output; all of them must
    call this, with an output or without.

    Args:
        store: to read from, for its rate.
        output: where checkpoints are to go.
        needs: of a plan.
        hosts: that train together, of which this is one; those of the plan by default. Of several processes
            all are here.
        seconds: to read for.
    """
    processes = jax.process_count()
    hosts = needs.hosts if hosts is None else hosts
    yield check_versions()
    yield from check_settings(os.environ, jax.default_backend(), _jaxlib_version())
    yield check_devices(needs, hosts)
    if jax.default_backend() == "cpu":
        yield check_products()
    if store is not None:
        readers = processes if processes > 1 else hosts
        yield check_store(store, needs.store_bytes_per_s * needs.hosts / readers, seconds)
    if output is not None:
        yield from check_output(output, needs.checkpoint_bytes, hosts)
    yield check_cache(jax.config.values["jax_compilation_cache_dir"])


def examine_together(**settings: Any) -> list[Finding]:
    """Let each of several processes examine its machine; return on all of them what was found anywhere.

    What is in order is told of the first process, what is not of each, with its number.

    Args:
        settings: as for :func:`examine`.
    """
    own = json.dumps([dataclasses.asdict(finding) for finding in examine(**settings)])
    first, *others = [[Finding(**one) for one in json.loads(told)] for told in _told_by_all(own.encode())]
    findings = list(first)
    for index, theirs in enumerate(others, start=1):
        findings += [
            dataclasses.replace(finding, name=f"{finding.name} (process {index})")
            for finding in theirs
            if finding.state != "ok" and finding not in first
        ]
    return findings


def _told_by_all(told: bytes) -> list[bytes]:
    lengths = multihost_utils.process_allgather(np.array([len(told)], np.int32)).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(told)] = np.frombuffer(told, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def check_versions() -> Finding:
    """Compare what is installed with what this package asks for."""
    lacking = []
    for requirement in importlib.metadata.requires("crosscoder-jax") or []:
        found = re.match(r"([\w.-]+)>=([\d.]+)$", requirement.split(";")[0].strip())
        if found is None or "extra ==" in requirement:
            continue
        installed = _installed(found[1])
        if installed is None or _numbers(installed) < _numbers(found[2]):
            lacking.append(f"{found[1]}>={found[2]}")
    if lacking:
        quoted = " ".join(f"'{name}'" for name in lacking)
        return Finding(
            "versions", "broken", f"too old or missing: {', '.join(lacking)}", f"pip install {quoted}"
        )
    shown = ", ".join(f"{name} {_installed(name)}" for name in ("jax", "jaxlib", "flax", "orbax-checkpoint"))
    return Finding("versions", "ok", shown)


def check_products() -> Finding:
    """Look for the compiled products, without which a step on CPU takes several times as long."""
    reason = native.missing()
    if reason is None:
        return Finding("products", "ok", "compiled for CPU")
    remedy = "install a C++ compiler, then: pip install --force-reinstall --no-deps crosscoder-jax"
    if os.environ.get(native.SWITCH) == "0":
        remedy = f"unset {native.SWITCH}"
    return Finding("products", "warning", f"training on CPU is slow without those compiled: {reason}", remedy)


def check_settings(
    environment: Mapping[str, str], platform: str, jaxlib: tuple[int, ...]
) -> Iterator[Finding]:
    """Look for settings and versions that are known to hurt.

    Args:
        environment: of the process.
        platform: that JAX runs on.
        jaxlib: its version.
    """
    found = False
    for name, harm in _HARMFUL.items():
        if environment.get(name, "").lower() in ("1", "true", "t", "yes", "on"):
            found = True
            yield Finding("settings", "warning", f"{name} {harm}", f"unset {name}")
    first, last = _SLOW_SCATTER
    flags = environment.get("XLA_FLAGS", "")
    if platform == "gpu" and first <= jaxlib <= last and _SCATTER_REMEDY not in flags:
        found = True
        yield Finding(
            "settings",
            "warning",
            "this jaxlib adds up float32 scatters up to 450 times slower on GPUs (openxla/xla#46225)",
            f'export XLA_FLAGS="$XLA_FLAGS --xla_backend_extra_options={_SCATTER_REMEDY}"',
        )
    if not found:
        yield Finding("settings", "ok", "none that is known to hurt")


def check_devices(needs: Needs, hosts: int = 1) -> Finding:
    """Compute on every device of this process, and compare the devices with the plan.

    Args:
        needs: of a plan.
        hosts: that the plan's chips belong to, where this process does not see the others'.
    """
    devices = jax.local_devices()
    wrong = [device for device in devices if not _computes(device)]
    if wrong:
        says = f"a product of matrices comes out wrong on {', '.join(map(str, wrong))}, of {len(devices)}"
        return Finding("devices", "broken", says, _without(wrong, devices, os.environ))
    idle = _idle_accelerator() if devices[0].platform == "cpu" else None
    if idle is not None:
        extra = "cuda13" if idle == "GPU" else "tpu"
        says = f"there is a {idle}, and JAX runs on the CPU"
        return Finding("devices", "broken", says, f"pip install 'crosscoder-jax[{extra}]'")
    kind, number = devices[0].device_kind, jax.device_count()
    return (
        _too_few(needs, hosts, devices)
        or _too_small(needs, hosts, devices, os.environ)
        or Finding("devices", "ok", f"{number} x {kind}, each of them computes")
    )


def _computes(device: Any) -> bool:
    square = jax.device_put(jnp.full((128, 128), 2.0), device)
    return float(jnp.sum(square @ square)) == 128**3 * 4.0


def _without(wrong: Sequence[Any], devices: Sequence[Any], environment: Mapping[str, str]) -> str:
    """Return the line that leaves out devices which compute nonsense."""
    if devices[0].platform == "tpu":
        return "gcloud compute tpus tpu-vm delete NAME --zone ZONE  # and create it anew"
    if devices[0].platform == "cpu":
        return "unset XLA_FLAGS"
    visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(str(i) for i in range(len(devices)))
    left = [name for name, one in zip(visible.split(","), devices, strict=False) if one not in wrong]
    return f"export CUDA_VISIBLE_DEVICES={','.join(left)}"


def _too_few(needs: Needs, hosts: int, devices: Sequence[Any]) -> Finding | None:
    """Compare the devices of all processes with the plan's; of one process with those of one host."""
    processes, there, wanted, where = jax.process_count(), jax.device_count(), needs.chips, ""
    if processes > 1:
        where = f" in {processes} processes"
    elif hosts > 1:
        wanted, where = -(-needs.chips // hosts), " here"
    if there >= wanted:
        return None
    of_each = f" on each of its {hosts} hosts" if processes == 1 < hosts else ""
    says = f"the plan's mesh needs {wanted} devices{of_each}, and there are {there}{where}"
    return Finding("devices", "broken", f"{says} ({devices[0].device_kind})", _replan(needs, hosts, devices))


def _too_small(
    needs: Needs, hosts: int, devices: Sequence[Any], environment: Mapping[str, str]
) -> Finding | None:
    """Compare the memory that JAX may take of a device with the plan's."""
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is None or limit >= needs.chip_bytes:
        return None
    says = f"the plan needs {needs.chip_bytes / 2**30:.1f} GiB of each, and it has {limit / 2**30:.1f}"
    if devices[0].platform == "gpu":
        old, new = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"
        share = float(environment.get(new) or environment.get(old) or 0.75)
        if needs.chip_bytes <= limit / share * _USABLE_SHARE:
            # Both together are refused.
            name = old if environment.get(old) else new
            says += f", of which JAX takes {share:.0%}"
            return Finding("devices", "broken", says, f"export {name}={_USABLE_SHARE}")
    return Finding("devices", "broken", says, _replan(needs, hosts, devices))


def _replan(needs: Needs, hosts: int, devices: Sequence[Any]) -> str:
    """Return the command that plans the same run for the chips that are here."""
    is_whole = jax.process_count() > 1
    topology = topology_of(jax.devices() if is_whole else devices, 1 if is_whole else hosts)
    return f"crosscoder-jax plan --topology {topology} {needs.options} --json > plan.json"


def _idle_accelerator() -> str | None:
    if Path("/dev/nvidia0").exists():
        return "GPU"
    return "TPU" if Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists() else None


def check_store(path: Path, needed_bytes_per_s: float, seconds: float) -> Finding:
    """Open a store and read from random places of it for a while.

    Args:
        path: of the store.
        needed_bytes_per_s: by a plan, on this host; 0 without one.
        seconds: to read for.
    """
    from crosscoder_jax.activations.store import ActivationStore

    try:
        store = ActivationStore.open(path)
        rate = _read_rate(store, seconds)
    except (OSError, ValueError) as error:
        remedy = f"crosscoder-jax harvest --store {path} ... goes on where it was stopped"
        return Finding("store", "broken", " ".join(str(error).split()), remedy)
    says = f"{store.num_tokens:,} tokens, read at {rate / 1e6:,.0f} MB/s"
    if rate < needed_bytes_per_s:
        return Finding(
            "store",
            "broken",
            f"{says}; the plan needs {needed_bytes_per_s / 1e6:,.0f}",
            f"copy it to a local disk: cp -r {path} FOLDER",
        )
    wanted = f", of {needed_bytes_per_s / 1e6:,.0f} needed" if needed_bytes_per_s else ""
    return Finding("store", "ok", f"{says}{wanted}")


def _read_rate(store: Any, seconds: float) -> float:
    """Return stored bytes per second; what the machine has in its cache makes it look quicker."""
    rng = np.random.default_rng()
    length = min(_READ_AT_ONCE, store.num_tokens)
    tokens, started = 0, time.monotonic()
    while not tokens or time.monotonic() - started < seconds:
        start = int(rng.integers(store.num_tokens - length + 1))
        store.read(start, start + length)
        tokens += length
    return tokens * store.sources.width * store.dtype.itemsize / (time.monotonic() - started)


def check_output(path: Path, checkpoint_bytes: int, hosts: int) -> Iterator[Finding]:
    """Write and rename a file where checkpoints are to go, and see whether they will fit and be shared.

    Several processes try whether all see what the first one writes; one alone goes by the file system.

    Args:
        path: folder of the run; need not be there.
        checkpoint_bytes: of one checkpoint; 0 if it is not known.
        hosts: that must see the same folder.
    """
    folder = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    refusal = _refusal(folder)
    # All of them together, also those that may not write.
    blind = _blind_processes(folder) if jax.process_count() > 1 else []
    if refusal:
        yield Finding("output", "broken", f"{folder}: {refusal}", f"chmod u+w {folder}")
        return
    kind = _filesystem(folder, _mounts())
    if blind:
        yield _not_shared(path, f"what process 0 writes to {folder} processes {blind} do not see ({kind})")
    elif jax.process_count() > 1:
        yield Finding("output", "ok", f"{folder} can be written to, and all processes see it ({kind})")
    elif hosts > 1 and not _SHARED_FILESYSTEMS.search(kind):
        yield _not_shared(path, f"{folder} is {kind}, which {hosts} hosts do not share")
    else:
        yield Finding("output", "ok", f"{folder} can be written to ({kind})")
    yield _space(folder, checkpoint_bytes)


def _not_shared(path: Path, says: str) -> Finding:
    place = path.absolute()
    return Finding("output", "broken", says, f"mkdir -p {place} && mount -t nfs SERVER:/EXPORT {place}")


def _refusal(folder: Path) -> str:
    """Return why no file can be written and renamed in a folder; empty if one can."""
    try:
        written = _write_token(folder)
        renamed = Path(f"{written}.renamed")
        os.replace(written, renamed)
        renamed.unlink()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _write_token(folder: Path) -> Path:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-", delete=False) as file:
        file.write(b"crosscoder-jax doctor")
        os.fsync(file.fileno())
    return Path(file.name)


def _blind_processes(folder: Path) -> list[int]:
    """Return the processes that do not see a file which the first one writes to its folder."""

    def write() -> bytes:
        try:
            return str(_write_token(folder)).encode()
        except OSError:  # told as the first one's refusal
            return b""

    told = from_first(write).decode()
    try:
        has_seen = multihost_utils.process_allgather(np.array([not told or _appears(Path(told))]))
    finally:
        if told and is_first_process():
            Path(told).unlink(missing_ok=True)
    return np.flatnonzero(~np.asarray(has_seen).reshape(-1)).tolist()


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _LONGEST_TO_APPEAR
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _space(folder: Path, checkpoint_bytes: int) -> Finding:
    free = shutil.disk_usage(folder).free
    needed = (KEPT + 1) * checkpoint_bytes  # the newest is written before the oldest goes
    says = f"{free / 1e9:,.1f} GB free"
    if free < needed:
        says += f", and {KEPT + 1} checkpoints are {needed / 1e9:,.1f} GB"
        return Finding("disk", "broken", says, f"make room: du -sh {folder}/*")
    return Finding("disk", "ok", says + (f", of {needed / 1e9:,.1f} GB needed" if needed else ""))


def _mounts() -> list[tuple[str, str]]:
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:  # no Linux
        return []
    return [(words[1], words[2]) for line in lines if len(words := line.split()) > 2]


def _filesystem(folder: Path, mounts: list[tuple[str, str]]) -> str:
    """Return the kind of the file system that a folder is on."""
    above = [(point, kind) for point, kind in mounts if folder.is_relative_to(point)]
    return max(above, key=lambda mount: len(mount[0]), default=("", "an unknown file system"))[1]


def check_cache(folder: str | None) -> Finding:
    """See whether compiled programs are kept from one start to the next."""
    if not folder:
        return Finding(
            "compile cache",
            "warning",
            "none: every start compiles anew",
            'export JAX_COMPILATION_CACHE_DIR="$HOME/.cache/jax"',
        )
    if "://" not in folder:
        place = next(
            one for one in (Path(folder).absolute(), *Path(folder).absolute().parents) if one.exists()
        )
        if not os.access(place, os.W_OK):
            return Finding("compile cache", "broken", f"{folder} cannot be written to", f"chmod u+w {place}")
    return Finding("compile cache", "ok", folder)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _jaxlib_version() -> tuple[int, ...]:
    return _numbers(_installed("jaxlib") or "")[:3]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0]))
