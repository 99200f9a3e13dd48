"""Loads libmxtrain.so, once, and reads its catalogue.

The catalogue is the formats, option names and build facts that live in C++.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import torch

PATH = Path(__file__).with_name("libmxtrain.so")
MINIMUM_TORCH = (2, 11)
CUDA_NOT_SUPPORTED = 801  # cudaErrorNotSupported


def _load() -> ctypes.CDLL:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        raise ImportError(
            f"mxtrain: torch must be 2.11 or newer, got {torch.__version__}. "
            "Upgrade torch; mxtrain need not be rebuilt."
        )
    if not PATH.exists():
        raise ImportError(
            f"mxtrain: the op library must be built first, got no {PATH.name} in {PATH.parent}. "
            "Run `pip install .` (or `pip install -e .`) in the repository; when Python runs "
            "inside a checkout that is not installed editable, it imports the sources there "
            "instead of the installed package."
        )
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        raise ImportError(
            f"mxtrain: {PATH} must load under torch {torch.__version__}, got: {error}. "
            "Rebuild it in this environment: "
            "pip install --no-build-isolation --force-reinstall --no-deps ."
        ) from error
    return ctypes.CDLL(str(PATH))


def _read_catalogue() -> dict:
    LIBRARY.mxtrain_catalogue.restype = ctypes.c_char_p
    return json.loads(LIBRARY.mxtrain_catalogue().decode())


def int8_gemm_backend(major: int, minor: int) -> str:
    """What int8_gemm takes on a GPU of this compute capability; of a build with CUDA."""
    LIBRARY.mxtrain_int8_gemm_backend.restype = ctypes.c_char_p
    return LIBRARY.mxtrain_int8_gemm_backend(major, minor).decode()


def gemm_backend(major: int, minor: int, format: int) -> str:
    """What gemm takes on a GPU of this compute capability, and why; of a build with CUDA."""
    LIBRARY.mxtrain_gemm_backend.restype = ctypes.c_char_p
    return LIBRARY.mxtrain_gemm_backend(major, minor, format).decode()


def mma_probe(
    format: int, selectors: tuple[int, int, int, int], registers: list[torch.Tensor]
) -> torch.Tensor | None:
    """Products of the block-scaled instruction, or its emulation, on the current GPU.

    registers: a int32 [count, 32, 4], b [count, 32, 2], scale_a and scale_b [count, 32] and c
    float32 [count, 32, 4], as csrc/ptx/block_scale.h lays them out, on any device. Returns d
    float32 [count, 32, 4] on the CPU, or None where the build has no code for it. Raises
    RuntimeError for what does not launch.
    """
    there = [t.cuda().contiguous() for t in registers]
    d = torch.full(there[4].shape, torch.nan, device="cuda")
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*there, d)]
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    error = LIBRARY.mxtrain_mma_probe(
        format, (ctypes.c_int * 4)(*selectors), len(d), *pointers, stream
    )
    if error == CUDA_NOT_SUPPORTED:
        return None
    if error:
        raise RuntimeError(f"mxtrain: the probe must launch, got CUDA error {error}")
    return d.cpu()


LIBRARY: ctypes.CDLL = _load()
CATALOGUE: dict = _read_catalogue()
