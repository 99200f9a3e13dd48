"""The benchmark suite: rows, timing logic, and rows that cannot run. No speed is asserted."""

from __future__ import annotations

import pytest
import torch
from bench_common import CPU, SCHEMA_KEYS

import mxtrain
from bench import cases, runner, suites, timing
from bench.__main__ import main

REQUIRED = [
    "quantize/mxfp4/nearest/16384x8192",
    "quantize/mxfp4/stochastic/16384x8192",
    "quantize/mxfp4/stochastic+h64/16384x8192",
    "quantize/mxfp4/nearest+transpose/16384x8192",
    "quantize_dual/mxfp4/stochastic+h64/16384x8192",
    "requantize/mxfp4/stochastic/16384x8192",
    "dequantize/mxfp4/bf16/16384x8192",
    "hadamard/64/16384x8192",
    "stochastic_round/bf16/16384x8192",
]


class Quiet:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def begin(self, name: str) -> None:
        pass

    def end(self, name: str, text: str) -> None:
        self.ended.append(name)


class FakeTimer(timing.CpuTimer):
    """A clock that advances by what each case says, with graphs that cost half; it logs what
    ran.
    """

    fewest, most = 3, 3

    def __init__(self, capture_error: str | None = None) -> None:
        super().__init__(cache_bytes=0)
        self.now, self.log, self.capture_error = 0.0, [], capture_error

    def record(self, run):
        before = self.now
        run()
        return (self.now - before) * 1e-6

    def capture(self, warm, run):
        warm()
        if self.capture_error:
            raise RuntimeError(self.capture_error)

        def replay():
            before = self.now
            run()
            self.now = before + (self.now - before) / 2

        return replay

    def case(self, name: str, us: float, **options) -> cases.Case:
        """A case that takes `us`."""

        def call(x):
            self.now += us
            self.log.append(name)
            return x

        return cases.Case(name, lambda device: (torch.ones(4),), call, **options)


def run(chosen, timer=None, seconds=0.001) -> runner.Outcome:
    return runner.Session(chosen, timer or timing.CpuTimer(0), seconds, Quiet()).run()


def test_an_interrupted_run_keeps_what_it_measured() -> None:
    timer = FakeTimer()

    def interrupt(x):
        raise KeyboardInterrupt

    stop = cases.Case("stop", lambda device: (torch.ones(4),), interrupt)
    outcome = run([timer.case("first", 5.0), stop, timer.case("last", 5.0)], timer)
    assert outcome.interrupted and [row["name"] for row in outcome.rows] == ["first"]
    assert [name for name, _ in outcome.skipped] == ["stop", "last"] and not outcome.failed


# ---- what is measured ----


def test_list_has_the_required_rows(capsys):
    assert main(["list", "--suite", "quick"]) == 0
    out = capsys.readouterr().out
    for name in REQUIRED:
        assert name in out
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "quick:" in out and "full:" in out and "cpu:" in out
    assert "quantize/mxfp4/nearest/4096x4096" in out
    assert "peer/torchao_to_mx_eager/4096x4096" in out


def test_bytes_are_counted_in_and_out():
    elements = 16384 * 8192
    assert cases.build(REQUIRED[0]).bytes == elements * (2 + 0.5 + 1 / 32)
    assert cases.build(REQUIRED[4]).bytes == elements * (2 + 2 * (0.5 + 1 / 32))
    assert cases.build("quantize/mxfp4/toward/64x64").bytes == 64 * 64 * (4 + 0.5 + 1 / 32)
    assert cases.build("optim/adamw+ema/64x64").bytes == 64 * 64 * 36
    assert cases.build("optim/qramping+bf16/64x64").bytes == 64 * 64 * (3 * 2 + 16 + 8 + 3)
    assert cases.build("peer/copy/64x32").bytes == 2 * 2 * 64 * 32
    assert cases.build("peer/cublas_bf16/8x16x32").flops == 2 * 8 * 16 * 32


def test_rows_that_do_not_fit_are_left_out():
    names = suites.names("full")
    assert "quantize/mxfp4/nearest/4099x1111" in names
    assert not any("h64" in name for name in names if name.endswith("4099x1111"))
    with pytest.raises(cases.Unfit):
        cases.build("hadamard/64/4099x1111")


@pytest.mark.parametrize(
    "name",
    [
        "sort/8x8",
        "quantize/mxfp4/nearest",
        "quantize/mxfp5/nearest/8x8",
        "quantize/mxfp4/upward/8x8",
        "quantize/mxfp4/nearest+h65/8x8",
        "quantize/mxfp4/nearest/8x0",
        "quantize/mxfp4/nearest/8x8x8",
        "dequantize/mxfp4/int8/8x8",
        "optim/sgd/8x8",
        "optim/qramping+ema/8x8",
        "peer/nobody/8x8",
        "linear/tetrajet/8x8x8/fwd",
        "train/gpt/tetra/1x64/1x8/step",
        "train/gpt/bf16/1x64/1x8/epoch",
        "train/gpt/bf16/1x96/1x8/step",  # heads of 64
        "rms_norm/int8/8x8/fwd",
        "swiglu/bf16/8x8/bwd",
        "block/gpt/bf16/1x8x128/fwd+bwd",
        "block/llama/bf16/1x8x96/fwd+bwd",  # heads of 128
    ],
)
def test_bad_names_are_refused(name):
    with pytest.raises(ValueError):
        cases.build(name)


def test_every_row_of_the_suites_is_right_on_the_cpu():
    rows = {name.rsplit("/", 1)[0] for name in suites.names("full")}
    chosen = []
    for row in sorted(rows):
        with_shapes = ("linear/", "train/", "rms_norm/", "swiglu/", "block/")
        if not row.startswith(("peer/", "gemm/", "int8_gemm/", *with_shapes)):
            chosen += [cases.build(f"{row}/{shape}") for shape in ("256x512", "128x256")]
    chosen += [
        cases.build(name)
        for name in ("quantize/mxfp4/stochastic/67x91", "requantize/nvfp4/nearest/67x91")
    ]
    for case in chosen:
        inputs = case.make(CPU)
        assert all(t.any() for t in inputs if isinstance(t, torch.Tensor)), "never zeros"
        assert case.check(inputs, case.call(*inputs), 1 << 12) == 0, case.name


@pytest.mark.parametrize("kind", ["mxfp4", "mxfp8_e4m3", "nvfp4"])
@pytest.mark.parametrize("shape", ["64x96x128", "33x47x100"])
def test_gemm_rows_check_their_result(kind, shape):
    case = cases.build(f"gemm/{kind}/{shape}")
    inputs = case.make(CPU)
    got = case.call(*inputs)
    assert 0 < case.check(inputs, got, 0) <= case.tolerance
    m, n, k = (int(size) for size in shape.split("x"))
    assert got.shape == (m, n) and case.flops == 2 * m * n * k
    got[3, 5] += got.abs().max()
    assert case.check(inputs, got, 0) > case.tolerance


@pytest.mark.parametrize("options", ["r0.0", "r0.3", "r0.5+channels", "r0.1+tokens", "r0.4+b"])
def test_int8_gemm_rows_check_their_result(options):
    case = cases.build(f"int8_gemm/{options}/300x260x520")
    inputs = case.make(CPU)
    got = case.call(*inputs)
    assert 0 < case.check(inputs, got, 0) <= case.tolerance
    got[3, 5] += got.abs().max()
    assert case.check(inputs, got, 0) > case.tolerance


@pytest.mark.parametrize(
    "name",
    [
        "int8_gemm/0.1/8x8x8", "int8_gemm/r2/8x8x8", "int8_gemm/r0.1+rows/8x8x8",
        "int8_quantize/toward/8x8", "int8_quantize_fallback/r0.1+row/8x8",
    ],
)  # fmt: skip
def test_bad_int8_names_are_refused(name):
    with pytest.raises(ValueError):
        cases.build(name)


@pytest.mark.parametrize("op", ["rms_norm", "swiglu"])
@pytest.mark.parametrize("shape", ["70x300", "33x256"])
def test_context_rows_check_their_result(op, shape):
    rows, cols = map(int, shape.split("x"))
    for passes in ("fwd", "bwd"):
        case = cases.build(f"{op}/int10/{shape}/{passes}")
        inputs = case.make(CPU)
        got = case.call(*inputs)
        assert case.check(inputs, got, 0) == 0
        first = got if isinstance(got, torch.Tensor) else got[0]
        first[2, 5] += 1
        assert case.check(inputs, got, 0) > 0
    twin, case = (cases.build(f"{op}/{kind}/{shape}/fwd") for kind in ("bf16", "int10"))
    inputs = case.make(CPU)
    assert torch.allclose(twin.call(*inputs).float(), case.call(*inputs)[0].float(), rtol=0.01)
    assert case.bf16 == twin.name
    padded = -(-cols // 128) * 128
    extra = rows * padded * (1.25 + 4 / 128) * (2 if op == "swiglu" else 1)
    extra += 4 * rows if op == "rms_norm" else 0
    assert case.bytes == twin.bytes + extra


def test_block_rows_are_a_forward_and_a_backward():
    name = "block/llama/{}/2x128x256/fwd+bwd"
    twin = cases.build(name.format("bf16"))
    want = twin.call(*twin.make(CPU))
    kept = twin.saved(*twin.make(CPU))
    for recipe in ("int8_fallback", "int8_fallback+c0.3", "int8_fallback+dense", "int8_block"):
        case = cases.build(name.format(recipe))
        inputs = case.make(CPU)
        got = case.call(*inputs)
        assert case.bf16 == twin.name and [t.shape for t in got] == [t.shape for t in want]
        assert all(t.isfinite().all() for t in got)
        error = (got[0].float() - want[0].float()).norm() / want[0].float().norm()
        assert 0 < error < 0.1
        assert case.saved(*inputs) < 0.7 * kept
    for bad in ("int8_fallback+c2", "int8_fallback+cx", "int5"):
        with pytest.raises(ValueError):
            cases.build(name.format(bad))


@pytest.mark.parametrize("recipe", suites.RECIPE_ROWS)
def test_linear_rows_are_a_forward_and_a_backward(recipe):
    case, twin = (cases.build(f"linear/{r}/64x128x192/fwd+bwd") for r in (recipe, "bf16"))
    inputs = case.make(CPU)
    errors = []
    for got, want in zip(case.call(*inputs), twin.call(*inputs), strict=True):
        assert got.shape == want.shape
        errors.append(float((got.float() - want.float()).norm() / want.float().norm()))
    assert max(errors) < 0.5 and min(errors[1:]) > 0  # a recipe may leave fprop in BF16
    assert case.bf16 == twin.name and case.flops == twin.flops == 6 * 64 * 128 * 192


def test_saved_bytes_are_those_of_the_activations():
    ours, bf16 = (cases.build(f"linear/{r}/64x512x192/fwd+bwd") for r in ("tetrajet", "bf16"))
    inputs = bf16.make(CPU)
    assert bf16.saved(*inputs) == 2 * 64 * 512
    assert ours.saved(*inputs) == 64 * 512 * (1 / 2 + 1 / 32) + 6 * 8  # codes, scales, rng
    mine, _ = run([ours, bf16]).rows
    assert mine["saved_bytes"] == ours.saved(*inputs) and mine["saved_vs_bf16"] > 3.7


@pytest.mark.parametrize(
    "name",
    [
        "quantize/mxfp4/nearest/256x128",
        "quantize/mxfp6_e2m3/stochastic+transpose+swizzle/256x128",
        "quantize_dual/mxfp4/stochastic+h64/256x128",
        "requantize/mxfp4/stochastic/256x128",
        "dequantize/mxfp4/bf16/256x128",
        "hadamard/64/256x128",
        "stochastic_round/bf16/256x128",
        "swizzle_scale/mxfp4/256x128",
    ],
)
def test_checks_see_one_wrong_byte(name):
    case = cases.build(name)
    inputs = case.make(CPU)
    out = case.call(*inputs)
    last = out[-1] if isinstance(out, tuple) else out
    target = last.scale if isinstance(last, mxtrain.Operand) else last
    target.view(torch.uint8).flatten()[0] ^= 1
    assert 0 < case.check(inputs, out, 1 << 12) < 0.01


def test_deterministic_rows_are_checked_at_both_ends():
    case = cases.build("quantize/mxfp4/nearest/4096x64")
    inputs = case.make(CPU)
    out = case.call(*inputs)
    out.data[-1, -1] ^= 1
    assert case.check(inputs, out, 1 << 10) > 0


# ---- how it is timed ----


def test_percentiles_and_noise():
    assert timing.percentiles([5.0]) == {"p20": 5.0, "p50": 5.0, "p80": 5.0}
    assert timing.percentiles([0, 1, 2, 3, 4, 5]) == {"p20": 1.0, "p50": 2.5, "p80": 4.0}
    assert not timing.is_noisy({"p20": 97.5, "p50": 100, "p80": 102.5})
    assert timing.is_noisy({"p20": 97.4, "p50": 100, "p80": 102.5})


def test_sets_exceed_twice_the_cache():
    for size in (1 << 12, 1 << 20, 50 << 20, 60 << 20, 500 << 20):
        count = timing.set_count(size, 60 << 20)
        assert count >= 2
        assert (count - 1) * size > 2 * (60 << 20) or count == timing.MOST_SETS
    assert timing.set_count(0, 60 << 20) == 1


def test_rotation_visits_sets_in_turn_and_keeps_outputs():
    seen = []

    def call(x):
        seen.append(x)
        return x * 10

    rotation = timing.Rotation(call, [(1,), (2,), (3,)])
    rotation(4)
    rotation(1)
    assert seen == [1, 2, 3, 1, 2] and rotation.outputs == [10, 20, 30]
    x = torch.randn(3, requires_grad=True)
    y, other = timing.copy_set((x, "shared"))
    assert torch.equal(x, y) and y.data_ptr() != x.data_ptr() and y.requires_grad and y.is_leaf
    assert other == "shared"


def test_cuda_samples_are_whole_rounds():
    timer = object.__new__(timing.CudaTimer)  # without a device
    assert timer.calls(100.0, 2) == 10
    assert timer.calls(5000.0, 2) == 2
    assert timer.calls(2.0, 9) == 504 and 504 % 9 == 0
    assert timer.calls(0.0, 300) == 1800
    assert timer.calls(1.0, 1024) == 1024


def test_a_row_and_its_baselines_are_sampled_alternately():
    timer = FakeTimer()
    ours = timer.case(
        "gemm/mine/1", 3000.0, flops=6_000_000, peers=("peer/none", "peer/a"), bf16="peer/b"
    )
    chosen = [ours, timer.case("peer/a", 6000.0), timer.case("peer/b", 12000.0, bytes=600_000)]
    outcome = run(chosen, timer)
    assert [row["name"] for row in outcome.rows] == ["gemm/mine/1", "peer/a", "peer/b"]
    mine, _, other = outcome.rows
    assert mine["us"]["p50"] == pytest.approx(1500) and mine["eager_us"] == pytest.approx(3000)
    assert mine["tflops"] == pytest.approx(6e6 / 1500 / 1e6) and mine["gbps"] is None
    assert mine["vs_peer"] == pytest.approx(2) and mine["peer"] == "peer/a"
    assert mine["vs_bf16"] == pytest.approx(4)
    assert mine["graph"] and mine["samples"] == 3 and not mine["noisy"]
    assert other["gbps"] == pytest.approx(600_000 / 6000 / 1e3)
    assert timer.log[-9:] == ["gemm/mine/1", "peer/a", "peer/b"] * 3


def test_rows_that_share_a_baseline_are_one_group():
    timer = FakeTimer()
    names = ["x/1", "x/2", "peer/p"]
    chosen = [timer.case(name, 2000.0, peers=("peer/p",)) for name in names[:2]]
    chosen += [timer.case("peer/p", 2000.0)]
    assert [row["vs_peer"] for row in run(chosen, timer).rows] == [1.0, 1.0, None]
    assert timer.log[-9:] == names * 3


def test_a_failed_capture_falls_back_to_eager():
    timer = FakeTimer("operation not permitted\nwhen stream is capturing")
    (row,) = run([timer.case("x/1", 2000.0)], timer).rows
    assert not row["graph"] and row["us"]["p50"] == pytest.approx(2000)
    assert row["note"] == "no graph: operation not permitted"


def test_ceilings_and_floors():
    def row(name, us, moved, eager):
        keys = dict.fromkeys(SCHEMA_KEYS | {"over_floor"})
        gbps = moved / us / 1e3 if moved else None
        return keys | {
            "name": name, "us": {"p50": us}, "eager_us": eager, "gbps": gbps, "bytes": moved
        }  # fmt: skip

    rows = [row("peer/copy/8x8", 200.0, 8e8, 160.0), row("peer/copy_kernel/8x8", 250.0, 8e8, 260.0)]
    rows += [row("peer/empty_kernel/1", 2.0, 0, 5.0), row("x/8x8", 100.0, 2e8, 110.0)]
    outcome = runner.Outcome(rows=rows)
    runner.finish(outcome)
    assert outcome.peaks == {
        "copy_gbps": pytest.approx(5000),
        "bf16_tflops": None,
        "fp8_tflops": None,
    }
    assert rows[3]["of_copy"] == pytest.approx(0.4)
    assert rows[3]["over_floor"] == pytest.approx(100 / 42)
    assert rows[2]["of_copy"] is None


# ---- rows that cannot run ----


def test_what_cannot_run_is_skipped_with_the_reason():
    def broken(x):
        raise RuntimeError("kernel launch failed\ndetails")

    def make(device):
        return (torch.ones(2),)

    chosen = [
        cases.Case("none/1", make, torch.neg, op="no_such_op"),
        cases.Case("peer/missing", make, torch.neg, requires="no_such_module"),
        cases.Case("peer/broken", make, broken),
        cases.Case("mine/1", make, broken, op="quantize"),
        cases.Case("fine/1", make, torch.neg, bytes=16, peers=("peer/broken",)),
    ]
    reporter = Quiet()
    outcome = runner.Session(chosen, timing.CpuTimer(0), 0.001, reporter).run()
    assert outcome.skipped == [
        ("none/1", "this build has no CPU kernel of mxtrain::no_such_op"),
        ("peer/missing", "needs no_such_module (pip install no_such_module)"),
        ("peer/broken", "RuntimeError: kernel launch failed"),
    ]
    assert outcome.failed == [("mine/1", "RuntimeError: kernel launch failed")]
    assert [row["name"] for row in outcome.rows] == ["fine/1"]
    assert outcome.rows[0]["vs_peer"] is None
    assert sorted(reporter.ended) == sorted(case.name for case in chosen)


def test_reasons_are_one_line():
    assert runner.first_line(RuntimeError("\n a\nb")) == "a"
    assert runner.first_line(RuntimeError("raised:\n\nthe reason\nb")) == "raised: the reason"
    assert runner.first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_the_rest_is_skipped_once_the_device_is_lost():
    class Lost(timing.CpuTimer):
        def healthy(self) -> bool:
            return False

    def broken(x):
        raise RuntimeError("illegal memory access")

    chosen = [
        cases.Case("a/1", lambda d: (torch.ones(2),), broken, op="quantize"),
        cases.Case("b/1", lambda d: (torch.ones(2),), torch.neg),
    ]
    outcome = run(chosen, Lost(0))
    assert outcome.failed == [("a/1", "RuntimeError: illegal memory access")]
    assert outcome.skipped == [("b/1", "not run: the device failed in a/1")]


def test_an_error_while_sampling_costs_the_row():
    calls = []

    def call(x):
        calls.append(x)
        if len(calls) > 6:
            raise RuntimeError("late")

    chosen = [
        cases.Case("mine/1", lambda d: (torch.ones(2),), call, op="quantize"),
        cases.Case("b/1", lambda d: (torch.ones(2),), torch.neg),
    ]
    outcome = run(chosen)
    assert outcome.failed == [("mine/1", "RuntimeError: late")]
    assert [row["name"] for row in outcome.rows] == ["b/1"]


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("row", ["quantization_statistics", "oscillation_step"])
def test_rows_of_the_diagnostics_compute_what_they_check(row, format):
    case = cases.build(f"{row}/{format}/16x96")
    inputs = case.make(torch.device("cpu"))
    assert case.check(inputs, case.call(*inputs), 10**6) <= case.tolerance
    assert case.bytes > 16 * 96 * (2 if row == "quantization_statistics" else 42)
    assert row in case.op
