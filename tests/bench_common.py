"""What the tests of the benchmark suite share. Importing it makes `bench` importable."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# At the end: an installed mxtrain keeps its precedence over the sources.
sys.path.append(str(ROOT))

SCHEMA_KEYS = {
    "name", "us", "eager_us", "gbps", "of_copy", "tflops", "vs_bf16", "error", "noisy"
}  # fmt: skip
CPU = torch.device("cpu")
