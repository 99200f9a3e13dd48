"""Which of the sm120 backends the GPU at hand runs, if any."""

from __future__ import annotations

import torch

from mxtrain._library import CATALOGUE

NATIVE = {(12, 0): "120a", (12, 1): "121a"}


def _backend() -> str:
    archs = CATALOGUE["build"]["cuda_archs"].split(";")
    if not torch.cuda.is_available():
        return ""
    capability = torch.cuda.get_device_capability()
    if NATIVE.get(capability) in archs:
        return "sm120"
    return "sm120_emulated" if capability == (9, 0) and "90a" in archs else ""


SM120_BACKEND = _backend()
