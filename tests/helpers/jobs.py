"""Jobs of several ranks: mpiexec as a subprocess in its own process group, with a time limit."""

import contextlib
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from paths import ROOT

MPIEXEC = Path(sys.executable).with_name("mpiexec")
LIMIT = 120  # seconds; a job takes a few, unless it hangs

needs_mpi = pytest.mark.skipif(
    find_spec("mpi4py") is None or not MPIEXEC.exists(), reason="mpi4py or mpiexec is not installed (the extra mpi)"
)


def job(ranks, *words, threads="1", **environment):
    """Run this Python command line on this many ranks, and return the outcome."""
    env = {**os.environ, "NUMBA_NUM_THREADS": threads, **environment}
    if threads is None:
        del env["NUMBA_NUM_THREADS"]
    command = [MPIEXEC, "-n", ranks, sys.executable, "-m", "mpi4py", *words]
    process = subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LIMIT)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its ranks end when it is gone
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)
