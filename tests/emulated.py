"""The CUDA kernels on the CPU (docs/emulation.md): libmxtrain_emulated.so in place of the CPU's.

`with emulated():` has torch.ops.mxtrain serve CPU tensors by the kernels of csrc/cuda, where the
library has been built: MXTRAIN_EMULATED=1 pip install -e .
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import warnings
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "build/emulated/libmxtrain_emulated.so"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, loaded; None where it has not been built."""
    path = os.environ.get("MXTRAIN_EMULATED_LIBRARY", LIBRARY)
    if not Path(path).exists():
        return None
    import mxtrain  # noqa: F401 (its library comes first: it defines the ops that are overridden)

    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


def set_order(seed: int) -> None:
    """0: threads and blocks in turn; otherwise a seed of the order in which they run."""
    library().mxtrain_emulation_set_order(ctypes.c_int64(seed))


def op_names() -> list[str]:
    schemas = torch._C._jit_get_all_schemas()
    return sorted({s.name.split("::")[1] for s in schemas if s.name.startswith("mxtrain_emulated")})


@contextlib.contextmanager
def emulated():
    """Within it, the kernels of csrc/cuda serve CPU tensors."""
    assert library() is not None, f"{LIBRARY} has not been built"
    override = torch.library.Library("mxtrain", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels that are overridden
            for name in op_names():
                override.impl(name, getattr(torch.ops.mxtrain_emulated, name).default, "CPU",
                              allow_override=True)  # fmt: skip
        yield
    finally:
        override._destroy()
