"""Optimizers for MX training: one pass over memory a step. docs/optimizers.md defines them."""

from .adamw import AdamW
from .oscillation import Changes
from .qramping import QRamping

__all__ = ["AdamW", "Changes", "QRamping"]
