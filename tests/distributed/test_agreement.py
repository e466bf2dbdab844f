"""How ranks agree, tested with threads of one process. Needs no MPI."""

import threading
from functools import reduce

import numpy as np
import pytest

pytest.importorskip("mpi4py")

from rmsprop_gpu.distributed import agreement
from rmsprop_gpu.distributed.agreement import RanksDisagree, agree


class Ranks:
    """MPI's part of agreement, among threads."""

    def __init__(self, ranks):
        self.barrier, self.told, self.calls = threading.Barrier(ranks, timeout=20), [None] * ranks, 0

    def all_of(self, rank, x):
        self.told[rank] = x
        self.barrier.wait()
        found = list(self.told)
        self.barrier.wait()
        return found


class Comm:
    def __init__(self, among, rank):
        self.among, self.rank = among, rank

    def allgather(self, x):
        return self.among.all_of(self.rank, x)


@pytest.fixture(autouse=True)
def without_mpi(monkeypatch):
    def bitwise_or(comm, sent):
        comm.among.calls += comm.rank == 0
        sent[:] = reduce(np.bitwise_or, comm.among.all_of(comm.rank, sent.copy()))

    monkeypatch.setattr(agreement, "_reduce", bitwise_or)


def outcomes(*given):
    """The outcome for ranks with these statements, faults and bits: an array, or the error raised."""
    among, found = Ranks(len(given)), [None] * len(given)

    def one(rank, said, fault=None, bits=None):
        try:
            found[rank] = agree(Comm(among, rank), said, fault, bits)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank, *x)) for rank, x in enumerate(given)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert among.calls == 1
    return found


def test_bits_of_all():
    rows = np.array([[1, 0, 128], [2, 0, 1], [0, 0, 128]], np.uint8)
    found = outcomes(*(({"a": "1", "b": "2"}, None, bits) for bits in rows))
    assert [x.tolist() for x in found] == [[3, 0, 129]] * 3
    assert [x.tolist() for x in outcomes(({}, None), ({}, None))] == [[], []]
    order = outcomes(({"a": "1", "b": "2"}, None), ({"b": "2", "a": "1"}, None))  # order does not matter
    assert [x.tolist() for x in order] == [[], []]


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ([{"a": "1"}, {"a": "1"}, {"a": "2"}], "a is 2 on rank 2 and 1 on rank 0; wanted the same"),
        ([{"a": "1"}, {"a": "2"}, {"a": "2"}], "a is 2 on rank 1 and 1 on rank 0; wanted the same"),
        ([{"a": "1", "b": "2"}, {"a": "1"}], "b is missing on rank 1 and 2 on rank 0; wanted the same"),
        ([{"a": "1"}, {"a": "1", "b": "2"}], "b is 2 on rank 1 and missing on rank 0; wanted the same"),
        ([{"a": "1", "b": "2"}, {"a": "1', 'b': '2"}], "rank 1"),
    ],
)
def test_what_differs_is_named(said, text):
    found = outcomes(*((x, None) for x in said))
    assert len({str(x) for x in found}) == 1
    assert {type(x) for x in found} == {RanksDisagree}
    assert text in str(found[0])
    assert str(found[0]).endswith("; nothing was changed on any rank")


def test_any_bit_that_differs_is_seen(monkeypatch):
    class Digest:
        def __init__(self, bits, digest_size):
            self.bits = bits

        def digest(self):
            return np.packbits(np.frombuffer(eval(self.bits)[0][1].encode(), np.uint8) - 48).tobytes()

    monkeypatch.setattr(agreement.hashlib, "blake2b", Digest)
    zero = "0" * 128
    for i in range(128):
        other = zero[:i] + "1" + zero[i + 1 :]
        for said in ([zero, other], [other, zero], [zero, zero, other]):
            assert {type(x) for x in outcomes(*(({"a": x}, None) for x in said))} == {RanksDisagree}


def test_faults_of_some():
    fault = TypeError("no")
    found = outcomes(({"a": "1"}, None), ({}, fault), ({"a": "3"}, None))
    want = "rank 1: TypeError: no; the other ranks found nothing; nothing was changed on any rank"
    assert [str(x) for x in found] == [want] * 3
    assert {type(x) for x in found} == {RanksDisagree}
    assert [x.__cause__ for x in found] == [None, fault, None]


def test_faults_of_all():
    same = outcomes(*(({}, ValueError("no")) for _ in range(3)))
    assert [(type(x), str(x), x.__cause__) for x in same] == [(ValueError, "no", None)] * 3
    differ = outcomes(({}, ValueError("no")), ({}, TypeError("no")))
    assert {str(x) for x in differ} == {
        "rank 0: ValueError: no; rank 1: TypeError: no; nothing was changed on any rank"
    }
    assert {type(x) for x in differ} == {RanksDisagree}


def test_what_may_have_changed_something_says_so_itself():
    found = outcomes(({}, None), ({}, RuntimeError("a device failed")))
    assert {(type(x), str(x)) for x in found} == {
        (RuntimeError, "rank 1: RuntimeError: a device failed; the other ranks found nothing")
    }
