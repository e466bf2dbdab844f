"""A part of the run: its command, its time limit, and how to read its output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any

Result = dict[str, Any]
CUDA = "/usr/local/cuda"  # where the toolkit is installed, if it is


@dataclass(frozen=True)
class Run:
    """What all parts of a run share."""

    folder: Path  # where everything ends
    work: Path  # for temporary files
    rehearse: bool  # small sizes, for a device that computes slowly
    device: bool = True  # is there one that works?

    def log(self, part: Part) -> Path:
        """The log of a part."""
        return self.folder / "logs" / f"{part.name}.txt"


@dataclass(frozen=True)
class Part:
    """One process. Only `command` runs on the device, and nothing here loads CUDA."""

    name: str
    title: str
    seconds: int  # at most
    command: Callable[[Run], list[str]]
    result: Callable[[Run], Result | None]  # what it has found, however it ended; None if nothing
    headline: Callable[[Result], str]  # the result in one line
    lines: Callable[[Result], list[str]] = lambda result: []  # a section of the summary, in Markdown
    missing: Callable[[], str | None] = lambda: None  # why it cannot run here
    environment: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()  # that it leaves in the folder, besides its log
    needs_device: bool = True


def measured(name: str, title: str, seconds: int, **more: Any) -> Part:
    """A part that is a module of this package and records what it finds (measuring.py)."""

    def command(run: Run) -> list[str]:
        words = [sys.executable, "-m", f"benchmarks.gpu.{name}", str(run.work / f"{name}.json")]
        return words + ["--rehearse"] * run.rehearse

    return Part(name, title, seconds, command, lambda run: read(run.work / f"{name}.json"), **more)


def read(file: Path) -> Result | None:
    """The JSON in a file; None if there is none."""
    try:
        found: Result = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found


def tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit."""
    homes = [Path(os.environ.get("CUDA_HOME", CUDA), "bin"), *sorted(Path("/opt/nvidia/nsight-compute").glob("*"))]
    return which(name) or next((found for home in homes if (found := which(name, path=str(home)))), None)


def not_installed(name: str) -> Callable[[], str | None]:
    """The reason if a tool is absent."""
    return lambda: None if tool(name) else f"{name} is not installed"
