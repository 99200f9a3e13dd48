"""The command line of the training examples: options, what is refused of them, and --resume.

What is wrong with an option is said before anything is loaded or trained, as BadInput.
"""

from __future__ import annotations

import argparse
import math
import os
from typing import TYPE_CHECKING

import torch
from checkpoint import BadInput, Fields, load_checkpoint, refuse

import mxtrain

if TYPE_CHECKING:
    from harness import Task

# Options that may change when a run is resumed. The others decide what is computed.
FREE_OPTIONS = {"device", "threads", "out", "save", "save_every", "resume", "list"}


def make_parser(task: Task) -> argparse.ArgumentParser:
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog=task.name, formatter_class=style)
    add = parser.add_argument
    recipes = ["bf16", "mxfp4_baseline", "tetrajet"]
    add("--recipe", nargs="+", metavar="NAME", default=recipes, help="recipes to train and compare")
    add("--list", action="store_true", help="print the recipes and stop")
    add("--seed", nargs="+", type=int, default=[0], help="train each recipe once from each")
    for name, (default, text) in task.options.items():
        add(f"--{name}", type=type(default), default=default, help=text)
    add("--eval-every", type=int, default=50, help="steps between validations, the rows of the log")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--compile", action="store_true", help="each block under torch.compile")
    help = "sums in one order: the same seed ends in the same bits, in more time (fixed_order.py)"
    add("--deterministic", action="store_true", help=help)
    add("--device", default=device, help="cpu, cuda, cuda:1, ...")
    out = task.name.replace("train_", "runs/")
    add("--out", metavar="DIR", default=out, help="folder of log.csv and curves.png")
    add("--save", metavar="FILE", help="checkpoint to write (without: DIR/checkpoint.pt)")
    add("--save-every", type=int, default=100, help="steps between checkpoints")
    add("--resume", metavar="FILE", help="go on from a checkpoint, with its options")
    return parser


# Past these, a mistyped number would fill the memory or take forever before it failed.
LIMITS = {
    "batch": 65536, "dim": 65536, "depth": 1024, "heads": 4096, "context": 65536, "threads": 4096,
    "megabytes": 1000, "windows": 10**6, "steps": 10**9, "eval_every": 10**9, "save_every": 10**9,
}  # fmt: skip


def check_options(task: Task, args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if type(value) in (int, float) and not 0 < value < math.inf:
            raise BadInput(f"{option} must be positive, got {value}. See --help.")
        if name in LIMITS and value > LIMITS[name]:
            raise BadInput(f"{option} must be at most {LIMITS[name]}, got {value}. See --help.")
    for seed in args.seed:
        if not -(2**63) <= seed < 2**63:
            raise BadInput(f"--seed must lie in [-2^63, 2^63), got {seed}. See --help.")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = ["cpu", "cuda", *gpus] if gpus else ["cpu"]
    known = [("--recipe", name, [*mxtrain.RECIPES, *mxtrain.MIXES]) for name in args.recipe]
    for option, name, names in [*known, ("--device", args.device, devices)]:
        if name not in names:
            raise BadInput(f"{option} must be among {', '.join(names)}, got {name}. See --help.")
    check_memory(task, args)


def check_memory(task: Task, args: argparse.Namespace) -> None:
    """Refuse what certainly does not fit, by a low estimate, before it fills the memory."""
    parameters = 12 * args.depth * args.dim**2
    activations = 20 * args.depth * args.dim * args.batch * task.tokens(args)
    gib = (16 * parameters + 4 * activations) / 2**30  # weight, gradient and two moments in float32
    if args.device == "cpu":
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    else:
        have = torch.cuda.get_device_properties(args.device).total_memory / 2**30
    if gib > have:
        raise BadInput(
            f"--dim, --depth and --batch must make a run that fits in the {have:.0f} GiB of "
            f"{args.device}, got about {gib:.0f} GiB. Choose smaller ones."
        )


def check_outputs(args: argparse.Namespace) -> None:
    """Make the folders, and refuse what could not be written once hours of training are over."""
    log, curves = (os.path.join(args.out, name) for name in ("log.csv", "curves.png"))
    for option, path in (("--out", log), ("--out", curves), ("--save", args.save)):
        probe = f"{path}.tmp"
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            if os.path.isdir(path):
                raise IsADirectoryError(0, "it is a folder")
            with open(probe, "wb"):
                pass
            os.remove(probe)
            if os.path.exists(path) and not os.access(path, os.W_OK):
                raise PermissionError(0, "it may not be written")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            must = f"{option} must name a place that can be written"
            raise BadInput(f"{must}, got {path} ({reason}). Choose another.") from None


def check_saved_options(
    task: Task, parser: argparse.ArgumentParser, args: argparse.Namespace, saved: Fields
) -> None:
    """Refuse a checkpoint whose options are not those of this parser, by name and type. Those that
    the program did not have when it was written get their defaults."""
    if not set(saved) <= set(vars(args)):
        refuse(task.name, args.resume, "whose options are not those of this program")
    for name in vars(args):
        saved.setdefault(name, parser.get_default(name))
    for name, value in saved.items():
        default = parser.get_default(name)
        if isinstance(default, list):
            ok = (
                isinstance(value, list)
                and value
                and all(type(v) is type(default[0]) for v in value)
            )
        else:
            ok = type(value) in ((str, type(None)) if default is None else (type(default),))
        if not ok:
            refuse(task.name, args.resume, f"whose --{name.replace('_', '-')} is {value!r:.60}")


def read_options(task: Task, argv: list[str] | None) -> tuple[argparse.Namespace, Fields | None]:
    """The options, and the checkpoint of --resume; then its options hold."""
    parser = make_parser(task)
    args = parser.parse_args(argv)
    checkpoint = None
    if args.resume is not None:
        checkpoint = load_checkpoint(task.name, args.resume)
        check_saved_options(task, parser, args, checkpoint["options"])
        # argparse leaves an attribute that exists alone: what stays None was not given.
        nothing = argparse.Namespace(**dict.fromkeys(vars(args)))
        given = vars(parser.parse_args(argv, nothing))
        for name, value in checkpoint["options"].items():
            if given[name] is None:
                setattr(args, name, value)
            elif name not in FREE_OPTIONS and given[name] != value:
                raise BadInput(
                    f"--resume must name a checkpoint that agrees with --{name.replace('_', '-')} "
                    f"{given[name]}, got {args.resume} with {value}. Leave one of the two out."
                )
        args.save = given["save"] or args.resume
    args.save = args.save or os.path.join(args.out, "checkpoint.pt")
    check_options(task, args)
    return args, checkpoint
