"""What the tests of the training examples share."""

from __future__ import annotations

import csv
import hashlib
import io
import sys
from pathlib import Path

import pytest
import torch

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package, reason="the examples extra is not installed")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from train_gpt import PythonSource  # noqa: E402
from train_vit import ImageClasses  # noqa: E402

SMALL = "--steps 4 --eval-every 2 --batch 32 --dim 32 --depth 1 --heads 2 --device cpu --threads 1"
TASKS = {
    "vit": (ImageClasses, SMALL.split()),
    "gpt": (PythonSource, [*SMALL.split(), "--context", "32", "--megabytes", "0.5"]),
}


@pytest.fixture(params=TASKS)
def example(request):
    """(the task's class, options of a run that takes a second)."""
    return TASKS[request.param]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def load(path: Path) -> dict:
    """The content, read without the code under test."""
    outer = torch.load(path, weights_only=True)
    payload = outer["payload"].numpy().tobytes()
    assert hashlib.sha256(payload).hexdigest() == outer["sha256"]
    return torch.load(io.BytesIO(payload), weights_only=True)


def read_csv(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def same(a, b) -> bool:
    """Bitwise equality of nested checkpoint fields."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
