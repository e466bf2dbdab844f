"""Saved by any number of ranks, loaded by any other, bit-identical. A failure is raised on all, and changes nothing."""

import os
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
from on_ranks import F32, F64, HALVES, SHAPES, WORLD, drawn, main, refused, same_bytes

from rmsprop_gpu import AdaGrad, RMSProp
from rmsprop_gpu.distributed import RanksDisagree, ShardedAdaGrad, ShardedRMSProp
from rmsprop_gpu.state import container, folder, pieces, replacing

RANK, N = WORLD.rank, WORLD.size
LAST = N - 1
ODD = RANK == LAST
FOLDER = Path(os.environ["FOLDER"])  # all ranks share this folder

FULL = {"momentum": 0.9, "centered": True, "use_ema": True, "bias_correction": True, "no_decay": ["one"]}
KINDS = {
    "rmsprop": (ShardedRMSProp, RMSProp, {"weight_decay": 0.1, "skip_nonfinite": True, **FULL}),
    "adagrad": (ShardedAdaGrad, AdaGrad, {"initial_scale": 0.1, "use_ema": True, "clipnorm": 1.0}),
}


def the_first_ranks(count):
    """A communicator of the first `count` ranks. None on the others."""
    comm = WORLD.Split(0 if count > RANK else 1, RANK)
    return comm if count > RANK else None


def alone(plain, hypers, steps, params=None):
    """One process that steps with rank 0's gradients."""
    p = drawn(1, dtypes=HALVES) if params is None else params
    opt = plain(p, **hypers)
    for step in range(steps):
        opt.step(drawn((7, step), dtypes=HALVES))
    return opt, p


def together(kind, hypers, comm, params=None, bucket_bytes=20_000):
    p = drawn(1, dtypes=HALVES) if params is None else params
    return kind(p, comm, bucket_bytes=bucket_bytes, average=False, **hypers), p


def take(opt, comm, step):
    """Only rank 0 has gradients, so that the sum is the same on any number of ranks."""
    mine = drawn((7, step), dtypes=HALVES)
    opt.step(mine if comm.rank == 0 else dict.fromkeys(mine))


def same_state(opt, twin):
    kinds = {kind for key in twin.state for kind in twin.state[key]}
    for kind in sorted(kinds):
        for key, x in opt.gather(kind).items():
            same_bytes((key, kind), x, twin.state[key][kind])
    assert (opt.steps, opt.skipped_steps) == (twin.steps, twin.skipped_steps)


# Any number of ranks


def check_any_number_loads_what_any_other_saved():
    for name, (kind, plain, hypers) in KINDS.items():
        twin, params = alone(plain, hypers, 2)
        later, later_params = alone(plain, hypers, 3)
        if RANK == 0:
            twin.save(FOLDER / f"{name}-one")
        for count in range(1, N + 1):
            comm = the_first_ranks(count)
            if comm is not None:
                opt, _ = together(kind, hypers, comm)
                for step in range(2):
                    take(opt, comm, step)
                opt.save(FOLDER / f"{name}-{count}")
        WORLD.barrier()
        for count in range(1, N + 1):
            comm = the_first_ranks(count)
            for saved in ["one", *range(1, N + 1)] if comm else []:
                p = {k: x.copy() for k, x in params.items()}
                # Built with other hyperparameters and cuts, and with state that has to be replaced.
                opt, _ = together(kind, {**hypers, "lr": 0.5, "weight_decay": 0.3}, comm, p, 10_000 * count)
                assert opt.load(FOLDER / f"{name}-{saved}") == ([], [])
                same_state(opt, twin)
                assert opt.lr == twin.lr
                take(opt, comm, 2)
                same_state(opt, later)
                for k, x in p.items():
                    same_bytes((k, count, saved), x, later_params[k])
        for count in range(1, N + 1):
            p = {k: x.copy() for k, x in params.items()}
            one = plain(p, **hypers)
            one.load(FOLDER / f"{name}-{count}")
            assert {k: {n: x.tobytes() for n, x in s.items()} for k, s in one.state.items()} == {
                k: {n: x.tobytes() for n, x in s.items()} for k, s in twin.state.items()
            }


def check_the_folder_is_one_file_a_rank():
    opt, _ = together(ShardedRMSProp, FULL, WORLD)
    for step in range(2):
        take(opt, WORLD, step)
        opt.save(FOLDER / "a")  # the second save removes the files of the first
    names = sorted(path.name for path in (FOLDER / "a").iterdir())
    assert len(names) == N + 1
    for rank, name in enumerate(names[1:]):
        assert name.startswith("step-00000002-")
        assert name.endswith(f"-rank-{rank:05d}.safetensors")
    sizes = [path.stat().st_size for path in (FOLDER / "a").glob("*.safetensors")]
    assert max(sizes) < 0.75 * sum(sizes)  # each rank writes only its own part


def check_what_is_read():
    """All ranks together read the state once, and no rank reads another's part. Averages are checked before use."""
    if not os.path.exists("/proc/self/io"):
        return
    shapes, dtypes = {"w": (700, 1000), "v": (300_000,)}, {"w": F32, "v": F64}
    for hypers in ({"momentum": 0.9}, {"centered": True}):
        opt = ShardedRMSProp(drawn(1, shapes, dtypes), WORLD, bucket_bytes=1 << 20, **hypers)
        opt.step(drawn(2, shapes, dtypes))
        opt.save(FOLDER / "b")
        opt.load(FOLDER / "b")  # so that imports and first reads are not counted
        WORLD.barrier()
        before = read()
        opt.load(FOLDER / "b")
        mine = read() - before
        own = sum(x.nbytes for state in opt.state.values() for x in state.values())
        size = sum(path.stat().st_size for path in (FOLDER / "b").iterdir())
        averages = sum(x.nbytes for state in opt.state.values() for kind, x in state.items() if kind == "square_avg")
        heads = 40_000 + 2_000 * N
        assert own <= mine <= own + averages + heads, (mine, own, averages)
        assert WORLD.allreduce(mine) <= size + WORLD.allreduce(averages + heads)


def read():
    return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].split()[0])


def check_a_load_that_is_not_strict():
    opt, _ = together(ShardedRMSProp, {}, WORLD)
    take(opt, WORLD, 0)
    opt.save(FOLDER / "c")
    wanted = opt.gather("square_avg")
    p = drawn(5, {"w": (3,), "big": (9000, 3), "new": (5000,)}, HALVES | {"new": F32})
    other = ShardedRMSProp(p, WORLD, lr=0.5, bucket_bytes=20_000)
    with refused(ValueError, '"new" is missing in state_dict', opt=other):
        other.load(FOLDER / "c")
    report = other.load(FOLDER / "c", strict=False)
    assert report == (["new"], [k for k in SHAPES if k not in p])
    got = other.gather("square_avg")
    same_bytes("big", got["big"], wanted["big"])
    same_bytes("w", got["w"], wanted["w"])
    assert not got["new"].any()
    assert (other.lr, other.steps) == (0.5, 1)
    with refused(RanksDisagree, f"strict is False on rank {LAST} and True on rank 0", opt=opt):
        opt.load(FOLDER / "c", strict=not ODD)


def check_schedules_are_given_again():
    opt, _ = together(ShardedRMSProp, {"lr": lambda step: 0.1}, WORLD)
    take(opt, WORLD, 0)
    opt.save(FOLDER / "d")
    again, _ = together(ShardedRMSProp, {"lr": lambda step: 0.2}, WORLD)
    again.load(FOLDER / "d")
    number, _ = together(ShardedRMSProp, {"lr": 0.2}, WORLD)
    with refused(ValueError, "wanted a callable lr", opt=number):
        number.load(FOLDER / "d")


# State dicts of whole arrays


def check_state_dicts_and_those_of_others():
    twin, _ = alone(RMSProp, FULL, 2)
    opt, _ = together(ShardedRMSProp, FULL, WORLD)
    saved = twin.state_dict()
    assert opt.load_state_dict(saved) == ([], [])
    same_state(opt, twin)
    flat = twin.state_dict(flat=True)
    again, _ = together(ShardedRMSProp, FULL, WORLD)
    again.load_state_dict(flat)
    same_state(again, twin)
    bad = {**saved, "state": {**saved["state"], "w": {**saved["state"]["w"], "square_avg": np.zeros(4, F32)}}}
    with refused(RanksDisagree, f"rank {LAST}: ValueError: ", "shape (4,); wanted (3,)", opt=opt):
        opt.load_state_dict(bad if ODD else saved)
    with refused(RanksDisagree, f"the steps of what is loaded is 3 on rank {LAST} and 2 on rank 0", opt=opt):
        opt.load_state_dict({**saved, "steps": 3} if ODD else saved)
    with refused(RanksDisagree, f"rank {LAST}: TypeError: ", opt=opt):
        opt.load_state_dict("nothing" if ODD else saved)
    group = {"lr": 0.25, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False}
    shapes, dtypes = {"a": (5000,), "b": (3, 3000)}, {"a": F32, "b": F64}
    avg = drawn(3, shapes, dtypes)
    state = {i: {"step": 3.0, "square_avg": np.abs(x)} for i, x in enumerate(avg.values())}
    torch = {"state": state, "param_groups": [{**group, "params": [0, 1]}]}
    opt = ShardedRMSProp(drawn(4, shapes, dtypes), WORLD, bucket_bytes=9000)
    opt.load_foreign("torch", torch)
    for k, x in opt.gather("square_avg").items():
        same_bytes(k, x, np.abs(avg[k]))
    assert (opt.steps, opt.lr) == (3, 0.25)
    for odd in (
        lambda: opt.load_foreign("torch", {}),
        lambda: opt.load_foreign("torch", torch, match="chance"),
        lambda: opt.load_foreign("porch", torch),
    ):
        with refused(RanksDisagree, f"rank {LAST}: ", "; the other ranks found nothing", opt=opt):
            odd() if ODD else opt.load_foreign("torch", torch)
    with refused(ValueError, "match is 'chance'", opt=opt):
        opt.load_foreign("torch", torch, match="chance")


def check_what_a_rank_has_not():
    opt, _ = together(ShardedRMSProp, FULL, WORLD)
    take(opt, WORLD, 0)
    for call in (opt.state_dict, lambda: opt.state_dict(flat=True), lambda: opt.to_foreign("torch")):
        with refused(TypeError, "a rank has parts of the state; wanted", opt=opt):
            call()
    with refused(RuntimeError, "no graph captures a step of a sharded optimizer", opt=opt):
        opt.refresh()
    parts = WORLD.allgather({name: sorted(kinds) for name, kinds in opt.state.items()})
    names = [name for some in parts for name in some]
    assert len(names) == len(set(names))
    for key, shape in SHAPES.items():
        spans = sorted(
            tuple(map(int, name[len(key) + 1 : -1].split(":"))) for name in names if name.rpartition("[")[0] == key
        )
        assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])]
        assert spans[-1][1] == np.prod(shape, dtype=int)
    assert list(opt.ema) == list(opt.state)
    averages = opt.gather("ema")
    for name, x in opt.ema.items():
        key, _, span = name.rpartition("[")
        start, stop = map(int, span[:-1].split(":"))
        same_bytes(name, x, averages[key].reshape(-1)[start:stop])
        x[...] = 3  # a view of the state itself
        assert opt.state[name]["ema"].tobytes() == x.tobytes()
    with pytest.raises(KeyError, match="'w'; this rank has"):
        opt.state["w"]
    assert "parts of parameters" in repr(opt.state)
    assert f"{len(SHAPES)} tensors" in repr(opt)
    assert repr(opt).startswith("ShardedRMSProp(")
    for kind in ("nonsense", ["step"], None):
        with refused(ValueError, f"kind is {kind!r}; wanted one of", opt=opt):
            opt.gather(kind)
        with refused(RanksDisagree, f"rank {LAST}: ValueError: kind is {kind!r}", opt=opt):
            opt.gather(kind if ODD else "step")
    with refused(RanksDisagree, f"kind is 'ema' on rank {LAST} and 'step' on rank 0", opt=opt):
        opt.gather("ema" if ODD else "step")
    with refused(ValueError, "no parameter has 'sum'; there are step,", opt=opt):
        opt.gather("sum")


# Saves that fail


@contextmanager
def failing(module, name, error, when=lambda *given: True):
    """Make a function raise on this rank."""
    before = getattr(module, name)

    def fails(*given, **others):
        if when(*given):
            raise error
        return before(*given, **others)

    setattr(module, name, fails)
    try:
        yield
    finally:
        setattr(module, name, before)


def check_a_save_that_fails_leaves_the_one_before():
    path = FOLDER / "e"
    opt, _ = together(ShardedRMSProp, FULL, WORLD)
    take(opt, WORLD, 0)
    opt.save(path)
    WORLD.barrier()
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    take(opt, WORLD, 1)

    def as_before():
        WORLD.barrier()
        assert {file.name: file.read_bytes() for file in path.iterdir()} == files
        other, _ = together(ShardedRMSProp, FULL, WORLD)
        other.load(path)
        assert other.steps == 1

    full = OSError(28, "No space left on device")
    for where in (replacing.os, "posix_fallocate"), (container, "write"), (replacing.os, "replace"):
        with refused(RanksDisagree, f"rank {LAST}: OSError: ", "No space left", opt=opt):
            if ODD:
                with failing(*where, full):
                    opt.save(path)
            else:
                opt.save(path)
        as_before()
    with refused(RanksDisagree, "rank 0: OSError: ", "No space left", opt=opt):  # the index, after all files
        if RANK == 0:
            with failing(folder, "write_index", full):
                opt.save(path)
        else:
            opt.save(path)
    as_before()

    def progress(done, total):
        raise ValueError("enough")

    with refused(RanksDisagree, f"rank {LAST}: ValueError: enough", opt=opt):
        opt.save(path, progress if ODD else None)
    as_before()
    with refused(RanksDisagree, "path is ", f" on rank {LAST} and ", opt=opt):
        opt.save(FOLDER / "other" if ODD else path)
    assert not (FOLDER / "other").exists()
    with refused(RanksDisagree, f"rank {LAST}: TypeError: ", opt=opt):
        opt.save(3 if ODD else path)
    with refused(NotADirectoryError, "is not a folder", opt=opt):
        opt.save(path / "index.json")
    with refused(FileNotFoundError, "No such file", opt=opt):
        opt.save(FOLDER / "nowhere" / "deep")
    as_before()
    if ODD:
        opt.param_groups[0]["lr"] = 0.75
    with refused(RanksDisagree, f"is 0.75 on rank {LAST} and 0.01 on rank 0", opt=opt):
        opt.save(path)
    opt.param_groups[0]["lr"] = 0.01
    as_before()
    opt.save(path)
    again, _ = together(ShardedRMSProp, FULL, WORLD)
    again.load(path)
    assert again.steps == 2


def check_an_index_that_is_there_keeps_its_files():
    """If its rename succeeds but the sync after it fails, the new index is the checkpoint."""
    path = FOLDER / "f"
    opt, _ = together(ShardedRMSProp, FULL, WORLD)
    take(opt, WORLD, 0)
    opt.save(path)
    take(opt, WORLD, 1)

    def no_sync(number):
        return os.path.samestat(os.fstat(number), os.stat(path)) and b'"steps": 2' in (path / "index.json").read_bytes()

    with refused(RanksDisagree, "rank 0: OSError: ", opt=opt):
        if RANK == 0:
            with failing(replacing.os, "fsync", OSError(5, "Input/output error"), no_sync):
                opt.save(path)
        else:
            opt.save(path)
    other, _ = together(ShardedRMSProp, FULL, WORLD)
    other.load(path)
    assert other.steps == 2


def check_what_was_tried_on_one_rank_does_not_stay():
    """A switch that one rank set by mistake, and that was refused, is in no checkpoint."""
    opt, _ = together(ShardedRMSProp, {}, WORLD)
    take(opt, WORLD, 0)
    opt.param_groups[0]["use_ema"] = ODD
    with refused(RanksDisagree, f"is True on rank {LAST} and False on rank 0"):
        take(opt, WORLD, 1)
    with refused(RanksDisagree, f"is True on rank {LAST} and False on rank 0"):
        opt.save(FOLDER / "g")
    opt.param_groups[0]["use_ema"] = False
    opt.save(FOLDER / "g")
    with refused(ValueError, "no parameter has 'ema'"):
        opt.gather("ema")
    opt.param_groups[0]["use_ema"] = True
    opt.save(FOLDER / "g")  # with initial averages
    opt.load(FOLDER / "g")
    for k, x in opt.gather("ema").items():
        same_bytes(k, x, opt.param_groups[0]["params"][list(SHAPES).index(k)].astype(x.dtype))


# Loads that fail


def damage(path, how):
    """A copy of the folder, with the last rank's file damaged."""
    if RANK == 0:
        shutil.rmtree(FOLDER / "damaged", ignore_errors=True)
        shutil.copytree(path, FOLDER / "damaged")
        (file,) = (FOLDER / "damaged").glob(f"*-rank-{LAST:05d}.safetensors")
        how(file)
    WORLD.barrier()
    return FOLDER / "damaged", f"-rank-{LAST:05d}.safetensors"


def check_a_load_that_fails_changes_nothing():
    path = FOLDER / "h"
    opt, _ = together(ShardedRMSProp, FULL, WORLD)
    take(opt, WORLD, 0)
    opt.save(path)
    take(opt, WORLD, 1)
    for how in (
        Path.unlink,
        lambda file: file.write_bytes(file.read_bytes()[:-5]),
        lambda file: file.write_bytes(b"x" * 100),
        lambda file: file.write_bytes(file.read_bytes().replace(b"square_avg[", b"square_avg(", 1)),
        lambda file: file.write_bytes(b""),
    ):
        damaged, name = damage(path, how)
        with refused(container.CheckpointError, name, opt=opt):
            opt.load(damaged)
    with refused(FileNotFoundError, "No such file", opt=opt):
        opt.load(FOLDER / "nothing")
    with refused(RanksDisagree, f"rank {LAST}: FileNotFoundError: ", opt=opt):
        opt.load(FOLDER / "nothing" if ODD else path)
    other, _ = together(ShardedRMSProp, FULL, WORLD)
    take(other, WORLD, 5)
    other.save(FOLDER / "i")  # from another run with the same number of steps
    with refused(RanksDisagree, "its files is step-00000001-", f"on rank {LAST} and step-00000001-", opt=opt):
        opt.load(FOLDER / "i" if ODD else path)
    opt.load(path)
    assert opt.steps == 1


def check_a_load_that_is_cut_off():
    """On one rank, a file fails after all checks. No rank can take a step until a load succeeds."""
    path = FOLDER / "j"
    opt, p = together(ShardedRMSProp, FULL, WORLD)
    take(opt, WORLD, 0)
    opt.save(path)
    params = {k: x.copy() for k, x in p.items()}
    for error in (OSError(5, "Input/output error"), MemoryError("no memory")):
        take(opt, WORLD, 1)
        with pytest.raises(RuntimeError, match=f"rank {LAST}: RuntimeError: the state is loaded in part"):
            load_or_fail(opt, path, error)
        for call in (lambda: take(opt, WORLD, 2), lambda: opt.save(FOLDER / "k")):
            with refused(RuntimeError, "load the state again before anything else", opt=opt):
                call()
        opt.load(path)
        for k, x in p.items():
            x[...] = params[k]
    twin, wanted = alone(RMSProp, FULL, 2)
    take(opt, WORLD, 1)
    same_state(opt, twin)
    for k, x in p.items():
        same_bytes(k, x, wanted[k])


def load_or_fail(opt, path, error):
    with failing(pieces.Stored, "read_into", error, second()) if ODD else nullcontext():
        opt.load(path)


def second():
    """True from the second call on."""
    calls = []

    def when(*given):
        calls.append(given)
        return len(calls) > 1

    return when


if __name__ == "__main__":
    main(globals())
