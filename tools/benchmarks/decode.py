"""Generate tokens with plain onnxruntime: one loop for float and quantized models.

Inputs and outputs are bound, so the past goes from step to step without a copy in Python; it grows by one token each.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

WARM_UP = 4  # steps before the clock starts


def generate(model: Path, threads: int, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Tokens per second of `tokens` greedy steps after `prompt`, on an empty past of batch 1."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    start = time.monotonic()
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    loaded = time.monotonic() - start
    inputs = {info.name: info for info in session.get_inputs()}
    outputs = [info.name for info in session.get_outputs()]
    past = {name: _empty(info) for name, info in inputs.items() if name.startswith("past")}

    def step(ids: list[int], position: int) -> int:
        """Feeds `ids` that start at `position`; keeps the present as the next past; returns the likeliest token."""
        binding = session.io_binding()
        total = position + len(ids)
        arrays = {"input_ids": [ids], "attention_mask": [[1] * total], "position_ids": [list(range(position, total))]}
        for name in inputs.keys() & arrays.keys():
            binding.bind_cpu_input(name, np.array(arrays[name], np.int64))
        for name, value in past.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        made = dict(zip(outputs, binding.get_outputs(), strict=True))
        for name in past:
            past[name] = made[name.replace("past_key_values", "present")]
        return int(made["logits"].numpy()[0, -1].argmax())

    start = time.monotonic()
    token, position, said, seconds = step(prompt, 0), len(prompt), [], []
    prefill = time.monotonic() - start
    for _ in range(WARM_UP + tokens):
        said.append(token)
        start = time.monotonic()
        token = step([token], position)
        seconds.append(time.monotonic() - start)
        position += 1
    timed = sorted(seconds[WARM_UP:])
    return {
        "tokens_per_second": tokens / sum(timed),
        "median_step": timed[len(timed) // 2],
        "prefill": prefill,
        "load": loaded,
        "said": said[:8],
    }


def _empty(info: Any) -> Any:
    """A past `[1, heads, 0, head size]` without tokens."""
    import numpy as np
    import onnxruntime as ort

    dtype = np.float16 if "16" in info.type else np.float32
    return ort.OrtValue.ortvalue_from_numpy(np.zeros((1, info.shape[1], 0, info.shape[3]), dtype))
