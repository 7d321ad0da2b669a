"""Verification of a result: its input is still what it was, and ONNX Runtime opens it, before it takes its place."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx

from onnx_woq.errors import BrokenResult, ModelError
from onnx_woq.graph.io.model import Model, load
from onnx_woq.runtime.session import lacks_operators, why_not_opened

logger = logging.getLogger(__name__)


def verify(written: Path, out: Path, source: Model, *, opens: bool = True) -> None:
    """Checks a result that is complete and does not have its final name yet.

    Args:
        written: its .onnx file.
        out: the final name, for messages.
        source: the float model.
        opens: check also that ONNX Runtime opens the result. If it refuses the float model as well, for an operator
            that it lacks, the log says that nothing could be checked.

    Raises:
        InputChanged: the float model is not the one that was read.
        BrokenResult: ONNX Runtime opens the float model and not the result.
        ModelError: it finds both invalid.
    """
    source.check_unchanged()
    reason = why_not_opened(written) if opens else ""
    if not reason:
        return
    reason = reason.removeprefix(f"{written} cannot be run: ") + _place(written, reason)
    if why_not_opened(source.named) and (refusal := why_not_opened(load(source.named))):
        if not lacks_operators(refusal):
            raise ModelError(f"{refusal}; nor can what is made of it, so {out} was not written: export the model again")
        logger.warning("%s; nor can what is made of it, so %s was not checked", refusal, out)
        return
    raise BrokenResult(
        f"{out} was not written, ONNX Runtime does not open it: {reason}. It opens {source.named}, so this is a fault "
        "of onnx-woq: please report it, and leave the node float with --exclude, or choose another --target, meanwhile "
        "(--no-verify, in Python verify=False, writes the file all the same)"
    )


def _place(written: Path, reason: str) -> str:
    """Returns which node the runtime means where it names an operator and no node, "" if it names one."""
    nodes = onnx.load(written, load_external_data=False).graph.node
    if any(node.name and node.name in reason for node in nodes):
        return ""
    return next((f" (node {node.name!r})" for node in nodes if node.op_type in reason), "")
