"""What the tests of the study share."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package, reason="the examples extra is not installed")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import study  # noqa: E402

SMALL = "--steps 12 --eval-every 6 --batch 32 --dim 32 --depth 1 --heads 2"


def record(run: str, loss: float, **changes) -> dict:
    return {
        "run": run, "recipe": run.split("@")[0], "seed": int(run.split("@")[1]), "diverged": None,
        "rows": [[6, 3.0, 2 * loss, 4.0], [12, 2.0, loss, 3.0]], "units_per_second": 1000.0,
        "unit": "tokens", "metric": "bits per byte", "alone": True, "peak_bytes": 2**30,
        "oscillation": {}, "parameters": 25e6, "units": 80e6, "steps": 12, "device": "a GPU",
        "torch": "2", **changes,
    }  # fmt: skip


class FakeProcess:
    """A worker that answers at once, or as it is told."""

    def __init__(self):
        self.given, self.stdin, self.pid, self.returncode = [], self, 0, -9

    def write(self, line):
        self.given.append(json.loads(line))

    def flush(self):
        pass


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A Study of four runs on two workers that are no processes."""

    def make(runs, **changes):
        args = SimpleNamespace(
            out=str(tmp_path), runs=runs, options="", budget=1000.0, expect=100.0, gpus=[],
            per_gpu=2, no_compile=False, scratch=str(tmp_path),
            **{"done": [], "fixed": set(), **changes},
        )  # fmt: skip
        made = study.Study(args, time.monotonic())
        made.workers = [study.Worker(i, FakeProcess(), ready=True) for i in range(2)]
        return made

    monkeypatch.setattr(study.Worker, "kill", lambda self: None)
    return make


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
