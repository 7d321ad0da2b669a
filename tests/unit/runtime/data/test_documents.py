"""Documents come out of files as they went in, one at a time; what is none is named with its line."""

from __future__ import annotations

import json

import pytest

from onnx_woq.errors import DataError
from onnx_woq.runtime.data import chat
from onnx_woq.runtime.data.documents import Document, head, lines, records


def texts(path, render=chat.plain):
    return [document.text for document in records(path, render)]


def jsonl(folder, *found):
    path = folder / "d.jsonl"
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in found))
    return path


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Ho"}]}]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "a", "other": "b"}, "a"),
        ({"body": "a", "n": 3}, "a"),
        ({"prompt": "a", "completion": "b", "id": "7"}, "a\nb"),
        ({"instruction": "a", "input": "", "output": "b"}, "a\nb"),
        ({"instruction": "a", "input": "x", "output": "b"}, "a\nx\nb"),
        ({"messages": CHAT, "id": "7"}, "Hi\nHo"),
        ({"text": "a", "messages": CHAT}, "a"),
    ],
)
def test_records(record, text, tmp_path):
    assert texts(jsonl(tmp_path, record, "", record)) == [text, text]


def test_a_record_may_be_a_string_alone(tmp_path):
    assert texts(jsonl(tmp_path, '"a b"')) == ["a b"]


def test_messages_are_rendered(tmp_path):
    (found,) = records(jsonl(tmp_path, {"messages": CHAT}), lambda messages: f"<{len(messages)}>")
    assert found == Document("<2>", rendered=True)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"a": "x", "b": "y"}, 'no field "text".*and not exactly one other string field'),
        ([1], "no field"),
        ({"messages": ["hi"]}, 'message is not an object with "role" and "content": hi'),
        ({"messages": [{"role": "user"}]}, "message is not an object"),
        ("{", "is not JSON"),
        ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
    ],
    ids=range(6),
)
def test_what_is_no_record_is_named_with_its_line(record, message, tmp_path):
    with pytest.raises(DataError, match=rf"d\.jsonl line 2.*{message}"):
        texts(jsonl(tmp_path, {"text": "a"}, record))


def test_half_a_character(tmp_path):
    """JSON may escape one without the other; no encoding has it."""
    path = jsonl(tmp_path, '{"text": "a\\ud83db"}', '{"text": "\\ud83d\\ude00"}')
    assert texts(path) == ["a\ufffdb", "😀"]


def test_records_are_read_one_at_a_time(tmp_path):
    found = records(jsonl(tmp_path, {"text": "a"}, {"text": "b"}, "{"), chat.plain)
    assert [next(found).text, next(found).text] == ["a", "b"]
    with pytest.raises(DataError, match="line 3"):
        next(found)


def test_tables(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('id,text\n1,"a, b\nc"\n2,d\n', encoding="utf-8-sig")
    assert texts(path) == ["a, b\nc", "d"]
    path.write_text("prompt,completion\na,b\n")
    assert texts(path) == ["a\nb"]
    path.write_text("sentence\na\n\nb\n")
    assert texts(path) == ["a", "b"]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"d\.csv line 2 has no field"):
        texts(path)
    path.write_text("text\n" + "x" * 200_000)
    with pytest.raises(DataError, match=r"d\.csv line 1 is not CSV .*\.jsonl"):
        texts(path)


def test_lines(tmp_path):
    path = tmp_path / "d.txt"
    path.write_bytes("\ufeffa\r\n \n\nb c\u2028d\x0ce\rf".encode())
    assert [document.text for document in lines(path)] == ["a", "b c", "d", "e", "f"]
    assert head(path, 3) == "a\n "


def test_files_without_text(tmp_path):
    path = tmp_path / "d.txt"
    for content, message in ((b"", "is empty"), (b" \n\n", "is empty"), ("naïve".encode("latin-1"), "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"d\.txt {message}|d\.txt is {message}"):
            head(path, 100)
    path.write_bytes(b" " * 10 + b"a")
    assert head(path, 4) == "    ", "text comes later"
    with pytest.raises(DataError, match="cannot be read"):
        head(tmp_path / "none.txt", 4)
