"""What a compiled program sends between the devices of a mesh."""

import re

import numpy as np


def over(where, data, latent):
    """The axis over which groups of the devices of a mesh ``data`` x ``latent`` reduce, or "both"."""
    devices = np.arange(data * latent).reshape(data, latent)
    named = {
        frozenset(tuple(row) for row in devices.tolist()): "latent",
        frozenset(tuple(row) for row in devices.T.tolist()): "data",
        frozenset([tuple(devices.ravel().tolist())]): "both",
    }
    return named[frozenset(where)]


def collectives(text):
    """(kind, shapes sent, groups of devices) of every collective of a compiled program."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    where = (
        r"mesh\[[^\]]*\](?:, device_ids=\(\S*\))? \{.*?\}|\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
    )
    pattern = re.compile(rf"= (.*?) ({kinds})(?:-start)?\(.*?replica_groups=({where})")
    found = []
    for line in text.splitlines():
        if re.search(rf" ({kinds})(-start)?\(", line):
            match = pattern.search(line)
            assert match, line
            shapes = re.findall(r"[a-z]+\d*\[([\d,]*)\]", match[1])
            found.append(
                (match[2], [tuple(int(n) for n in s.split(",") if n) for s in shapes], groups(match[3]))
            )
    return found


def groups(text):
    """The groups of devices that a compiled program names, in any of XLA's three ways.

    ``{{0,1},{2,3}}``, ``[4,2]<=[2,4]T(1,0)`` or ``mesh['a'=2,'b'=4] {'b'}``.
    """
    if text.startswith("{"):
        return {tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text[1:-1])}
    if text.startswith("mesh"):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", text)}
        over = re.findall(r"'(\w+)'", text[text.rindex("{") :])
        devices = np.arange(np.prod(list(sizes.values())))
        if relabelled := re.search(r"device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\)", text):
            source, order = ([int(n) for n in part.split(",")] for part in relabelled.groups())
            devices = devices.reshape(source).transpose(order)
        axes = list(sizes)
        order = [i for i, axis in enumerate(axes) if axis not in over] + [axes.index(axis) for axis in over]
        size = int(np.prod([sizes[axis] for axis in over]))
        grid = devices.reshape(list(sizes.values())).transpose(order)
        return {tuple(row) for row in grid.reshape(-1, size).tolist()}
    match = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert match, text
    shape, source = ([int(n) for n in part.split(",")] for part in match.group(1, 2))
    devices = np.arange(np.prod(source)).reshape(source)
    if match[3]:
        devices = devices.transpose([int(n) for n in match[3].split(",")])
    return {tuple(row) for row in devices.reshape(shape).tolist()}
