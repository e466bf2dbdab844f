"""Checkpoints by any number of ranks, including killed ones."""

import os
import random
import signal
import sys
import time

import numpy as np
import pytest
from ranks import ended, kill, needs_mpi, offspring, run, start

from rmsprop_gpu import RMSProp

pytestmark = needs_mpi


def test_saved_by_any_number_and_loaded_by_any_other(tmp_path):
    run("checkpoints", 4, "any_number_loads_what_any_other_saved", FOLDER=str(tmp_path))


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_goes_wrong_goes_wrong_on_all(ranks, tmp_path):
    assert run("checkpoints", ranks, FOLDER=str(tmp_path)).count("check_") > 10


def ranks_of(process):
    """The process ids of the ranks, in no particular order."""
    return [pid for pid in offspring(process.pid) if b"mpi4py" in read(f"/proc/{pid}/cmdline") and not is_proxy(pid)]


def is_proxy(pid):
    return b"hydra" in read(f"/proc/{pid}/cmdline") or b"mpiexec" in read(f"/proc/{pid}/cmdline")


def read(path):
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are listed in /proc")
def test_a_killed_rank_leaves_a_checkpoint_that_loads(tmp_path):
    """At twenty moments. Killing one ends the others, and leaves one complete save."""
    rng, path, steps = random.Random(18), tmp_path / "saved", []
    for _ in range(20):
        process = start("saving", 2, FOLDER=str(path))
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.4))
        os.kill(rng.choice(ranks_of(process)), signal.SIGKILL)
        done = ended(process, 60)
        assert done.code != 0
        assert done.seconds < 30
        if (path / "index.json").exists():
            opt = RMSProp({"w": np.ones(200_000, np.float32), "v": np.ones(70_000)}, momentum=0.9)
            opt.load(path)
            steps.append(opt.steps)
            assert {int(opt.state[key]["step"]) for key in opt.state} == {opt.steps}
            assert all(np.unique(opt.state[key]["momentum_buffer"]).size == 1 for key in opt.state)
    assert len(set(steps)) > 3
    RMSProp({"w": np.ones(200_000, np.float32), "v": np.ones(70_000)}, momentum=0.9).load(path)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are listed in /proc")
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_in_a_step_ends_the_others(dies):
    process = start("saving", 3, DIES=str(dies))
    done = ended(process, 60)
    assert done.code != 0
    assert done.out.startswith("ready\n")


@pytest.mark.skipif(sys.platform != "linux", reason="processes are listed in /proc")
def test_what_hangs_is_killed_with_all_its_ranks():
    process = start("saving", 2)
    assert process.stdout.readline() == "ready\n"
    ranks = ranks_of(process)
    assert len(ranks) == 2
    with pytest.raises(pytest.fail.Exception, match=r"the program did not end within 0.5 s"):
        ended(process, 0.5)
    end = time.monotonic() + 20
    while any(is_running(pid) for pid in ranks) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in ranks)
    kill(process)  # does nothing to processes that are gone


def is_running(pid):
    try:
        return read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[0] != b"Z"
    except FileNotFoundError:
        return False
