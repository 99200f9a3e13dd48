"""Checkpoints of the training examples: written whole or not at all, and read only if intact.

The file is what torch.save makes of {"magic", "sha256", "payload"}: the payload is the content, as
torch.save makes it, in a uint8 tensor, and sha256 its digest. So a file that was cut short or
changed anywhere is refused, as is one that another program or release wrote.
"""

from __future__ import annotations

import hashlib
import io
import os
from typing import Any

import torch
from torch import Tensor

Fields = dict[str, Any]
MAGIC = "mxtrain example checkpoint, version 3"
ADVICE = "Name the file that --save wrote, or leave --resume out to start afresh."

# What the content must hold, by type.
CONTENT = {"example": str, "options": dict, "data": int, "records": list, "run": dict}
RECORD = {
    "recipe": str,
    "seed": int,
    "seconds": float,
    "timed_steps": int,
    "timed_seconds": float,
    "rows": list,
}
RUN = {
    "step": int,
    "recent": list,
    "model": dict,
    "optimizer": dict,
    "torch_rng": Tensor,
    "data_rng": Tensor,
    "cuda_rng": (Tensor, type(None)),
}


class BadInput(Exception):
    """An option or a checkpoint cannot be used. `main` prints the message and returns 2."""


def save_checkpoint(path: str, content: Fields) -> None:
    """Write a temporary file and rename it: whenever this stops, `path` is a whole checkpoint."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        torch.save({"magic": MAGIC, "sha256": digest, "payload": payload}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(example: str, path: str) -> Fields:
    """The content of a checkpoint of this example. BadInput for any other file."""
    got = None
    try:
        content = _read(path)
    except FileNotFoundError:
        got = "which does not exist"
    except BadInput as error:
        got = str(error)
    except Exception as error:  # a damaged file can raise nearly anything
        got = f"which is cut short, damaged or something else ({type(error).__name__})"
    else:
        if content["example"] != example:
            got = f"which {content['example']}.py wrote"
    if got is not None:
        refuse(example, path, got)
    return content


def refuse(example: str, path: str, got: str) -> None:
    must = f"--resume must name a checkpoint written by {example}.py"
    raise BadInput(f"{must}, got {path}, {got}. {ADVICE}")


def _read(path: str) -> Fields:
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInput("which is a folder, a pipe or a device, not a file")  # a pipe would block
    outer = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(outer, dict) or outer.get("magic") != MAGIC:
        raise BadInput("which another program or release wrote")
    payload = outer["payload"].numpy().tobytes()
    if hashlib.sha256(payload).hexdigest() != outer["sha256"]:
        raise BadInput("which is damaged: its digest differs from that of its content")
    content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    _check(content, CONTENT, "the checkpoint")
    _check(content["run"], RUN, "run")
    if not content["records"]:
        raise BadInput("which lacks the record of its run")
    for record in content["records"]:
        _check(record, RECORD, "a record")
        for row in record["rows"]:
            _check_numbers(row, "a row", 5)
    _check_numbers(content["run"]["recent"], "recent")
    return content


def _check(fields: object, types: dict[str, Any], what: str) -> None:
    if not isinstance(fields, dict) or set(fields) != set(types):
        raise BadInput(f"whose fields of {what} are not {', '.join(types)}")
    for name, expected in types.items():
        if not isinstance(fields[name], expected) or isinstance(fields[name], bool):
            raise BadInput(f"whose {name} is of type {type(fields[name]).__name__}")


def _check_numbers(values: object, what: str, count: int | None = None) -> None:
    numbers = isinstance(values, list) and all(type(v) in (int, float) for v in values)
    if not numbers or (count is not None and len(values) != count):
        raise BadInput(f"in which {what} is not a list of numbers")


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """ValueError unless the state that was loaded has the shapes of its parameters."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state is None:
                continue  # a checkpoint before the first step
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].shape != parameter.shape:
                    raise ValueError(f"{name} has shape {list(state[name].shape)}")
            if state["step"].numel() != 1:
                raise ValueError("step is not a number")
