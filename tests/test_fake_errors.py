"""The fake kernels refuse what the real kernels refuse, in the same words.

So torch.compile, torch.export and meta tensors say at once what the run would say.
"""

from __future__ import annotations

import math

import pytest
import torch
from common import STYLE, operand
from torch._subclasses.fake_tensor import FakeTensorMode

import mxtrain
from mxtrain import ops

X = torch.randn(64, 64)
A, N = operand(64, 40, "mxfp4"), operand(64, 40, "nvfp4")
C, B6 = operand(64, 80, "mxfp4"), operand(64, 40, "mxfp6_e3m2")
RNG, SIGNS = torch.tensor([1, 2]), torch.ones(64, dtype=torch.int8)
SCALE = torch.zeros(130, 5, dtype=torch.uint8)
SWIZZLED = mxtrain.swizzle_scale(SCALE)
NAN, INF = math.nan, math.inf
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
W = torch.ones(64)
NORM = torch.ops.mxtrain.rms_norm_forward(X, W, 1e-6, F32)[1:]
GLU = torch.ops.mxtrain.swiglu_forward(X, X)[1:]


def dual(row=(), col=(), x=X, rng=None):
    default = (0, 1, 0, 0, None, 1.0, None)
    return (x, rng, *(*row, *default[len(row) :]), *(*col, *default[len(col) :]))


def gemm(a=A, b=A, format=0, bias=None, alpha=1.0, out_dtype=F32, accumulate=0):
    parts = (a.data, a.scale, a.tensor_scale, b.data, b.scale, b.tensor_scale)
    return (*parts, format, bias, alpha, out_dtype, accumulate)


def gemm_add_(out=None, a=A, b=A, format=0, alpha=1.0, accumulate=0):
    out = torch.zeros(64, 64) if out is None else out
    parts = (a.data, a.scale, a.tensor_scale, b.data, b.scale, b.tensor_scale)
    return (out, *parts, format, alpha, accumulate)


P, P16 = torch.ones(4, 40), torch.ones(4, 40, dtype=BF16)
C8, C16 = torch.ones(4, 40, dtype=torch.uint8), torch.ones(4, 40, dtype=torch.int16)
STEP = torch.zeros(())
ADAMW = ("params", "grads", "exp_avgs", "exp_avg_sqs")


def adamw(
    steps=(STEP,), beta1=0.9, beta2=0.999, eps=0.0, lr_tensor=None, rng=None, extra=None, **lists
):
    lists = [list(lists.get(name, [P])) for name in ADAMW]
    numbers = (0.1, beta1, beta2, eps, 0.0)
    return (*lists, list(steps), *numbers, lr_tensor, rng, *(extra or ([], [], [], [])))


def ramped(grad_sums=(P,), counts=(C8,), periods=(C8,), **rest):
    return adamw(extra=(list(grad_sums), list(counts), list(periods)), **rest)


def statistics(x=X, a=A, format=0, prescale=1.0):
    return (x[:, :40], a.data, a.scale, a.tensor_scale, format, prescale)


def oscillation_step_(state=None, sums=None, w=X, a=A, format=0):
    state = torch.zeros(5, 64, 40) if state is None else state
    sums = torch.zeros(128, 5, dtype=F64) if sums is None else sums
    return (state, sums, w[:, :40], a.data, a.scale, a.tensor_scale, format)


I8, ONE = mxtrain.int8_quantize_fallback(X, 0.5)[0], torch.ones(1)


def int8(
    a=I8.data, a_scale=I8.scale, b=I8.data, b_scale=I8.scale, bias=None, out_dtype=F32,
    residual=(None,) * 3, of_b=False,
):  # fmt: skip
    return (a, a_scale, b, b_scale, bias, out_dtype, *residual, of_b)


POOL = torch.zeros(3, 128, 128, dtype=torch.int8)
CODES = POOL.view(-1, 256)
GRID, KEPT = torch.ones(2, 2), torch.ones(2, 2, dtype=torch.uint8)
SLOTS = torch.ones(2, 2, dtype=torch.int32)


def pack(residual=CODES[:150], scale=GRID, mask=KEPT, count=3):
    return (residual, scale, mask, count)


def unpack(pool=POOL, slots=SLOTS, rows=150, kp=256):
    return (pool, slots, rows, kp)


BAD = {
    "adamw_": [
        adamw(params=[P.half()]),
        adamw(params=[P.double()]),
        adamw(params=[P, P16]),
        adamw(params=[P.t()]),
        adamw(grads=[P, P]),
        adamw(grads=[P16]),
        adamw(grads=[P[:2]]),
        adamw(grads=[torch.ones(40, 4).t()]),
        adamw(exp_avgs=[P16]),
        adamw(exp_avgs=[]),
        adamw(exp_avg_sqs=[P[:1]]),
        adamw(steps=[]),
        adamw(steps=[STEP.double()]),
        adamw(steps=[torch.zeros(2)]),
        adamw(beta1=1.0),
        adamw(beta2=-0.5),
        adamw(beta2=NAN),
        adamw(eps=-1e-8),
        adamw(eps=INF),
        adamw(lr_tensor=STEP),
        adamw(lr_tensor=torch.zeros(2, dtype=F64)),
        adamw(rng=RNG),
        adamw(rng=RNG[None].int()),
        adamw(rng=RNG.repeat(2, 1)),
        adamw(extra=([P16], [0.1], [], [])),
        adamw(extra=([P, P], [0.1], [], [])),
        adamw(extra=([P], [], [], [])),
        adamw(extra=([], [0.5], [], [])),
        adamw(extra=([P], [1.5], [], [])),
        adamw(extra=([P], [NAN], [], [])),
        adamw(extra=([], [], [P], [])),
        adamw(extra=([], [], [], [P])),
        adamw(extra=([], [], [P], [P16])),
        adamw(**{name: [P[0]] for name in ADAMW}, extra=([], [], [P[0]], [P[0]])),
        adamw(extra=([], [], [P], [P], 3)),
        adamw(extra=([], [], [P], [P], 1, 3)),
        adamw(extra=([], [], [P], [P], 1, 1)),
        adamw(extra=([], [], [P], [P], 1, 2)),
    ],
    "ramped_adamw_": [
        ramped(params=[P.half()]),
        ramped(grads=[]),
        ramped(beta1=-1.0),
        ramped(grad_sums=[]),
        ramped(grad_sums=[P16]),
        ramped(counts=[]),
        ramped(counts=[P]),
        ramped(counts=[C8[:2]]),
        ramped(periods=[C16]),
        ramped(counts=[C16]),
        ramped(counts=[C16], periods=[C16, C16]),
    ],
    "quantize": [
        (X.double(), 0),
        (X.to(torch.complex64), 0),
        (X.to(torch.float8_e4m3fn), 0),
        (X.bool(), 0),
        (X[0], 0),
        (X[None], 0),
        (X[:, :0], 0),
        (X[:0], 0, 1, 0, True),
        (X[:1, :0].expand(2**57, 0), 0),
        (X, 9),
        (X, -1),
        (X, 0, 3),
        (X, 0, -1),
        (X, 0, 1, 7),
        (X, 0, 1, 1),
        (X, 0, 1, 1, False, RNG.int()),
        (X, 0, 1, 1, False, RNG[:1]),
        (X, 0, 1, 1, False, RNG[None]),
        (X, 0, 1, 0, False, None, 24),
        (X, 0, 1, 0, False, None, -16),
        (X, 0, 1, 0, False, None, 512),
        (X, 0, 1, 0, False, None, 128),
        (X[:, :33], 5, 1, 0, False, None, 32),
        (X, 0, 1, 0, False, None, 0, SIGNS),
        (X, 0, 1, 0, False, None, 32, SIGNS),
        (X, 0, 1, 0, False, None, 64, SIGNS.float()),
        (X, 0, 1, 0, False, None, 32, SIGNS[::2]),
        (X, 0, 1, 0, False, None, 0, None, 0.0),
        (X, 0, 1, 0, False, None, 0, None, -1.5),
        (X, 0, 1, 0, False, None, 0, None, NAN),
        (X, 0, 1, 0, False, None, 0, None, INF),
        (X, 0, 1, 0, False, None, 0, None, 1e300),
        (X, 0, 1, 0, False, None, 0, None, 1e-300),
        (X, 0, 1, 2),
        (X, 0, 1, 0, False, None, 0, None, 1.0, X),
        (X, 0, 1, 2, False, None, 0, None, 1.0, X[:, :32]),
        (X, 0, 1, 2, False, None, 0, None, 1.0, X[0]),
        (X, 0, 1, 2, False, None, 0, None, 1.0, X.double()),
    ],
    "quantize_dual": [
        dual(x=X.int()),
        dual(x=X[0]),
        dual(x=X[:0]),
        dual(row=(7,)),
        dual(col=(7,)),
        dual(row=(0, 1, 1)),
        dual(col=(0, 1, 1)),
        dual(col=(0, 1, 1), rng=RNG.float()),
        dual(row=(0, 1, 0, 32, SIGNS)),
        dual(col=(0, 1, 0, 128)),
        dual(col=(0, 1, 0, 0, None, NAN)),
        dual(row=(0, 1, 2)),
        dual(col=(0, 1, 2, 0, None, 1.0, X[:3])),
    ],
    "requantize": [
        (A.data.float(), A.scale, None, 0, 40, 0),
        (A.data, A.scale[:3], None, 0, 40, 0),
        (A.data, A.scale, None, 0, 65, 0),
        (A.data, A.scale, None, 0, 40, 6),
        (A.data, A.scale, None, 0, 40, 0, 1, 2),
        (A.data, A.scale, None, 0, 40, 0, 1, 1),
        (A.data, A.scale, None, 0, 40, 0, 1, 0, None, 128),
        (A.data[:0], A.scale[:0], None, 0, 40, 0),
    ],
    "dequantize": [
        (A.data.float(), A.scale, None, 0, 40, F32),
        (A.data[0], A.scale, None, 0, 40, F32),
        (A.data, A.scale[:, 0], None, 0, 40, F32),
        (A.data, SWIZZLED, None, 0, 40, F32),
        (A.data[:, :15], A.scale, None, 0, 40, F32),
        (A.data[:, :0], A.scale, None, 0, 40, F32),
        (B6.data[:, :10], B6.scale, None, 1, 40, F32),
        (A.data, A.scale[:3], None, 0, 40, F32),
        (A.data, A.scale, None, 3, 40, F32),
        (A.data, A.scale, None, 6, 40, F32),
        (A.data, A.scale, None, 0, 0, F32),
        (A.data, A.scale, None, 0, 32, F32),
        (A.data, A.scale, None, 0, 65, F32),
        (A.data, A.scale, None, 0, 40, F64),
        (A.data, A.scale, None, 0, 40, torch.int64),
        (A.data, A.scale, torch.ones(1), 0, 40, F32),
        (N.data, N.scale, None, 5, 40, F32),
        (N.data, N.scale, torch.ones(0), 5, 40, F32),
        (N.data, N.scale, torch.ones(2), 5, 40, F32),
        (N.data, N.scale, torch.ones(1).half(), 5, 40, F32),
    ],
    "hadamard": [
        (X.double(), 32),
        (X[0, 0], 32),
        (X, 0),
        (X, 7),
        (X, 128),
        (X[:, :40], 16),
        (X, 32, SIGNS),
        (X, 64, SIGNS.int()),
    ],
    "stochastic_round": [
        (X.bfloat16(), BF16, RNG),
        (X, torch.float16, RNG),
        (X, torch.int8, RNG),
        (X, BF16, RNG.int()),
        (X, BF16, RNG[:1]),
    ],
    "swizzle_scale": [(X,), (SCALE[0],), (SCALE[:1, :0].expand(2**57, 0),)],
    "unswizzle_scale": [
        (SCALE, 130, 5),
        (SWIZZLED, -1, 5),
        (SWIZZLED, 130, 2**63 - 1),
        (SWIZZLED, 2**56, 5),
        (SWIZZLED, 130, 9),
        (SWIZZLED.float(), 130, 5),
    ],
    "gemm": [
        gemm(b=C),
        gemm(b=N),
        gemm(format=5),
        gemm(format=-1),
        gemm(out_dtype=F64),
        gemm(alpha=INF),
        gemm(alpha=NAN),
        gemm(alpha=1e300),
        gemm(accumulate=9),
        gemm(bias=torch.ones(3)),
        gemm(bias=torch.ones(64, 1)),
        gemm(bias=torch.ones(64).double()),
        gemm(a=N, b=A, format=5),
    ],
    "gemm_add_": [
        gemm_add_(b=C),
        gemm_add_(format=5),
        gemm_add_(alpha=NAN),
        gemm_add_(accumulate=9),
        gemm_add_(torch.zeros(64, 64).bfloat16()),
        gemm_add_(torch.zeros(64, 65)),
        gemm_add_(torch.zeros(64)),
        gemm_add_(torch.zeros(1, 64, 64)),
        gemm_add_(torch.zeros(64, 128)[:, ::2]),
        gemm_add_(torch.zeros(64, 64).t().expand(64, 64)[:, :0]),
    ],
    "quantization_statistics": [
        statistics(X.double()),
        statistics(X[:60]),
        statistics(a=C),
        statistics(a=N),
        statistics(format=9),
        statistics(prescale=0.0),
        statistics(prescale=INF),
        statistics(prescale=NAN),
    ],
    "oscillation_step_": [
        oscillation_step_(w=X.double()),
        oscillation_step_(w=X[:60]),
        oscillation_step_(a=C),
        oscillation_step_(format=5),
        oscillation_step_(torch.zeros(5, 64, 64)),
        oscillation_step_(torch.zeros(4, 64, 40)),
        oscillation_step_(torch.zeros(5, 64, 40, dtype=F64)),
        oscillation_step_(torch.zeros(5, 64, 80)[:, :, ::2]),
        oscillation_step_(sums=torch.zeros(128, 5)),
        oscillation_step_(sums=torch.zeros(5, dtype=F64)),
    ],
    "int8_quantize": [
        (X.double(),),
        (X[0],),
        (X[:0],),
        (X[:, :0],),
        (X, 2),
        (X, -1),
        (X, 0, None, 3),
        (X, 1),
        (X, 1, RNG.int()),
    ],
    "int8_quantize_fallback": [
        (X.int(), ONE),
        (X[:0], ONE),
        (X, ONE, 3),
        (X, ONE.double()),
        (X, torch.ones(2)),
    ],
    "int8_gemm": [
        int8(a=X),
        int8(a=I8.data[0]),
        int8(b=I8.data[:, :100]),
        int8(b=I8.data[:, :0]),
        int8(b=torch.zeros(64, 256, dtype=torch.int8)),
        int8(a_scale=I8.scale.double()),
        int8(a_scale=I8.scale[0]),
        int8(b_scale=torch.ones(2, 1)),
        int8(b_scale=torch.ones(1, 2)),
        int8(out_dtype=F64),
        int8(residual=(I8.residual, None, None)),
        int8(residual=(I8.residual, I8.residual_scale, None)),
        int8(residual=(I8.residual[:3], I8.residual_scale, I8.mask)),
        int8(residual=(I8.residual.float(), I8.residual_scale, I8.mask)),
        int8(residual=(I8.residual, I8.residual_scale.half(), I8.mask)),
        int8(residual=(I8.residual, I8.residual_scale, I8.mask.bool())),
        int8(residual=(I8.residual, I8.residual_scale, torch.ones(2, 1, dtype=torch.uint8))),
        int8(residual=(I8.residual, I8.residual_scale, I8.mask.int())),
        int8(residual=(POOL, I8.residual_scale, I8.mask)),
        int8(residual=(POOL, I8.residual_scale, torch.ones(2, 1, dtype=torch.int32))),
        int8(residual=(POOL.byte(), I8.residual_scale, I8.mask.int())),
        int8(residual=(POOL[:, :100], I8.residual_scale, I8.mask.int())),
        int8(bias=torch.ones(63)),
        int8(bias=torch.ones(64, 1)),
        int8(bias=torch.ones(64).int()),
    ],
    "int8_pack_residual": [
        pack(residual=POOL),
        pack(residual=POOL[0].float()),
        pack(residual=CODES[:, :200]),
        pack(residual=CODES[:, :0]),
        pack(residual=CODES[:100]),
        pack(scale=GRID.double()),
        pack(scale=GRID[0]),
        pack(scale=torch.ones(2, 3)),
        pack(mask=KEPT.bool()),
        pack(mask=KEPT[:1]),
        pack(count=-1),
        pack(count=5),
        pack(residual=CODES[:0], scale=GRID[:0], mask=KEPT[:0], count=1),
    ],
    "int8_unpack_residual": [
        unpack(pool=POOL.byte()),
        unpack(pool=POOL[0]),
        unpack(pool=POOL[:, :100]),
        unpack(pool=POOL[:, :, :100]),
        unpack(slots=KEPT),
        unpack(slots=SLOTS.long()),
        unpack(slots=SLOTS[None]),
        unpack(rows=128),
        unpack(rows=257),
        unpack(rows=-1, slots=SLOTS[:0]),
        unpack(rows=2**63 - 1),
        unpack(kp=128),
        unpack(kp=250),
        unpack(kp=-256),
    ],
    "column_sum": [(X[0],), (X.double(),), (X[None],)],
    "rms_norm_forward": [
        (X.double(), W, 1e-6, F32),
        (X[0], W, 1e-6, F32),
        (X[:, :0], None, 1e-6, F32),
        (X[:1, :1].expand(2, 16385), None, 1e-6, F32),
        (X, W[:5], 1e-6, F32),
        (X, W.int(), 1e-6, F32),
        (X, X, 1e-6, F32),
        (X, W, -1.0, F32),
        (X, W, math.nan, F32),
        (X, W, 1e300, F32),
        (X, W, 1e-6, F64),
    ],
    "rms_norm_backward": [
        (X.int(), *NORM, W, F32),
        (X[:5], *NORM, W, F32),
        (X[:, :0], *NORM, W, F32),
        (X, NORM[0].byte(), *NORM[1:], W, F32),
        (X, NORM[0], NORM[0], *NORM[2:], W, F32),
        (X, *NORM[:2], NORM[2][0], NORM[3], W, F32),
        (X, *NORM[:3], NORM[3].double(), W, F32),
        (X, *NORM[:3], NORM[3][:5], W, F32),
        (X, *NORM, W[:5], F32),
        (X, *NORM, W, F64),
    ],
    "swiglu_forward": [(X.int(), X), (X[0], X[0]), (X, X.half()), (X, X[:5]), (X, X[0])],
    "swiglu_backward": [
        (X.double(), *GLU, F32),
        (X[:5], *GLU, F32),
        (X, *NORM[:3], F32),
        (X, GLU[0], GLU[0], GLU[2], F32),
        (X, *GLU[:2], GLU[2].half(), F32),
        (X, *GLU, F64),
    ],
}
CASES = [(name, i) for name, calls in BAD.items() for i in range(len(calls))]


def message(name: str, args: tuple) -> str:
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.mxtrain, name)(*args)
    return str(caught.value)


def to_meta(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def convert(args, change):
    """The arguments, with change made to every tensor, in lists too."""

    def one(a):
        if isinstance(a, list):
            return [one(v) for v in a]
        return change(a) if isinstance(a, torch.Tensor) else a

    return [one(a) for a in args]


def test_every_op_has_bad_calls():
    assert set(BAD) == set(ops.OP_NAMES)


@pytest.mark.parametrize("name, i", CASES)
def test_same_words(name, i):
    args = BAD[name][i]
    real = message(name, args)
    assert STYLE.fullmatch(real) and real.startswith(f"mxtrain::{name}: "), real
    with FakeTensorMode() as mode:
        fake = convert(args, mode.from_tensor)
        assert message(name, fake) == real
    meta = convert(args, to_meta)
    assert message(name, meta) == real


def test_compiled_calls_are_refused():
    def call(x):
        return mxtrain.quantize(x, "mxfp4", hadamard=128)

    with pytest.raises(Exception, match=r"hadamard must divide .* \(K = 64, padded to 64\)"):
        torch.compile(call, backend="eager", fullgraph=True)(X)


def test_symbolic_sizes_are_left_to_the_kernels():
    compiled = torch.compile(
        lambda x: mxtrain.quantize(x, "mxfp4", hadamard=32).data, dynamic=True, fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    for rows, k in ((3, 64), (5, 96), (7, 33)):
        x = torch.randn(rows, k)
        assert torch.equal(compiled(x), mxtrain.quantize(x, "mxfp4", hadamard=32).data)
