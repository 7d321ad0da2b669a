"""Rows: text as samples of token ids, each beginning as the tokenizer begins a document."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from onnx_woq.errors import DataError
from onnx_woq.runtime.data import chat
from onnx_woq.runtime.data.documents import Document, head, lines, records
from onnx_woq.runtime.data.inputs import POSITIONS, TOKEN_TYPES, InputInfo, is_decoder
from onnx_woq.runtime.data.settings import read_settings
from onnx_woq.runtime.data.text import Encode, Tokenizer, load_tokenizer, tokenizer_folder

logger = logging.getLogger(__name__)

_CHARACTERS_PER_TOKEN = 8  # natural text has fewer
_PROBE = 4000  # characters of the user's text that a tokenizer is tried on
_MORE = 4  # times as much text is taken where it had fewer tokens than expected


def text_rows(
    path: Path,
    inputs: Sequence[InputInfo],
    wanted: int,
    seqlen: int,
    exact_length: bool,
    tokenizer: Path | None,
    model_dir: Path | None,
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields text as samples of input_ids, with an attention mask where a fixed length makes padding necessary.

    Args:
        path: of the .txt, .jsonl or .csv file.
        inputs: the model's inputs.
        wanted: samples that are wanted at most.
        seqlen: tokens of a sample at most.
        exact_length: shorter samples are of no use.
        tokenizer: folder of the tokenizer, if it is not beside the model.
        model_dir: folder of the model.

    Raises:
        DataError: the text or the tokenizer cannot be used, or not with this model.
    """
    ids = next((info for info in inputs if info.name == "input_ids"), None)
    if ids is None:
        wants = ", ".join(map(str, inputs))
        raise DataError(
            f"{path} is text, but the model takes no input_ids (it takes {wants}): give .npz or dictionaries"
        )
    probe = head(path, _PROBE)
    if path.suffix != ".txt":
        probe = "\n".join(document.text for document in islice(records(path, chat.plain), 100))
    tokens = load_tokenizer(tokenizer, model_dir, probe, ids.limit)
    fixed = ids.shape[1] if ids.shape is not None and len(ids.shape) == 2 else None
    fixed = fixed if isinstance(fixed, int) else None
    length = _row_length(tokens, inputs, seqlen, exact_length, fixed, model_dir)
    closes = tokens.closes()
    stream = is_decoder(inputs) or not (closes or any(info.name in TOKEN_TYPES for info in inputs))
    if path.suffix == ".txt" and stream:
        _say_how_rows_begin(tokens, model_dir)
        rows: Iterable[list[int]] = stream_rows(
            lambda size: head(path, size), tokens.encode, wanted, length, tokens.opening
        )
    else:
        render = chat.renderer(tokenizer_folder(tokenizer, model_dir))
        documents = lines(path) if path.suffix == ".txt" else records(path, render)
        encoded = (document_ids(document, tokens, length) for document in documents if document.text.strip())
        rows = (row[: length - 1] + row[-1:] if closes and len(row) > length else row[:length] for row in encoded)
    for number, row in enumerate((row for row in rows if row), 1):
        yield f"{path} sample {number}", _sample(row, fixed or len(row))


def stream_rows(
    head: Callable[[int], str], encode: Encode, rows: int, length: int, opening: Sequence[int] = ()
) -> list[list[int]]:
    """Encodes a text as one stream of tokens, cut into at most `rows` rows of `length` tokens.

    Each row begins with the tokens that a document begins with. A rest is dropped, except that a text shorter than one
    row gives one short row.

    Args:
        head: returns the first characters of the text.
        encode: turns text into ids.
        rows: rows at most.
        length: tokens of a row.
        opening: the tokens that each row begins with, such as BOS; none where a row has no room for more.
    """
    start = list(opening) if len(opening) < length else []
    step = length - len(start)
    needed = rows * step
    size = needed * _CHARACTERS_PER_TOKEN
    while True:
        text = head(size)
        ids = encode(text, False)
        if len(ids) >= needed or len(text) < size:
            break
        size *= _MORE
    cut = [ids[at : at + step] for at in range(0, min(len(ids), needed), step)]
    return [start + row for row in cut[:1] + [row for row in cut[1:] if len(row) == step]]


def document_ids(document: Document, tokens: Tokenizer, length: int) -> list[int]:
    """Returns the ids of a document with its special tokens, at least the first `length` of them.

    Args:
        document: its text.
        tokens: the tokenizer.
        length: as many of its tokens are used.
    """
    size = length * _CHARACTERS_PER_TOKEN
    while True:
        ids = tokens.encode(document.text[:size], not document.rendered)
        if len(ids) > length or size >= len(document.text):
            break
        size *= _MORE
    begun = ids[: len(tokens.opening)] == list(tokens.opening)
    return ids if begun else [*tokens.opening, *ids]


def _row_length(
    tokens: Tokenizer,
    inputs: Sequence[InputInfo],
    seqlen: int,
    exact_length: bool,
    fixed: int | None,
    model_dir: Path | None,
) -> int:
    """Returns the tokens of a row: as many as are asked for, or as the model takes."""
    positions = next((info.limit for info in inputs if info.name == POSITIONS), None)
    length = min(limit for limit in (seqlen, tokens.longest, positions, fixed) if limit is not None)
    if length < seqlen:
        logger.warning("samples are cut to %d tokens, the longest that %s takes", length, model_dir or "the model")
    if exact_length and length < seqlen:
        raise DataError(
            f"no sample can have exactly {seqlen} tokens: the model takes {length} at most (--seqlen {length})"
        )
    return length


def _say_how_rows_begin(tokens: Tokenizer, model_dir: Path | None) -> None:
    """Logs the tokens that rows begin with, and where a model names a BOS token that its tokenizer does not add."""
    if tokens.opening:
        logger.info("each row begins with %s, as the tokenizer begins a document", list(tokens.opening))
        return
    bos = read_settings((model_dir or tokens.folder) / "config.json").get("bos_token_id")
    if bos is not None:
        logger.info("rows begin without the BOS token %s that config.json names: the tokenizer adds none", bos)


def _sample(ids: list[int], length: int) -> dict[str, np.ndarray]:
    """Returns one sample of input_ids `[1, length]`; if it has to be padded, with an attention mask."""
    tokens = np.zeros((1, length), np.int64)
    tokens[0, : len(ids)] = ids
    if len(ids) == length:
        return {"input_ids": tokens}
    return {"input_ids": tokens, "attention_mask": (np.arange(length) < len(ids)).astype(np.int64)[None]}
