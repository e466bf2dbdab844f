"""Copies between tensors and a bucket: all bits, nothing beside them, in one call or launch."""

import numpy as np
import pytest

from rmsprop_gpu.kernels import cpu_drive
from rmsprop_gpu.kernels.cpu_copies import make_copies

LINE = 64  # bytes: at least so many between two tensors, which no copy may touch
KINDS = ["pack", "pack and zero", "unpack"]
ITEMSIZES = [2, 4, 8]
SIZES = [1, 0, 7, 64, 65, 8, 1000, 0, 4097, 3, 20_000]
MANY = [256] * 3000


class Copied:
    """Tensors and a bucket in one memory of random bytes, and copies of all elements between them.

    Tensors begin `shift` elements behind a line, the bucket `bucket_shift`. Of each tensor the first element is left
    out where it has `heads`.
    """

    def __init__(self, sizes, itemsize, missing=(), shift=0, bucket_shift=0, heads=0):
        sizes = np.array(sizes)
        room = -(-sizes * itemsize // LINE) * LINE + 2 * LINE
        self.tensors = LINE + np.cumsum(room) - room + shift * itemsize
        self.lengths = np.maximum(sizes - heads, 0) * itemsize
        self.offset = heads * itemsize
        ends = np.cumsum(self.lengths)
        self.bucket = LINE + int(room.sum()) + ends - self.lengths + bucket_shift * itemsize
        self.itemsize, self.missing = itemsize, list(missing)
        self.before = np.random.default_rng(7).integers(0, 256, self.bucket[-1] + self.lengths[-1] + LINE, np.uint8)

    def on_host(self, make, kind):
        """The memory after the copies, made on the host."""
        memory = np.zeros(len(self.before) + LINE, np.uint8)
        memory = memory[-memory.ctypes.data % LINE :][: len(self.before)]
        memory[:] = self.before
        copies = make(self.rows(memory.ctypes.data), self.itemsize, kind)
        copies(self.column(memory.ctypes.data))
        return memory

    def rows(self, start):
        numbers = np.arange(len(self.lengths))
        offsets = np.full_like(numbers, self.offset)
        return np.stack([numbers, offsets, start + self.bucket, self.lengths // self.itemsize], axis=1)

    def column(self, start):
        column = start + self.tensors
        column[self.missing] = 0
        return column

    def wanted(self, kind):
        """The memory after the copies, by slices of bytes."""
        memory = self.before.copy()
        for i, (tensor, bucket, n) in enumerate(
            zip(self.tensors + self.offset, self.bucket, self.lengths, strict=True)
        ):
            there, here = slice(tensor, tensor + n), slice(bucket, bucket + n)
            if kind == "unpack":
                if i not in self.missing:
                    memory[there] = memory[here]
            else:
                memory[here] = 0 if i in self.missing else memory[there]
                if kind == "pack and zero" and i not in self.missing:
                    memory[there] = 0
        return memory


def check(copied, kind):
    assert np.array_equal(copied.on_host(make_copies, kind), copied.wanted(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_all_bits_are_copied_and_no_others(itemsize, kind):
    copied = Copied(SIZES, itemsize)
    assert np.isnan(copied.before[: len(copied.before) // 8 * 8].view(f"f{itemsize}")).any()
    check(copied, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shift", "bucket_shift", "heads"), [(1, 0, 0), (0, 1, 0), (3, 3, 0), (0, 0, 1), (0, 5, 4)])
@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_addresses_are_aligned_to_elements_alone(itemsize, shift, bucket_shift, heads, kind):
    check(Copied(SIZES, itemsize, shift=shift, bucket_shift=bucket_shift, heads=heads), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_is_not_there_is_packed_as_zeros(kind):
    check(Copied(SIZES, 4, missing=[0, 1, 6, 10], heads=1), kind)
    check(Copied(SIZES, 2, missing=range(len(SIZES))), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[0], [0, 0, 0], MANY], ids=["empty", "all empty", "many"])
def test_tensors_may_be_empty_or_many(sizes, kind):
    check(Copied(sizes, 4), kind)


def test_there_may_be_no_rows():
    make_copies(np.empty((0, 4), np.int64), 4, "pack")(np.empty(0, np.int64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_may_be_copied_in_pieces(kind):
    """From other buckets too, and in any order."""
    tensor, bucket = np.arange(10), -np.arange(12)
    start = bucket.ctypes.data
    rows = [(1, 40, start, 5), (1, 0, start + 48, 4)]
    make_copies(np.array(rows), 8, kind)(np.array([0, tensor.ctypes.data]))
    if kind == "unpack":
        assert tensor.tolist() == [-6, -7, -8, -9, 4, 0, -1, -2, -3, -4]
        assert bucket.tolist() == (-np.arange(12)).tolist()
    else:
        assert bucket.tolist() == [5, 6, 7, 8, 9, -5, 0, 1, 2, 3, -10, -11]
        assert tensor.tolist() == ([0, 0, 0, 0, 4, 0, 0, 0, 0, 0] if "zero" in kind else list(range(10)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_column_may_be_another_each_time(kind):
    first, second, bucket = np.full(3, 1), np.full(3, 2), np.full(3, 3)
    columns = [np.array([x.ctypes.data]) for x in (first, second)]
    copies = make_copies(np.array([(0, 0, bucket.ctypes.data, 3)]), 8, kind)
    copies(columns[0])
    if kind == "unpack":
        copies(columns[1])
        assert first.tolist() == second.tolist() == [3, 3, 3]
    else:
        assert bucket.tolist() == [1, 1, 1]
        copies(columns[1])
        assert bucket.tolist() == [2, 2, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [MANY, [200_000, 0, 5, 300_000]], ids=["many", "large"])
def test_threads_share_it_equally(sizes, kind, monkeypatch):
    asked, shares = [], cpu_drive.shares
    monkeypatch.setattr(cpu_drive, "shares", lambda *a: asked.append(a[1:]) or shares(*a))
    monkeypatch.setattr(cpu_drive, "get_num_threads", lambda: 7)
    check(Copied(sizes, 4, missing=[1]), kind)
    assert asked == [(7, cpu_drive.UNIT)]


def test_all_is_one_call(monkeypatch):
    """Between two, Ctrl-C would be heard."""
    calls = []

    def counted(drive):
        return lambda *arguments: calls.append(1) or drive(*arguments)

    serial, parallel = cpu_drive._drivers()
    monkeypatch.setattr(cpu_drive, "_drivers", lambda: (counted(serial), counted(parallel)))
    check(Copied(SIZES, 4), "pack and zero")
    check(Copied(MANY, 4), "pack and zero")
    assert calls == [1, 1]
