"""Settings are an object in a regular file; anything else counts as none."""

from __future__ import annotations

import os

import pytest

from onnx_woq.runtime.data.settings import read_settings


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff", b"[" * 200_000, b'{"a": ' * 200_000])
def test_what_is_no_object(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    assert read_settings(tmp_path / "config.json") == {}


def test_an_object(tmp_path):
    (tmp_path / "config.json").write_text('{"a": {"b": 1}}')
    assert read_settings(tmp_path / "config.json") == {"a": {"b": 1}}
    assert read_settings(tmp_path / "other.json") == {}
    assert read_settings(tmp_path) == {}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    assert read_settings(tmp_path / "config.json") == {}
