"""The commands: take the config of each, call the room that does it, show the result.

Harvest, train, calibrate, evaluate, diff, report: in this order they lead from two language models
to a page of evidence. Every mistake of the user is one line on standard error.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from rich.console import Console

from crosscoder_jax.activations.atomic import write_bytes_atomically, write_json_atomically
from crosscoder_jax.activations.manifest import Manifest
from crosscoder_jax.arguments import name_flags, parse_options
from crosscoder_jax.commands import (
    Calibrate,
    Devices,
    Diff,
    Doctor,
    Encode,
    Evaluate,
    Export,
    ImportActs,
    Plan,
    Processes,
    Report,
    Train,
)
from crosscoder_jax.configs import config_from_json, config_to_json
from crosscoder_jax.language_models import HarvestConfig
from crosscoder_jax.outputs import check_file, check_folder, check_vacant
from crosscoder_jax.terminal import print_table, progress_bar
from crosscoder_jax.training.preemption import PREEMPTED, PreemptedError
from crosscoder_jax.training.watchdog import watchdog
from crosscoder_jax.typing import Progress

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from crosscoder_jax.training.runs import Run
    from crosscoder_jax.training.tracking import Tracker

_EXPECTED_ERRORS = (ValueError, OSError, FloatingPointError, ModuleNotFoundError)
_COUNTED = ("counts", "confirmed_by_class")
"""What a summary has of each exclusive class: those claimed by norms, and those confirmed."""
_NOTABLE_OUTLIER_SHARE = 0.5
"""Layers of real models, without their attention sinks, have 0.01 to 0.04."""
_LABELS_AT_ONCE = 1 << 24
_LONGEST_BATCH = 1800.0
"""Seconds in which several processes must have measured a batch, the compilation included."""
_NOTABLE_EPOCHS = 1000
"""Published runs see their tokens once; small planted ones have taken hundreds of epochs."""


def harvest(config: HarvestConfig) -> None:
    """Run two models on the same text and store their activations."""
    from crosscoder_jax.language_models import harvest as run_harvest

    check_folder(config.store)
    with progress_bar("harvest") as progress:
        manifest = run_harvest(
            config, progress, on_accepted=lambda: _save_command(config, _command_beside(config.store))
        )
    _print_store(config.store, manifest)
    _warn_of_ended_texts(config, manifest)


def _warn_of_ended_texts(config: HarvestConfig, manifest: Manifest) -> None:
    """Say which texts ended before they had given their share of the tokens."""
    ended = manifest.provenance["texts"]["ended"]
    if not ended:
        return
    kept = _tokens_by_label(config.store)
    shares = {text.label: text.share for text in config.texts}
    for label in ended:
        asked = round(config.max_tokens * shares[label] / sum(shares.values()))
        if kept[label] < asked:
            _warn(f"text {label!r} ended early: {kept[label]:,} tokens kept of {asked:,} asked for")


def _tokens_by_label(store: str | Path) -> dict[str, int]:
    from crosscoder_jax.activations.store import ActivationStore

    opened = ActivationStore.open(store)
    labels = opened.manifest.labels
    counts = np.zeros(len(labels), np.int64)
    for start in range(0, opened.num_tokens, _LABELS_AT_ONCE):
        column = opened.labels(start, min(start + _LABELS_AT_ONCE, opened.num_tokens))
        counts += np.bincount(column, minlength=len(labels))
    return dict(zip(labels, counts.tolist(), strict=True))


def _warn_of_outliers(manifest: Manifest) -> None:
    """Say which sources' squared norms lie in a few tokens, which training would then mostly serve."""
    for name, statistics in manifest.statistics.items():
        if statistics.outlier_share > _NOTABLE_OUTLIER_SHARE:
            mean, root_mean_square = statistics.mean_norm, statistics.root_mean_square_norm
            _warn(
                f"a few tokens hold at least {statistics.outlier_share:.0%} of the squared norm of {name} "
                f"(mean norm {mean:,.1f}, root mean square {root_mean_square:,.1f}): as a rule attention "
                "sinks, which a crosscoder then spends itself on. "
                "`harvest --outlier-multiple 5` leaves out tokens of more than five times the median norm"
            )


C = TypeVar("C", bound=Processes)


def _in_processes(run: Callable[[C], None]) -> Callable[[C], None]:
    """Let a command be one of several processes, of which the first alone is heard."""

    @functools.wraps(run)
    def joined(config: C) -> None:
        if not config.is_distributed:
            run(config)
            return
        from crosscoder_jax.sharding import is_first_process, start_processes

        start_processes(config.coordinator, config.num_processes, config.process_id)
        if not isinstance(config, Train):
            # JAX notes a SIGTERM for those who ask, as training does; what saves nothing just ends.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with contextlib.nullcontext() if is_first_process() else _silence():
            run(config)

    return joined


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Print nothing: the first of several processes says it. Errors that leave the block are heard."""
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


@contextlib.contextmanager
def _watched_bar(name: str, config: Processes) -> Iterator[Progress]:
    """Show progress, without which one of several processes ends after a while, as a stuck training does."""
    seconds = _LONGEST_BATCH if config.is_distributed else None
    with progress_bar(name) as show, watchdog(seconds) as is_alive:

        def tell(done: int, total: int, unit: str) -> None:
            is_alive()
            show(done, total, unit)

        yield tell


@_in_processes
def train(config: Train) -> None:
    """Train a crosscoder on a store; run it again to go on where it stopped."""
    from crosscoder_jax.activations.store import ActivationStore
    from crosscoder_jax.activations.view import TokenView
    from crosscoder_jax.training.loop import RunOptions, fit_together
    from crosscoder_jax.training.memory import runs_at_once

    check_folder(config.output)
    store = ActivationStore.open(config.store)
    runs = config.runs()
    commands = {run.output: run for run in runs}
    recipes = [run.recipe(store.sources) for run in runs]
    mesh = _mesh(config)
    options = RunOptions(
        split=config.split(),
        window_tokens=config.window_tokens,
        lanes=config.lanes,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        step_timeout=config.step_timeout,
        is_optimizer_spread=config.is_optimizer_spread,
        null=config.null_data(),
    )
    # Refuses a share that holds nothing out, while nothing is trained yet.
    held_out = TokenView.of_split(store, options.split, held_out=True)
    _warn_of_epochs(config, store.num_tokens - held_out.num_tokens)
    _warn_of_lanes(config)
    _warn_of_outliers(store.manifest)
    if len(runs) > 1:
        Console().print(f"{len(runs)} crosscoders, {runs_at_once(recipes, mesh)} in turns over each read")
    with progress_bar("train") as progress:
        fit_together(
            recipes,
            store,
            list(commands),
            options=options,
            mesh=mesh,
            make_trackers=lambda folder: _begin(commands[folder]),
            progress=progress,
        )
    for run in runs:
        Console().print(f"crosscoder: {run.output / 'crosscoder'}")
    if len(runs) > 1:
        _write_once(lambda: _save_command(config, config.output / "train.command.json"))


def _warn_of_lanes(config: Train) -> None:
    """Say when a host reads what another one reads, too."""
    from jax import process_count

    sharing = min(process_count(), config.data_shards)
    if config.lanes % sharing:
        _warn(
            f"--lanes {config.lanes} for {sharing} processes that share a batch: each reads more of the "
            f"store than its share; a new run with --lanes {sharing}, or a multiple, reads every file once"
        )


def _warn_of_epochs(config: Train, num_tokens: int) -> None:
    """Say when training would see its tokens more often than they can teach anything new."""
    seen = config.num_steps * config.batch_size
    if 0 < _NOTABLE_EPOCHS * num_tokens < seen:
        _warn(
            f"--num-steps {config.num_steps} of --batch-size {config.batch_size} are "
            f"{seen / num_tokens:,.0f} epochs of the {num_tokens:,} tokens to train on: take fewer steps, or "
            "harvest more tokens"
        )


def _begin(run: Train) -> "Sequence[Tracker]":
    """Keep the command of a run whose folder is now its own, should it be killed, and log to TensorBoard."""
    from crosscoder_jax.training.tracking import TensorBoardTracker

    _save_command(run, run.output / "train.command.json")
    return [TensorBoardTracker(run.output / "tensorboard")] if run.tensorboard else []


@_in_processes
def evaluate(config: Evaluate) -> None:
    """Measure a run's crosscoder on its held-out tokens."""
    from crosscoder_jax.sharding import Shardings, on_mesh
    from crosscoder_jax.training.evaluate import evaluate as measure
    from crosscoder_jax.training.runs import Run

    if config.splice and config.is_distributed:
        raise ValueError("--splice runs language models in one process: leave the other processes out")
    run = Run.open(config.run, config.store)
    if config.splice and run.null is not None:
        raise ValueError(
            f"{config.run}: was trained on null data, which no model has: evaluate without --splice"
        )
    measured_on, mesh = run.measured_on(), _mesh(config)
    with on_mesh(mesh), _watched_bar("evaluate", config) as progress:
        crosscoder = run.crosscoder(Shardings.for_mesh(mesh))
        metrics = measure(crosscoder, run.held_out(), batch_size=config.batch_size, progress=progress)
    record: dict[str, Any] = {"split": "held-out", "measured_on": measured_on}
    if config.splice:
        metrics |= _spliced(config, run)
        texts = [str(text) for text in config.splice_texts or ()]
        record["spliced_on"] = ", ".join(texts) or "held-out"

    def write() -> None:
        write_json_atomically(config.run / "evaluation.json", {**record, **metrics})
        _save_command(config, config.run / "evaluate.command.json")

    _write_once(write)
    rows = [(name, _with_error(name, metrics)) for name in metrics if not name.startswith("se_")]
    print_table(f"{config.run}: held-out tokens", ("metric", "value"), rows)


def _with_error(name: str, metrics: Mapping[str, float | None]) -> str:
    """Write a metric with its standard error, where it has one."""
    value, error = metrics[name], metrics.get(f"se_{name}")
    shown = "n/a" if value is None else f"{value:,.4g}"
    return shown if error is None else f"{shown} ± {error:.2g}"


def _spliced(config: Evaluate, run: "Run") -> dict[str, float | None]:
    from crosscoder_jax.language_models import evaluate_spliced

    with progress_bar("splice") as progress:
        return evaluate_spliced(run.crosscoder(), run.store, run.split, config.splicing(), progress)


@_in_processes
def calibrate(config: Calibrate) -> None:
    """Set the inference threshold so that the mean L0 over the held-out tokens is k."""
    from crosscoder_jax.metrics import named_thresholds
    from crosscoder_jax.sharding import Shardings, on_mesh
    from crosscoder_jax.training.evaluate import calibrate as find_threshold
    from crosscoder_jax.training.runs import Run

    run = Run.open(config.run, config.store)
    mesh, view = _mesh(config), run.held_out()
    with on_mesh(mesh), _watched_bar("calibrate", config) as progress:
        before = run.crosscoder(Shardings.for_mesh(mesh))
        after = find_threshold(before, view, batch_size=config.batch_size, progress=progress)
    run.replace_crosscoder(after, calibrated_on_tokens=view.num_tokens)
    _write_once(lambda: _save_command(config, config.run / "calibrate.command.json"))
    names = after.config.threshold_names
    old, new = (named_thresholds(one.threshold[...], names) for one in (before, after))
    for name in new:
        Console().print(f"{name}: {float(old[name]):.6g} -> {float(new[name]):.6g}")


@_in_processes
def diff(config: Diff) -> None:
    """Write decoder norms, classes and Latent Scaling of every latent as one table."""
    from crosscoder_jax.diffing import DiffConfig, diff_run, write_diff
    from crosscoder_jax.diffing.nulls import read_null_counts
    from crosscoder_jax.report.files import read_run
    from crosscoder_jax.report.gaps import stale_files
    from crosscoder_jax.sharding import Shardings, on_mesh
    from crosscoder_jax.training.runs import Run

    run = Run.open(config.run, config.store)
    null_counts = None if config.null_run is None else read_null_counts(run, config.null_run)
    settings = DiffConfig(batch_size=config.batch_size, num_snippet_latents=config.num_snippet_latents)
    measured_on, mesh = run.measured_on(), _mesh(config)
    with on_mesh(mesh), _watched_bar("diff", config) as progress:
        crosscoder = run.crosscoder(Shardings.for_mesh(mesh))
        result = diff_run(crosscoder, run.held_out(), settings, progress)
    result.summary["measured_on"] = measured_on
    if null_counts is not None:
        result.summary["null"] = null_counts

    def write() -> None:
        write_diff(result, config.run / "diff")
        _save_command(config, config.run / "diff.command.json")

    _write_once(write)
    for sentence in stale_files(read_run(config.run)):
        _warn(sentence)
    _print_exclusive(config.run, result.summary)
    Console().print(f"table: {config.run / 'diff' / 'latents.parquet'}")


def _print_exclusive(run: Path, summary: Mapping[str, Any]) -> None:
    """Print how many latents are exclusive, claimed and confirmed, beside those of a null run.

    Of those that are exclusive by design the claim says nothing: they are told apart.
    """
    if "counts" not in summary:
        return
    counted = {"": summary}
    if "null" in summary:
        counted["null run: "] = summary["null"]
    columns = [f"{who}{what}" for who in counted for what in ("claimed by norms", "confirmed")]
    rows = []
    for name in ("base-only", "chat-only"):
        pairs = [_found(one, what, name) for one in counted.values() for what in _COUNTED]
        rows.append((name, *("-" if number is None else str(number) for number in pairs)))
    print_table(f"{run}: exclusive latents", ("class", *columns), rows)
    designed = summary.get("by_design", {})
    if designed:
        numbers = [sum(designed.get(what, {}).values()) for what in _COUNTED]
        Console().print(
            f"Not among these: {numbers[0]} latents that write to one model by design. Latent Scaling "
            f"confirms {numbers[1]} of them: what they hold is in that model alone."
        )


def _found(summary: Mapping[str, Any], what: str, latent_class: str) -> int | None:
    """Return a count of a class without the latents that are exclusive by design."""
    number = summary.get(what, {}).get(latent_class)
    by_design = summary.get("by_design", {}).get(what, {}).get(latent_class, 0)
    return None if number is None else number - by_design


def report(config: Report) -> None:
    """Write one self-contained HTML page about one or several diffed runs."""
    from crosscoder_jax.report import write_report

    if not config.output.is_dir():
        check_file(config.output)
    path = write_report(config.content, config.output, tell=_warn)
    _save_command(config, path.with_suffix(".command.json"))
    Console().print(f"report: {path}")


def encode(config: Encode) -> None:
    """Encode an array of raw activations with any crosscoder, of this package or another library."""
    import io

    from crosscoder_jax.interop import encode_array, load, load_provenance, locate
    from crosscoder_jax.sources import Sources

    check_file(config.output)
    place = locate(config.crosscoder)
    crosscoder = load(place)
    recorded = load_provenance(place).get("stored_sources")
    stored = None if recorded is None else config_from_json(Sources, recorded, where="stored_sources")
    acts = _read_array(config.acts)
    encoded = encode_array(crosscoder, acts, stored=stored, batch_size=config.batch_size)
    buffer = io.BytesIO()
    np.savez(buffer, indices=encoded.indices, values=encoded.values, recon=encoded.recon)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(config.output, buffer.getvalue())
    _save_command(config, config.output.with_suffix(".command.json"))
    Console().print(f"{len(acts):,} tokens, at most {encoded.indices.shape[-1]} active: {config.output}")


def import_acts(config: ImportActs) -> None:
    """Write a store from activations that dictionary_learning or SAELens cached."""
    from crosscoder_jax.interop.caches import import_activations

    check_folder(config.store)
    texts = config.texts()
    vocabulary = None if config.tokenizer is None else _vocabulary(config.tokenizer)
    with progress_bar("import") as progress:
        manifest = import_activations(
            config.store, texts, models=config.models(), vocabulary=vocabulary, progress=progress
        )
    _save_command(config, _command_beside(config.store))
    _print_store(config.store, manifest)


def export(config: Export) -> None:
    """Write a crosscoder of any known format in another one."""
    from crosscoder_jax.interop import load, save

    check_vacant(config.output)
    crosscoder = load(config.crosscoder, sources=config.source_names or None, scales=config.scales or None)
    folder = save(crosscoder, config.output, format=config.format)
    _save_command(config, _command_beside(folder))
    Console().print(f"{config.format}: {folder}", soft_wrap=True)


def plan(config: Plan) -> None:
    """Tell whether a run would fit on chips that need not be here, and how fast it might go."""
    from crosscoder_jax.planning import make_plan, wording

    planned_for = config.config()
    with progress_bar("compile") as progress:
        made = make_plan(planned_for, progress)
    if config.json:
        sys.stdout.write(json.dumps(wording.plan_to_json(made), indent=2) + "\n")
        return
    console = Console(highlight=False, markup=False)
    console.print(wording.describe(planned_for))
    print_table(*wording.memory_table(made))
    steps = wording.step_table(made)
    if steps is not None:
        print_table(*steps)
        console.print(wording.LEGEND, style="dim")
    for line in wording.closing_lines(made):
        console.print(line)


@_in_processes
def doctor(config: Doctor) -> None:
    """Look for what would stop or slow down a training run here."""
    from crosscoder_jax.planning.doctor import Needs, examine, examine_together

    console = Console(highlight=False, soft_wrap=True)
    colours = {"ok": "green", "warning": "yellow", "broken": "red"}
    needs = Needs() if config.plan is None else Needs.read(config.plan)
    states = []
    look = examine_together if config.is_distributed else examine
    for finding in look(
        store=config.store, output=config.output, needs=needs, hosts=config.hosts, seconds=config.seconds
    ):
        states.append(finding.state)
        colour, says = colours[finding.state], _one_line(finding.says)
        console.print(f"[{colour}]{finding.state:<8}[/{colour}] [bold]{finding.name}[/bold]: {says}")
        if finding.remedy:
            console.print(f"         fix: {_one_line(finding.remedy)}")
    if "broken" in states:
        raise SystemExit(1)


@dataclasses.dataclass(frozen=True)
class _Command:
    config: type
    run: Callable[[Any], None]
    is_resumed: bool = False
    """Whether the same command, given again, goes on where it was stopped."""
    short: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Shorter names of options."""


COMMANDS = {
    "harvest": _Command(HarvestConfig, harvest, is_resumed=True),
    "train": _Command(Train, train, is_resumed=True),
    "calibrate": _Command(Calibrate, calibrate),
    "evaluate": _Command(Evaluate, evaluate),
    "diff": _Command(Diff, diff),
    "report": _Command(Report, report),
    "import-acts": _Command(ImportActs, import_acts, is_resumed=True),
    "encode": _Command(Encode, encode),
    "export": _Command(Export, export),
    "plan": _Command(Plan, plan, short={"--latents": "--num-latents", "--batch": "--batch-size"}),
    "doctor": _Command(Doctor, doctor),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Exits with 2 for wrong usage, 1 for any other mistake of the user, 130 when interrupted, 75 when a
    training run that was told to end by SIGTERM has saved where it is, 76 when a step of one does not end:
    given again, the command goes on.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        Console(soft_wrap=True).print(_overview(), highlight=False, markup=False)
        return
    name, options = given[0], given[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(COMMANDS)}"
        _fail(f"no command {name!r}: {hint}", 2)
    command = COMMANDS[name]
    try:
        command.run(parse(name, options))
    except KeyboardInterrupt:
        way = "goes on from what is saved" if command.is_resumed else "begins anew"
        _print_error(f"interrupted: the same command, given again, {way}")
        if arguments is None:  # the process is this command's own
            _leave_at_once(130)
        raise SystemExit(130) from None
    except PreemptedError as told:
        _print_error(f"{told}: give the same command again")
        raise SystemExit(PREEMPTED) from None
    except _EXPECTED_ERRORS as error:
        _print_error(name_flags(_described(error), command.config))
        _abandon_others(arguments)
        raise SystemExit(1) from None
    except Exception:
        if arguments is None and _is_among_others():
            traceback.print_exc()
        _abandon_others(arguments)
        raise


def _abandon_others(arguments: Sequence[str] | None) -> None:
    """End one of several processes at once: it would wait for the others, and they for it in a collective."""
    if arguments is None and _is_among_others():
        _leave_at_once(1)


def _is_among_others() -> bool:
    import jax

    return jax.distributed.is_initialized()


def _leave_at_once(code: int) -> None:
    """End the process without the interpreter's farewell.

    XLA goes on with a compilation whose waiting was interrupted, in a thread of its own; the interpreter
    would take the client away from under it, and the process would end in a segmentation fault.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _described(error: BaseException) -> str:
    """Return what an error says; of one from the operating system the path first, without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}: check the path"
    return str(error) or type(error).__name__


def parse(name: str, options: Sequence[str]) -> Any:
    """Return the config of command ``name`` from its options; raises as :func:`parse_options`."""
    command = COMMANDS[name]
    description = command.run.__doc__ or ""
    options = [_at_length(option, command.short) for option in options]
    return parse_options(command.config, options, prog=f"crosscoder-jax {name}", description=description)


def _at_length(option: str, short: Mapping[str, str]) -> str:
    name, equals, value = option.partition("=")
    return f"{short.get(name, name)}{equals}{value}"


def _print_store(store: str | Path, manifest: Manifest) -> None:
    rows = [
        (source.name, source.model, source.hook_point, f"{source.width}", f"{statistics.mean_norm:.1f}")
        for source, statistics in zip(manifest.sources, manifest.statistics.values(), strict=True)
    ]
    print_table(
        f"{store}: {manifest.num_tokens:,} tokens of {manifest.num_documents:,} documents",
        ("source", "model", "hook point", "width", "mean norm"),
        rows,
    )
    _warn_of_outliers(manifest)


def _vocabulary(model: str) -> dict[int, bytes]:
    from crosscoder_jax.language_models import ModelReference, load_tokenizer, vocabulary_bytes

    return vocabulary_bytes(load_tokenizer(ModelReference.parse(model)))


def _mesh(config: Devices) -> "Mesh | None":
    from crosscoder_jax.sharding import make_mesh

    shards = (config.data_shards, config.latent_shards)
    return None if shards == (1, 1) else make_mesh(*shards)


def _save_command(config: Any, path: Path) -> None:
    """Keep a command beside what it wrote, without the processes that it ran in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = config.without_processes() if isinstance(config, Processes) else config
    write_json_atomically(path, config_to_json(kept))


def _write_once(write: Callable[[], None]) -> None:
    """Let the first of several processes write; all of them must call this, and all are told if it fails."""
    from crosscoder_jax.sharding import from_first

    def written() -> bytes:
        write()
        return b""

    from_first(written)


def _command_beside(folder: str | Path) -> Path:
    """Return where the command that wrote a folder is kept."""
    return Path(f"{os.path.abspath(folder)}.command.json")


def _read_array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file: name a .npy file, as numpy.save writes it")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: is not a whole .npy file of numbers ({error})") from error


def _overview() -> str:
    lines = [
        f"  {name:<11} {(command.run.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: crosscoder-jax COMMAND [options]",
            "",
            "Which concepts belong to one of two language models only? In this order:",
            "",
            *lines,
            "",
            "crosscoder-jax COMMAND --help tells the options of a command.",
        ]
    )


def _fail(message: str, code: int) -> None:
    _print_error(message)
    raise SystemExit(code)


def _print_error(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {_one_line(message)}", highlight=False)


def _warn(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(
        f"[yellow]warning:[/yellow] {_one_line(message)}", highlight=False
    )


def _one_line(message: str) -> str:
    return " ".join(message.split()).replace("[", r"\[")
