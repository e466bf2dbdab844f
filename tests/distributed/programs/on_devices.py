"""What ranks do with parameters on devices: ``python -m mpi4py on_devices.py NAME ...`` runs these functions.

Each rank has its own device if there are enough. The twin is one process that steps over host memory.
"""

import json
import os
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

from mpi4py import MPI

COMM = MPI.COMM_WORLD
RANK, RANKS = COMM.rank, COMM.size
FOLDER = Path(COMM.bcast(tempfile.mkdtemp() if RANK == 0 else None))
STATISTICS = FOLDER / f"launches{RANK}.jsonl"
if "VGPU_LAZY" in os.environ or "VGPU_DEVICES" in os.environ:
    os.environ["VGPU_STATS"] = str(STATISTICS)  # before CUDA is initialised

import cupy  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
from nccl_stand_in import StandIn, is_held  # noqa: E402

from rmsprop_gpu import AdaGrad, RMSProp  # noqa: E402
from rmsprop_gpu.distributed import RanksDisagree, ShardedAdaGrad, ShardedRMSProp  # noqa: E402
from rmsprop_gpu.extras import MissingExtraError  # noqa: E402

F4, F8, F2, BF = np.float32, np.float64, np.float16, ml_dtypes.bfloat16
# Two float32 parameters that several ranks share, one with fewer elements than ranks, an empty one, and other dtypes.
SHAPES = {
    "a": ((3,), F4),
    "b": ((100, 77), F4),
    "c": ((5000,), F2),
    "d": ((), F8),
    "e": ((0, 4), F4),
    "f": ((9000, 3), BF),
    "g": ((1,), F4),
    "h": ((6, 2000), F4),
}
SINGLE = {name: x for name, x in SHAPES.items() if x[1] is F4}
ALL = {"skip_nonfinite": True, "use_ema": True, "bias_correction": True, "global_clipnorm": 0.7, "momentum": 0.83}
NORM = {"momentum": 0.83, "global_clipnorm": 0.7}
CLIPPED = {"clipnorm": 0.5, "centered": True, "weight_decay": 0.07}
KINDS = "step", "bias_weight", "square_avg", "sum", "grad_avg", "momentum_buffer", "ema"
DEVICE = RANK % cupy.cuda.runtime.getDeviceCount()
cupy.cuda.Device(DEVICE).use()


def draw(seed, shapes, scale=1.0):
    rng = np.random.default_rng(seed)
    return {k: np.asarray(scale * rng.standard_normal(shape)).astype(dtype) for k, (shape, dtype) in shapes.items()}


def there(arrays):
    return {k: None if x is None else cupy.array(x) for k, x in arrays.items()}


def total(grads):
    """The sum in rank order. Halves are summed in float32 and rounded once."""
    (dtype,) = {x.dtype for x in grads if x is not None} or {None}
    if dtype is None:
        return None
    compute = F8 if dtype == F8 else F4
    given = next(x for x in grads if x is not None)
    found = None
    for x in grads:
        addend = np.zeros(given.shape, compute) if x is None else x.astype(compute)
        found = addend if found is None else found + addend
    return np.asarray(found).astype(dtype)


def wait_for_all():
    """A barrier that leaves the processor to the ranks still at work."""
    barrier = COMM.Ibarrier()
    while not barrier.Test():
        time.sleep(0.01)


class Twins:
    """A sharded optimizer on devices, and a single process on the host that takes the same steps."""

    def __init__(self, given, shapes=SHAPES, adagrad=False, **sharded):
        self.shapes, self.host = shapes, draw(0, shapes)
        self.params = there(self.host)
        if RANK == 0:  # compiles, so that the others find the kernels on disk
            for params in self.params, self.host:
                (AdaGrad if adagrad else RMSProp)(params, **given).compile(grad_scale=RANKS > 1)
        wait_for_all()
        sharded = {"nccl": StandIn(COMM), **sharded}
        self.opt = (ShardedAdaGrad if adagrad else ShardedRMSProp)(self.params, COMM, **sharded, **given)
        self.twin = (AdaGrad if adagrad else RMSProp)(self.host, **given)
        self.averages = sharded.get("average", True)

    def grads(self, t):
        return [draw([7, t, rank], self.shapes, 10) for rank in range(RANKS)]

    def step(self, grads, *, mine=None, scale=None, scale_of=lambda x: x, found=None, found_of=None, zero_grads=False):
        """Step with all ranks' gradients. `mine` are ours in another form, `found` is what any rank reports."""
        mine = there(grads[RANK]) if mine is None else mine
        told = {} if found is None else {"found_inf": found_of}
        told |= {} if scale is None else {"grad_scale": scale_of(scale)}
        self.opt.step(mine, zero_grads=zero_grads, **told)
        whole = {k: total([g[k] for g in grads]) for k in self.shapes}
        factor = (1.0 if scale is None else float(scale)) * (RANKS if self.averages else 1)
        self.twin.step(whole, grad_scale=None if factor == 1 else factor, found_inf=found)
        return mine

    def check(self):
        for k, x in self.params.items():
            assert x.get().tobytes() == self.host[k].tobytes(), f"{k} on rank {RANK}"
        for kind in KINDS:
            if any(kind in state for state in self.twin.state.values()):
                whole = self.opt.gather(kind)
                for k, x in whole.items():
                    want = self.twin.state[k][kind]
                    assert isinstance(x, cupy.ndarray)
                    assert (x.dtype, x.shape, x.get().tobytes()) == (want.dtype, want.shape, want.tobytes()), (k, kind)
        norms = self.opt.last_grad_norm, self.twin.last_grad_norm
        assert np.array_equal(*norms, equal_nan=True), norms
        assert (self.opt.skipped_steps, self.opt.steps) == (self.twin.skipped_steps, self.twin.steps)


def raised(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError(f"nothing was refused on rank {RANK}")


def on_all(call, kind, *texts):
    """Every rank raises the same error."""
    error = raised(call)
    assert type(error) is kind, f"{type(error)}: {error}"
    assert len(set(COMM.allgather(str(error)))) == 1, error
    for text in texts:
        assert text in str(error), error


# The functions to run


def bits():
    """Switches, dtypes, buckets, missing gradients, a NaN on one rank."""
    two = {k: SHAPES[k] for k in "bch"}  # so that few kernels are compiled
    for given, shapes, bucket in (ALL, SHAPES, None), (ALL, SHAPES, 30_000), (CLIPPED, two, 30_000), ({}, SINGLE, 4096):
        twins = Twins(given, shapes, bucket_bytes=bucket, adagrad=not given)
        for t in range(4):
            grads = twins.grads(t)
            if t == 1:
                for k in "bfd":
                    if k in shapes:
                        grads[-(k != "b")][k] = None
                for x in grads:
                    x["h"] = None
            if t == 2 and given is ALL:
                grads[-1]["f"][8999, 1] = np.nan
            if t == 3:
                grads[-1] = dict.fromkeys(shapes)
            twins.step(grads)
            twins.check()
        assert twins.twin.skipped_steps == (given is ALL)
        assert "reduce_scatter" in twins.opt._nccl.calls


def told():
    """`grad_scale`, `found_inf` and `zero_grads`, as numbers and on the device, on one rank or all."""
    twins = Twins({"momentum": 0.83}, SINGLE)
    number = cupy.asarray
    for scale, scale_of in (
        (1024.0, lambda x: x),
        (1 / 3, lambda x: number(x, F8)),
        (F4(0.001), number),  # three times this is not exact in float32
        (Fraction(5, 2), lambda x: x),
    ):
        twins.step(twins.grads(1), scale=scale, scale_of=scale_of)
        twins.check()
    steps = twins.twin.skipped_steps
    last = RANK == RANKS - 1
    for found, found_of in (
        (True, number(np.float32(np.nan)) if last else None),
        (True, number(True) if last else number(False)),
        (True, True if last else number(0, np.int32)),
        (True, Fraction(1, 3) if last else None),
        (False, number(0.0) if last else None),
        (False, False if last else number(0)),
        (False, 0),
    ):
        twins.step(twins.grads(2), found=found, found_of=found_of)
        twins.check()
        twins.step(twins.grads(3))
        twins.check()
    assert twins.twin.skipped_steps == steps + 4
    average = Twins({"momentum": 0.83}, SINGLE, average=False)
    average.step(average.grads(1))
    average.check()


def zeros():
    """Zeroing gradients with their parameters' layout, another layout, or a narrower dtype."""
    twins = Twins({"momentum": 0.83}, SINGLE, bucket_bytes=20_000)
    for t, zero_grads in enumerate((True, False, True)):
        grads = twins.grads(t)
        narrow = [g["h"].astype(F2) for g in grads]
        for g, x in zip(grads, narrow, strict=True):
            g["h"] = x.astype(F4)
        mine = there(grads[RANK])
        mine["b"] = cupy.asarray(mine["b"], order="F")
        mine["h"] = cupy.asarray(narrow[RANK])[::-1].copy()[::-1]
        before = {k: x.copy() for k, x in mine.items()}
        twins.step(grads, mine=mine, zero_grads=zero_grads)
        for k, x in mine.items():
            assert (x.get() == (0 if zero_grads else before[k].get())).all(), k
        twins.check()


def streams():
    """Gradients computed on a stream are used in order, and later work on that stream sees the gathered parameters."""
    twins = Twins(NORM, SINGLE, bucket_bytes=20_000)
    cupy.cuda.Device().synchronize()
    mine = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    for t in range(4):
        grads = twins.grads(t)
        with mine[t % 2] as stream:
            ours = there(grads[RANK])
            twins.step(grads, mine={k: x * 1 for k, x in ours.items()})  # freed at once
            seen = {k: x.copy() for k, x in twins.params.items()}
            other = [cupy.full(5000, np.nan, F4) for _ in range(5)]  # reuses freed memory
            stream.synchronize()
        assert len(other) == 5
        for k, x in seen.items():
            assert x.get(stream=stream).tobytes() == twins.host[k].tobytes(), (t, k)
    with mine[1]:
        twins.check()
    grads = twins.grads(4)
    ours = there(grads[RANK])
    cupy.cuda.Device().synchronize()
    with mine[0]:
        twins.step(grads, mine=ours)
    with mine[1], cupy.cuda.Device(0):  # whichever device is current
        whole = twins.opt.gather("momentum_buffer")
        for k, x in whole.items():
            with cupy.cuda.Device(DEVICE):
                assert x.get().tobytes() == twins.twin.state[k]["momentum_buffer"].tobytes(), k
    grads = twins.grads(5)
    ours, scale, found = there(grads[RANK]), cupy.asarray(2.0), cupy.asarray(False)
    with cupy.cuda.Device(0):
        twins.step(grads, mine=ours, scale=2.0, scale_of=lambda x: scale, found=False, found_of=found)
    cupy.cuda.Device().synchronize()
    twins.check()


def files():
    """Saved by all ranks and loaded by them, by one process on a device or on the host, and the other way around."""
    given = {**ALL, "lr": 0.01}
    twins = Twins(given, bucket_bytes=30_000)
    for t in range(2):
        twins.step(twins.grads(t))
    folder, one = FOLDER / "all", FOLDER / f"one{RANK}.safetensors"
    twins.opt.save(folder)
    twins.twin.save(one)
    want = twins.twin.state
    for place in (there, lambda arrays: arrays):
        plain = RMSProp(place(draw(0, SHAPES)), **given)
        plain.load(folder)
        assert (plain.steps, plain.skipped_steps) == (twins.twin.steps, twins.twin.skipped_steps)
        for k, state in plain.state.items():
            for kind, x in state.items():
                assert (x.get() if place is there else x).tobytes() == want[k][kind].tobytes(), (k, kind)
    for path in (folder, one):
        again = Twins(given, bucket_bytes=None)
        again.opt.load(path)
        again.twin.load(one)
        for k, x in twins.host.items():
            again.host[k][...] = x
            again.params[k][...] = cupy.asarray(x)
        again.check()
        again.step(again.grads(5))
        again.check()


def one_rank():
    """A single rank packs nothing and needs no NCCL."""
    twins = Twins(ALL, SINGLE, nccl=None)
    for t in range(2):
        twins.step(twins.grads(t))
        twins.check()
    assert not hasattr(twins.opt, "_transport")


def refused():
    """The same error on all ranks, and no byte changed."""
    twins = Twins({"momentum": 0.83}, SINGLE)
    grads = there(twins.grads(0)[RANK])
    twins.step(twins.grads(0))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    for ranks in range(RANKS), [0]:
        with stream:
            if RANK in ranks:
                stream.begin_capture()
            on_all(lambda: twins.opt.step(grads), RuntimeError, "captured in a CUDA graph")
            if RANK in ranks:
                stream.end_capture()
    bad = {**grads, "b": grads["b"].get()} if RANK == 0 else grads
    on_all(lambda: twins.opt.step(bad), RanksDisagree, 'grads["b"]', "rank 0", "nothing was changed")
    mine = cupy.asarray(2.0) if RANK == 0 else 2.0
    on_all(lambda: twins.opt.step(grads, grad_scale=mine), RanksDisagree, "grad_scale is 2.0 on rank 1")
    twins.check()
    nccl = StandIn(COMM)
    nccl.nranks += RANK == 0
    build = lambda params, **given: ShardedRMSProp(params, COMM, **given)  # noqa: E731
    on_all(lambda: build(twins.params, nccl=nccl), RanksDisagree, f"nccl has rank 0 of {RANKS + 1}")
    odd = {"w": cupy.ones((4, 6), F4).T}
    on_all(lambda: build(odd, nccl=StandIn(COMM)), ValueError, 'params["w"] is not C-contiguous')
    if cupy.cuda.runtime.getDeviceCount() > 1:
        params = []
        for device in range(2):
            with cupy.cuda.Device(device):
                params.append(cupy.ones(5, F4))
        on_all(lambda: build(params, nccl=StandIn(COMM)), ValueError, "are on devices [0, 1]; wanted one device")
    sys.modules["nccl"] = None  # type: ignore[assignment]
    on_all(lambda: build(twins.params), MissingExtraError, "extra nccl")
    place = twins.params if RANK == 0 else draw(0, SINGLE)
    on_all(lambda: build(place), RanksDisagree, "rank 0: MissingExtraError", "the other ranks found nothing")
    del sys.modules["nccl"]


def fails():
    """NCCL fails. By the next step at the latest, all ranks report that the optimizer is between two steps."""
    twins = Twins({"momentum": 0.83}, SINGLE)
    nccl, folder = twins.opt._nccl, FOLDER / "before"
    twins.step(twins.grads(0))
    twins.opt.save(folder)
    grads = there(twins.grads(1)[RANK])
    nccl.failed = 3 * (RANK == 1)
    on_all(lambda: twins.opt.step(grads), RuntimeError, "rank 1: ", "NCCL has failed (3)", "between two steps")
    nccl.failed = 0
    twins.step(twins.grads(1))
    twins.check()
    working = nccl.allgather

    class OddError(Exception):
        """Like NCCL's, not derived from any known class."""

    def failing(*args, **kwargs):
        working(*args, **kwargs)
        if RANK == 0:
            raise OddError("unhandled system error")

    nccl.allgather = failing
    if RANK == 0:
        error = raised(lambda: twins.opt.step(grads))
        assert type(error) is RuntimeError
        assert "OddError: unhandled system error" in str(error)
        assert "between two steps" in str(error)
    else:
        twins.opt.step(grads)
    nccl.allgather = working
    on_all(lambda: twins.opt.step(grads), RuntimeError, "rank 0: ", "between two steps")
    on_all(lambda: twins.opt.save(FOLDER / "not"), RuntimeError, "between two steps")
    twins.opt.load(folder)
    twins.opt.step(grads)


def connects():
    """By default, a communicator is made from rank 0's id, once for all optimizers of the ranks."""
    import types

    made, ready = [], StandIn(COMM)

    class UniqueId:
        def __init__(self, text):
            self.text = text

        def __bytes__(self):
            return self.text

        @staticmethod
        def from_bytes(text):
            return UniqueId(text)

    class Communicator:
        @staticmethod
        def init(nranks, rank, unique_id):
            assert (nranks, rank, bytes(unique_id)) == (RANKS, RANK, b"of rank 0")
            assert cupy.cuda.runtime.getDevice() == DEVICE
            if core.fails == RANK:
                raise OSError("no NCCL here")
            made.append(ready)
            return ready

    def unique_id():
        if core.fails == "id":
            raise OSError("no network")
        return UniqueId(b"of rank %d" % RANK)

    core = types.ModuleType("nccl.core")
    core.UniqueId, core.Communicator, core.get_unique_id = UniqueId, Communicator, unique_id
    nccl = types.ModuleType("nccl")
    nccl.core = core
    sys.modules |= {"nccl": nccl, "nccl.core": core}
    for core.fails, text in ("id", "OSError: no network"), (1, "OSError: no NCCL here"):
        on_all(lambda: Twins({}, SINGLE, nccl=None), RuntimeError, f"rank {0 if core.fails == 'id' else 1}: ", text)
    core.fails = None
    given = ready if RANK == 0 else None
    text = "nccl is None on rank 1 and a communicator on rank 0"
    on_all(lambda: Twins({}, SINGLE, nccl=given), RanksDisagree, text)
    del made[:]
    for _ in range(2):
        twins = Twins({"momentum": 0.83}, SINGLE, nccl=None)
        twins.step(twins.grads(0))
        twins.check()
    assert len(made) == 1


def deaf():
    """If the communication stream does not wait for packing, or is not waited for, the bits differ."""

    class Deaf:
        def __init__(self, stream):
            self.ptr = stream.ptr
            self._stream = stream

        def wait_event(self, event):
            pass

    for side in "start", "end":
        twins = Twins({"momentum": 0.83}, SINGLE, bucket_bytes=20_000)
        engine = twins.opt._engine
        if side == "start":
            engine._stream = Deaf(engine._stream)
        else:
            engine.wait = lambda started: None
        same = True
        for t in range(3):
            twins.step(twins.grads(t))
            try:
                twins.check()
            except AssertionError:
                same = False
            COMM.barrier()
        if not all(COMM.allgather(same)) and RANK == 0:
            print(side, "noticed", flush=True)


def launched():
    """The names of the kernels that a virtual device ran for this rank."""
    return [json.loads(line)["kernel"] for line in STATISTICS.read_text().splitlines()] if STATISTICS.exists() else []


def launches():
    """Three launches per bucket and step, and two where partial sums are exchanged."""
    for given, bucket, exchanged in ({"momentum": 0.83}, 20_000, 0), (NORM, None, 2):
        twins = Twins(given, SINGLE, bucket_bytes=bucket)
        grads = there(twins.grads(0)[RANK])
        twins.opt.step(grads)
        cupy.cuda.Device().synchronize()
        before = len(launched())
        twins.opt.step(grads)
        cupy.cuda.Device().synchronize()
        found = launched()[before:]
        buckets = [cuts.pieces for _, cuts in twins.opt._transport._buckets]
        assert len(buckets) == (3 if bucket else 1)
        wanted = sum(1 + bool(some[RANK]) + any(some[:RANK] + some[RANK + 1 :]) for some in buckets)
        assert wanted <= 3 * len(buckets)
        copies = [name for name in found if "copies_kernel" in name]
        assert len(copies) == wanted + exchanged, (len(copies), wanted)
        assert len(found) == len(copies) + (3 if exchanged else 2), found  # the average is in the prepare kernel


class Mute(StandIn):
    """Sends nothing and waits for nothing."""

    def reduce_scatter(self, sendbuf, recvbuf, op, *, stream):
        self.calls.append("reduce_scatter")

    def allgather(self, sendbuf, recvbuf, *, stream):
        self.calls.append("allgather")


def waits():
    """If work is deferred as long as possible, a step does none of it: the host does not wait."""
    twins = Twins(NORM, SINGLE, bucket_bytes=20_000, nccl=Mute(COMM))
    grads = there(twins.grads(0)[RANK])
    told = {"grad_scale": cupy.asarray(2.0), "found_inf": cupy.asarray(False)}
    for _ in range(2):
        twins.opt.step(grads, **told)
    cupy.cuda.Device().synchronize()
    before = len(launched())
    for _ in range(3):
        twins.opt.step(grads, **told)
    assert len(launched()) == before
    cupy.cuda.Device().synchronize()
    assert len(launched()) > before + 30


def behind():
    """A step returns even though earlier work on the stream has not ended, whatever its arguments on the device."""
    twins = Twins(NORM, SINGLE, bucket_bytes=20_000, nccl=Mute(COMM))
    told = {"grad_scale": cupy.asarray(2.0), "found_inf": cupy.asarray(False)}
    several = [there(twins.grads(t)[RANK]) for t in range(3)]
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()

    def steps():
        for zero_grads in False, True:
            for grads in several:
                twins.opt.step(grads, zero_grads=zero_grads, **told)

    with stream:
        assert is_held(stream, steps), "the host waited for the device"


if __name__ == "__main__":
    names = sys.argv[1:]
    if "--no-pool" in names:
        names.remove("--no-pool")
        cupy.cuda.set_allocator(None)
    for name in names:
        globals()[name]()
        COMM.barrier()
        if RANK == 0:
            print(name, "done", flush=True)
