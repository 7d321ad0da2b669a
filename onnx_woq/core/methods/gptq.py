from __future__ import annotations

from typing import Any

import numpy as np


def solve(weight: Any, stats: Any, spec: Any, *, scale_dtype: Any = np.float32, actorder: bool = False, percdamp: float = 0.01, block_size: int = 128, static_groups: bool = False, enable_mse_search: bool = False, mse_range: Any = (0.805, 1.0, 0.005), enable_full_range: bool = False) -> Any:
    raise NotImplementedError
