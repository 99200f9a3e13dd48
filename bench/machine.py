"""What the measurements were made on: versions, and the GPU's clocks, power and temperature.
Nothing is ever changed.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

QUERY = {  # our name: nvidia-smi's
    "name": "name",
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def parse_state(line: str) -> dict[str, Any]:
    """One line of nvidia-smi's csv,noheader,nounits answer to QUERY; values that are no numbers
    stay text, N/A is None.

    Empty for a line of another length.
    """
    values = [value.strip() for value in line.split(",")]
    if len(values) != len(QUERY):
        return {}

    def convert(key: str, text: str) -> Any:
        if key in ("name", "driver"):
            return text
        try:
            return float(text)
        except ValueError:
            return None

    return {key: convert(key, text) for key, text in zip(QUERY, values, strict=True)}


def gpu_state(
    uuid: str | None = None, execute: Callable[..., Any] = subprocess.run
) -> dict[str, Any]:
    """The state of a GPU, of the first without a uuid; empty where nvidia-smi does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY.values())}"]
    command += ["--format=csv,noheader,nounits"] + ([f"--id={uuid}"] if uuid else [])
    try:
        answer = execute(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return gpu_state(None, execute) if uuid else {}
    lines = answer.strip().splitlines()
    return parse_state(lines[0]) if lines else {}


def cpu_name() -> str:
    """The processor, as Linux names it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """mxtrain.env's report, with the device that is measured."""
    try:
        from mxtrain import env

        found = dict(env.report())
    except ImportError:
        found = {}
    found.setdefault("torch", torch.__version__)
    found.setdefault("torch_cuda", torch.version.cuda)
    found.setdefault("python", platform.python_version())
    found.setdefault("platform", platform.platform())
    found["peers"] = {name: version_of(name) for name in ("torchao", "triton")}
    found["cpu"] = cpu_name()
    found["threads"] = torch.get_num_threads()
    found["device"] = cpu_name()
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found["device"] = p.name
        found["gpu"] = {
            "name": p.name,
            "compute_capability": f"{p.major}.{p.minor}",
            "sms": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": getattr(p, "L2_cache_size", None),
        }
    return found


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def uuid_of(device: torch.device) -> str | None:
    """The GPU's uuid as nvidia-smi takes it: CUDA_VISIBLE_DEVICES renumbers torch's devices, not
    nvidia-smi's.
    """
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"GPU-{uuid}" if uuid else None
