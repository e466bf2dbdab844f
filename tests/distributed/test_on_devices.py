"""A sharded optimizer over parameters on devices: several processes, with a device each or sharing the only one.

NCCL is replaced by a stand-in made of MPI and host copies (`nccl_stand_in`), since NCCL itself needs a card per rank.
The ranks' part is in `programs/on_devices.py`. Work is deferred as long as possible, where the device supports that.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import rmsprop_gpu

PROGRAM = Path(__file__).with_name("programs") / "on_devices.py"
BESIDE = Path(sys.executable).with_name("mpiexec")
MPIEXEC = str(BESIDE) if BESIDE.exists() else shutil.which("mpiexec")
LIMIT = 400  # seconds: with kernels on disk ten are enough, compiling them takes minutes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("mpi4py") is None, reason="mpi4py is not installed (the extra mpi)"),
    pytest.mark.skipif(MPIEXEC is None, reason="mpiexec is not installed (the extra mpi)"),
]


def run(ranks, *names, **environment):
    """What the ranks print. They must have ended successfully. mpiexec itself ends ranks that take too long."""
    paths = [str(Path(rmsprop_gpu.__file__).parents[1]), *sys.path]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "NUMBA_NUM_THREADS": "1", "MPIEXEC_TIMEOUT": str(LIMIT)}
    done = subprocess.run(
        [MPIEXEC, "-n", str(ranks), sys.executable, "-m", "mpi4py", str(PROGRAM), *names],
        env={**os.environ, **ours, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT + 30,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{name} done" in done.stdout for name in names if name != "--no-pool"), done.stdout
    return done.stdout


@pytest.fixture
def no_pool(request):
    return ["--no-pool"] if request.config.getoption("--no-pool") else []


@pytest.fixture
def virtual():
    """Needs a virtual device: only that can defer work as long as possible, and record its launches."""
    import cupy

    if b"on the CPU" not in cupy.cuda.runtime.getDeviceProperties(0)["name"]:
        pytest.skip("only a virtual device defers its work as long as possible, and counts it")


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_bits_are_those_of_one_process_on_the_host(ranks, no_pool):
    run(ranks, *no_pool, "bits")


def test_one_rank_needs_no_nccl_and_packs_nothing(no_pool):
    run(1, *no_pool, "one_rank")


@pytest.mark.parametrize(("ranks", "name"), [(3, "told"), (2, "zeros"), (2, "streams")])
def test_what_a_step_is_told(ranks, name, no_pool):
    run(ranks, *no_pool, name)


def test_files_are_those_of_one_process():
    run(2, "files")


@pytest.mark.parametrize("name", ["refused", "fails"])
def test_what_one_rank_refuses_all_do(name):
    run(2, name)


def test_a_communicator_of_nccl_is_made_of_what_rank_0_says_and_kept():
    run(3, "connects")


def test_launches_are_counted(virtual):
    run(2, "launches", VGPU_LAZY="0")


def test_the_host_does_not_wait(virtual):
    run(2, "waits", VGPU_LAZY="1")


def test_a_wait_of_the_communication_stream_that_is_missing_shows(virtual):
    out = run(2, "deaf", VGPU_LAZY="1")
    assert "start noticed" in out
    assert "end noticed" in out
