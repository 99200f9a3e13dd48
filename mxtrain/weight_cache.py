"""The packed weight of an MXLinear, kept between calls: quantized once an optimizer step.

Contract:

- What: the operand of W for fprop, and that of W^T for dgrad, each where the recipe makes it
  without random numbers: rounding to nearest or toward the average, signs not drawn, and for a
  requantized W^T a forward operand of which the same holds. Results are bitwise what they are
  without: micro-steps of a gradient accumulation, recomputations of a checkpoint and forwards of
  one evaluation save the work. Costs the bytes of the operands: of each 4.25 bits a weight in
  mxfp4, 8 in int8_block.
- Fresh: an operand is used while nothing of this has changed: the identity, storage, `_version`,
  shape, strides, dtype and device of the weight and of the average that it rounds toward, the
  recipe object, the CUDA stream, and the number of steps that any torch optimizer has made (an
  optimizer may write `p.data`, which leaves `_version` as it was). It is dropped by eval(), a
  train() that changes the mode, load_state_dict, to(), half() and their like, and a new recipe; it
  is in no state_dict, copy or pickle.
- Not kept, and quantized at every call: under torch.compile; in a CUDA graph capture, and from
  then on in that layer (in all, if an optimizer's step was captured), because a replay changes
  weights unseen; inside an optimizer's step; weights that are not plain Parameters (shards, fakes,
  views) or lie in memory that processes share; where FSDP2 has modules in the process, whose
  gathered weights change unseen; in functorch transforms, forward-mode AD, and fake, functional
  and tracing modes.
- The one hole: a write that autograd does not see (`weight.data`, `weight.numpy()`, a collective,
  a kernel of one's own), or by another process, between two forwards with none of the above in
  between. Call `layer.drop_cache()` after it, or set `layer.keep_packed = False`
  (`MXLinear.keep_packed = False` for all layers). On by default, because the usual writes of that
  kind are covered: those of an optimizer, after its step, and before an evaluation's eval().
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .ema import EmaLinear
from .operand import Operand
from .recipe import Quantizer, Recipe

# ---- what may be kept ----


def _deterministic(q: Quantizer) -> bool:
    return q.format is not None and q.rounding != "stochastic" and q.signs != "drawn"


def _keeps_dgrad(recipe: Recipe) -> bool:
    q = recipe.dgrad_w
    return _deterministic(q) and (q.source == "original" or _deterministic(recipe.fprop_w))


_MODES = [getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "FUNCTIONAL", "PROXY")]


def _transformed() -> bool:
    """Whether ops now do something else than compute: a trace, a fake or a functorch transform."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES)
    )


def _plain(weight: Tensor) -> bool:
    """Whether a change of the weight shows in what `_stamp` reads."""
    if type(weight) is not nn.Parameter or weight.is_inference():
        return False
    return weight.is_cuda or (weight.device.type == "cpu" and not weight.is_shared())


def _gathered() -> bool:
    """Whether FSDP2 has modules here: it gathers into plain Parameters and keeps their version."""
    states = sys.modules.get("torch.distributed._composable_state")
    return states is not None and len(states._module_state_mapping) > 0


def _capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


# ---- what makes it stale ----


class _Steps:
    """The steps that torch's optimizers make in this process."""

    count = 0
    within = False  # one is being made
    captured = False  # one was captured: its replays change weights unseen
    installed = False


# Not traced, even where the optimizer's step is compiled: the count changes with every step.
@_disable_dynamo
def _begin_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    _Steps.count, _Steps.within = _Steps.count + 1, True  # left so by a step that raises: no harm
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _Steps.captured = True


@_disable_dynamo
def _end_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    _Steps.count, _Steps.within = _Steps.count + 1, False


def _install_hooks() -> None:
    if not _Steps.installed:
        _Steps.installed = True
        register_optimizer_step_pre_hook(_begin_step)
        register_optimizer_step_post_hook(_end_step)


def _stamp(t: Tensor) -> tuple[Any, ...]:
    """Differs after every change of t that torch records; an alias by detach() has the same."""
    storage = t.untyped_storage()._cdata  # not reused for another while an entry pins it
    return storage, t._version, t.data_ptr(), t.shape, t.stride(), t.dtype, t.device


def _same(saved: Tensor, t: Tensor) -> bool:
    """Whether autograd gave back t itself, or an alias of it as a checkpoint does."""
    if saved is t:
        return True
    plain = type(saved) in (Tensor, nn.Parameter) and not saved.is_inference()
    return plain and _stamp(saved) == _stamp(t)


def _key(t: Tensor, ema: Tensor | None, recipe: Recipe) -> tuple[Any, ...]:
    stream = torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0
    average = None if ema is None else (id(ema), *_stamp(ema))
    return id(t), _stamp(t), average, id(recipe), stream, _Steps.count


class _Entry:
    """An operand and what it was made of. The weak references only keep addresses from reuse."""

    __slots__ = ("key", "operand", "pins")

    def __init__(self, key: tuple[Any, ...], operand: Operand, *pins: Any) -> None:
        self.key, self.operand = key, operand
        self.pins = [StorageWeakRef(p.untyped_storage()) if isinstance(p, Tensor) else p
                     for p in pins]  # fmt: skip


class WeightCache:
    """The operands of one layer's weight. Empty in copies and pickles."""

    __slots__ = ("_dgrad", "_fprop", "captured")

    def __init__(self) -> None:
        self.captured = False
        self.drop()
        _install_hooks()

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()

    def drop(self) -> None:
        self._fprop: _Entry | None = None
        self._dgrad: _Entry | None = None

    def usable(self, x: Tensor, weight: Tensor) -> bool:
        """Whether a forward of x may use it."""
        if _transformed() or not _plain(weight) or x.device != weight.device or _gathered():
            return False
        if _capturing(weight):
            self.captured = True
            self.drop()
        return not (self.captured or _Steps.within or _Steps.captured)

    def fprop(
        self, weight: Tensor, ema: Tensor | None, recipe: Recipe, make: Callable[[], Operand]
    ) -> Operand:
        """The operand of the weight for fprop: the one that is kept, else what make returns."""
        if not _deterministic(recipe.fprop_w):
            return make()
        if ema is not None and (type(ema) is not Tensor or ema.is_inference()):
            return make()
        key = _key(weight, ema, recipe)  # before it is made: a write meanwhile makes it stale
        entry = self._fprop
        if entry is None or entry.key != key:
            self.drop()  # the old ones, which are stale both, are freed first
            entry = _Entry(key, _make(make), weight, ema, recipe)
            self._fprop = entry
        return entry.operand

    def dgrad(
        self, weight: Tensor, saved: Tensor, recipe: Recipe, make: Callable[[], Operand]
    ) -> Operand:
        """The operand of W^T for dgrad: the one that is kept, else what make returns.

        saved: what autograd saved of the weight, or of the codes of its fprop operand, which is
        other memory where hooks moved it.
        """
        if not _keeps_dgrad(recipe) or _transformed() or _capturing(weight):
            return make()
        if self.captured or _Steps.within or _Steps.captured:
            return make()
        source, fprop = weight, self._fprop
        if recipe.dgrad_w.source == "forward":
            if fprop is None:
                return make()
            source = fprop.operand.data
        if not _same(saved, source):
            return make()
        key = _key(source, None, recipe)
        entry = self._dgrad
        if entry is None or entry.key != key:
            self._dgrad = None
            entry = _Entry(key, _make(make), source, recipe)
            self._dgrad = entry
        return entry.operand


def _make(make: Callable[[], Operand]) -> Operand:
    """make() without autograd; not as inference tensors, which no later backward could save."""
    with torch.inference_mode(False), torch.no_grad():
        return make()


# ---- the part of MXLinear ----


class CachedLinear(EmaLinear):
    """An `nn.Linear` that keeps its packed weight between calls. MXLinear is one."""

    keep_packed: bool = True
    """Whether to keep it; may be set for a layer or, on the class, for all."""

    _cache: WeightCache

    def drop_cache(self) -> None:
        """Forget the packed weight. Needed after a write that autograd and optimizers do not see.

        That is one to `weight.data`, by hand, between two forwards; the next forward after
        an optimizer's step, eval(), load_state_dict or to() packs the weight anew by itself.
        """
        self._cache.drop()

    @property
    def was_captured(self) -> bool:
        """Whether a CUDA graph holds a forward of this layer as it was: eager, not compiled."""
        return self._cache.captured

    def _start_without_cache(self) -> None:
        self._cache = WeightCache()

    def _usable_cache(self, x: Tensor) -> WeightCache | None:
        """The cache where this forward may use it. A trace reads nothing of it."""
        if torch.compiler.is_compiling():
            return None
        usable = self._cache.usable(x, self.weight)
        if not self.keep_packed:
            self.drop_cache()
            return None
        return self._cache if usable else None

    def train(self, mode: bool = True) -> CachedLinear:
        # A weight is swapped for an evaluation through weight.data more often than anywhere else.
        # nn.Linear.__init__ does not call this, but a subclass may before there is a cache.
        if "_cache" in self.__dict__ and not (mode and self.training):
            self.drop_cache()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> CachedLinear:
        self.drop_cache()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.drop_cache()
        super()._load_from_state_dict(*args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_without_cache()
