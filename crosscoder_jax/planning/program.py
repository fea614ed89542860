"""What a compiled program says of itself: its collectives, and the cycles of its parts.

Reads the text of an optimised XLA program, in which every computation is listed once. A loop whose
number of passes depends on the data is counted with an assumed number of them.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_COUNTING = {"parameter", "get-tuple-element", "constant", "compare"}
"""All that the condition of a loop that only counts is made of."""
_SHAPE = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation in which chips exchange data."""

    kind: str
    """Such as ``all-reduce``."""
    num_bytes: int
    """What it leaves on one chip."""
    largest: str
    """The largest array of it, as XLA writes shapes."""
    axes: tuple[str, ...]
    """Mesh axes that it goes over; empty where that was not understood."""
    passes: int
    """How often in a step; more than once in loops, with the assumed number where it depends on the data."""
    group_size: int
    """Chips that take part in one exchange."""


@dataclasses.dataclass(frozen=True)
class _Instruction:
    opcode: str
    result: str
    text: str

    @property
    def called(self) -> list[str]:
        return _CALLED.findall(self.text)

    @property
    def branches(self) -> list[str]:
        found = _BRANCHES.search(self.text)
        if found:
            return [name.strip().lstrip("%") for name in found[1].split(",")]
        return re.findall(r"(?:true|false)_computation=%?([\w.-]+)", self.text)

    @property
    def cycles(self) -> int:
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found else 0

    @property
    def scope(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""


class Program:
    """A compiled program, read from its text.

    Args:
        text: as ``compiled.as_text()`` gives it.
        mesh_shape: shards of data and of latents; devices are numbered along the latents first.
        loop_passes: assumed passes of loops whose end depends on the data.
    """

    def __init__(self, text: str, mesh_shape: tuple[int, int], *, loop_passes: int = 1):
        self._mesh_shape, self._loop_passes = mesh_shape, loop_passes
        self._text = text
        self._computations, self._entry = _computations(text)

    def collectives(self) -> list[Collective]:
        """Return every collective, the largest first."""
        passes = self._passes()
        found = [
            self._collective(one, opcode, passes.get(name, 1))
            for name, instructions in self._computations.items()
            for one in instructions
            if (opcode := one.opcode.removesuffix("-start")) in _COLLECTIVES
        ]
        return sorted(found, key=lambda one: -one.num_bytes)

    @property
    def num_custom_calls(self) -> int:
        """How many operations XLA knows no time for; most are views that take none."""
        everything = (one for instructions in self._computations.values() for one in instructions)
        return sum(one.opcode == "custom-call" for one in everything)

    def cycles(self, parts: Iterable[str]) -> dict[str, int]:
        """Return the cycles that the compiler estimates for each part, where it does (on TPU).

        Of conditionals the costliest branch counts.

        Args:
            parts: names of scopes; what lies in none of them comes as ``"other"``.
        """
        return dict(self._cycles_of(self._entry, tuple(parts)))

    @property
    def repetition(self) -> float:
        """How many times as long the program takes as one pass of each counted loop, by its cycles.

        Loops whose passes depend on the data count as one pass here.
        """
        once = self._cycles_of(self._entry, (), is_once=True).total()
        counted = Program(self._text, self._mesh_shape).cycles(())
        return sum(counted.values()) / once if once else 1.0

    def _counted_passes(self, loop: _Instruction) -> int | None:
        """Return the passes of a loop that counts up from 0 to a number, however XLA says so."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
            return int(found[1])
        condition = re.search(r"condition=%?([\w.-]+)", loop.text)
        lines = self._computations.get(condition[1], []) if condition else []
        ends = [re.search(r"s32\[\].* constant\((\d+)\)", line.text) for line in lines]
        counts = [int(end[1]) for end in ends if end]
        is_plain = {line.opcode for line in lines} == _COUNTING
        return counts[0] if is_plain and len(counts) == 1 and "direction=LT" in lines[-1].text else None

    def _cycles_of(
        self, computation: str, parts: tuple[str, ...], *, is_once: bool = False
    ) -> collections.Counter[str]:
        total: collections.Counter[str] = collections.Counter()
        for one in self._computations.get(computation, ()):
            if one.opcode == "while":
                passes = 1 if is_once else self._passes_of(one)
                for name in one.called:
                    inner = self._cycles_of(name, parts, is_once=is_once)
                    total.update({part: passes * cycles for part, cycles in inner.items()})
            elif one.opcode == "conditional":
                branches = [self._cycles_of(name, parts, is_once=is_once) for name in one.branches]
                total.update(max(branches, key=lambda branch: branch.total(), default=collections.Counter()))
            elif one.opcode in ("call", "async-start"):
                for name in one.called:
                    total.update(self._cycles_of(name, parts, is_once=is_once))
            if one.cycles:
                total[_part(one.scope, parts)] += one.cycles
        return total

    def _passes(self) -> Mapping[str, int]:
        """Return how often each computation is done in a step."""
        passes, pending = {self._entry: 1}, [self._entry]
        while pending:
            name = pending.pop()
            for one in self._computations.get(name, ()):
                here = passes[name] * (self._passes_of(one) if one.opcode == "while" else 1)
                for called in [*one.called, *one.branches]:
                    if here > passes.get(called, 0):
                        passes[called] = here
                        pending.append(called)
        return passes

    def _passes_of(self, loop: _Instruction) -> int:
        return self._counted_passes(loop) or self._loop_passes

    def _collective(self, one: _Instruction, kind: str, passes: int) -> Collective:
        arrays = _arrays(one.result)
        if one.opcode.endswith("-start") and kind != "all-reduce":
            # The operand comes first in the result, and what it becomes second.
            arrays = [max(arrays, key=lambda array: array[1])]
        largest = max(arrays, key=lambda array: array[1])
        group = _first_group(one.text)
        return Collective(
            kind=kind,
            num_bytes=round(sum(size for _, size in arrays)),
            largest=largest[0],
            axes=self._axes(group),
            passes=passes,
            group_size=len(group) or math.prod(self._mesh_shape),
        )

    def _axes(self, group: list[int]) -> tuple[str, ...]:
        places = {divmod(device, self._mesh_shape[1]) for device in group}
        names = ("data", "latent")
        return tuple(name for axis, name in enumerate(names) if len({place[axis] for place in places}) > 1)


def _computations(text: str) -> tuple[Mapping[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    entry = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_Instruction(found[3], found[2], line))
    return computations, entry


def _part(scope: str, parts: tuple[str, ...]) -> str:
    words = set(re.findall(r"[\w.-]+", scope))
    return next((part for part in parts if part in words), "other")


def _arrays(result: str) -> list[tuple[str, float]]:
    """Return each array of a result type and its bytes."""
    return [
        (f"{kind}[{sizes}]", math.prod(int(size) for size in sizes.split(",") if size) * _itemsize(kind))
        for kind, sizes in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", result))
    ]


def _itemsize(kind: str) -> float:
    bits = re.search(r"\d+", kind)
    return _BYTES.get(kind) or (int(bits[0]) / 8 if bits else 1)


def _first_group(text: str) -> list[int]:
    """Return the devices of the first group of a collective; empty if that is not understood."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return [int(device) for device in listed[1].split(",") if device]
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _numbered(counted[3], counted[4]).reshape(int(counted[1]), int(counted[2]))[0].tolist()
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return [int(pairs[1]), int(pairs[2])]
    return _group_of_mesh(text)


def _group_of_mesh(text: str) -> list[int]:
    pattern = (
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
    )
    found = re.search(pattern, text)
    if not found:
        return []
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    ids = _numbered(found[2], found[3]) if found[2] else np.arange(math.prod(sizes.values()))
    grouped = re.findall(r"'(\w+)'", found[4])
    taken = tuple(slice(None) if name in grouped else 0 for name in sizes)
    return np.atleast_1d(ids.reshape(tuple(sizes.values()))[taken]).ravel().tolist()


def _numbered(sizes: str, order: str | None) -> np.ndarray:
    shape = [int(size) for size in sizes.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids if order is None else ids.transpose([int(axis) for axis in order.split(",")])
