"""Feeds: calibration or evaluation data in any form, as one dictionary of arrays per sample.

Samples are fed one after the other and never padded to each other's length, so that every token counts once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnx_woq.errors import DataError
from onnx_woq.runtime.data import documents
from onnx_woq.runtime.data.arrays import SUFFIXES, read_arrays
from onnx_woq.runtime.data.inputs import (
    MASKS,
    POSITIONS,
    TOKEN_TYPES,
    InputInfo,
    can_fill,
    fill,
    model_inputs,
)
from onnx_woq.runtime.data.rows import text_rows

__all__ = ["Feed", "InputInfo", "data_hash", "feeds", "model_inputs", "random_feeds"]

logger = logging.getLogger(__name__)

Feed = dict[str, np.ndarray]
"""One sample: input name -> array."""

RANDOM = "random"
"""The source that stands for random data."""

_BY_TOKEN = ("input_ids", *MASKS, POSITIONS, *TOKEN_TYPES)  # inputs [B, T] with one number per token
_SAFE_KINDS = {
    "i": "iub",
    "u": "iub",
    "f": "f",
    "b": "b",
    "V": "f",
}  # kind of an input -> those it takes; V is bfloat16
_FORMS = (
    "a .txt, .jsonl or .csv text, a .npz or .npy file, a folder of arrays, or in Python an iterable of dictionaries"
)


def feeds(
    source: Any,
    inputs: list[InputInfo],
    *,
    samples: int,
    seqlen: int,
    exact_length: bool = False,
    tokenizer: Path | None = None,
    model_dir: Path | None = None,
    skip: int = 0,
    at_most: bool = False,
) -> list[Feed]:
    """Returns samples from `source`, complete and of the types that the model takes.

    Forms of data:

    - .txt: for a decoder (a model that keeps a past), one stream of tokens cut into rows of `seqlen`, each of which
      begins as the tokenizer begins a document; for an encoder, each line is a sample with special tokens around it.
    - .jsonl, .csv: each record is a sample, see `runtime.data.documents.records`.
    - .npz: arrays named like the inputs; .npy: one array for a model with one input. The first axis counts samples.
    - An iterable of dictionaries, arrays (for a model with one input), lists of arrays in the order of the inputs, or
      tuples `(inputs, labels)`, of which the labels are ignored.
    - "random": see `random_feeds`.

    Inputs that follow from the tokens, such as masks and positions, are filled in (`runtime.data.inputs.fill`).

    Args:
        source: data in one of these forms.
        inputs: the model's inputs, from `model_inputs`.
        samples: number of samples wanted.
        seqlen: tokens of a sample at most; longer ones are cut.
        exact_length: leave out samples of fewer than `seqlen` tokens.
        tokenizer: folder of the tokenizer, if it is not beside the model.
        model_dir: folder of the model, as the user named it.
        skip: samples to pass over first, so that they can be held out for another use.
        at_most: accept fewer samples than wanted, as long as there is one.

    Raises:
        DataError: the data is missing, damaged, too little or does not fit the model.
    """
    if samples < 1 or seqlen < 1:
        raise DataError(f"samples={samples} and seqlen={seqlen}: both must be at least 1")
    if isinstance(source, str) and source == RANDOM:
        return random_feeds(inputs, samples, seqlen, seed=skip)
    raw = _open(source, inputs, skip + samples, seqlen, exact_length, tokenizer, model_dir)
    found = []
    dropped: set[str] = set()
    for label, sample in raw:
        named = _named(sample, inputs, label)
        dropped |= named.keys() - {info.name for info in inputs}
        feed = _fitted(named, inputs, seqlen, label)
        if exact_length and "input_ids" in feed and feed["input_ids"].shape[1] < seqlen:
            continue
        found.append(feed)
        if len(found) == skip + samples:
            break
    if dropped:
        logger.warning("ignored what the model has no input for: %s", ", ".join(sorted(dropped)))
    kept = found[skip:]
    if not kept or (len(kept) < samples and not at_most):
        raise DataError(_too_few(source, len(kept), samples, seqlen, exact_length, skip))
    return kept


def random_feeds(inputs: list[InputInfo], samples: int, seqlen: int, seed: int = 0) -> list[Feed]:
    """Returns random samples of the right shapes, for trying things out: uniform ids, normal floats.

    Args:
        inputs: the model's inputs, from `model_inputs`.
        samples: number of samples.
        seqlen: size of every open dimension except the first, which is 1.
        seed: of the random numbers.

    Raises:
        DataError: an input has no known rank.
    """
    rng = np.random.default_rng(seed)
    made = []
    for number in range(samples):
        feed = {}
        for info in inputs:
            if can_fill(info, inputs):
                continue
            if info.shape is None:
                raise DataError(f"random data is not possible: the model does not say the rank of {info}")
            shape = [d if isinstance(d, int) else (1 if axis == 0 else seqlen) for axis, d in enumerate(info.shape)]
            if info.dtype.kind in "iub":
                feed[info.name] = rng.integers(0, info.limit or 2, shape).astype(info.dtype)
            else:
                feed[info.name] = rng.standard_normal(shape).astype(info.dtype)
        made.append(fill(feed, inputs, f"random sample {number + 1}"))
    return made


def data_hash(samples: Iterable[Mapping[str, np.ndarray]]) -> str:
    """Returns a hash of the names, types, shapes and bytes of all samples in their order, as 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for feed in samples:
        for name in sorted(feed):
            array = np.ascontiguousarray(feed[name])
            digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
            digest.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
        digest.update(b"\n")
    return digest.hexdigest()


def _open(
    source: Any,
    inputs: list[InputInfo],
    wanted: int,
    seqlen: int,
    exact_length: bool,
    tokenizer: Path | None,
    model_dir: Path | None,
) -> Iterator[tuple[str, Any]]:
    """Returns the elements of any source, each with a label that names it in messages."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.exists():
            raise DataError(f"there is no data at {path}: give {_FORMS}")
        if not path.is_file() and not path.is_dir():
            raise DataError(f"{path} is neither a regular file nor a folder: copy the data to a file first")
        if path.is_file() and path.suffix in documents.SUFFIXES:
            return text_rows(path, inputs, wanted, seqlen, exact_length, tokenizer, model_dir)
        if path.is_dir() or path.suffix in SUFFIXES:
            return read_arrays(path, inputs)
        if path.suffix == ".parquet":
            raise DataError(
                f"{path} is not read: write its text as .jsonl (in pandas: to_json(orient='records', lines=True))"
            )
        raise DataError(f"{path} is in no known format: give {_FORMS}")
    if isinstance(source, (Mapping, np.ndarray)):
        return iter([("the sample", source)])
    return ((f"sample {number}", element) for number, element in enumerate(_elements(source), 1))


def _elements(source: Any) -> Iterable[Any]:
    """Returns the elements of an iterable, or of a map-style dataset: one with `__getitem__` and `__len__` only."""
    if not hasattr(source, "__iter__") and hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return (source[index] for index in range(len(source)))
    try:
        return iter(source)
    except TypeError as error:
        raise DataError(f"{type(source).__name__} is not data: give {_FORMS}") from error


def _named(sample: Any, inputs: list[InputInfo], label: str) -> dict[str, Any]:
    """Returns an element of the source as a dictionary from input names to values."""
    needed = [info for info in inputs if not can_fill(info, inputs)]
    if isinstance(sample, tuple | list) and len(sample) == 2 and _has_labels(sample, inputs, len(needed)):
        sample = sample[0]
    if isinstance(sample, Mapping):
        return dict(sample)
    if isinstance(sample, (list, tuple)) and sample and any(map(_is_array, sample)):
        if len(sample) > len(inputs):
            raise DataError(
                f"{label} is a list of {len(sample)} arrays, but the model has {len(inputs)} inputs: {_list(inputs)}"
            )
        return {info.name: array for info, array in zip(inputs, sample, strict=False)}
    if not _is_array(sample) and not isinstance(sample, (list, tuple, int, float)):
        raise DataError(f"{label} is a {type(sample).__name__}: give a dictionary of arrays named {_list(inputs)}")
    if len(needed) != 1:
        raise DataError(f"{label} is one array, but the model needs {_list(needed)}: give a dictionary with these keys")
    return {needed[0].name: sample}


def _has_labels(pair: Sequence[Any], inputs: Sequence[InputInfo], needed: int) -> bool:
    """Tells whether two things are the inputs of a sample and its labels; data loaders give lists of them as well."""
    if isinstance(pair, tuple):
        return _is_group(pair[0]) or needed == 1
    return isinstance(pair[0], Mapping) or (len(inputs) == 1 and all(map(_is_array, pair)))


def _plain(value: Any) -> Any:
    """Returns the array of a tensor of another library, on whatever device it is; anything else as it is."""
    for step in ("detach", "cpu", "numpy"):
        if callable(method := getattr(value, step, None)):
            value = method()
    return value


def _is_array(value: Any) -> bool:
    """Tells whether `value` is an array (also one of torch, say) with at least one dimension."""
    return (hasattr(value, "__array__") or hasattr(value, "numpy")) and np.ndim(_plain(value)) > 0


def _is_group(value: Any) -> bool:
    """Tells whether `value` holds all inputs of a sample rather than one of them."""
    return isinstance(value, Mapping) or (isinstance(value, (list, tuple)) and any(map(_is_array, value)))


def _list(inputs: list[InputInfo]) -> str:
    """Lists inputs with types and shapes, for messages."""
    return ", ".join(map(str, inputs)) or "no input"


def _fitted(named: Mapping[str, Any], inputs: list[InputInfo], seqlen: int, label: str) -> Feed:
    """Returns a complete feed: arrays of the model's types, cut to `seqlen` and checked, missing inputs filled in."""
    known = {info.name: info for info in inputs}
    feed = {name: _shaped(value, known[name], label) for name, value in named.items() if name in known}
    if not feed and inputs:
        raise DataError(f"{label} has {', '.join(map(str, named)) or 'nothing'}, but the model takes {_list(inputs)}")
    ids = feed.get("input_ids")
    if ids is not None and ids.ndim == 2 and not any(name.startswith("past") for name in feed):
        batch, length = ids.shape
        for name in _BY_TOKEN:
            if length > seqlen and name in feed and feed[name].shape == (batch, length):
                feed[name] = feed[name][:, :seqlen]
    empty = [name for name, array in feed.items() if not array.size]
    if empty and (len(empty) == len(feed) or "input_ids" in empty):
        shapes = ", ".join(f"{name} {list(feed[name].shape)}" for name in empty)
        raise DataError(f"{label} is empty ({shapes}): leave empty samples out")
    feed = fill({name: _typed(array, known[name], label) for name, array in feed.items()}, inputs, label)
    for name, array in feed.items():
        _check(array, known[name], label)
    return feed


def _shaped(value: Any, info: InputInfo, label: str) -> np.ndarray:
    """Returns a value as an array of the input's rank; a missing leading batch dimension is added."""
    try:
        array = np.asarray(_plain(value))
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{label}: {info.name} is not an array ({error})") from error
    if info.shape is not None and array.ndim == len(info.shape) - 1:
        array = array[None]
    if info.shape is not None and array.ndim != len(info.shape):
        raise DataError(f"{label}: {info.name} has shape {list(array.shape)}, the model takes {info}")
    return array


def _typed(array: np.ndarray, info: InputInfo, label: str) -> np.ndarray:
    """Converts an array to the input's type, where that loses nothing but precision."""
    kind = "f" if array.dtype.name == "bfloat16" else array.dtype.kind
    if kind not in _SAFE_KINDS.get(info.dtype.kind, "") and array.dtype != info.dtype:
        raise DataError(f"{label}: {info.name} is {array.dtype.name}, the model takes {info}: convert it")
    if array.dtype.kind in "iu" and info.dtype.kind in "iu" and array.size:
        limits = np.iinfo(info.dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise DataError(f"{label}: {info.name} holds numbers too large for {info.dtype.name}")
    return np.ascontiguousarray(array, dtype=info.dtype).reshape(array.shape)


def _check(array: np.ndarray, info: InputInfo, label: str) -> None:
    """Raises a DataError if the model cannot take an array of this shape or with these numbers."""
    for have, want in zip(array.shape, info.shape or (), strict=False):
        if isinstance(want, int) and have != want:
            raise DataError(f"{label}: {info.name} has shape {list(array.shape)}, the model takes {info}")
    if array.dtype.kind in "fV" and array.size and not np.isfinite(array.astype(np.float32, copy=False)).all():
        raise DataError(f"{label}: {info.name} holds NaN or infinite numbers: clean the data")
    if array.dtype.kind in "iu" and info.limit is not None and array.size:
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= info.limit:
            fix = "give a shorter --seqlen" if info.name == POSITIONS else "is this another model's tokenizer?"
            worst = low if low < 0 else high
            raise DataError(f"{label}: {info.name} holds {worst}, but the model's table has {info.limit} rows: {fix}")


def _too_few(source: Any, have: int, wanted: int, seqlen: int, exact_length: bool, skip: int) -> str:
    """Returns the message for a source with fewer samples than wanted."""
    name = str(source) if isinstance(source, (str, Path)) else "the data"
    long = f" of {'exactly ' if exact_length else 'up to '}{seqlen} tokens"
    after = f" after the first {skip}" if skip else ""
    if not have:
        return f"{name} has no sample{long if exact_length else ''}{after}: give more data or a shorter --seqlen"
    return f"{name} has only {have} samples{long}{after}, {wanted} are wanted: give --samples {have}, or more data"
