"""Rows of text: the tokens of the whole text, whatever part of it is read, each row begun as a document is."""

from __future__ import annotations

import json
import logging
import tracemalloc

import numpy as np
import pytest

from onnx_woq.errors import DataError
from onnx_woq.runtime.data.documents import Document
from onnx_woq.runtime.data.inputs import InputInfo
from onnx_woq.runtime.data.rows import document_ids, stream_rows, text_rows
from onnx_woq.runtime.data.text import load_tokenizer
from tests.zoo.chains import byte_tokenizer, letter_ids

PAST = InputInfo("past_key_values.0.key", np.dtype(np.float32), ("b", 1, "p", 8))
IDS = InputInfo("input_ids", np.dtype(np.int64), ("b", "t"))
TEXT = "the quick brown fox jumps over the lazy dog. " * 9


def rows(path, wanted=4, seqlen=10, inputs=(IDS, PAST)):
    return [
        feed["input_ids"][0].tolist() for _, feed in text_rows(path, inputs, wanted, seqlen, False, None, path.parent)
    ]


def test_rows_of_a_stream_are_those_of_the_whole_text():
    """Only as much text is tokenized as the rows need, which must not show."""
    text = "".join(chr(97 + i % 26) for i in range(1000))
    whole = letter_ids(text)
    seen = []

    def encode(part, _):
        seen.append(len(part))
        return letter_ids(part)

    for rows, length in ((1, 10), (7, 13), (10, 100), (50, 7)):
        cut = stream_rows(lambda size: text[:size], encode, rows, length)
        assert cut == [whole[i * length : (i + 1) * length] for i in range(rows)]
    assert seen[0] == 80
    assert [len(row) for row in stream_rows(lambda size: text[:size], encode, 50, 99)] == [99] * 10
    assert stream_rows(lambda _: "abc", encode, 5, 10) == [letter_ids("abc")]


def test_tokens_of_many_letters():
    words = lambda text, _: [len(word) for word in text.split()]  # noqa: E731
    text = "incomprehensibilities " * 100
    assert stream_rows(lambda size: text[:size], words, 9, 10) == [[21] * 10] * 9


def test_each_row_begins_as_a_document_and_keeps_its_length():
    text = "".join(chr(97 + i % 26) for i in range(1000))
    whole = letter_ids(text)
    cut = stream_rows(lambda size: text[:size], lambda part, _: letter_ids(part), 4, 10, (1, 2))
    assert cut == [[1, 2, *whole[i * 8 : i * 8 + 8]] for i in range(4)]
    (short,) = stream_rows(lambda _: "abc", lambda part, _: letter_ids(part), 5, 10, (1,))
    assert short == [1, *letter_ids("abc")]
    assert stream_rows(lambda _: "abc", lambda part, _: letter_ids(part), 2, 1, (1,)) == [[3], [4]], "no room for it"
    assert stream_rows(lambda _: "", lambda part, _: letter_ids(part), 2, 5, (1,)) == []


@pytest.mark.parametrize("template", [True, False])
def test_rows_of_a_file_begin_as_the_tokenizer_says(template, tmp_path, caplog):
    byte_tokenizer(tmp_path, closing=template)
    (tmp_path / "t.txt").write_text(TEXT)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 7}))
    whole = letter_ids(TEXT)
    with caplog.at_level(logging.INFO):
        found = rows(tmp_path / "t.txt")
    if template:
        assert found == [[1, *whole[i * 9 : i * 9 + 9]] for i in range(4)]
        assert "each row begins with [1]" in caplog.text
    else:
        assert found == [whole[i * 10 : i * 10 + 10] for i in range(4)]
        assert "without the BOS token 7" in caplog.text


def test_a_document_has_its_special_tokens_once(tmp_path):
    closed = load_tokenizer(byte_tokenizer(tmp_path / "a", closing=True), None, TEXT, None)
    assert document_ids(Document("abc"), closed, 9) == [1, 3, 4, 5, 2]
    folder = byte_tokenizer(tmp_path / "b")
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "a"}))
    asked = load_tokenizer(folder, None, TEXT, None)
    assert document_ids(Document("bc"), asked, 9) == [3, 4, 5]
    assert document_ids(Document("abc", rendered=True), asked, 9) == [3, 4, 5], "the template wrote it"
    assert document_ids(Document("bc", rendered=True), asked, 9) == [3, 4, 5]


def test_of_a_long_document_only_the_beginning_is_encoded():
    seen = []

    class Counting:
        opening = ()

        def encode(self, text, special):
            seen.append(len(text))
            return letter_ids(text)

    assert document_ids(Document("ab" * 10**6), Counting(), 10)[:10] == letter_ids("ab" * 5)
    assert seen == [80]


@pytest.mark.parametrize("decoder", [True, False])
def test_a_long_line_costs_no_more_than_what_is_used_of_it(decoder, tmp_path):
    """32 MB in one line."""
    byte_tokenizer(tmp_path, closing=True)
    with (tmp_path / "t.txt").open("w") as file:
        for _ in range(32):
            file.write("ab" * (1 << 19))
        file.write("\nlast line")
    tracemalloc.start()
    found = rows(tmp_path / "t.txt", wanted=2, inputs=(IDS, PAST) if decoder else (IDS,))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 24 << 20
    assert found[0][:3] == [1, 3, 4]
    assert decoder or found[1] == [1, *letter_ids("last line")[:8], 2]


def test_text_for_a_model_without_tokens(tmp_path):
    (tmp_path / "t.txt").write_text(TEXT)
    with pytest.raises(DataError, match="takes no input_ids"):
        rows(tmp_path / "t.txt", inputs=(PAST,))
