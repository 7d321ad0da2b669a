"""The folder of a run: the user's own stays for the next run, a temporary one goes unless its model is wanted."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from onnx_woq.errors import OutputError
from onnx_woq.tuning.work_folder import work_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


@pytest.mark.parametrize("keep", [False, True])
def test_a_temporary_one_stays_only_where_it_is_kept(keep, temporary):
    with work_folder(None, keep=keep) as folder:
        assert folder.parent == temporary
        (folder / "model.onnx").touch()
    assert list(temporary.rglob("*.onnx")) == ([folder / "model.onnx"] if keep else [])
    assert folder.exists() == keep


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_temporary_one_goes_where_the_run_fails(error, temporary):
    with pytest.raises(error), work_folder(None, keep=True) as folder:  # noqa: PT012
        (folder / "model.onnx").touch()
        raise error
    assert list(temporary.iterdir()) == []


def test_one_that_was_given_stays(tmp_path):
    wanted = tmp_path / "a" / "b"
    with work_folder(str(wanted), keep=False) as folder:
        assert folder == wanted
        (folder / "journal").touch()
    assert (wanted / "journal").exists()


def test_what_is_begun_stays_where_the_run_fails_and_what_was_made_for_nothing_goes(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for begun in (False, True):
        with pytest.raises(ZeroDivisionError), work_folder(mine / "a" / "b", keep=False) as folder:  # noqa: PT012
            if begun:
                (folder / "journal").touch()
            raise ZeroDivisionError
        assert (mine / "a" / "b" / "journal").exists() == (mine / "a").exists() == begun
    with pytest.raises(ZeroDivisionError), work_folder(tmp_path / "tmp", keep=False):
        raise ZeroDivisionError
    assert (tmp_path / "tmp").exists(), "an empty folder that was there is not ours to remove"


def test_where_no_folder_can_be_made_it_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=r"cannot make the work folder .*file"),
        work_folder(Path(tmp_path / "file" / "w"), keep=False),
    ):
        pytest.fail("there is no folder")
