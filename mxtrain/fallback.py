"""The threshold of int8 recipes with a fallback: which blocks of an activation take two steps.

- Rule: a block falls back where its largest magnitude exceeds the layer's threshold. The threshold
  is fixed before a call, so quantizing needs no reduction over the tensor and no synchronization;
  what the call counts moves the threshold for the next step:

      rate = blocks that fell back / finite blocks not all zero, over the micro-batches of a step
      threshold *= f  if rate > high      threshold /= f  if rate < low

  with the recipe's band [low, high] and f = factor, within [2^-126, the largest float32]. A block
  of zeros, as of an expert or a gate that was idle, and one with NaN or Inf say nothing of the
  threshold; where there are only such, nothing moves. How many are not finite is counted too
  (`nonfinite_rate`). Damping: after two moves in opposite directions f becomes
  max(smallest, sqrt(f)), after two in one direction min(factor, f^recovery), so the threshold
  settles even where the magnitudes of a tensor lie so close together that f jumps over the band.
- Whose: each layer has its own. Layers with the same input (q, k and v; gate and up) count the same
  blocks from the same start, so theirs are equal bit for bit as long as recipe and inputs are;
  nothing has to know which layers share one. (Each quantizes the input for itself.)
- When: after every `step()` of an optimizer that holds the layer's weight, on the device. Where the
  weight is frozen and no optimizer has held it, as under adapters, after the step of any. Where an
  optimizer holds a copy (float32 masters), call `update_fallback_thresholds([layer])` after it.
  Evaluation uses the threshold, counts nothing and changes nothing; the recomputation of a
  checkpoint meets the threshold of its forward and counts the same blocks again, which leaves the
  rate as it is.
- The first training call takes the quantile of its own blocks in the middle of the band.
  `reset_parameters`, and what leaves the numbers behind (`to_empty`, leaving meta), start anew.
- Ranks: where torch.distributed is initialized, an update takes the largest threshold of a group's
  ranks, which each found in its own first call, and the sum of their counts; the group is the
  default one unless `set_fallback_group` names another. So from the first update on the ranks keep
  one threshold, and one that gets its first tokens later takes it. (Pass `broadcast_buffers=False`
  to DistributedDataParallel, which else overwrites what a rank counted.)
- Saved in the state_dict: `fallback_threshold`, `fallback_step` and `fallback_counts`. A layer that
  refuses them loads nothing.

Source: arXiv 2503.08040, its delayed threshold; the numbers of the rule, all of them fields of
`mxtrain.recipe.Fallback`, are defaults of this package.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .checks import check_tensor, kind, refusal, show
from .int8 import block_amax
from .recipe import Recipe
from .weight_cache import CachedLinear

_BUFFERS = ("fallback_threshold", "fallback_step", "fallback_counts")
# Where the threshold stays, whatever comes: positive and finite, so that it can always return.
_LOWEST, _HIGHEST = 2.0**-126, torch.finfo(torch.float32).max


@torch.no_grad()
def initial_threshold(x: Tensor, recipe: Recipe) -> Tensor:
    """The threshold, float32 [1], above which the middle of the recipe's band of x's blocks lies.

    x: `[R, K]`. Blocks without a finite element that is not zero are left out; where no other is
    left it is 1.
    """
    middle = 1.0 - (recipe.fallback.low + recipe.fallback.high) / 2
    amax = block_amax(x).flatten()
    counted = amax > 0  # Tensor.nanquantile is not traced on the CPU by every torch
    ordered = torch.where(counted, amax, torch.nan).sort().values  # NaN last
    rank = (middle * (counted.sum() - 1)).clamp(min=0).reshape(1)
    below = rank.long()
    low, high = ordered[below], ordered[(below + 1).clamp(max=len(ordered) - 1)]
    threshold = torch.where(rank > below, torch.lerp(low, high, rank - below), low)
    return torch.where(threshold > 0, threshold.clamp(min=_LOWEST), 1.0)


@torch.no_grad()
def next_threshold(
    threshold: Tensor, step: Tensor, counts: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """The rule above for n layers of one recipe: (threshold, step), float32 `[n]` each.

    Args:
        threshold: float32 `[n]`.
        step: float32 `[n]`, the factor of the last move, negative where that was down, 0 before.
        counts: int64 `[n, 3]`: fallen back, not finite, not all zero. Nothing moves where no block
            is finite and not all zero.
        recipe: its fallback is the rule.
    """
    rule, rate = recipe.fallback, fallen_share(counts)  # NaN is neither above nor below
    move = (rate > rule.high).float() - (rate < rule.low).float()
    factor = torch.full_like(threshold, rule.factor)
    if rule.damping:
        before = torch.where(step == 0, factor, step.abs())
        smaller = before.sqrt().clamp(min=min(rule.smallest, rule.factor))
        larger = torch.minimum(before**rule.recovery, factor)
        turned = move * step
        factor = torch.where(turned < 0, smaller, torch.where(turned > 0, larger, before))
    moved = torch.where(move > 0, threshold * factor, threshold / factor)
    moved = moved.clamp(_LOWEST, _HIGHEST)
    return (
        torch.where(move == 0, threshold, moved),
        torch.where(move == 0, step, move * factor),
    )


def fallen_share(counts: Tensor) -> Tensor:
    """Of counts `[..., 3]`: the share that fell back of finite blocks not all zero; or NaN."""
    return counts[..., 0] / (counts[..., 2] - counts[..., 1])


def nonfinite_share(counts: Tensor) -> Tensor:
    """Of counts `[..., 3]`: the share of the blocks not all zero that have NaN or Inf; or NaN."""
    return counts[..., 1] / counts[..., 2]


class FallbackLinear(CachedLinear):
    """A linear layer with the threshold that its recipe asks for. MXLinear is one."""

    fallback_threshold: Tensor
    fallback_step: Tensor
    fallback_counts: Tensor
    _fallback_started: bool
    _fallback_held: bool  # an optimizer that has stepped holds the weight
    _fallback_last: Tensor | None  # the counts of the last update

    def _start_without_fallback(self) -> None:
        self._fallback_started = False
        self._fallback_held = False
        self._fallback_last = None

    @torch.no_grad()
    def _restart_fallback(self) -> None:
        for name in _BUFFERS:
            if name in self._buffers:
                self._buffers[name].zero_()
        self._fallback_started, self._fallback_last = False, None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "fallback_threshold" in self._buffers:  # not where nn.Linear.__init__ calls this
            self._restart_fallback()

    def _begin_or_end_fallback(self) -> None:
        """Have what _recipe needs: the state and its updates, or neither."""
        if self._recipe.fprop_x.fallback:
            if "fallback_threshold" not in self._buffers:
                self._fallback_started = False
                device = self.weight.device
                self.register_buffer("fallback_threshold", torch.zeros(1, device=device))
                self.register_buffer("fallback_step", torch.zeros(1, device=device))
                counts = torch.zeros(3, dtype=torch.int64, device=device)
                self.register_buffer("fallback_counts", counts)
            _register(self)
        else:
            for name in _BUFFERS:
                if name in self._buffers:
                    delattr(self, name)
            self._start_without_fallback()
            _forget(self)

    def fallback_rate(self) -> Tensor:
        """The share of blocks that fell back since the last update: float32 [], NaN for none.

        Of those that are finite and not all zero, which are what the threshold is judged by.
        """
        return fallen_share(self.fallback_counts)

    def nonfinite_rate(self) -> Tensor:
        """The share of blocks with NaN or Inf since the last update: float32 [], NaN for none."""
        return nonfinite_share(self.fallback_counts)

    def last_fallback_rate(self) -> Tensor | None:
        """What fallback_rate was at the last update, over all ranks; None before the first."""
        return None if self._fallback_last is None else fallen_share(self._fallback_last)

    def last_nonfinite_rate(self) -> Tensor | None:
        """What nonfinite_rate was at the last update, over all ranks; None before the first."""
        return None if self._fallback_last is None else nonfinite_share(self._fallback_last)

    def trained_threshold(self) -> Tensor | None:
        """A copy of the threshold; None where no training call has set one."""
        return self.fallback_threshold.detach().clone() if self._fallback_started else None

    def _threshold_for(self, x: Tensor) -> Tensor | None:
        """What this forward quantizes x with; None where the recipe has no fallback."""
        if not self._recipe.fprop_x.fallback:
            return None
        if self._fallback_started or x.numel() == 0:
            return self.fallback_threshold
        threshold = initial_threshold(x.reshape(-1, x.shape[-1]), self._recipe)
        # Another rank may have found one before.
        given = self.fallback_threshold
        threshold = torch.where(given > 0, given, threshold)
        if self.training:
            with torch.no_grad():
                self.fallback_threshold.copy_(threshold)
            self._fallback_started = True
        return threshold

    def _count_fallback(self, counts: Tensor) -> None:
        if self.training:
            with torch.no_grad():
                self.fallback_counts.add_(counts)

    def _apply(self, fn: Any, recurse: bool = True) -> FallbackLinear:
        before = {name: self._buffers[name] for name in _BUFFERS if name in self._buffers}
        super()._apply(fn, recurse)
        for name, old in before.items():  # to(bfloat16) is for parameters
            if self._buffers[name].dtype != old.dtype:
                self._buffers[name] = old.to(self._buffers[name].device)
        if not all(_kept(old, self._buffers[name]) for name, old in before.items()):
            self._restart_fallback()
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        keys = [prefix + name for name in _BUFFERS]
        mine = "fallback_threshold" in self._buffers
        saved = mine and all(key in state_dict for key in keys)
        loaded = {key: value for key, value in state_dict.items() if saved or key not in keys}
        if saved:
            problem = _bad_state(*(state_dict[key] for key in keys))
            if problem is not None:  # load_state_dict raises, and lists it with what else is wrong
                error_msgs.append(problem)
                return
            for key, name in zip(keys, _BUFFERS, strict=True):  # as they are, also by assignment
                own = self._buffers[name]
                loaded[key] = loaded[key].to(own.dtype).reshape(own.shape)
        super()._load_from_state_dict(
            loaded, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not mine:
            return
        if saved:
            threshold = self.fallback_threshold
            self._fallback_started = not threshold.is_meta and bool(threshold > 0)
            return
        for key in keys:  # a plain checkpoint: start anew
            if key in missing_keys:
                missing_keys.remove(key)
        if prefix + "weight" in state_dict:
            self._restart_fallback()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_fallback_held", False)
        self.__dict__.setdefault("_fallback_last", None)
        if "fallback_threshold" in self._buffers:
            _register(self)


def _kept(old: Tensor, new: Tensor) -> bool:
    """Whether new, which _apply made of old, has its numbers, as far as anyone can look."""
    if new.is_meta or type(old) is not type(new) or type(new) is not Tensor:
        return True
    return not old.is_meta and torch.equal(old.to(new.device), new)


def _bad_state(threshold: object, step: object, counts: object) -> str | None:
    """What is wrong with the fallback's state of a state_dict, or None."""
    expected = (
        ("fallback_threshold", threshold, 1, "be one finite number of at least 0",
         lambda t: t.isfinite() & (t >= 0)),
        ("fallback_step", step, 1, "be 0 or one finite number of magnitude at least 1",
         lambda t: t.isfinite() & ((t == 0) | (t.abs() >= 1))),
        ("fallback_counts", counts, 3, "be three integers, the first two at most the last in sum",
         lambda t: not t.is_floating_point() and (t >= 0).all() & (t[0] + t[1] <= t[2])),
    )  # fmt: skip
    for name, value, size, condition, good in expected:
        real = isinstance(value, Tensor) and value.numel() == size and not value.is_complex()
        if real and (value.is_meta or bool(good(value.flatten()))):
            continue
        got = f"{value.tolist()}" if real else show(value)
        advice = "Load what state_dict returned, or remove the keys fallback_* to start anew."
        return refusal("load_state_dict", name, condition, got, kind(value), advice)
    return None


# ---- updates ----

_LAYERS: dict[int, weakref.ref[FallbackLinear]] = {}  # in the order of definition
_GROUP: Any = None
_LOCAL = False
_HOOK: Any = None


def _register(layer: FallbackLinear) -> None:
    global _HOOK
    _LAYERS[id(layer)] = weakref.ref(layer)
    if _HOOK is None:
        # Not traced, even where the optimizer's step is compiled.
        _HOOK = register_optimizer_step_post_hook(torch.compiler.disable(_after_step))


def _forget(layer: FallbackLinear) -> None:
    _LAYERS.pop(id(layer), None)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    alive: list[FallbackLinear] = []
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for key, ref in list(_LAYERS.items()):
        layer = ref()
        if layer is None:
            del _LAYERS[key]
            continue
        holds = id(layer.weight) in held
        layer._fallback_held |= holds
        frozen = not layer._fallback_held and not layer.weight.requires_grad
        if (holds or frozen) and not layer.fallback_counts.is_meta:
            alive.append(layer)
    update_fallback_thresholds(alive)


def set_fallback_group(group: Any = None, local: bool = False) -> None:
    """Over which ranks the counts of fallen blocks are summed, from now on in this process.

    Args:
        group: a `torch.distributed` process group; None is the default group. Every rank of it
            must hold the same layers: name the data-parallel group under pipeline parallelism.
        local: sum over no ranks.
    """
    global _GROUP, _LOCAL
    _GROUP, _LOCAL = group, bool(local)


@torch.no_grad()
def update_fallback_thresholds(layers: Iterable[FallbackLinear]) -> None:
    """Move the threshold of every layer by what it counted, and count anew. The hook calls it.

    Two small collectives where torch.distributed is initialized; a handful of kernels for all
    layers of a recipe and device, and no synchronization with the host.
    """
    groups: dict[tuple[Any, ...], list[FallbackLinear]] = {}
    for layer in _checked(layers):
        if layer._recipe.fprop_x.fallback:
            key = layer._recipe, layer.fallback_counts.device
            groups.setdefault(key, []).append(layer)
    for (recipe, _), same in groups.items():
        counts = torch.stack([layer.fallback_counts for layer in same])
        thresholds = [layer.fallback_threshold for layer in same]
        steps = [layer.fallback_step for layer in same]
        threshold, step = torch.cat(thresholds), torch.cat(steps)
        if not _LOCAL and dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts, group=_GROUP)
            dist.all_reduce(threshold, dist.ReduceOp.MAX, group=_GROUP)
        threshold, step = next_threshold(threshold, step, counts, recipe)
        for layer, last in zip(same, counts.unbind(), strict=True):
            layer._fallback_last = last
        torch._foreach_copy_(thresholds, list(threshold.split(1)))
        torch._foreach_copy_(steps, list(step.split(1)))
        torch._foreach_zero_([layer.fallback_counts for layer in same])


def _checked(layers: Iterable[FallbackLinear]) -> list[FallbackLinear]:
    what, argument = "update_fallback_thresholds", "layers"
    advice = "Pass a list of mxtrain.MXLinear."
    if not isinstance(layers, Iterable) or isinstance(layers, (str, Tensor)):
        got = type(layers).__name__
        raise TypeError(refusal(what, argument, "be a list", got, show(layers), advice))
    layers = list(layers)
    for layer in layers:
        if not isinstance(layer, FallbackLinear):
            got = type(layer).__name__
            raise TypeError(
                refusal(what, argument, "be made of MXLinear", got, show(layer), advice)
            )
    return layers


def check_threshold(what: str, threshold: object, recipe: Recipe) -> None:
    """TypeError or ValueError unless it is None, or one float32 for a recipe with a fallback."""
    check_tensor(what, "threshold", threshold, optional=True)
    if threshold is None:
        return
    context = f"recipe {recipe.name!r}"
    if not recipe.fprop_x.fallback:
        condition, advice = "be None without a fallback", "Leave it out."
        raise ValueError(refusal(what, "threshold", condition, show(threshold), context, advice))
    if threshold.dtype != torch.float32 or threshold.numel() != 1:
        condition, advice = "be one float32", "A block falls back where its maximum exceeds it."
        raise ValueError(refusal(what, "threshold", condition, show(threshold), context, advice))
