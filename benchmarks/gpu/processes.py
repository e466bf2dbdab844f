"""A process with a time limit, which ends together with everything that it has started."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GRACE = 5  # seconds between asking it to end and killing it, and then until giving up
TIME_LIMIT, INTERRUPTED = "time limit", "interrupted"


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int | None  # its exit status, minus the number of a signal that ended it; None: it is still there
    seconds: float
    stopped: str | None = None  # by us: TIME_LIMIT or INTERRUPTED


def run(command: Sequence[str], seconds: float, log: Path, cwd: Path, environment: Mapping[str, str]) -> Ended:
    """Run a command; all its output goes to the log, below the command itself.

    When its time is over, or on Ctrl-C, its process group gets the signal of Ctrl-C, so that it may write what it has,
    and is killed a few seconds later.
    """
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        print("$", shlex.join(command), file=file, flush=True)
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its own process group: Ctrl-C is for us
            )
        except OSError as error:
            print(error, file=file)
            return Ended(127, time.monotonic() - start)
        stopped = None
        try:
            process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            stopped = TIME_LIMIT
        except KeyboardInterrupt:
            stopped = INTERRUPTED
        if stopped:
            _signal(process, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                process.wait(GRACE)
        _signal(process, signal.SIGKILL)  # whatever of the group is left
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return Ended(process.returncode, time.monotonic() - start, stopped)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the process and its whole group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def last_line(log: Path) -> str:
    """The last line of output, apart from the command; empty if there is none."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()[1:]]
    return next((line for line in reversed(lines) if line), "")
