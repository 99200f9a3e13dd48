"""Which rows run: suites are lists of (rows, shapes), and a plan is what is left of one under --ops
and --shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from .cases import Case, Unfit, build, parse_shape

Rows = Sequence[str]

HEADLINE: Rows = (
    "quantize/mxfp4/nearest",
    "quantize/mxfp4/nearest+transpose",
    "quantize/mxfp4/stochastic",
    "quantize/mxfp4/stochastic+h64",
    "quantize_dual/mxfp4/stochastic+h64",
    "requantize/mxfp4/stochastic",
    "dequantize/mxfp4/bf16",
    "hadamard/64",
    "stochastic_round/bf16",
    "swizzle_scale/mxfp4",
)
FORMATS: Rows = tuple(
    f"quantize/{format}/nearest"
    for format in ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "nvfp4")
)
VARIANTS: Rows = (
    "quantize/mxfp4/nearest+floor",
    "quantize/mxfp4/nearest+even",
    "quantize/mxfp4/nearest+swizzle",
    "quantize/mxfp4/nearest+fp32",
    "quantize/mxfp4/nearest+h64",
    "quantize/mxfp4/toward",
    "quantize/mxfp4/stochastic+transpose",
    "quantize/mxfp4/stochastic+h64+transpose",
    "quantize/mxfp4/stochastic+h16",
    "quantize/mxfp4/stochastic+h32",
    "quantize/mxfp4/stochastic+h128",
    "quantize/mxfp4/stochastic+h256",
    "quantize/nvfp4/stochastic",
    "quantize/mxfp8_e4m3/nearest+transpose",
    "quantize_dual/mxfp4/nearest",
    "quantize_dual/mxfp4/stochastic",
    "quantize_dual/mxfp8_e4m3/nearest",
    "requantize/mxfp4/nearest",
    "requantize/mxfp4/stochastic+h64",
    "dequantize/mxfp8_e4m3/bf16",
    "dequantize/nvfp4/bf16",
    "dequantize/mxfp4/fp32",
    "hadamard/16",
    "hadamard/128",
    "hadamard/256",
    "column_sum",
    "stochastic_round/e4m3",
)
OPTIMIZERS: Rows = ("optim/adamw", "optim/adamw+ema")
MORE_OPTIMIZERS: Rows = (
    "optim/adamw+ema+bf16",
    "optim/adamw+changes",
    "optim/adamw+ema+changes",
    "optim/qramping",
    "peer/torch_adamw",
    "peer/torch_adamw+ema",
    "peer/torch_adamw_foreach+ema",
)
WATCHED: Rows = ("quantization_statistics/mxfp4", "oscillation_step/mxfp4")
SAMPLE = "16x4096"  # what mxtrain.monitor takes of a weight
COPIES: Rows = ("peer/copy", "peer/copy_kernel")
COMPILED: Rows = ("peer/torchao_to_mx_compiled", "peer/torchao_to_mx_compiled/mxfp8_e4m3")
BIG = "16384x8192"
SMALL = "2048x4096"
MODELS = (
    "8192x4096",  # Llama-3-8B, attention, 8192 tokens
    "8192x14336",  # Llama-3-8B, feed-forward
    "12608x768",  # ViT-B, 64 images of 197 tokens
    "12608x3072",  # ViT-B, feed-forward
    "4099x1111",  # ragged both ways
)

GEMMS: Rows = ("gemm/mxfp4", "peer/cublas_bf16", "peer/cublas_fp8_rowwise")
GEMM_SHAPES = ("8192x8192x8192", "4096x4096x4096", "16384x4096x4096", "8192x14336x4096")
OTHER_GEMMS: Rows = ("gemm/mxfp4+dequant", "gemm/mxfp8_e4m3", "gemm/nvfp4")
MODEL_GEMMS = (
    "8192x6144x4096",  # Llama-3-8B, attention in
    "8192x4096x14336",  # Llama-3-8B, feed-forward out
    "8192x28672x4096",  # Llama-3-8B, feed-forward in, gate and up in one
    "12608x3072x768",  # ViT-B, 64 images of 197 tokens
    "12608x768x3072",  # ViT-B, feed-forward out
    "4099x1111x3333",  # ragged
)
LINEARS = ("8192x4096x4096", "8192x8192x8192", "16384x4096x14336")
MODEL_LINEARS = (
    "8192x14336x4096",  # Llama-3-8B, feed-forward out
    "12608x768x3072",  # ViT-B, feed-forward in
    "12608x768x2304",  # ViT-B, attention in
    "4099x1111x3333",  # ragged
)
RECIPE_ROWS = (
    "tetrajet", "mxfp4_baseline", "mxfp4_backward", "mxfp8", "nvfp4", "int8_block", "int8_fallback",
    "int8_fallback+dense",
)  # fmt: skip
INT8: Rows = (
    "int8_quantize/nearest",
    "int8_quantize/nearest+both",
    "int8_quantize/stochastic+both",
    "int8_quantize_fallback/r0.2",
    "int8_quantize_fallback/r0.2+both",
    "int8_quantize_fallback/r1.0",
)
INT8_GEMMS: Rows = (
    "int8_gemm/r0.0",
    "int8_gemm/r0.1",
    "int8_gemm/r0.2",
    "int8_gemm/r1.0",
    "int8_gemm/r0.1+channels",
    "int8_gemm/r0.2+channels",
    "int8_gemm/r0.2+tokens",
    "int8_gemm/r0.0156",
    "int8_gemm/r0.0156+tokens",
    "int8_gemm/r0.2+b",
)
TOKEN_GEMMS: Rows = ("int8_gemm/r0.03125+tokens", "int8_gemm/r0.03125")  # one row of blocks of 32
NORM_SHAPES = ("16384x4096", "16384x1024", "4099x1111")
GLU_SHAPES = ("16384x4096", "8192x14336", "4099x1111")
LLAMA = "4x2048x4096"
LLAMAS: Rows = tuple(
    f"block/llama/{recipe}/{LLAMA}"
    for recipe in ("int8_fallback", "int8_fallback+dense", "int8_block", "bf16")
)

FP8_LINEAR: Rows = ("peer/torchao_fp8_rowwise",)
TRAINING: Rows = tuple(f"train/gpt/{recipe}/24x1024/16x1024" for recipe in ("tetrajet", "bf16"))


def linears(recipes: Sequence[str], shapes: Sequence[str]) -> Rows:
    """Rows up to their last part, which all have in common."""
    return tuple(f"linear/{recipe}/{shape}" for shape in shapes for recipe in (*recipes, "bf16"))


def contexts(op: str, kind: str, shapes: Sequence[str]) -> Rows:
    """The same of RMSNorm and SwiGLU."""
    return tuple(f"{op}/{kind}/{shape}" for shape in shapes)


SUITES: dict[str, tuple[tuple[Rows, Sequence[str]], ...]] = {
    "quick": (
        (COPIES, (BIG,)),
        (("peer/empty_kernel",), ("1",)),
        ((*HEADLINE, *FORMATS), (BIG,)),
        (COMPILED[:1], (BIG,)),
        (("quantize/mxfp4/nearest",), (SMALL,)),
        (OPTIMIZERS, ("8192x8192",)),
        (GEMMS, GEMM_SHAPES),
        (OTHER_GEMMS, GEMM_SHAPES[:1]),
        (INT8[3:4], (BIG,)),
        (INT8_GEMMS[:1], GEMM_SHAPES[:1]),
        (contexts("rms_norm", "int10", NORM_SHAPES[:1]), ("fwd", "bwd")),
        (contexts("swiglu", "int10", GLU_SHAPES[:1]), ("fwd", "bwd")),
        (contexts("rms_norm", "bf16", NORM_SHAPES[:1]), ("fwd",)),
        (contexts("swiglu", "bf16", GLU_SHAPES[:1]), ("fwd",)),
        (linears(("tetrajet",), LINEARS), ("fwd+bwd",)),
    ),
    "full": (
        (COPIES, (BIG,)),
        (("peer/empty_kernel",), ("1",)),
        ((*HEADLINE, *FORMATS, *VARIANTS), (BIG,)),
        (COMPILED, (BIG,)),
        (WATCHED, (SAMPLE, SMALL)),
        (HEADLINE, (SMALL, *MODELS)),
        (COMPILED[:1], MODELS[:2]),
        ((*OPTIMIZERS, *MORE_OPTIMIZERS), ("8192x8192",)),
        (OPTIMIZERS, ("4096x4096", "4099x1111")),
        (GEMMS, (*GEMM_SHAPES, *MODEL_GEMMS)),
        (OTHER_GEMMS, (*GEMM_SHAPES[:2], *MODEL_GEMMS[-1:])),
        (INT8, (BIG,)),
        (INT8_GEMMS, GEMM_SHAPES[:1]),
        (INT8_GEMMS[:1], (*GEMM_SHAPES[1:], *MODEL_GEMMS[-1:])),
        (TOKEN_GEMMS, GEMM_SHAPES[1:2]),
        (contexts("rms_norm", "int10", NORM_SHAPES), ("fwd", "bwd")),
        (contexts("swiglu", "int10", GLU_SHAPES), ("fwd", "bwd")),
        (contexts("rms_norm", "bf16", NORM_SHAPES), ("fwd",)),
        (contexts("swiglu", "bf16", GLU_SHAPES), ("fwd",)),
        (LLAMAS, ("fwd+bwd",)),
        (linears(("tetrajet",), (*LINEARS, *MODEL_LINEARS)), ("fwd+bwd",)),
        (linears(RECIPE_ROWS[1:], LINEARS[:1]), ("fwd+bwd",)),
        (FP8_LINEAR, (*LINEARS, *MODEL_LINEARS[:3])),  # FP8 takes sizes of whole 16s
        (TRAINING, ("step", "graph")),
    ),
    "cpu": (
        (COPIES[:1], ("4096x4096",)),
        (("quantize/mxfp4/nearest", "quantize/mxfp4/nearest+floor"), ("4096x4096",)),
        (("peer/torchao_to_mx_eager",), ("4096x4096",)),
        ((*HEADLINE[1:], *FORMATS), ("2048x2048",)),
    ),
}
PEAKS = {
    "copy_gbps": ("gbps", "peer/copy*/*"),
    "bf16_tflops": ("tflops", "peer/cublas_bf16/*"),
    "fp8_tflops": ("tflops", "peer/cublas_fp8_rowwise/*"),
}
"""The ceilings: the best of these columns over these rows, which run whatever --ops says."""


def names(suite: str, shapes: Sequence[str] = ()) -> list[str]:
    """The rows of a suite, without those that do not fit their shape; `shapes` replace every RxC in
    it.

    Raises ValueError for a shape that is none.
    """
    for shape in shapes:
        parse_shape(shape)
    found: dict[str, None] = {}  # an ordered set
    for rows, own in SUITES[suite]:
        matrices = own[0].count("x") == 1
        for shape in shapes if shapes and matrices else own:
            for row in rows:
                try:
                    found[build(f"{row}/{shape}").name] = None
                except Unfit:
                    continue
    return list(found)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern selects a row: its family, leading parts of its name, or a glob of the
    whole name.
    """
    return (
        name == pattern or name.startswith(pattern.rstrip("/") + "/") or fnmatchcase(name, pattern)
    )


def plan(suite: str, ops: Sequence[str] = (), shapes: Sequence[str] = ()) -> list[Case]:
    """The cases to run, in order: those of the suite that `ops` select (all without), the rows that
    these are compared with, and the ceilings.

    Raises ValueError where a pattern selects nothing or a shape is none.
    """
    every = [build(name) for name in names(suite, shapes)]
    if not ops:
        return every
    for pattern in ops:
        if not any(matches(case.name, pattern) for case in every):
            known = dict.fromkeys(case.name.split("/")[0] for case in every)
            raise ValueError(
                f"--ops {pattern} selects no row of suite {suite}; families there are "
                f"{', '.join(known)} (`python -m bench list --suite {suite}` has the names)"
            )
    wanted = {c.name for c in every if any(matches(c.name, pattern) for pattern in ops)}
    for case in every:
        if case.name in wanted:
            wanted.update(case.baselines)
    ceilings = [pattern for _, pattern in PEAKS.values()]
    return [c for c in every if c.name in wanted or any(fnmatchcase(c.name, p) for p in ceilings)]
