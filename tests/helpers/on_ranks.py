"""Building blocks of programs on several ranks: every rank's gradients, a single process doing the same, refusals."""

import sys
from contextlib import contextmanager

import ml_dtypes
import numpy as np
from mpi4py import MPI

from rmsprop_gpu import AdaGrad, RMSProp
from rmsprop_gpu.distributed import ShardedAdaGrad, ShardedRMSProp

WORLD = MPI.COMM_WORLD
F16, F32, F64, BF16 = np.float16, np.float32, np.float64, ml_dtypes.bfloat16
ONE_BUCKET = 1 << 30
PLAIN = {ShardedRMSProp: RMSProp, ShardedAdaGrad: AdaGrad}

# Smaller than a block of norms, and spanning several; 0-d; without elements; with fewer elements than ranks.
SHAPES = {"w": (3,), "m": (70, 77), "b": (5000,), "s": (), "e": (0, 4), "big": (9000, 3), "one": (1,)}
DTYPES = dict.fromkeys(SHAPES, F32) | {"b": F64, "s": F64}
HALVES = DTYPES | {"m": F16, "big": BF16, "one": F16}


def drawn(seed, shapes=SHAPES, dtypes=DTYPES):
    """Arrays over four decades, the same on every rank."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 1, shape)
        found[name] = np.asarray(x).astype(dtypes[name])
    return found


def grads(step, comm=WORLD, shapes=SHAPES, dtypes=DTYPES):
    """Every rank's gradients in a step."""
    return [drawn((step, rank), shapes, dtypes) for rank in range(comm.size)]


def added(given, like):
    """The sum of the gradients of a parameter, in rank order; None if no rank has one."""
    if all(x is None for x in given):
        return None
    wide = F64 if like.dtype == F64 else F32
    with np.errstate(all="ignore"):
        total = np.zeros(like.shape, wide) if given[0] is None else given[0].astype(wide)
        for x in given[1:]:
            total = np.asarray(total + (np.zeros(like.shape, wide) if x is None else x.astype(wide)))
        return total.astype(like.dtype)


def flat(params):
    """Arrays by name, from a mapping or from groups."""
    return params if isinstance(params, dict) else {k: x for group in params for k, x in group["params"].items()}


class Twins:
    """A sharded optimizer, and one in a single process that does the same with the sums of all gradients.

    `make` returns the parameters, in any structure of mappings and groups, with new arrays at every call.
    """

    def __init__(self, make=drawn, kind=ShardedRMSProp, comm=WORLD, bucket_bytes=30_000, average=True, **hypers):
        make = make if make is not drawn else lambda: drawn(1)
        self.comm, self.average = comm, average
        self.params, self.wanted = make(), make()
        self.opt = kind(self.params, comm, bucket_bytes=bucket_bytes, average=average, **hypers)
        self.twin = PLAIN[kind](self.wanted, **hypers)

    def step(self, of_ranks, grad_scale=None, found_inf=None, **given):
        """Take a step with both; `found_inf` is a list with one value per rank."""
        mine = of_ranks[self.comm.rank]
        total = {k: added([g[k] for g in of_ranks], x) for k, x in flat(self.wanted).items()}
        said = None if found_inf is None else found_inf[self.comm.rank]
        any_inf = None if found_inf is None else any(x is not None and bool(np.any(x != 0)) for x in found_inf)
        scale = grad_scale
        if self.average:
            scale = self.comm.size * (1 if grad_scale is None else float(np.asarray(grad_scale).reshape(())))
        self.opt.step(mine, grad_scale=grad_scale, found_inf=said, **given)
        self.twin.step(total, grad_scale=scale, found_inf=any_inf)

    def same(self):
        """Parameters, all state, norms and counts are bit-identical to those of a single process."""
        opt, twin = self.opt, self.twin
        for (k, x), y in zip(flat(self.params).items(), flat(self.wanted).values(), strict=True):
            same_bytes(k, x, y)
        assert (opt.steps, opt.skipped_steps) == (twin.steps, twin.skipped_steps)
        assert np.float64(opt.last_grad_norm).tobytes() == np.float64(twin.last_grad_norm).tobytes()
        kinds = {kind for key in twin.state for kind in twin.state[key]}
        for kind in sorted(kinds):
            got = opt.gather(kind)
            assert list(got) == [key for key in twin.state if kind in twin.state[key]]
            for key, x in got.items():
                same_bytes((key, kind), x, twin.state[key][kind])
        for name, state in opt.state.items():
            key, _, span = name.rpartition("[")
            start, stop = map(int, span[:-1].split(":"))
            for kind, x in state.items():
                y = twin.state[key][kind]
                same_bytes((name, kind), x, y.reshape(-1)[start:stop] if x.ndim else y)


def same_bytes(what, got, want):
    """Two arrays are equal, byte for byte."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    assert got.tobytes() == want.tobytes(), (what, "rank", WORLD.rank)


def content(opt, *arrays):
    """Everything that a refusal must not change."""
    state = {name: {kind: x.tobytes() for kind, x in kinds.items()} for name, kinds in opt.state.items()} if opt else 0
    counts = (opt.steps, opt.skipped_steps) if opt else 0
    params = [p.tobytes() for group in opt.param_groups for p in group["params"]] if opt else 0
    return state, counts, params, [x.tobytes() for x in arrays]


@contextmanager
def refused(kind, *texts, opt=None, arrays=(), comm=WORLD):
    """Expect the same error on all ranks, with these texts in it and no changed byte in `opt` or `arrays`."""
    before, found = content(opt, *arrays), None
    try:
        yield
    except Exception as error:
        found = error
    told = comm.allgather(None if found is None else (type(found), str(found)))
    assert len(set(told)) == 1, told
    assert found is not None, "nothing was refused"
    if type(found) is not kind:
        raise found
    for text in texts:
        assert text in str(found), (text, str(found))
    assert content(opt, *arrays) == before


def main(checks):
    """Run the functions called check_..., or those named on the command line. If one fails, all ranks end."""
    named = [f"check_{name}" for name in sys.argv[1:]]
    for name, check in list(checks.items()):
        if name.startswith("check_") and (not named or name in named):
            check()
            WORLD.barrier()
            if WORLD.rank == 0:
                print(name, flush=True)
