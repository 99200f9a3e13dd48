"""Every test that takes `device` runs on the CPU, and on CUDA where a GPU is.

Those of ops run on the CPU once more, by the CUDA kernels, where tests/emulated.py has them.
"""

from __future__ import annotations

import emulated
import pytest
import torch
from common import cuda_has

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
if emulated.library():
    DEVICES.append("emulated")


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param != "emulated":
        yield request.param
        return
    with emulated.emulated():
        yield "cpu"


@pytest.fixture
def looks_at_values(request, device):
    """Whether ops refuse values: those of the CPU. CUDA's, emulated too, would have to wait."""
    return request.node.callspec.params["device"] == "cpu"


@pytest.fixture
def one_thread():
    """For small models: where other jobs share the cores, a second thread is waited for at every
    op, some 10 ms each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items) -> None:
    """Deselect what cannot or should not run.

    Tests marked `ops("quantize", ...)` run on CUDA once the build has CUDA kernels for those ops;
    slow ones, and those that measure speed, when asked.
    """
    dropped = emulated.not_taken(items)
    for item in items:
        mark = item.get_closest_marker("ops")
        on_cuda = getattr(item, "callspec", None) and item.callspec.params.get("device") == "cuda"
        asked = config.option.markexpr or ""
        by_hand = any(item.get_closest_marker(m) and m not in asked for m in ("slow", "perf"))
        if by_hand or (on_cuda and mark and not all(cuda_has(op) for op in mark.args)):
            dropped.append(item)
    if dropped:
        gone = set(dropped)
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in gone]
