"""A command's options as its config: flags, a saved config file, typos refused by the nearest name."""

import dataclasses
import difflib
import functools
import itertools
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from crosscoder_jax.activations.atomic import read_json
from crosscoder_jax.configs import config_from_json
from crosscoder_jax.language_models import TextSource

T = TypeVar("T")


def parse_options(
    config_class: type[T], options: Sequence[str], *, prog: str = "", description: str = ""
) -> T:
    """Return a config from its options and, with ``--config FILE``, from a saved one.

    Options override the file.

    Args:
        config_class: the dataclass whose fields are the options, nested dataclasses' fields too.
        options: words of the command line, such as ``["--k", "5"]``.
        prog: what the usage line of ``--help`` calls the command.
        description: what ``--help`` says before the options.

    Raises:
        ValueError: if an option is mistyped, naming the nearest, a flag is given a value, an option has
            a value that the config refuses, or the file is missing or not a config of this class, naming the
            field.
        SystemExit: from ``--help``, or after saying which option lacks a value of its type.
    """
    options, file = _take_config_file(options)
    _refuse_typos(config_class, options)
    saved = {} if file is None else _read_config(config_class, file)
    try:
        return tyro.cli(
            # A class would have its own errors shown as faults of the syntax; a function's are left alone.
            functools.partial(config_class, **saved),
            prog=prog,
            description=f"{description}\n\n--config FILE reads the options of an earlier run.",
            args=list(options),
            config=(tyro.conf.OmitArgPrefixes,),
            registry=_REGISTRY,
        )
    except _TextError as error:
        raise ValueError(str(error)) from error


class _TextError(Exception):
    """A text that is not understood; no ValueError, for which tyro would show the usage in its place."""


def option_types(config_class: type) -> dict[str, Any]:
    """Return what each option holds, nested dataclasses' too, by its name on the command line.

    Examples:
        >>> option_types(TextSource)["location"]
        <class 'str'>
    """
    types: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(config_class).items():
        is_nested = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        types |= option_types(kind) if is_nested else {name.replace("_", "-"): kind}
    return types


def name_flags(message: str, config_class: type) -> str:
    """Return a message with every ``name=`` that is an option of the config written as its flag.

    Examples:
        >>> name_flags("share=2 needs batch_size=8", dataclasses.make_dataclass("C", [("batch_size", int)]))
        'share=2 needs --batch-size=8'
    """
    names = "|".join(name.replace("-", "_") for name in option_types(config_class))
    # Not inside a word, a quoted value or the fields of a text.
    pattern = rf"(?<![\w'\"?&./-])({names})="
    return re.sub(pattern, lambda found: f"--{found[1].replace('_', '-')}=", message)


def _read_config(config_class: type, file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"--config {file}: there is no such file: name a .command.json beside a result")
    config = config_from_json(config_class, read_json(file), where=str(file))
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _take_config_file(options: Sequence[str]) -> tuple[list[str], Path | None]:
    rest, file = [], None
    waiting = iter(options)
    for option in waiting:
        if option == "--config":
            file = next(waiting, None)
            if file is None:
                raise ValueError("--config needs the name of a file")
        elif option.startswith("--config="):
            file = option.removeprefix("--config=")
        else:
            rest.append(option)
    return rest, None if file is None else Path(file)


def _refuse_typos(config_class: type, options: Sequence[str]) -> None:
    types = option_types(config_class)
    flags = [f"{no}{name}" for name, kind in types.items() if kind is bool for no in ("", "no-")]
    known = ["help", *types, *flags]
    for option, following in itertools.zip_longest(options, options[1:]):
        if not option.startswith("--"):
            continue
        name, equals, _ = option.removeprefix("--").partition("=")
        name = name.replace("_", "-")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{close[0]}?" if close else "see --help"
            raise ValueError(f"no option --{name}: {hint}")
        if name in flags and (equals or following in ("True", "False")):
            name = name.removeprefix("no-")
            raise ValueError(f"--{name} takes no value: write --{name} or --no-{name}")


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _text_source(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Read a text as :meth:`TextSource.parse` does."""
    if info.type is not TextSource:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="LABEL=LOCATION[?FIELD=VALUE&...]",
        instance_from_str=lambda args: _parse_text(args[0]),
        is_instance=lambda instance: isinstance(instance, TextSource),
        str_from_instance=lambda text: [str(text)],
    )


def _parse_text(given: str) -> TextSource:
    try:
        return TextSource.parse(given)
    except ValueError as error:
        raise _TextError(str(error)) from error
