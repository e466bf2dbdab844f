"""Copies between tensors and a bucket: exact, touching nothing else, in one call or launch."""

import numpy as np
import pytest
from devices import two
from processes import counted, run

from rmsprop_gpu.arrays.layout import pointer_of
from rmsprop_gpu.kernels import cpu_drive
from rmsprop_gpu.steps.copies import DeviceCopies, HostCopies

LINE = 64  # bytes: the least gap between two tensors, which no copy may touch
KINDS = ["pack", "pack and zero", "unpack"]
ITEMSIZES = [2, 4, 8]
SIZES = [1, 0, 7, 64, 65, 8, 1000, 0, 4097, 3, 20_000]
MANY = [256] * 3000


class Copied:
    """Tensors and a bucket in one block of random bytes, and copies of all elements between them.

    Tensors begin `shift` elements after a line, the bucket `bucket_shift`. `heads` leaves out that many elements at the
    start of each tensor.
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

    def by(self, xp, kind):
        """The memory after the copies, made where this library's arrays live."""
        memory = xp.zeros(len(self.before) + LINE, np.uint8)
        memory = memory[-pointer_of(memory) % LINE :][: len(self.before)]
        memory[:] = xp.asarray(self.before)
        copies = copies_of(xp, self.rows(pointer_of(memory)), self.itemsize, kind)
        copies(self.column(pointer_of(memory)))
        return memory.tobytes()

    def rows(self, start):
        numbers = np.arange(len(self.lengths))
        offsets = np.full_like(numbers, self.offset)
        return np.stack([numbers, offsets, start + self.bucket, self.lengths // self.itemsize], axis=1)

    def column(self, start):
        column = start + self.tensors
        column[self.missing] = 0
        return column

    def wanted(self, kind):
        """The memory after the copies, computed with slices of bytes."""
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
        return memory.tobytes()


def copies_of(xp, rows, itemsize, kind):
    """The copies of these rows, for arrays of this library."""
    if xp is np:
        return HostCopies(np.array(rows), itemsize, kind)
    return DeviceCopies(np.array(rows), itemsize, kind, 0, order_of(0))


def order_of(*devices):
    from rmsprop_gpu.steps.order import Order

    return Order(devices)


def column_of(*arrays):
    return np.array([0 if x is None else pointer_of(x) for x in arrays])


def check(copied, kind, xp=np):
    assert copied.by(xp, kind) == copied.wanted(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_all_bits_are_copied_and_no_others(itemsize, kind, xp):
    copied = Copied(SIZES, itemsize)
    assert np.isnan(copied.before[: len(copied.before) // 8 * 8].view(f"f{itemsize}")).any()
    check(copied, kind, xp)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shift", "bucket_shift", "heads"), [(1, 0, 0), (0, 1, 0), (3, 3, 0), (0, 0, 1), (0, 5, 4)])
@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_addresses_are_aligned_to_elements_alone(itemsize, shift, bucket_shift, heads, kind, xp):
    check(Copied(SIZES, itemsize, shift=shift, bucket_shift=bucket_shift, heads=heads), kind, xp)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_is_not_there_is_packed_as_zeros(kind, xp):
    check(Copied(SIZES, 4, missing=[0, 1, 6, 10], heads=1), kind, xp)
    check(Copied(SIZES, 2, missing=range(len(SIZES))), kind, xp)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[0], [0, 0, 0], MANY], ids=["empty", "all empty", "many"])
def test_tensors_may_be_empty_or_many(sizes, kind, xp):
    check(Copied(sizes, 4), kind, xp)


def test_there_may_be_no_rows(xp):
    copies_of(xp, np.empty((0, 4), np.int64), 4, "pack")(np.empty(0, np.int64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_may_be_copied_in_pieces(kind, xp):
    """In any order. The rest of the bucket stays untouched."""
    tensor, bucket = xp.arange(10), -xp.arange(12)
    rows = [(1, 40, pointer_of(bucket), 5), (1, 0, pointer_of(bucket) + 48, 4)]
    copies_of(xp, rows, 8, kind)(column_of(None, tensor))
    if kind == "unpack":
        assert tensor.tolist() == [-6, -7, -8, -9, 4, 0, -1, -2, -3, -4]
        assert bucket.tolist() == (-np.arange(12)).tolist()
    else:
        assert bucket.tolist() == [5, 6, 7, 8, 9, -5, 0, 1, 2, 3, -10, -11]
        assert tensor.tolist() == ([0, 0, 0, 0, 4, 0, 0, 0, 0, 0] if "zero" in kind else list(range(10)))


def test_the_column_may_be_another_each_time(xp):
    """Or the same column with other addresses in it."""
    tensors, bucket = [xp.full(3, 1), xp.full(3, 2), xp.full(3, 3)], xp.full(3, 9)
    columns = list(map(column_of, tensors))
    copies = copies_of(xp, [(0, 0, pointer_of(bucket), 3)], 8, "pack")
    for number in (0, 1, 1, 0):
        copies(columns[number])
        assert bucket.tolist() == [number + 1] * 3
    columns[0][:] = columns[2]
    copies(columns[0])
    assert bucket.tolist() == [3, 3, 3]


def test_a_column_may_be_longer_than_the_rows_ask(xp):
    tensor, bucket = xp.full(3, 1), xp.full(3, 9)
    copies_of(xp, [(1, 0, pointer_of(bucket), 3)], 8, "pack")(column_of(None, tensor, *[None] * 1000))
    assert bucket.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [MANY, [200_000, 0, 5, 300_000]], ids=["many", "large"])
def test_threads_share_it_equally(sizes, kind, monkeypatch):
    asked, shares = [], cpu_drive.shares
    monkeypatch.setattr(cpu_drive, "shares", lambda *a: asked.append(a[1:]) or shares(*a))
    monkeypatch.setattr(cpu_drive, "get_num_threads", lambda: 7)
    check(Copied(sizes, 4, missing=[1]), kind)
    assert asked == [(7, cpu_drive.UNIT)]


def test_all_is_one_call(monkeypatch):
    """Between two calls, Ctrl-C would get through."""
    calls = []

    def counted(drive):
        return lambda *arguments: calls.append(1) or drive(*arguments)

    serial, parallel = cpu_drive._drivers()
    monkeypatch.setattr(cpu_drive, "_drivers", lambda: (counted(serial), counted(parallel)))
    check(Copied(SIZES, 4), "pack and zero")
    check(Copied(MANY, 4), "pack and zero")
    assert calls == [1, 1]


def test_no_cuda_is_imported_for_the_host():
    code = """
import sys
import numpy as np
from rmsprop_gpu.steps.copies import DeviceCopies, HostCopies
x, y = np.ones(3), np.zeros(3)
HostCopies(np.array([(0, 0, y.ctypes.data, 3)]), 8, "pack")(np.array([x.ctypes.data]))
names = "cupy", "numba_cuda", "numba.cuda.cudadrv"
print(y.sum(), [m for m in sys.modules if any(m == name or m.startswith(f"{name}.") for name in names)])
"""
    assert run(code) == "3.0 []"


# Packs and unpacks 3,000 tensors of 256 elements on a device, and then a large one beside an empty one.
MANY_COPIES = """
import cupy, numpy as np
from rmsprop_gpu.steps.copies import DeviceCopies
from rmsprop_gpu.steps.order import Order
order = Order([0])
for sizes in ([256] * 3000, [1 << 18, 0]):
    n, ends = len(sizes), 4 * np.cumsum(sizes)
    tensors, bucket = [cupy.zeros(size, np.float32) for size in sizes], cupy.zeros(sum(sizes), np.float32)
    rows = np.stack([np.arange(n), np.zeros(n, int), bucket.data.ptr + ends - 4 * np.array(sizes), sizes], axis=1)
    column = np.array([x.data.ptr for x in tensors])
    for kind in ("pack", "pack and zero", "unpack"):
        DeviceCopies(rows, 4, kind, 0, order)(column)
cupy.cuda.Device().synchronize()
"""


@pytest.mark.gpu
def test_all_is_one_launch_in_which_each_byte_is_moved_once(tmp_path, request):
    """In whole sectors of 32 bytes, 16 bytes per thread. Apart from that, each warp reads its chunk and an address."""
    _, ours = counted(MANY_COPIES, tmp_path, request)
    assert len(ours) == 6
    for k, launch in enumerate(ours):
        nbytes, blocks = ((3000 * 1024, 3000), (1 << 20, 256))[k // 3]
        written = nbytes * (2 if k % 3 == 1 else 1)
        assert launch["grid"] == [blocks, 1, 1]
        assert launch["store_bytes"] == launch["dram_write_bytes"] == 32 * launch["store_sectors"] == written
        assert launch["store_requests"] == written // (32 * 16)
        assert launch["load_sectors"] == nbytes // 32 + blocks * 8 * (4 + 1)
        assert 0 <= launch["dram_read_bytes"] - nbytes <= blocks * (32 + 8) + 32


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [64, 16, 1 << 16])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_may_have_any_size(kind, chunk, monkeypatch):
    import cupy

    from rmsprop_gpu.kernels import cuda_copies

    monkeypatch.setattr(cuda_copies, "CHUNK", chunk)
    check(Copied(SIZES, 4, missing=[4], shift=1), kind, cupy)
    check(Copied([20_001, 70_000], 2), kind, cupy)


@pytest.fixture
def sent(monkeypatch):
    """A list that grows with each upload."""
    from rmsprop_gpu.steps.on_cupy import CuPy

    sent, upload = [], CuPy.upload
    monkeypatch.setattr(CuPy, "upload", lambda *arguments: sent.append(1) or upload(*arguments))
    return sent


@pytest.mark.gpu
def test_a_column_is_sent_where_it_changed_and_may_change_at_once(sent):
    """Copies that are already enqueued, on whichever stream, still read the old addresses."""
    import cupy

    tensors, bucket = [cupy.full(1000, i) for i in range(8)], cupy.full(1000, -1)
    copies = copies_of(cupy, [(0, 0, pointer_of(bucket), 1000)], 8, "unpack")
    cupy.cuda.Device().synchronize()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(3)]
    sent.clear()
    column = column_of(None)
    for i, tensor in enumerate(tensors):
        with streams[i % 3]:
            column[:] = pointer_of(tensor)
            copies(column)
            copies(column)
    column[:] = 0
    for stream in reversed(streams):
        stream.synchronize()
    assert [set(x.tolist()) for x in tensors] == [{-1}] * 8
    assert len(sent) == 8


@pytest.mark.gpu
@pytest.mark.parametrize("behind", [False, True])
def test_what_is_interrupted_does_not_count_as_sent(behind, monkeypatch):
    """The interrupt comes before the upload, or after it."""
    import cupy

    from rmsprop_gpu.steps.on_cupy import CuPy

    columns = list(map(column_of, tensors := [cupy.full(3, i) for i in range(2)]))
    bucket, upload = cupy.full(3, 9), CuPy.upload
    copies = copies_of(cupy, [(0, 0, pointer_of(bucket), 3)], 8, "pack")
    copies(columns[0])

    def interrupted(*arguments):
        if behind:
            upload(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(CuPy, "upload", interrupted)
    with pytest.raises(KeyboardInterrupt):
        copies(columns[1])
    monkeypatch.undo()
    again = 0 if behind else 1
    copies(columns[again])
    assert bucket.tolist() == tensors[again].tolist()


@pytest.mark.gpu
def test_copies_are_work_of_the_current_stream():
    """They run after the work already on the stream, and before what follows."""
    import cupy

    tensor, bucket = cupy.full(1000, 0), cupy.full(1000, 9)
    copies, column = copies_of(cupy, [(0, 0, pointer_of(bucket), 1000)], 8, "pack"), column_of(tensor)
    cupy.cuda.Device().synchronize()
    for i in range(4):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            tensor += 1
            copies(column)
            assert set(bucket.get(stream=stream, blocking=True).tolist()) == {i + 1}


@two
@pytest.mark.gpu
def test_copies_are_made_on_their_device():
    """Whichever device is current, and it stays current."""
    import cupy

    for device in (1, 0):
        with cupy.cuda.Device(device):
            tensor, bucket = cupy.full(3, 1), cupy.full(3, 9)
        rows = np.array([(0, 0, pointer_of(bucket), 3)])
        copies = DeviceCopies(rows, 8, "pack", device, order_of(0, 1))
        copies(column_of(tensor))
        assert cupy.cuda.Device().id == 0
        assert bucket.tolist() == [1, 1, 1]
