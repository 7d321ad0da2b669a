"""Conversion of an old or unusual float model to one that can be quantized."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from onnx_woq.engine.output import destination, write
from onnx_woq.errors import OnnxWoqError
from onnx_woq.graph.io.find_model import find_model
from onnx_woq.graph.io.model import load
from onnx_woq.graph.io.save import check_output
from onnx_woq.graph.rewrite.modernize import modernize


def convert(model: str | Path, output: str | Path) -> list[str]:
    """Writes a float model anew, in the form that `quantize` takes; it computes the same.

    An opset from 7 to 12 is raised to 13 by ONNX's version converter, initializers that are inputs as well become
    constants, and double precision becomes single, except in the model's inputs and outputs.

    Args:
        model: an .onnx file, or a folder that holds one. It is never modified.
        output: an .onnx file; or a folder, which gets the tokenizer and config files as well.

    Returns:
        Lines for people on what was changed; none if the model is written as it was.

    Raises:
        OnnxWoqError: the model cannot be converted, or the output cannot be written.
    """
    path = find_model(model)
    source = load(path, convert=True)
    place = destination(output, path)
    if place.onnx.parent.is_dir():
        check_output(source, place.onnx)
    converted, done = modernize(source)
    write(converted, place, {}, path)
    return done


@contextmanager
def converted(path: Path, wanted: bool, announce: Callable[[str], None] | None = None) -> Iterator[Path]:
    """Yields the path of the model to work on: `path` itself, or if wanted what `convert` makes of it.

    That is in a private temporary folder, with tokenizer and config beside it, and is removed after the `with` block.

    Args:
        path: the .onnx file of the float model.
        wanted: True to convert it.
        announce: called with each line on what was changed.

    Raises:
        OnnxWoqError: the model cannot be converted.
    """
    if not wanted:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="onnx-woq-") as folder:
        for line in convert(path, folder):
            if announce:
                announce(line)
        new = Path(folder) / path.name
        try:
            yield new
        except OnnxWoqError as error:
            raise type(error)(str(error).replace(str(new), str(path))) from error  # the user knows no other
