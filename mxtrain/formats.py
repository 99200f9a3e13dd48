"""Descriptors of the block formats, and the option names that the ops take as int codes.

The tables live in C++ (csrc/formats/block.h) and are read from the built library: a format added
there appears here. Sources: OCP Microscaling Formats (MX) v1.0 for mxfp*; NVIDIA's NVFP4 for nvfp4.
docs/numerics.md defines the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ._library import CATALOGUE
from .checks import check_name


@dataclass(frozen=True)
class Format:
    """One block format.

    Elements of `bits` bits share a scale in blocks of `block` along the contraction axis.

    Attributes:
        name: as `mxtrain.quantize` takes it.
        code: as the ops take it.
        bits, ebits, mbits: of one element, its exponent and its mantissa.
        emax: exponent of the largest element.
        max: the largest element.
        block: elements per scale.
        scale: "e8m0" (powers of two) or "e4m3" (with one float32 tensor scale on top).
    """

    name: str
    code: int
    bits: int
    ebits: int
    mbits: int
    emax: int
    max: float
    block: int
    scale: str

    @property
    def two_level(self) -> bool:
        """Whether operands carry a float32 tensor scale."""
        return self.scale == "e4m3"

    @property
    def bits_per_element(self) -> float:
        """Storage of one element with its share of the block scale."""
        return self.bits + 8 / self.block

    def padded(self, k: int) -> int:
        """K rounded up to whole blocks."""
        return -(-k // self.block) * self.block

    def row_bytes(self, k: int) -> int:
        """Bytes of codes in one row of an operand with K = k."""
        return self.padded(k) * self.bits // 8


FORMATS: dict[str, Format] = {
    row["name"]: Format(code=code, **row) for code, row in enumerate(CATALOGUE["formats"])
}
SCALE_RULES: dict[str, int] = {name: code for code, name in enumerate(CATALOGUE["scale_rules"])}
ROUNDINGS: dict[str, int] = {name: code for code, name in enumerate(CATALOGUE["roundings"])}
ACCUMULATE: dict[str, int] = {name: code for code, name in enumerate(CATALOGUE["accumulate"])}
GEMM_BACKENDS: dict[str, int] = {name: code for code, name in enumerate(CATALOGUE["gemm_backends"])}
# What gemm takes on which GPU, if the build has its code (csrc/dispatch_table.h).
GEMM_ROWS: list[dict] = CATALOGUE["gemm_rows"]
INT8_LAYOUTS: dict[str, int] = {name: i for i, name in enumerate(CATALOGUE["int8_layouts"])}
INT8_BLOCK = "int8_block"
"""Signed bytes in squares of 128 x 128 with a float32 scale; it has ops of its own: `int8_*`."""
HADAMARD_GROUPS: tuple[int, ...] = tuple(CATALOGUE["hadamard_groups"])


def element_bits(name: str) -> int:
    """Bits of an element of a format of `FORMATS`, or of int8_block."""
    return 8 if name == INT8_BLOCK else FORMATS[name].bits


def format_named(name: str, what: str = "quantize") -> Format:
    """The format called `name`. Raises ValueError that lists the known names."""
    check_name(what, "format", name, FORMATS)
    return FORMATS[name]
