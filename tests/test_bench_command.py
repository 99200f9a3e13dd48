"""The command `bench`: run, compare, plot, exit codes, and what it says of the machine."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys

import pytest
import torch
from bench_common import CPU, ROOT, SCHEMA_KEYS

from bench import cases, machine, report, suites
from bench.__main__ import Progress, main


def run_json(tmp_path, *argv: str) -> tuple[int, dict]:
    path = tmp_path / "out.json"
    code = main(["run", "--suite", "cpu", "--seconds", "0.001", "--json", str(path), *argv])
    return code, json.loads(path.read_text())


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
    done = subprocess.run(
        [sys.executable, "-m", "bench", "compare", "a.json", "b.json"],
        cwd=ROOT, capture_output=True, text=True,
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
