"""Whichever library tokenizes, the ids are the tokenizer's own."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import numpy as np
import pytest

from onnx_woq.errors import DataError
from onnx_woq.runtime.data.text import load_tokenizer
from tests.zoo.chains import byte_tokenizer, letter_ids

TEXT = "pack my box with five dozen liquor jugs"


class Fake:
    """A stand-in for onnxruntime-extensions' tokenizer."""

    shift = 0

    def __init__(self, folder, options=None):
        self.special = options is None

    def tokenize(self, text):
        ids = [i + self.shift for i in letter_ids(text)]
        return np.array([1, *ids, 2] if self.special else ids)

    def detokenize(self, ids):
        letters = "???abcdefghijklmnopqrstuvwxyz .,\n'!?"
        return ["".join(letters[i] if i < len(letters) else "?" for i in ids)]


@pytest.fixture
def extensions(monkeypatch):
    """Puts a class in the place of onnxruntime_extensions.pp_api.Tokenizer, or None for a missing package."""

    def put(tokenizer):
        api = ModuleType("onnxruntime_extensions.pp_api")
        if tokenizer is not None:
            api.Tokenizer = tokenizer
        monkeypatch.setitem(sys.modules, "onnxruntime_extensions.pp_api", api)

    return put


@pytest.fixture
def folder(tmp_path):
    return byte_tokenizer(tmp_path / "tok", closing=True)


def encode(folder, text=TEXT, special=False, vocabulary=None):
    return load_tokenizer(folder, None, text, vocabulary).encode(text, special)


def shifted(by):
    return type("Shifted", (Fake,), {"shift": by})


def failing(error):
    def raise_it(*_):
        raise error

    return type("Failing", (), {"__init__": raise_it})


@pytest.mark.parametrize(
    "library",
    [Fake, shifted(1), shifted(2**32 - 40), failing(RuntimeError("unsupported")), failing(TypeError("x")), None],
    ids=["right", "wrong ids", "garbage", "refuses", "crashes", "absent"],
)
@pytest.mark.parametrize("special", [False, True])
def test_right_ids_whatever_the_library_does(library, special, folder, extensions):
    extensions(library)
    wanted = letter_ids(TEXT)
    assert encode(folder, special=special) == ([1, *wanted, 2] if special else wanted)


def test_the_real_libraries(folder):
    """Whatever class a config declares; onnxruntime-extensions 0.15.2 ends the process for some of these."""
    assert encode(folder) == letter_ids(TEXT)
    for name in ("PreTrainedTokenizerFast", "BertTokenizer", "LlamaTokenizer", "GPT2Tokenizer", "NoSuchClass"):
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        assert encode(folder) == letter_ids(TEXT)


@pytest.fixture
def other_format(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    return folder


PLAIN = TEXT.replace(" ", "") * 40  # the fixed probe holds letters that this tokenizer does not know


def test_other_formats_are_for_onnxruntime_extensions(other_format, extensions):
    extensions(Fake)
    assert encode(other_format, PLAIN) == letter_ids(PLAIN)
    assert encode(other_format, PLAIN, special=True) == [1, *letter_ids(PLAIN), 2]


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (shifted(1), "do not decode to the text"),
        (shifted(2**32 - 40), "gives the id 429496"),
        (failing(RuntimeError("Unsupported\nclass")), "extensions: Unsupported class"),
        (None, "pip install onnxruntime-extensions"),
    ],
    ids=["wrong ids", "garbage", "refuses", "absent"],
)
def test_when_nothing_reads_the_tokenizer(library, message, other_format, extensions):
    extensions(library)
    with pytest.raises(
        DataError, match=rf"tok cannot be used: tokenizers: there is no tokeniz.*{message}.*--tokenizer"
    ):
        encode(other_format, PLAIN, vocabulary=64)


def test_a_kind_of_tokenizer_json_that_only_extensions_knows(folder, extensions):
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "news": True}}))
    extensions(Fake)
    assert encode(folder, PLAIN) == letter_ids(PLAIN)


def test_ids_outside_the_vocabulary(folder):
    with pytest.raises(DataError, match=r"gives id \d+, but the model knows 20 tokens"):
        encode(folder, vocabulary=20)
    assert encode(folder, vocabulary=64) == letter_ids(TEXT)


@pytest.mark.parametrize("content", ["{", "{}", "[]", "", '{"model": {"type": "WordPiece"}}'])
def test_a_damaged_tokenizer_never_reaches_native_code(content, folder, extensions):
    (folder / "tokenizer.json").write_text(content)
    extensions(Fake)
    with pytest.raises(DataError, match=r"tok cannot be used: tokenizers: \w.*; onnxruntime-ext.*: \w.*--tokenizer"):
        encode(folder, PLAIN)


def test_where_it_is_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"there is none.*--tokenizer"):
        load_tokenizer(None, tmp_path, TEXT, None)
    with pytest.raises(DataError, match="there is none"):
        load_tokenizer(None, None, TEXT, None)
    (tmp_path / "onnx").mkdir()
    byte_tokenizer(tmp_path)
    assert load_tokenizer(None, tmp_path / "onnx", TEXT, None).folder == tmp_path, "one folder up, as on the hub"
    byte_tokenizer(tmp_path / "onnx")
    assert load_tokenizer(None, tmp_path / "onnx", TEXT, None).folder == tmp_path / "onnx"
    given = byte_tokenizer(tmp_path / "other")
    assert load_tokenizer(given, tmp_path / "onnx", TEXT, None).folder == given
    assert load_tokenizer(given / "tokenizer.json", None, TEXT, None).folder == given
    with pytest.raises(DataError, match=r"no tokenizer in .*nowhere"):
        load_tokenizer(tmp_path / "nowhere", tmp_path, TEXT, None)


def test_whether_documents_are_closed(tmp_path):
    assert load_tokenizer(byte_tokenizer(tmp_path / "a", closing=True), None, TEXT, None).closes()
    assert not load_tokenizer(byte_tokenizer(tmp_path / "b"), None, TEXT, None).closes()


@pytest.mark.parametrize(
    ("closing", "settings", "opening"),
    [
        (True, {}, (1,)),
        (True, {"add_bos_token": True, "bos_token": "a"}, (1,)),
        (False, {}, ()),
        (False, {"bos_token": "<s>"}, ()),
        (False, {"add_bos_token": False, "bos_token": "a"}, ()),
        (False, {"add_bos_token": True, "bos_token": "a"}, (3,)),
        (False, {"add_bos_token": True, "bos_token": {"content": "b"}}, (4,)),
        (False, {"add_bos_token": True, "bos_token": "two tokens"}, ()),
        (False, {"add_bos_token": True}, ()),
        (False, {"add_bos_token": "yes", "bos_token": "a"}, ()),
    ],
)
def test_what_a_document_begins_with(closing, settings, opening, tmp_path):
    """As the template adds it, or else as the settings ask for."""
    byte_tokenizer(tmp_path, closing=closing)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path, None, TEXT, None).opening == opening
