"""The command ``rmsprop-gpu demo``: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import AdaGrad, RMSProp, __version__
from ..conventions.explain import WORDS
from ..extras import MissingExtraError, extra
from ..kernels.compiling import why_not
from .report import image_format, plot, print_summary
from .sharded import Ranks, ShardedRun
from .train import LR, Run, Settings

if TYPE_CHECKING:
    from rich.console import Console

OK, FAILED, BAD_USE, INTERRUPTED = 0, 1, 2, 130
STDOUT = "-"  # as the argument of --json
RANK_0_FIRST = 5.0  # seconds for rank 0 to report an error that all ranks have found, before the others end

NUMBERS = {
    "alpha": "decay of the average of squared gradients",
    "eps": "added to the root of that average",
    "weight-decay": "L2 penalty",
    "momentum": "0 needs no buffer",
    "clipvalue": "clip every element of a gradient to +- this",
    "initial-scale": "what the average starts from",
}
FLAGS = {
    "centered": "divide by the standard deviation",
    "nesterov": "look ahead by one momentum step",
    "eps-in-sqrt": "add eps inside the root",
    "lr-in-momentum": "the momentum buffer holds steps",
    "bias-correction": "correct the averages for their start",
    "decoupled-weight-decay": "decay the parameters themselves",
}


class RefusedError(Exception):
    """The request cannot be carried out: a line for stderr and an exit status."""

    def __init__(self, line: str, status: int = FAILED) -> None:
        super().__init__(line)
        self.status = status


def add_demo(commands: Any) -> None:
    """Add the command `demo` to the others."""
    text = "train a small network on scikit-learn's handwritten digits"
    demo = commands.add_parser("demo", help=text, description=f"{text}.", allow_abbrev=False)
    demo.set_defaults(run=run)
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    demo.add_argument("--optimizer", choices=tuple(LR), default="rmsprop", help="default: rmsprop")
    for name, default, text in (("epochs", 60, "default: 60"), ("batch-size", 32, "default: 32")):
        demo.add_argument(f"--{name}", type=count, default=default, metavar="N", help=text)
    text = "of the split, the start, the order and the noise (default: 0)"
    demo.add_argument("--seed", type=seed, default=0, metavar="N", help=text)
    text = "draw the curves of loss and accuracy: a .png, or what else matplotlib writes"
    demo.add_argument("--plot", type=Path, metavar="FILE", help=text)
    text = "write all results; - is standard output, and the lines for people go to standard error then"
    demo.add_argument("--json", metavar="FILE", help=text)
    demo.add_argument("--quiet", action="store_true", help="print the final lines only")
    text = "say in the final lines how much memory was moved, and how far the updates were from the oracle's"
    demo.add_argument("--verbose", action="store_true", help=text)
    text = (
        "train on all ranks of an MPI job, each with its part of every batch and of the optimizer's state: "
        "mpiexec -n 4 python -m mpi4py -m rmsprop_gpu demo --sharded"
    )
    demo.add_argument("--sharded", action="store_true", help=text)
    demo.add_argument("--no-check", action="store_true", help="do not compare each update with the float64 oracle")

    group = demo.add_argument_group("hyperparameters, as of rmsprop_gpu.RMSProp and AdaGrad")
    add = partial(group.add_argument, default=argparse.SUPPRESS)  # only those that are given go to the optimizer
    rates = f"default: {LR['rmsprop']} for rmsprop, {LR['adagrad']} for adagrad, which learns too slowly with less"
    text = f"learning rate at the start; half a cosine takes it down to a hundredth ({rates})"
    add("--lr", type=float, metavar="X", help=text)
    for name, text in NUMBERS.items():
        default = inspect.signature(RMSProp).parameters[name.replace("-", "_")].default
        add(f"--{name}", type=float, metavar="X", help=f"{text} (default: {default})")
    for name, text in FLAGS.items():
        add(f"--{name}", action="store_true", help=text)


def count(word: str) -> int:
    """Parse a whole number above 0."""
    if not word.isdecimal() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number above 0")
    return int(word)


def seed(word: str) -> int:
    """Parse a seed that scikit-learn accepts."""
    if not word.isdecimal() or int(word) >= 2**32:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number from 0 to {2**32 - 1}")
    return int(word)


def run(options: argparse.Namespace) -> int:
    """Train, print and write; anything that can be refused is refused before the training."""
    if not options.sharded:
        return train(options, None)
    ranks = Ranks()
    ranks.share_cores()
    try:
        return train(options, ranks)
    except (RefusedError, MissingExtraError, OSError):
        if ranks.rank:
            time.sleep(RANK_0_FIRST)  # `python -m mpi4py` ends a job with the first of its ranks that fails
        raise


def train(options: argparse.Namespace, ranks: Ranks | None) -> int:
    """Train in a single process, or as one of several ranks, of which the first prints and writes."""
    speaks = ranks is None or ranks.rank == 0
    training = make_run(options, ranks)
    if speaks:
        check_files(options)
    if why := why_not():
        raise RefusedError(why)
    with extra("demo"):
        from rich.console import Console
    console = Console(highlight=False, stderr=options.json == STDOUT)
    for line in without_effect(training) if speaks else ():
        print(f"rmsprop-gpu: {line}", file=sys.stderr)
    training.load()
    quiet = options.quiet or not speaks
    if not quiet:
        train, test = training.digits
        console.print(f"{train:,} handwritten digits to learn from, {test} others to test it on (seed {options.seed})")
    interrupted = False
    try:
        for epoch in progress(training, console, quiet):
            if not math.isfinite(epoch.loss):
                break
    except KeyboardInterrupt:
        interrupted = True
        if ranks or not training.history:  # ranks are interrupted at different steps
            raise

    summary = training.summary()
    if speaks:
        tell(options, summary, console)
    if ranks:
        ranks.comm.Barrier()  # everything is written before any rank ends
    done = f"after {len(training.history)} of {options.epochs} epochs"
    if interrupted:
        print(f"rmsprop-gpu: interrupted {done}", file=sys.stderr)
        return INTERRUPTED
    if not math.isfinite(summary["loss"]):
        raise RefusedError(f"the loss is {summary['loss']} {done}: the training diverged, a smaller --lr may help")
    if not summary.get("same", True):
        raise RefusedError("the ranks ended on different parameters: this is a bug")
    return OK


def tell(options: argparse.Namespace, summary: dict[str, Any], console: Console) -> None:
    """Print the final lines and write the files."""
    print_summary(summary, console, options.verbose)
    if options.json:
        text = json.dumps({"version": __version__, **summary})
        valid = json.loads(text, parse_constant=lambda _: None)  # JSON has no NaN
        text = json.dumps(valid, indent=2) + "\n"
        if options.json == STDOUT:
            sys.stdout.write(text)
            sys.stdout.flush()  # notices here that a reader is gone
        else:
            Path(options.json).write_text(text)
    if options.plot:
        plot(summary, options.plot)


def make_run(options: argparse.Namespace, ranks: Ranks | None = None) -> Run:
    """The run described by the options."""
    names = ("lr", *(name.replace("-", "_") for name in (*NUMBERS, *FLAGS)))
    hyper = {name: getattr(options, name) for name in names if name in options}
    if options.optimizer == "adagrad":
        known = inspect.signature(AdaGrad).parameters
        for name in hyper:
            if name not in known:
                has = ", ".join(option(name) for name in names if name in known)
                raise RefusedError(f"{option(name)} is no hyperparameter of adagrad; it has {has}", BAD_USE)
    settings = Settings(
        options.device, options.optimizer, hyper, options.epochs, options.batch_size, options.seed, not options.no_check
    )
    try:
        return Run(settings) if ranks is None else ShardedRun(settings, ranks)
    except (TypeError, ValueError) as error:
        raise RefusedError(str(error), BAD_USE) from None
    except RuntimeError as error:  # the device
        raise RefusedError(f"--device {options.device}: {error}") from None


def without_effect(training: Run) -> Iterator[str]:
    """A line for each given switch that changes nothing, in the words of `opt.explain()`."""
    group = training.opt.param_groups[0]
    for name in training.settings.hyper:
        if name in WORDS and (said := WORDS[name](group, training.lr)).startswith("without effect"):
            yield f"{option(name)} is {said}"


def option(name: str) -> str:
    """The name of a hyperparameter on the command line."""
    return "--" + name.replace("_", "-")


def check_files(options: argparse.Namespace) -> None:
    """Find, before the training, anything that would make writing the files fail after it."""
    if options.plot:
        with extra("demo"):
            from matplotlib.figure import Figure
        try:  # some formats need more: Pillow, LaTeX
            figure = Figure(layout="constrained")
            figure.subplots()
            figure.savefig(BytesIO(), format=image_format(options.plot))
        except Exception as error:  # from matplotlib, or from what it calls
            raise RefusedError(f"--plot {options.plot}: {' '.join(str(error).split())}", BAD_USE) from None
    results = None if options.json in (None, STDOUT) else Path(options.json)
    if options.plot and results and options.plot.absolute() == results.absolute():
        raise RefusedError(f"--plot and --json both name {options.plot}", BAD_USE)
    for name, path in (("plot", options.plot), ("json", results)):
        if path:
            try:
                new = not os.path.lexists(path)
                path.open("ab").close()
                if new:
                    path.unlink()
            except OSError as error:
                raise RefusedError(f"--{name} {path} cannot be written: {error.strerror}", BAD_USE) from None


def progress(training: Run, console: Console, quiet: bool) -> Iterator[Any]:
    """The epochs, each with a line, above a progress bar if there is a terminal."""
    from rich.progress import Progress

    with Progress(console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task("compiling", total=training.settings.epochs)
        for epoch in training.epochs():
            if not quiet:
                console.print(f"epoch {epoch.epoch:3}   loss {epoch.loss:9.6f}   test accuracy {epoch.accuracy:7.2%}")
            bar.update(task, advance=1, description="training")
            yield epoch
