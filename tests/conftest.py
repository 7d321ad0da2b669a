"""Settings of the whole suite: one thread per process, and no telemetry."""

from __future__ import annotations

import os

# Tiny models gain nothing from threads, and with two pytest processes on two cores they would fight. Before numpy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("ONNX_WOQ_THREADS", "1")
# Tests that import onnxruntime before the package report to nobody either.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
