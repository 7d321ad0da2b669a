from __future__ import annotations

from typing import Any

import numpy as np


def solve(weight: Any, stats: Any, spec: Any, *, scale_dtype: Any = np.float32, enable_auto_scale: bool = True, enable_mse_search: bool = True, mse_range: Any = (0.91, 1.0, 0.01), folding: bool = False, enable_full_range: bool = False) -> Any:
    raise NotImplementedError
