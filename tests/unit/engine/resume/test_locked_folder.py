"""A private folder is one process's at a time, however often it is made and removed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from onnx_woq.engine.resume.locked_folder import clear, locked, own_file, own_folder, remove
from onnx_woq.errors import OutputError

BUSY = """
import os, sys
from pathlib import Path
from onnx_woq.errors import OutputError
from onnx_woq.engine.resume.locked_folder import locked, own_file, own_folder, remove
folder, got = Path(sys.argv[1]), 0
while got < 100:
    try:
        lock = locked(folder, Path("out"))
    except OutputError:
        continue
    own_folder(folder / "states")
    with open(folder / "mine", "x"), own_file(folder / "data"):  # fails if another process is here
        got += 1
    assert sorted(os.listdir(folder)) == ["data", "lock", "mine", "states"]
    remove(folder, lock)
"""


def test_processes_that_make_and_remove_it_never_meet(tmp_path):
    command = [sys.executable, "-c", BUSY, str(tmp_path / "folder")]
    busy = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    for process in busy:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert list(tmp_path.iterdir()) == []


def test_it_is_free_once_the_lock_is_closed(tmp_path):
    folder = tmp_path / "folder"
    lock = locked(folder, tmp_path / "out")
    own_file(folder / "kept").close()
    with pytest.raises(OutputError, match="another process is writing"):
        locked(folder, tmp_path / "out")
    lock.close()
    remove(folder, locked(folder, tmp_path / "out"))
    assert not folder.exists()


def test_a_file_that_cannot_be_removed_while_it_is_open_goes_later(tmp_path, monkeypatch):
    """As on Windows; another process may have the folder by then."""
    folder, real = tmp_path / "folder", os.unlink
    lock = locked(folder, tmp_path / "out")

    def refusing(path, **options):
        if not lock.closed:
            raise PermissionError(13, "in use")
        real(path, **options)

    monkeypatch.setattr(os, "unlink", refusing)
    remove(folder, lock)
    assert not folder.exists()


def test_what_is_in_the_way_is_removed_and_what_it_leads_to_is_not(tmp_path):
    folder, precious = tmp_path / "folder", tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_bytes(b"mine")
    with locked(folder, tmp_path / "out"):
        (folder / "linked folder").symlink_to(precious)
        (folder / "linked file").symlink_to(precious / "file")
        os.link(precious / "file", folder / "hard")
        (folder / "a folder").mkdir()
        own_folder(folder / "linked folder")
        for name in ("linked file", "hard", "a folder"):
            with own_file(folder / name) as file:
                file.write(b"other")
        clear(folder, {"hard"})
        assert sorted(os.listdir(folder)) == ["hard", "lock"]
    assert (precious / "file").read_bytes() == b"mine"


def test_where_no_folder_can_be_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        locked(tmp_path / "missing" / "folder", tmp_path / "out")
