"""The folder of a run: the user's own stays for the next run, a temporary one goes unless its model is wanted."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path

import pytest

from onnx_woq.errors import OutputChanged, OutputError
from onnx_woq.tuning import work_folder as module
from onnx_woq.tuning.work_folder import default_folder, discard, work_folder


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
        pytest.raises(OutputError, match=r"cannot use the work folder .*file.*--workdir"),
        work_folder(Path(tmp_path / "file" / "w"), keep=False),
    ):
        pytest.fail("there is no folder")


def test_one_that_is_made_is_private(tmp_path):
    with work_folder(tmp_path / "w", keep=False):
        assert stat.S_IMODE((tmp_path / "w").stat().st_mode) == 0o700


def test_two_runs_do_not_share_one(tmp_path):
    with work_folder(tmp_path / "w", keep=False, out=tmp_path / "q.onnx") as folder:
        (folder / "journal").touch()
        with (
            pytest.raises(OutputError, match=r"another process is writing .*q\.onnx"),
            work_folder(tmp_path / "w", keep=False, out=tmp_path / "q.onnx"),
        ):
            pytest.fail("it is locked")
        discard(folder)
        assert (folder / "journal").exists(), "it is in use"
    assert [path.name for path in folder.iterdir()] == ["journal"], "the lock goes with the run"
    with work_folder(tmp_path / "w", keep=False) as folder:
        assert (folder / "journal").exists()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_one_that_others_may_write_to_is_refused(mode, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w").chmod(mode)
    with pytest.raises(OutputError, match="others may write to it"), work_folder(tmp_path / "w", keep=False):
        pytest.fail("anybody could have written the journal")
    (tmp_path / "w").chmod(0o755)
    with work_folder(tmp_path / "w", keep=False):
        pass


def test_a_link_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "w").symlink_to("real")
    with pytest.raises(OutputError, match="in the way"), work_folder(tmp_path / "w", keep=False):
        pytest.fail("a link leads anywhere")


def test_the_chosen_model_stays_where_the_output_was_not_overwritten(temporary):
    with pytest.raises(OutputChanged), work_folder(None, keep=False) as folder:  # noqa: PT012
        (folder / "model.onnx").touch()
        raise OutputChanged
    assert (folder / "model.onnx").exists()


def test_a_finished_run_leaves_nothing(tmp_path):
    with work_folder(tmp_path / "w", keep=False) as folder:
        (folder / "trial").mkdir()
        (folder / "trial" / "model.onnx").touch()
    discard(folder)
    assert not folder.exists()


def test_the_place_if_none_is_named(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    beside = tmp_path / ".out.onnx-woq-tune"
    assert default_folder(tmp_path / "out") == beside
    assert default_folder(tmp_path / "q.onnx") == tmp_path / ".q.onnx.onnx-woq-tune"
    monkeypatch.setattr(module.os, "access", lambda path, _: Path(path) != tmp_path)
    assert default_folder(tmp_path / "out") == tmp_path / "out" / ".onnx-woq-tune"
    assert default_folder(tmp_path / "new") == tmp_path / ".new.onnx-woq-tune"
    beside.mkdir()
    assert default_folder(tmp_path / "out") == beside, "an earlier run has begun there"
    monkeypatch.chdir(tmp_path)
    for here in (".", "..", "/"):
        assert default_folder(Path(here)) == Path(here, ".onnx-woq-tune")
