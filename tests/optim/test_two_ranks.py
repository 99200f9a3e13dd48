"""Two processes on gloo: sharded steps have the bits of one process, thresholds are shared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from common import own_process

HERE = Path(__file__).parent


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch with gloo"
)
def test_two_ranks_agree(tmp_path):
    env = own_process(HERE, HERE.parent, OMP_NUM_THREADS="1", PYTHONFAULTHANDLER="1")
    command = [sys.executable, str(HERE / "two_ranks.py")]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=env,
                         stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(s[-2000:] for s in said)
