"""The training examples: what is refused, options and checkpoints."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import examples_common
import harness
import pytest
import torch
from examples_common import EXAMPLES, TASKS, load, same
from options import load_checkpoint
from train_gpt import PythonSource
from train_vit import ImageClasses

example, _threads = examples_common.example, examples_common._threads


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
    variant("unknown.pt", lambda c: c["options"].update(colour=1))
    variant("older.pt", lambda c: c["options"].pop("deterministic"))
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
        ("unknown.pt", ImageClasses, [], "whose options are not those"),
        ("older.pt", ImageClasses, ["--deterministic"], "agrees with --deterministic True, got"),
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


def test_a_checkpoint_from_before_an_option_has_its_default(checkpoints, tmp_path):
    fields = load(checkpoints / "older.pt")
    fields["run"]["step"] = 3  # so that there is a step to make
    path = str(tmp_path / "older.pt")
    harness.save_checkpoint(path, fields)
    options = ["--resume", path, "--out", str(tmp_path)]
    assert harness.main(ImageClasses(), options) == 0
    assert load(Path(path))["options"]["deterministic"] is False
    assert load(Path(path))["options"]["steps"] == 4
    assert load(Path(path))["run"]["step"] == 4


def test_a_byte_changed_anywhere_is_refused(checkpoints, tmp_path, capsys):
    content = (checkpoints / "checkpoint.pt").read_bytes()
    path = tmp_path / "changed.pt"
    for where in range(7, len(content), len(content) // 40):
        changed = bytearray(content)
        changed[where] ^= 0x10
        path.write_bytes(changed)
        try:
            fields = load_checkpoint("train_vit", str(path))
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
