"""Paths that cannot hold a result are refused by name, and what is refused leaves no folder behind."""

import pytest

from crosscoder_jax.outputs import check_file, check_folder, check_vacant, made_folder


@pytest.fixture
def taken(tmp_path):
    """A file that stands where a folder would have to be."""
    (tmp_path / "taken").write_text("something")
    return tmp_path / "taken"


def test_places_that_are_free_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.npz").write_text("an earlier result")
    for file in ("old.npz", "new.npz", tmp_path / "a" / "b" / "new.npz"):
        check_file(file)
    for folder in (".", "new", tmp_path / "a" / "b"):
        check_folder(folder)
        check_vacant("new")
    assert [path.name for path in tmp_path.iterdir()] == ["old.npz"]


def test_a_file_to_write_is_no_folder_and_not_below_a_file(tmp_path, taken):
    with pytest.raises(ValueError, match=r"is a folder: name a file to write, such as .*/result"):
        check_file(tmp_path)
    with pytest.raises(ValueError, match=r"since .*/taken is a file: choose another path"):
        check_file(taken / "new.npz")


@pytest.mark.parametrize("below", ["", "run", "runs/run"])
def test_a_folder_to_write_is_no_file_and_not_below_one(taken, below):
    with pytest.raises(ValueError, match=r"cannot be a folder, since .*/taken is a file"):
        check_folder(taken / below)


def test_a_link_that_leads_nowhere_is_in_the_way_too(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"link is a file"):
        check_folder(tmp_path / "link")


def test_a_folder_that_holds_anything_is_not_vacant(tmp_path, taken):
    (tmp_path / "empty").mkdir()
    check_vacant(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"already holds empty, taken: choose another output folder"):
        check_vacant(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be a folder"):
        check_vacant(taken)


def test_work_that_fails_leaves_only_the_folders_that_were_there_or_that_it_filled(tmp_path):
    def fail(folder, file):
        with made_folder(folder):
            if file is not None:
                file.write_text("")
            raise ZeroDivisionError

    (tmp_path / "old").mkdir()
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "old" / "new" / "deep", None)
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "filled" / "deep", tmp_path / "filled" / "part")
    assert [path.name for path in (tmp_path / "filled").iterdir()] == ["part"]


def test_work_that_succeeds_has_its_folder(tmp_path):
    with made_folder(tmp_path / "new" / "deep"):
        assert (tmp_path / "new" / "deep").is_dir()
    assert (tmp_path / "new" / "deep").is_dir()
