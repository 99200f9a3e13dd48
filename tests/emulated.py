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

# Files of tests whose `device` is this one, too. Some twenty-five tests of each are taken, spread
# evenly, or all with MXTRAIN_EMULATED=all, but for those that are large: not without being asked.
FILES = (
    "test_strips", "test_pairs", "test_requantize_tiles", "test_quantize", "test_elementwise",
    "test_convert", "test_context", "test_adamw", "test_qramping", "test_oscillation",
    "test_int8_quantize", "test_int8_gemm", "test_int8_pool",
)  # fmt: skip
LARGE = (
    "test_dual_nearest_of_every_value", "test_it_is_torchs_adamw", "over_1000_steps",
    "test_under_compile", "strided_and_misaligned", "outliers_in_a_product", "test_t21_ratios",
)  # fmt: skip
CPU_ONLY = ("test_a_threshold_must_be_positive",)  # what a kernel on a GPU does not check
A_FILE = 25

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


def not_taken(items) -> list:
    """Of the tests that pytest has collected, those of this device that are not to run."""
    ours = [i for i in items if getattr(i, "callspec", None)]
    ours = [i for i in ours if i.callspec.params.get("device") == "emulated"]
    everything = os.environ.get("MXTRAIN_EMULATED") == "all"
    taken = set()
    for file in FILES:
        of_file = [i for i in ours if i.path.stem == file and i.originalname not in CPU_ONLY]
        if not everything:
            of_file = [i for i in of_file if not any(name in i.name for name in LARGE)]
            of_file = of_file[:: -(-len(of_file) // A_FILE) or 1]
        taken.update(of_file)
    return [i for i in ours if i not in taken]


@functools.cache
def op_names() -> list[str]:
    """What is overridden."""
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name.split("::")[1] for s in schemas if s.name.startswith("mxtrain_emulated::")}
    return sorted(names - {"gemm", "gemm_add_"})  # CUDA's may ask for cuBLAS


@contextlib.contextmanager
def emulated(gemm_backend: str | None = None):
    """Within it, the kernels of csrc/cuda serve CPU tensors.

    gemm and gemm_add_ too where it names the backend: fold_mma, sm120_emulated, or sm100, of which
    only what surrounds the product is that of the GPU (csrc/emulation/sm100_product.cpp).
    """
    assert library() is not None, f"{LIBRARY} has not been built"
    from mxtrain.operand import GEMM_BACKENDS

    names = op_names() + (["gemm", "gemm_add_"] if gemm_backend else [])
    backend = GEMM_BACKENDS[gemm_backend or "auto"]
    override = torch.library.Library("mxtrain", "IMPL")
    before = library().mxtrain_set_gemm_backend(backend)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels that are overridden
            for name in names:
                override.impl(name, getattr(torch.ops.mxtrain_emulated, name).default, "CPU",
                              allow_override=True)  # fmt: skip
        yield
    finally:
        library().mxtrain_set_gemm_backend(before)
        override._destroy()
