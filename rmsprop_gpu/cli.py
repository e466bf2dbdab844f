"""The command ``rmsprop-gpu``: ``info`` (what works), ``cache`` (kernels), ``inspect`` (a checkpoint), ``demo``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import numba
import numpy as np

from . import RMSProp, __version__, available_backends
from .arrays.selector import cuda_versions
from .demo.command import BAD_USE, FAILED, INTERRUPTED, OK, RefusedError, add_demo
from .extras import MissingExtraError
from .kernels import disk
from .state import checkpoint
from .state.container import CheckpointError


class Parser(argparse.ArgumentParser):
    """argparse with one-line error messages."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise RefusedError(f"{message} (see {self.prog} --help)", BAD_USE)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 (failed), 2 (bad use) or 130 (Ctrl-C)."""
    parser = make_parser()
    try:
        options = parser.parse_args(words)
        if "run" not in options:
            parser.print_help()
            return OK
        status: int = options.run(options)
        return status
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (RefusedError, MissingExtraError, OSError) as error:
        print(f"rmsprop-gpu: {error}", file=sys.stderr)
        return error.status if isinstance(error, RefusedError) else FAILED
    except KeyboardInterrupt:
        print("rmsprop-gpu: interrupted", file=sys.stderr)
        return INTERRUPTED


def make_parser() -> Parser:
    """The options."""
    parser = Parser(prog="rmsprop-gpu", description="RMSProp in place on NumPy and CuPy arrays.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"rmsprop-gpu {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    text = "versions, backends, devices, threads, compiled kernels"
    commands.add_parser("info", help=text, description=f"{text}.", allow_abbrev=False).set_defaults(run=info)
    text = "compiled kernels on disk: where they are, how many, how large"
    cache = commands.add_parser("cache", help=text, description=f"{text}.", allow_abbrev=False)
    cache.add_argument("--clear", action="store_true", help="delete them; they are compiled again when needed")
    cache.set_defaults(run=run_cache)
    text = "what is in a checkpoint that opt.save wrote, a file or a folder"
    look = commands.add_parser("inspect", help=text, description=f"{text}; no array is read.", allow_abbrev=False)
    look.add_argument("path", metavar="PATH")
    look.set_defaults(run=inspect)
    add_demo(commands)
    return parser


# info


def info(_: argparse.Namespace) -> int:
    """Show what is installed, which backends work on which devices, how many threads; needs only NumPy and Numba."""
    rows = [("rmsprop-gpu", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    rows += [(name, installed(name) or "not installed") for name in ("numpy", "numba", "llvmlite", "numba-cuda")]
    cupy = [f"{found} ({name})" for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy") if (found := installed(name))]
    rows += [("cupy", ", ".join(cupy) or "not installed")]
    backends = available_backends()
    rows += [(f"backend {name}", text) for name, text in backends.items()]
    if not backends["cuda"].startswith("not available"):
        rows += [("cuda", cuda_versions()), *kernels()]
    for name, text in [*rows, *threads(), ("kernels on disk", kept())]:
        print(f"{name:16} {text}")
    return OK


def kernels() -> list[tuple[str, str]]:
    """What compiles and links for CUDA, and whether it works, tested on the smallest possible kernel."""
    from .kernels import cuda_code, cuda_fit  # they import Numba's CUDA target

    return [("linked by", cuda_fit.linker()), ("kernels", cuda_code.trial() or "are compiled, linked and loaded")]


def installed(name: str) -> str | None:
    """The version of a distribution, found without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def threads() -> list[tuple[str, str]]:
    """How many threads run, and on which layer; starting them shows that they work."""
    param = np.zeros(1 << 17, np.float32)
    try:
        number = numba.get_num_threads()  # starts them
        RMSProp(param).step(np.zeros_like(param))
        layer: str = numba.threading_layer()  # type: ignore[attr-defined]  # Numba does not list it in __all__
    except (ValueError, RuntimeError) as error:
        return [("threads", f"do not work: {' '.join(str(error).split())}")]
    return [("threads", str(number)), ("threading layer", layer)]


# cache


def run_cache(options: argparse.Namespace) -> int:
    """Show what is kept, or delete it."""
    if not options.clear:
        print(kept())
    elif disk.folder() is None:
        print(kept() + ": nothing to delete")
    else:
        was = disk.clear()
        print(f"{was.kernels} kernels deleted from {disk.folder()}, {mebibytes(was.size)}")
    return OK


def kept() -> str:
    """Where compiled kernels are kept, and how many there are."""
    directory, found = disk.folder(), disk.usage()
    if directory is None:
        return "off (RMSPROP_GPU_CACHE=0)" if os.environ.get("RMSPROP_GPU_CACHE") == "0" else "off: there is no home"
    said = f"{directory}: {found.kernels} kernels, {mebibytes(found.size)} of at most {mebibytes(disk.LIMIT)}"
    return said if can_be_written(directory) else f"{said}; it cannot be written to"


def can_be_written(directory: Path) -> bool:
    """Can files be created in this folder, or the folder itself if it does not exist yet?"""
    try:
        there = next(path for path in (directory, *directory.parents) if path.exists())
        return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError:  # a parent folder that we may not search
        return False


def mebibytes(size: int) -> str:
    """Bytes in a readable unit."""
    return f"{size / 2**20:.1f} MiB"


# inspect


def inspect(options: argparse.Namespace) -> int:
    """Print tables of what is in a checkpoint."""
    try:
        with checkpoint.opened(options.path) as saved:
            text, coding = "\n".join(described(saved)), sys.stdout.encoding or "utf-8"
            print(text.encode(coding, "backslashreplace").decode(coding))
    except CheckpointError as error:
        raise RefusedError(str(error), FAILED) from None
    return OK


def described(saved: Mapping[str, Any]) -> list[str]:
    """The lines that describe a state dict whose arrays are in one file or several."""
    arrays = [
        (shown(f"{key}/{name}"), str(x.dtype), str(x.shape), f"{x.nbytes:,}")
        for key, buffers in saved["state"].items()
        for name, x in buffers.items()
    ]
    total = sum(x.nbytes for buffers in saved["state"].values() for x in buffers.values())
    where = f", in {len(saved['files'])} files" if "files" in saved else ""
    lines = [
        f"{shown(saved['optimizer'])}, version {shown(saved['version'])}",
        f"steps: {shown(saved['steps'])}, {shown(saved['skipped_steps'])} of them skipped",
        f"arrays: {len(arrays)}, of {len(saved['state'])} parameters, {mebibytes(total)}{where}",
    ]
    groups = saved["param_groups"] if isinstance(saved["param_groups"], list) else []
    for i, group in enumerate(groups):
        entries = group if isinstance(group, dict) else {}
        names = entries.get("params", [])
        lines += ["", f"group {i}, parameters: {len(names) if isinstance(names, list) else shown(names)}"]
        lines += aligned([(f"  {shown(name)}", shown(x)) for name, x in entries.items() if name != "params"])
    return [*lines, "", *aligned([("array", "dtype", "shape", "bytes"), *arrays])]


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The rows of a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]


def shown(x: object) -> str:
    """A value on one line, as written; any control characters for the terminal are escaped."""
    text = x if isinstance(x, str) else repr(x)
    return text if text.isprintable() else ascii(text)
