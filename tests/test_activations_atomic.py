"""Files are whole or not there."""

import errno
import os
import stat

import numpy as np
import pytest

from crosscoder_jax.activations.atomic import (
    as_read_back,
    read_json,
    remove_temporary_files,
    write_bytes_atomically,
    write_json_atomically,
)


def test_new_file_and_replacement(tmp_path):
    path = tmp_path / "file"
    write_bytes_atomically(path, b"one")
    write_bytes_atomically(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["file"]


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_bytes_atomically(tmp_path / "file", b"")
    finally:
        os.umask(old)
    # A temporary file of the tempfile module would be readable by its owner alone.
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_bytes_atomically(path, b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*{"fsync": ("os.fsync", fail), "replace": ("pathlib.Path.replace", fail)}[step])
    with pytest.raises(OSError, match="No space left"):
        write_bytes_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_data_reach_the_disk_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda fd: (events.append("sync"), fsync(fd)))
    monkeypatch.setattr("pathlib.Path.replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_bytes_atomically(tmp_path / "file", b"data")
    assert events == ["sync", "rename", "sync"]  # the last one is the folder


def test_leftovers_of_a_killed_writer_are_removed_and_nothing_else(tmp_path):
    (tmp_path / ".file.0123456789ab.tmp").write_bytes(b"part")
    (tmp_path / "kept.tmp").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"")
    remove_temporary_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "kept.tmp"]


def test_json_is_readable_and_exact(tmp_path):
    path = tmp_path / "x.json"
    floats = [0.1, 1 / 3, 1e-300, 2.0**-1074]
    write_json_atomically(
        path, {"a": floats, "b": {"c": np.float64(0.1), "n": np.int32(7)}, "d": [{}, {"e": []}]}
    )
    assert read_json(path) == {"a": floats, "b": {"c": 0.1, "n": 7}, "d": [{}, {"e": []}]}
    # A list of numbers takes one line, whatever its length; everything else one line each.
    assert path.read_text().splitlines()[1] == f'  "a": {floats},'
    assert path.read_text().endswith("}\n")


@pytest.mark.parametrize("bad", [float("nan"), {"x": float("inf")}, [object()], {1: 2}, {"x": {3: 4}}])
def test_what_is_not_json_is_refused_before_anything_is_written(tmp_path, bad):
    path = tmp_path / "x.json"
    with pytest.raises(ValueError, match=r"x\.json: cannot be written as JSON"):
        write_json_atomically(path, bad)
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        as_read_back(bad)
    assert not os.listdir(tmp_path)


def test_as_read_back_has_no_tuples():
    assert as_read_back({"a": ({"b": (1, 2)},)}) == {"a": [{"b": [1, 2]}]}


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe{}"])
def test_broken_json_names_the_file(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json: is not valid JSON"):
        read_json(path)
