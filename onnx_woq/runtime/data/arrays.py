"""Arrays: .npy and .npz files, and stacks of samples in them, of which no more is read than is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnx_woq.errors import DataError
from onnx_woq.runtime.data.inputs import InputInfo, can_fill

SUFFIXES = (".npz", ".npy")


def read_arrays(path: Path, inputs: Sequence[InputInfo]) -> Iterator[tuple[str, Any]]:
    """Yields the samples in a .npz or .npy file, or in all of these in a folder, with their names for messages.

    Args:
        path: the file or folder.
        inputs: the model's inputs; arrays of other names are not read, and are None.

    Raises:
        DataError: there is no such file, or it does not hold plain arrays.
    """
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise DataError(f"the folder {path} holds no .npz or .npy file: give arrays in such files, or name a text file")
    yield from stacked(((str(file), _loaded(file, {info.name for info in inputs})) for file in files), inputs)


def stacked(loaded: Iterable[tuple[str, Any]], inputs: Sequence[InputInfo]) -> Iterator[tuple[str, Any]]:
    """Cuts arrays into samples along their common first axis: one entry each, or as many as the model's batch has.

    Where all arrays have one axis more than the model's inputs, samples were stacked with their batch. Arrays stay
    whole if their first axes differ, if they are no multiple of the batch, or if a past is among them.
    """
    needed = [info for info in inputs if not can_fill(info, inputs)]
    for label, content in loaded:
        named = content if isinstance(content, Mapping) else {needed[0].name: content} if len(needed) == 1 else {}
        known = {info.name: (named[info.name], info.shape) for info in inputs if info.name in named and info.shape}
        step = 0 if any(name.startswith("past") for name in named) else _step([*known.values()])
        if not step:
            yield label, content if isinstance(content, Mapping) else np.array(content)
            continue
        count = next(iter(known.values()))[0].shape[0]
        for row in range(count // step):
            rows = slice(row * step, (row + 1) * step)
            cut = {
                name: array[rows] if array.ndim == len(shape) else array[row] for name, (array, shape) in known.items()
            }
            yield f"{label}, row {row + 1}", {name: np.array(array) for name, array in cut.items()}


def _step(known: Sequence[tuple[np.ndarray, tuple[int | str | None, ...]]]) -> int:
    """Returns the entries of a stack that make one sample, 0 if the arrays are no stack but a sample themselves."""
    if len({array.shape[:1] for array, _ in known}) != 1:
        return 0
    count = known[0][0].shape[0] if known[0][0].ndim else 0
    if all(array.ndim == len(shape) + 1 for array, shape in known):
        return 1
    if not all(array.ndim == len(shape) for array, shape in known):
        return 0
    batches = {shape[0] for _, shape in known if isinstance(shape[0], int)} or {1}
    batch = batches.pop()
    fixed = any(isinstance(shape[0], int) for _, shape in known)
    return 0 if batches or not batch or count % batch or (fixed and count == batch) else batch


def _loaded(file: Path, names: set[str]) -> Any:
    """Loads the array in a .npy file, which stays on the disk, or the dictionary of arrays in a .npz file."""
    if not file.is_file():
        raise DataError(f"{file} is not a regular file: copy the arrays to one")
    try:
        if file.suffix == ".npy" and (mapped := _mapped(file)) is not None:
            return mapped
        with file.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            return {name: loaded[name] if name in names else None for name in loaded.files}
    except Exception as error:  # zipfile, zlib and numpy raise all sorts of errors on a damaged archive
        raise DataError(f"{file} is not a file of plain arrays ({error}): write it with numpy.savez") from error


def _mapped(file: Path) -> np.ndarray | None:
    """Returns the array in a .npy file without reading it; None if it has to be read, as an empty one has."""
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError:
        return None
