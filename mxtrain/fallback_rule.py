"""How a fallback's threshold moves: the numbers of a recipe, which mxtrain/fallback.py applies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .checks import as_float32, check_that, is_number

MARGIN = 0.1
"""By how much the default capacity exceeds the upper end of the band.

A call sees the threshold of the step before. Where all magnitudes grow by 5% meanwhile and the
logarithms of the blocks' maxima are normal with deviation s, the rate grows by less than
ln(1.05) / s / sqrt(2 pi): 0.1 at s = 0.2, which is narrow.
"""


@dataclass(frozen=True)
class Fallback:
    """The band of the share of blocks that fall back, and what the threshold moves by outside it.

    Attributes:
        low, high: the band; defaults of this package, as are the others.
        factor: what the threshold is multiplied or divided by.
        smallest: what the factor shrinks to at least, where there is damping.
        recovery: the exponent of a factor that has shrunk, with every move in one direction.
        damping: whether the factor shrinks where the threshold jumps to and fro over the band.
        capacity: the share of an activation's blocks whose second step backward keeps, densely
            packed: 1 + capacity bytes an element. Where more fell back, those of the largest
            magnitudes; the others are plain INT8 in wgrad, not in forward. "band" is `MARGIN` above
            the band, high + 0.1, so that this happens only while a threshold is on its way. None
            keeps all, 2 bytes an element, and packs nothing, which takes no time.

    Raises:
        ValueError: for a band that is none, a factor that does not move, a capacity that is no
            share.
    """

    low: float = 0.1
    high: float = 0.3
    factor: float = 1.3
    smallest: float = field(default=1.02, kw_only=True)
    recovery: float = field(default=1.5, kw_only=True)
    damping: bool = True
    capacity: float | str | None = "band"

    def __post_init__(self) -> None:
        what, low, high, factor = "Fallback", self.low, self.high, self.factor
        ok = is_number(low) and is_number(high) and 0 <= low < high <= 1
        condition = "be shares with 0 <= low < high <= 1"
        check_that(ok, what, "low, high", condition, (low, high), "Try 0.1 and 0.3.")
        ok = is_number(factor) and 1 < as_float32(factor) < math.inf
        check_that(ok, what, "factor", "be above 1", factor, "Try 1.3.")
        for name, default in (("smallest", 1.02), ("recovery", 1.5)):
            value = getattr(self, name)
            ok = is_number(value) and 1 < as_float32(value) < math.inf
            check_that(ok, what, name, "be above 1", value, f"Try {default}.")
        ok = isinstance(self.damping, bool)
        advice = "Pass one of the two."
        check_that(ok, what, "damping", "be True or False", self.damping, advice)
        share = min(1.0, high + MARGIN) if self.capacity == "band" else self.capacity
        ok = share is None or (is_number(share) and 0 < share <= 1)
        condition, advice = "be None or a share in (0, 1], or 'band'", "Try 'band', somewhat above."
        check_that(ok, what, "capacity", condition, share, advice)

        # Not a field: a string, which torch.compile takes for a constant where a float that differs
        # between layers becomes a symbol, of which sizes cannot be made in backward.
        object.__setattr__(self, "_capacity", None if share is None else repr(float(share)))

    @property
    def kept_share(self) -> float | None:
        """The capacity, as what is traced may compute sizes with it."""
        return None if self._capacity is None else float(self._capacity)


DEFAULT = Fallback()
