"""Write the permuted SmolLM2 as a PyTorch checkpoint, the same weights as build/models/smollm2-permuted.

.venv-models/bin/python tools/peers/checkpoint.py OUT_DIR    (the environment of `make real-models`)
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_models import smollm2_checkpoint

if __name__ == "__main__":
    smollm2_checkpoint(Path(sys.argv[1]), permuted=True)
