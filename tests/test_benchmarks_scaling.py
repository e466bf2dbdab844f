"""The model of a sharded step compared with values computed by hand, its page, and a rehearsal of its measurement."""

import importlib
import json
import math
import re
import subprocess
import sys

import pytest
from jobs import needs_mpi
from paths import ROOT

sys.path.append(str(ROOT))  # last, as in test_benchmarks.py

from benchmarks import scaling_model as model
from benchmarks import scaling_page
from benchmarks.scaling_model import EVERYTHING, INFINIBAND, NVLINK, PLAIN, Link

RESULT = ROOT / "benchmarks" / "results" / "scaling.json"
MIB = 1 << 20
SLOW = Link(1e9, 1e-3)


def near(value):
    return pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    ("ranks", "ring", "tree"), [(2, 1, 1), (3, 2, 2), (4, 3, 2), (8, 7, 3), (9, 8, 4), (4096, 4095, 12)]
)
def test_messages_that_follow_each_other(ranks, ring, tree):
    assert (model.hops(ranks), model.hops(ranks, tree=True)) == (ring, tree)


@pytest.mark.parametrize(
    ("ranks", "size", "count"),
    [(2, 1, 1), (2, 32 * MIB, 1), (2, 32 * MIB + 1, 2), (64, 128 * MIB, 2), (4096, 4e9, 1), (1, 0, 1)],
)
def test_buckets(ranks, size, count):
    assert model.buckets(size, ranks) == count


def test_buckets_are_those_of_the_package():
    transport = pytest.importorskip("rmsprop_gpu.distributed.transport", exc_type=ImportError)
    assert [model.bucket_bytes(n) for n in (1, 2, 32, 33, 4096)] == [
        transport.bucket_bytes_of(n) for n in (1, 2, 32, 33, 4096)
    ]


def test_bytes_and_messages_of_four_ranks():
    # Of each of two buckets, a rank keeps a quarter and sends three, once to their owners and once to all.
    size = 64 * MIB
    assert model.sent(4, size) == 2 * 48 * MIB
    assert model.messages(4, size) == 2 * 2 * 3 + 2  # plus an agreement, which is a tree
    assert model.messages(4, size, tree=True) == 2 * 2 * 2 + 2


def test_a_collective():
    # 3 messages of 1 ms per bucket, and three quarters of 1 GB at 1 GB/s
    assert model.collective(4, 1e9, SLOW) == near(0.753)
    assert model.collective(4, 1e9, SLOW, 5) == near(0.765)
    assert model.collective(4, 1e9, SLOW, 5, tree=True) == near(0.760)
    assert model.collective(1, 1e9, SLOW) == 0


@pytest.mark.parametrize(
    ("ranks", "link"), [(2, NVLINK), (8, NVLINK), (9, Link(400e9, 5e-6)), (4096, Link(400e9, 5e-6))]
)
def test_nodes_have_eight_ports_together(ranks, link):
    assert model.in_nodes(ranks) == link


def test_a_step_of_eight_gpus():
    # 4 GB in 120 buckets of 32 MiB: twice 120 x 7 messages of 3 us, and 7/8 of the data at 450 GB/s. Plus 16 GB of
    # copies and 20 GB of an update at 4 TB/s, an eighth of it here.
    found = model.sharded(8, 1e9, NVLINK, 4e12)
    communication = 2 * (120 * 7 * 3e-6 + 3.5 / 450)
    assert found == near((communication, 0.004, 0.000625))
    assert found.seconds == near(communication + 0.000625)
    assert model.replicated(8, 1e9, NVLINK, 4e12).seconds == near(communication + 0.005)
    assert model.sharded(8, 1e9, NVLINK, 4e12, EVERYTHING).update == near(0.0055 / 4)


def test_larger_buckets_are_fewer_and_take_memory():
    assert model.sharded(8, 1e9, NVLINK, 4e12, times=4).communication == near(2 * (30 * 7 * 3e-6 + 3.5 / 450))
    assert model.held(8, 1e9, times=4) == near(9 + 2 * 4 / 30)


def test_copies_count_where_they_are_slower_than_the_link():
    assert model.sharded(2, 1e9, Link(1e15, 0.0), 1e12).seconds == near(0.016 + 0.010)


def test_one_rank_only_updates():
    assert model.sharded(1, 1e9, NVLINK, 4e12) == (0, 0, 0.005)
    assert model.held(1, 1e9) == model.held_replicated() == 12


@pytest.mark.parametrize(
    ("optimizer", "ranks", "want"),
    [
        (PLAIN, 2, 12.07),  # 8 + (4 + 4) / 2, and two buckets of 32 MiB for 1e9 elements
        (PLAIN, 8, 9.07),
        (EVERYTHING, 8, 10.57),  # 24 bytes become 8 + (16 + 4) / 8, plus buckets
        (PLAIN, 4096, 16.0),  # a bucket is the whole model
    ],
)
def test_memory(optimizer, ranks, want):
    assert model.held(ranks, 1e9, optimizer) == pytest.approx(want, abs=0.005)


def test_memory_moved_by_two_ranks():
    # Per rank: 8 bytes to pack. Its half: 8 to copy, 12 to add, 20 to update, 8 to pack. The other half: 8 to unpack.
    assert model.local_bytes(2, 100) == 800 + 50 * (8 + 12 + 20 + 8) + 50 * 8


def test_the_loopback_interface_is_read():
    pytest.importorskip("mpi4py.MPI", exc_type=ImportError)
    loopback = importlib.import_module("benchmarks.scaling_rank").loopback
    text = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
  eth0:     100       2    0    0    0     0          0         0      300       4    0    0    0     0       0          0
    lo: 7000001      20    0    0    0     0          0         0  7000002      20    0    0    0     0       0          0
"""  # noqa: E501
    assert loopback(text) == 7000002


def test_turns_are_merged():
    turns = [{"ranks": 2, "threads": 1, "elements": 9, "sharded": [x, 2 * x], "sent": x} for x in (1.0, 5.0, 3.0)]
    got = importlib.import_module("benchmarks.scaling").merged(turns)
    assert got["sharded"] == [1.0, 2.0, 5.0, 10.0, 3.0, 6.0]
    assert (got["sent"], got["ranks"], got["threads"], got["elements"]) == (3.0, 2, 1, 9)


def test_a_time_by_the_model_is_made_of_what_was_measured():
    # 2 ranks, 4 MB in one bucket: exchanged in 2 x 1 ms, of which messages take 2 x 0.1 ms.
    job = {"ranks": 2, "elements": 1_000_000, "exchange": [0.002], "small": 1e-4, "agree": 5e-4}
    local = 2 * 36e6 / 1e10  # both ranks move 36 bytes per element through one memory
    assert scaling_page.by_the_model(job, 1e10) == near(0.002 + 5e-4 + local)


def test_the_page_is_made_from_the_results():
    assert RESULT.with_suffix(".md").read_text() == scaling_page.page(json.loads(RESULT.read_text()))


def test_the_card_s_speed_is_the_recorded_one():
    scaling = importlib.import_module("benchmarks.scaling")
    assert math.isclose(scaling.speed_of_the_card(), json.loads(RESULT.read_text())["measured_memory"])
    assert f"{scaling.speed_of_the_card() / 1e12:.2f}" == "4.18"


def test_the_picture_is_drawn_from_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    draw = importlib.import_module("benchmarks.scaling_plot").draw
    draw(json.loads(RESULT.read_text()), tmp_path / "a.png")
    image = importlib.import_module("matplotlib.image").imread(tmp_path / "a.png")
    assert image.shape[1] > 1000
    assert math.isclose(image[0, 0].min(), 1)  # white


def test_a_part_is_told_as_less_or_more():
    assert [scaling_page.of_less(x) for x in (0.75, 1.0, 1.004, 1.33)] == ["25% less", "nothing", "nothing", "33% more"]


@needs_mpi
def test_a_rehearsal_counts_and_times_nothing():
    command = [sys.executable, "-m", "benchmarks.scaling", "--rehearse"]
    before = RESULT.read_bytes()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    lines = done.stdout.splitlines()
    assert lines[0] == "2 ranks over shared memory: runs"
    (sent,) = re.findall(r"^2 ranks over TCP: runs, sends (\S+) of the model's bytes$", lines[1])
    assert float(sent) >= 1  # includes what other programs send over the loopback interface
    assert all(re.fullmatch("one rank, .*: runs", line) for line in lines[2:])
    assert not re.search(r"\d (s|ms|us)\b", done.stdout)
    assert RESULT.read_bytes() == before


def test_links_are_those_that_the_page_states():
    assert (NVLINK.bandwidth, INFINIBAND.bandwidth) == (450e9, 50e9)
