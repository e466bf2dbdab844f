"""The demo over ranks: it trains like one process, only rank 0 prints, and a job that cannot continue ends."""

import importlib.util
import json
import os
import re
import sys

import pytest
from jobs import job, needs_mpi

from rmsprop_gpu.cli import main
from rmsprop_gpu.demo.sharded import share

TRAIN = 1437
DEMO = ("-m", "rmsprop_gpu", "demo", "--device", "cpu")


def said_by_us(err):
    """The command's own lines in an MPI job's standard error. MPI adds that the job was aborted."""
    return [line for line in err.splitlines() if line.startswith("rmsprop-gpu: ")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """For each batch size, what one process reports after two epochs without `--sharded`."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for size in (360, TRAIN - 1):
        path = folder / f"{size}.json"
        words = ["demo", "--device", "cpu", "--quiet", "--epochs", "2", "--batch-size", str(size), "--json", str(path)]
        assert main(words) == 0
        found[size] = json.loads(path.read_text())
    return found


# With batches of all digits but one, the last batch has one row, and two of three ranks have none.
@needs_mpi
@pytest.mark.parametrize(("ranks", "size"), [(1, 360), (2, 360), (3, TRAIN - 1)])
def test_ranks_train_as_one_process_does(ranks, size, alone, tmp_path):
    path = tmp_path / "run.json"
    done = job(ranks, *DEMO, "--sharded", "--epochs", 2, "--batch-size", size, "--json", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^epoch +\d+", done.stdout, re.MULTILINE) == ["epoch   1", "epoch   2"]
    assert "match the float64 reference to rounding" in done.stdout
    assert done.stdout.count("parameters in 6 tensors") == 1
    got, want = json.loads(path.read_text()), alone[size]
    assert (got["optimizer"], got["ranks"], got["same"]) == ("ShardedRMSProp", ranks, True)
    assert len(got["state_bytes"]) == ranks
    assert got["steps"] == want["steps"]
    if ranks == 1:
        assert got["history"] == want["history"]  # bit-identical
    for mine, theirs in zip(got["history"], want["history"], strict=True):
        # Summing in another order is off by roundings of the largest term, 2**-24 each. 8 steps hardly amplify that.
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert abs(mine["accuracy"] - theirs["accuracy"]) <= 2 / 360


@needs_mpi
def test_adagrad_and_momentum_are_sharded_too(tmp_path):
    for words, name in ((("--optimizer", "adagrad"), "ShardedAdaGrad"), (("--momentum", 0.9), "ShardedRMSProp")):
        path = tmp_path / f"{name}.json"
        done = job(2, *DEMO, "--sharded", "--quiet", "--epochs", 1, "--batch-size", 360, *words, "--json", path)
        assert (done.returncode, done.stderr) == (0, "")
        got = json.loads(path.read_text())
        assert (got["optimizer"], got["same"], got["deviation"]["matches"]) == (name, True, True)


@needs_mpi
@pytest.mark.parametrize(
    ("words", "line", "code"),
    [
        (("--lr", -1), "lr is -1.0; wanted a finite number >= 0", 2),  # on every rank
        (("--plot", "no-such-folder/a.png"), "--plot no-such-folder/a.png cannot be written: ", 2),  # only rank 0
        (("--lr", 1e30, "--batch-size", TRAIN, "--epochs", 2), "the loss is nan after 2 of 2 epochs", 1),
    ],
)
def test_what_is_refused_ends_the_job_with_one_line(words, line, code):
    done = job(2, *DEMO, "--sharded", "--quiet", *words)
    assert done.returncode == code
    (said,) = said_by_us(done.stderr)
    assert said.startswith(f"rmsprop-gpu: {line}")
    assert "Traceback" not in done.stderr


OTHERS = """
from mpi4py import MPI
from rmsprop_gpu.cli import main
from rmsprop_gpu.demo.sharded import ShardedRun
rank, summary = MPI.COMM_WORLD.rank, ShardedRun.summary
def other(self):
    self.params["dense2.bias"][3] += {off} * rank
    return summary(self)
ShardedRun.summary = other
words = "demo --device cpu --sharded --quiet --epochs 1 --batch-size 1437 --lr"
raise SystemExit(main([*words.split(), str({lr})]))
"""


@needs_mpi
@pytest.mark.parametrize(
    ("off", "lr", "line"),
    [
        (1e-6, "0.1", "the ranks ended on different parameters"),
        (0, "0.1 + rank", 'param_groups[0]["lr"] is 1.1 on rank 1 and 0.1 on rank 0'),
    ],
)
def test_ranks_that_differ_are_told(off, lr, line):
    done = job(2, "-c", OTHERS.format(off=off, lr=lr))
    assert done.returncode in (1, 2)
    (said,) = said_by_us(done.stderr)
    assert line in said
    assert ("ended on DIFFERENT parameters" in " ".join(done.stdout.split())) == bool(off)


# Cores and threads

FEW = frozenset({0, 1})


@pytest.mark.parametrize(
    ("cores", "threads"),
    [
        ([FEW], [2]),
        ([FEW] * 2, [1, 1]),
        ([FEW] * 4, [1] * 4),
        ([frozenset(range(16))] * 3, [5] * 3),
        ([frozenset(range(8)), frozenset(range(8, 16))], [8, 8]),  # bound by the launcher
        ([frozenset(range(6)), FEW], [5, 1]),
    ],
)
def test_cores_are_shared_among_those_who_may_run_on_them(cores, threads):
    assert [share(cores, i) for i in range(len(cores))] == threads


THREADS = """
import numba
from rmsprop_gpu.demo.sharded import Ranks
ranks = Ranks()
ranks.share_cores()
found = ranks.comm.gather(numba.get_num_threads())  # lines that two ranks print may run into each other
print(*found or (), end="")
"""


@needs_mpi
@pytest.mark.parametrize("said", [None, "1"])
def test_a_rank_has_threads_for_its_share_of_the_cores(said):
    done = job(2, "-c", THREADS, threads=said)
    assert (done.returncode, done.stderr) == (0, "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert done.stdout.split() == [said or str(max(1, cores // 2))] * 2


# Missing packages


def forget_the_wing(monkeypatch):
    """Have it imported again."""
    for name in [name for name in sys.modules if name.startswith("rmsprop_gpu.distributed")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("module", ["mpi4py", "mpi4py.MPI"])
def test_without_mpi4py_the_extra_is_named(module, monkeypatch, capsys):
    forget_the_wing(monkeypatch)
    if module == "mpi4py.MPI":
        mpi4py = pytest.importorskip("mpi4py")
        monkeypatch.delattr(mpi4py, "MPI", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--sharded"]) == 1
    assert re.match(r"rmsprop-gpu: .*the extra mpi: .*pip install .*\[mpi\]", capsys.readouterr().err)


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed (the extra mpi)")
def test_where_mpi4py_finds_no_mpi_the_extra_is_named(monkeypatch, capsys):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "mpi4py.MPI":
                raise RuntimeError("cannot load MPI library")

    import mpi4py

    forget_the_wing(monkeypatch)
    monkeypatch.delattr(mpi4py, "MPI", raising=False)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert main(["demo", "--sharded"]) == 1
    assert "mpi4py does not work: cannot load MPI library; it comes with the extra mpi" in capsys.readouterr().err


@pytest.mark.gpu
@needs_mpi
def test_one_rank_trains_on_a_device(tmp_path):
    path = tmp_path / "run.json"
    words = ("--device", "cuda", "--epochs", 1, "--batch-size", 720, "--quiet", "--json", path)
    done = job(1, "-m", "rmsprop_gpu", "demo", "--sharded", *words)
    assert done.returncode == 0, done.stderr
    got = json.loads(path.read_text())
    assert (got["device"], got["ranks"], got["deviation"]["matches"]) == ("cuda", 1, True)


@pytest.mark.gpu
@needs_mpi
def test_ranks_without_a_device_each_are_refused():
    import cupy

    ranks = cupy.cuda.runtime.getDeviceCount() + 1
    done = job(ranks, "-m", "rmsprop_gpu", "demo", "--sharded", "--device", "cuda")
    assert done.returncode == 1
    (said,) = said_by_us(done.stderr)
    assert f"{ranks} ranks on this machine have {ranks - 1} GPUs; wanted one for each" in said
