"""Programs on several ranks: mpiexec as a subprocess with a time limit, which leaves no process behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

import rmsprop_gpu

PROGRAMS = Path(__file__).parents[1] / "distributed" / "programs"
MPIEXEC = Path(sys.executable).with_name("mpiexec")
LIMIT = 300  # seconds: most programs take ten, and longer where kernels have to be compiled


def why_no_mpi():
    """The reason why nothing can run on several ranks, or ""."""
    if find_spec("mpi4py") is None:
        return "mpi4py is not installed (the extra mpi)"
    if not MPIEXEC.exists():
        return f"there is no mpiexec beside {Path(sys.executable).name} (the extra mpi)"
    return ""


needs_mpi = pytest.mark.skipif(bool(why_no_mpi()), reason=why_no_mpi() or "MPI is available")


class Ended(NamedTuple):
    """The outcome of a program."""

    code: int
    out: str
    err: str
    seconds: float


def start(program, ranks, *arguments, **environment):
    """Start one of our programs on this many ranks, with one thread each, in its own process group."""
    paths = [str(Path(rmsprop_gpu.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "NUMBA_NUM_THREADS": "1", **environment}
    command = [str(MPIEXEC), "-n", str(ranks), sys.executable, "-W", "error", "-m", "mpi4py"]
    return subprocess.Popen(
        [*command, str(PROGRAMS / f"{program}.py"), *map(str, arguments)],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process, limit=LIMIT):
    """Wait for its end and return the outcome. After the time limit, kill it with all its ranks."""
    begin = time.monotonic()
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        pytest.fail(f"the program did not end within {limit} s:\n{out}{err}")
    return Ended(process.returncode, out, err, time.monotonic() - begin)


def run(program, ranks, *arguments, limit=LIMIT, **environment):
    """What a program prints. It must have ended successfully."""
    code, out, err, _ = ended(start(program, ranks, *arguments, **environment), limit)
    assert code == 0, out + err
    return out


def kill(process):
    """Kill it and everything it started: its ranks have their own sessions."""
    for pid in [process.pid, *offspring(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(os.getpgid(pid), signal.SIGKILL)


def offspring(pid):
    """All descendants of a process, where the system lists them."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = list(children.get(pid, []))
    for one in found:
        found += children.get(one, [])
    return found
