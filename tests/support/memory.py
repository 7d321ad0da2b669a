from __future__ import annotations

import tracemalloc


def peak_bytes(work) -> int:
    """The most memory `work()` held at once beyond what there was before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
