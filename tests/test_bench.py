"""The benchmark suite: rows, timing logic, files, comparison, plots and exit codes. No speed is
asserted.
"""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mxtrain

# At the end: an installed mxtrain keeps its precedence over the sources.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import cases, machine, report, runner, suites, timing
from bench.__main__ import Progress, main

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
SCHEMA_KEYS = {
    "name", "us", "eager_us", "gbps", "of_copy", "tflops", "vs_bf16", "error", "noisy"
}  # fmt: skip
CPU = torch.device("cpu")


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


def session(chosen, timer=None, seconds=0.001) -> runner.Outcome:
    return runner.Session(chosen, timer or timing.CpuTimer(0), seconds, Quiet()).run()


def run_json(tmp_path, *argv: str) -> tuple[int, dict]:
    path = tmp_path / "out.json"
    code = main(["run", "--suite", "cpu", "--seconds", "0.001", "--json", str(path), *argv])
    return code, json.loads(path.read_text())


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
        "peer/nobody/8x8",
    ],
)
def test_bad_names_are_refused(name):
    with pytest.raises(ValueError):
        cases.build(name)


def test_every_row_of_the_suites_is_right_on_the_cpu():
    rows = {name.rsplit("/", 1)[0] for name in suites.names("full")}
    chosen = []
    for row in sorted(rows):
        if not row.startswith("peer/"):
            chosen += [cases.build(f"{row}/{shape}") for shape in ("256x512", "128x256")]
    chosen += [
        cases.build(name)
        for name in ("quantize/mxfp4/stochastic/67x91", "requantize/nvfp4/nearest/67x91")
    ]
    for case in chosen:
        inputs = case.make(CPU)
        assert all(t.any() for t in inputs if isinstance(t, torch.Tensor)), "never zeros"
        assert case.check(inputs, case.call(*inputs), 1 << 12) == 0, case.name


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
    outcome = session(chosen, timer)
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
    assert [row["vs_peer"] for row in session(chosen, timer).rows] == [1.0, 1.0, None]
    assert timer.log[-9:] == names * 3


def test_a_failed_capture_falls_back_to_eager():
    timer = FakeTimer("operation not permitted\nwhen stream is capturing")
    (row,) = session([timer.case("x/1", 2000.0)], timer).rows
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
    outcome = session(chosen, Lost(0))
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
    outcome = session(chosen)
    assert outcome.failed == [("mine/1", "RuntimeError: late")]
    assert [row["name"] for row in outcome.rows] == ["b/1"]


# ---- run ----


def test_cpu_run_writes_the_schema(tmp_path, capsys):
    code, data = run_json(tmp_path, "--ops", "quantize/mxfp4,hadamard", "--shapes", "256x512")
    assert code == 0
    assert data["schema"] == 1 and set(data["peaks"]) == {"copy_gbps", "bf16_tflops", "fp8_tflops"}
    assert data["peaks"]["copy_gbps"] > 0
    assert data["env"]["torch"] == torch.__version__ and data["env"]["suite"]["name"] == "cpu"
    names = [row["name"] for row in data["results"]]
    assert "quantize/mxfp4/stochastic+h64/256x512" in names and "hadamard/64/256x512" in names
    assert "peer/copy/256x512" in names
    assert not any(name.startswith(("requantize", "quantize/mxfp8")) for name in names)
    for row in data["results"]:
        assert set(row) >= SCHEMA_KEYS
        assert 0 < row["us"]["p20"] <= row["us"]["p50"] <= row["us"]["p80"]
        assert row["error"] == 0 and row["of_copy"] > 0
        assert isinstance(row["noisy"], bool)
    captured = capsys.readouterr()
    assert "hadamard/64/256x512" in captured.out and "of copy" in captured.out
    assert f"[{len(names)}/{len(names)}] " in captured.err


def test_cpu_run_beside_torchao(tmp_path, capsys):
    pytest.importorskip("torchao")
    code, data = run_json(tmp_path, "--ops", "quantize/mxfp4/nearest", "--shapes", "128x256")
    assert code == 0 and not data["skipped"]
    rows = {row["name"]: row for row in data["results"]}
    assert set(rows) == {
        "peer/copy/128x256", "quantize/mxfp4/nearest/128x256", "peer/torchao_to_mx_eager/128x256"
    }  # fmt: skip
    ours = rows["quantize/mxfp4/nearest/128x256"]
    assert ours["peer"] == "peer/torchao_to_mx_eager/128x256" and ours["vs_peer"] > 0
    assert rows[ours["peer"]]["error"] == 0  # floor, nearest: the same bytes as the reference
    assert "times the throughput of peer/torchao_to_mx_eager" in capsys.readouterr().out


def test_wrong_and_failed_rows_exit_with_1(tmp_path, monkeypatch, capsys):
    def case(name, error):
        return cases.Case(
            name, lambda d: (torch.ones(2),), torch.neg, bytes=8, check=lambda *_: error
        )

    monkeypatch.setattr(suites, "plan", lambda *_: [case("a/1", 0.0), case("b/1", 0.25)])
    code, data = run_json(tmp_path)
    assert code == 1 and [row["wrong"] for row in data["results"]] == [False, True]
    captured = capsys.readouterr()
    assert "0.25 WRONG" in captured.out and "wrong or failed: b/1" in captured.err
    monkeypatch.setattr(suites, "plan", lambda *_: [case("a/1", float("nan"))])
    assert run_json(tmp_path)[0] == 1


@pytest.mark.parametrize("suite", ["quick", "full"])
def test_no_gpu_exits_with_3(suite, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["run", "--suite", suite]) == 3
    assert "--suite cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["measure"],
        ["run", "--suite", "huge"],
        ["run", "--suite", "cpu", "--ops", "sort"],
        ["run", "--suite", "cpu", "--shapes", "12"],
        ["run", "--suite", "cpu", "--seconds", "0"],
        ["run", "--suite", "cpu", "--json", "no/such/folder/x.json"],
        ["list", "--ops", "sort"],
        ["compare", "a.json"],
        ["plot", "no.json", "-o", "x"],
    ],
)
def test_usage_exits_with_2(argv, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err


def test_module_runs_as_a_command():
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "compare", "a.json", "b.json"],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "a.json: cannot be read" in done.stderr


def test_progress_is_plain_lines_or_a_bar():
    stream = io.StringIO()
    plain = Progress(2, stream)
    plain.begin("a")
    plain.end("a", "1 us")
    plain.close()
    assert stream.getvalue() == "[1/2] a  1 us\n"
    pytest.importorskip("tqdm")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    bar = Progress(2, terminal)
    bar.begin("a")
    bar.end("a", "1 us")
    bar.close()
    assert bar.bar is not None and "[1/2] a  1 us" in terminal.getvalue()


# ---- compare ----


def measurement(**rows) -> dict:
    """A document of rows name=(us, ratios)."""
    results = []
    for name, (us, extra) in rows.items():
        row = dict.fromkeys(SCHEMA_KEYS) | {
            "name": name.replace("__", "/"), "us": {"p20": us * 0.99, "p50": us, "p80": us * 1.01},
            "eager_us": us + 2, "noisy": False, "error": 0.0, "bytes": 1e8, "flops": 0,
        }  # fmt: skip
        results.append(row | extra)
    peaks = {"copy_gbps": 4000.0, "bf16_tflops": 700.0, "fp8_tflops": 1300.0}
    return {"schema": 1, "env": {"device": "test"}, "peaks": peaks, "results": results}


@pytest.fixture
def files(tmp_path):
    def write(a: dict, b: dict) -> list[str]:
        paths = [tmp_path / "a.json", tmp_path / "b.json"]
        for path, data in zip(paths, (a, b), strict=True):
            path.write_text(json.dumps(data))
        return ["compare", *map(str, paths)]

    return write


def test_compare_counts_ratios_before_times(files, capsys):
    # half as fast in time on another day, but the same fraction of that day's copy
    a = measurement(q=(100.0, {"of_copy": 0.90}), g=(50.0, {"vs_bf16": 1.8}), t=(10.0, {}))
    b = measurement(q=(200.0, {"of_copy": 0.89}), g=(99.0, {"vs_bf16": 1.8}), t=(10.1, {}))
    assert main([*files(a, b), "--fail-above", "5"]) == 0
    out = capsys.readouterr().out
    assert "1.1% slower" in out and "REGRESSION" not in out
    b["results"][0]["of_copy"] = 0.80
    assert main([*files(a, b), "--fail-above", "5%"]) == 1
    captured = capsys.readouterr()
    assert "12.5% slower" in captured.out and "REGRESSION" in captured.out
    assert "1 of the rows are worse: q" in captured.err
    assert main(files(a, b)) == 0  # only told, where no limit was given
    assert main([*files(a, b), "--fail-above", "15"]) == 0


def test_compare_by_time_and_rows_that_are_missing(files, capsys):
    a = measurement(x=(10.0, {}), only_a=(1.0, {}))
    b = measurement(x=(11.0, {"noisy": True}), only_b=(1.0, {}))
    assert main([*files(a, b), "--fail-above", "5"]) == 1
    out = capsys.readouterr().out
    assert "noisy in B" in out and "only in A: only_a" in out and "only in B: only_b" in out
    assert main([*files(b, a), "--fail-above", "5"]) == 0
    assert "9.1% faster" in capsys.readouterr().out


def test_compare_never_blames_peers_and_always_blames_wrong_or_failed_rows(files):
    a = measurement(peer__p=(10.0, {}), x=(10.0, {"wrong": False}))
    b = measurement(peer__p=(90.0, {}), x=(9.0, {"wrong": False}))
    assert main([*files(a, b), "--fail-above", "5"]) == 0
    wrong = copy.deepcopy(b)
    wrong["results"][1]["wrong"] = True
    assert main([*files(a, wrong), "--fail-above", "5"]) == 1
    failed = copy.deepcopy(b)
    failed["failed"] = [{"name": failed["results"].pop()["name"], "reason": "launch failed"}]
    assert main([*files(a, failed), "--fail-above", "5"]) == 1


def test_compare_usage(files, tmp_path, capsys):
    good = measurement(x=(10.0, {}))
    assert main([*files(good, measurement(y=(1.0, {}))), "--fail-above", "5"]) == 2
    assert "no row in common" in capsys.readouterr().err
    command = files(good, good)
    for limit in ("-1", "much", "nan"):
        assert main([*command, f"--fail-above={limit}"]) == 2
    damaged = [{}, {"schema": 2}, {"schema": 1}, {"schema": 1, "results": [{"name": "x"}]}, []]
    for data in damaged:
        assert main(files(good, data)) == 2
    (tmp_path / "b.json").write_text("{")
    assert main(command) == 2
    assert "is not JSON" in capsys.readouterr().err


# ---- plot ----


def test_plot_writes_png(tmp_path):
    pytest.importorskip("matplotlib")
    rows = measurement(
        peer__copy__8x8=(50.0, {"gbps": 4000.0, "of_copy": 1.0}),
        quantize__mxfp4__nearest__8x8=(60.0, {"gbps": 3600.0, "of_copy": 0.9, "vs_peer": 4.0}),
        gemm__mxfp4__8x8x8=(40.0, {"tflops": 900.0, "vs_bf16": 1.7, "flops": 4e10, "noisy": True}),
    )
    (tmp_path / "gpu.json").write_text(json.dumps(rows))
    assert main(["plot", str(tmp_path / "gpu.json"), "-o", str(tmp_path / "new" / "plots")]) == 0
    made = sorted((tmp_path / "new" / "plots").iterdir())
    assert [path.name for path in made] == ["gpu-bars.png", "gpu-roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


def test_plot_without_matplotlib_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "gpu.json").write_text(json.dumps(measurement(x=(1.0, {}))))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [n for n in sys.modules if n == "bench.plot" or n.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    import bench

    monkeypatch.delattr(bench, "plot", raising=False)
    assert main(["plot", str(tmp_path / "gpu.json"), "-o", str(tmp_path)]) == 2
    assert "plot needs matplotlib" in capsys.readouterr().err


# ---- the machine ----


def test_gpu_state_reads_nvidia_smi():
    line = "NVIDIA H200, 580.1, 1980, 1980, 3201, 123.45, 700.00, [N/A]\n"
    asked = []

    def answer(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, line, "")

    state = machine.gpu_state("GPU-1", answer)
    assert state["name"] == "NVIDIA H200" and state["power_w"] == 123.45
    assert state["temperature_c"] is None
    assert "--id=GPU-1" in asked[0]

    def missing(command, **options):
        raise FileNotFoundError

    assert machine.gpu_state(None, missing) == machine.gpu_state("GPU-1", missing) == {}
    assert machine.parse_state("No devices were found") == {}


def test_environment_is_json():
    env = machine.environment(CPU)
    assert json.loads(json.dumps(report.rounded(env)))["torch"] == torch.__version__


# ---- CUDA ----


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_run(tmp_path):
    path = tmp_path / "out.json"
    argv = ["run", "--ops", "quantize", "dequantize", "peer/copy", "--shapes", "512x1024"]
    assert main([*argv, "--seconds", "0.01", "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert data["peaks"]["copy_gbps"] > 0 and data["peaks"]["bf16_tflops"] > 0
    for row in data["results"]:
        assert row["graph"], row.get("note")
        assert row["samples"] >= 20 and row["calls"] % row["sets"] == 0
        assert row["us"]["p50"] <= row["eager_us"] * 1.5
