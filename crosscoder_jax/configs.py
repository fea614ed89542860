"""Frozen dataclasses as plain data and back, so that every result has its config beside it.

A value of a union of dataclasses, such as ``BatchTopK | ReLU``, carries its class name as ``"type"``.
Reading checks every name and type and never runs code from the file.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def config_to_json(config: Any) -> Any:
    """Return plain data (dicts, lists, numbers, strings) from a dataclass."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: config_to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": type(config).__name__, **fields}
    if isinstance(config, Mapping):
        return {str(key): config_to_json(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [config_to_json(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def config_from_json(cls: type[T], data: Any, *, where: str = "config") -> T:
    """Rebuild a dataclass from :func:`config_to_json`.

    Args:
        cls: the dataclass to build.
        data: plain data; fields left out take their defaults.
        where: what to call the data in errors, such as the file it came from.

    Raises:
        ValueError: naming an unknown field and the nearest known one, a missing field, or a value
            of the wrong type.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is {data!r}, but {cls.__name__} needs named fields")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    given = {name: value for name, value in data.items() if name != "type"}
    if data.get("type", cls.__name__) != cls.__name__:
        raise ValueError(f"{where}.type={data['type']!r} must be {cls.__name__!r}")
    for name in given:
        if name not in fields:
            raise ValueError(f"{where} has no field {name!r}{_nearest(name, fields)}")
    for name, field in fields.items():
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_required and name not in given:
            raise ValueError(f"{where} lacks the field {name!r} of {cls.__name__}")
    return cls(**{name: _read(hints[name], value, f"{where}.{name}") for name, value in given.items()})


def value_from_json(hint: Any, data: Any, *, where: str) -> Any:
    """Rebuild a value of any type that a dataclass' field may have, such as ``BatchTopK | ReLU | None``.

    Raises:
        ValueError: as :func:`config_from_json`.
    """
    return _read(hint, data, where)


def config_differences(mine: Any, theirs: Any) -> list[str]:
    """Return one line per field in which two pieces of plain data differ: ``name: mine, was theirs``.

    A field that one side lacks is ``None`` there, as an option that a later version added is by default.
    """
    return [f"{path}: {left!r}, was {right!r}" for path, left, right in differing_leaves(mine, theirs)]


def differing_leaves(
    mine: Any, theirs: Any, *, absent: Any = None, path: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield where two pieces of plain data differ, as dotted path, mine and theirs, one per leaf.

    A tuple equals the list that it becomes in JSON, and is yielded as one.

    Args:
        mine: dicts, lists, numbers, strings; its order comes first.
        theirs: the same.
        absent: stands for what one side lacks.
        path: what the paths begin with.

    Examples:
        >>> list(differing_leaves({"base": {"width": 4}, "k": (1, 2)}, {"base": {"width": 8}, "k": [1, 2]}))
        [('base.width', 4, 8)]
    """
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        prefix = f"{path}." if path else ""
        for name in [*mine, *(name for name in theirs if name not in mine)]:
            pair = (side.get(name, absent) for side in (mine, theirs))
            yield from differing_leaves(*pair, absent=absent, path=f"{prefix}{name}")
        return
    left, right = _as_lists(mine), _as_lists(theirs)
    if left != right:
        yield path, left, right


def _as_lists(value: Any) -> Any:
    return [_as_lists(entry) for entry in value] if isinstance(value, list | tuple) else value


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]!r}?" if close else f": it has {', '.join(known)}"


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _read_union(arguments, value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return config_from_json(hint, value, where=where)
    if origin is tuple:
        return _read_tuple(arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{where}={value!r} must be one of {', '.join(map(repr, arguments))}")
        return value
    return _read_plain(hint, value, where)


def _read_union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    classes = {m.__name__: m for m in members if isinstance(m, type) and dataclasses.is_dataclass(m)}
    if isinstance(value, Mapping) and classes:
        name = value.get("type") or (next(iter(classes)) if len(classes) == 1 else None)
        if name not in classes:
            raise ValueError(f"{where}.type={name!r} must be one of {', '.join(classes)}")
        return config_from_json(classes[name], value, where=where)
    errors = []
    for member in members:
        if member is type(None) or dataclasses.is_dataclass(member):
            continue
        try:
            return _read(member, value, where)
        except ValueError as error:
            errors.append(error)
    raise errors[0] if errors else ValueError(f"{where}={value!r} must be one of {', '.join(classes)}")


def _read_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}={value!r} must be a list")
    hints = [arguments[0]] * len(value) if len(arguments) == 2 and arguments[1] is ... else list(arguments)
    if len(hints) != len(value):
        raise ValueError(f"{where}={value!r} must have {len(hints)} entries")
    return tuple(_read(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))


def _read_plain(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    expected = typing.get_origin(hint) or hint
    is_bool_for_number = isinstance(value, bool) and hint is not bool
    if expected is not Any and (is_bool_for_number or not isinstance(value, expected)):
        raise ValueError(f"{where}={value!r} must be a {getattr(hint, '__name__', hint)}")
    return value
