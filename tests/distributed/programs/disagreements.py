"""Ranks that differ, or one that refuses: the same error on all ranks, no byte changed, and the next step works."""

import os
import signal
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from on_ranks import F16, F32, F64, WORLD, Twins, drawn, grads, main, refused, same_bytes

from rmsprop_gpu import RMSProp
from rmsprop_gpu.distributed import RanksDisagree, ShardedAdaGrad, ShardedRMSProp, agreement, kept, sharded
from rmsprop_gpu.hyper import FIXED, RMSPROP
from rmsprop_gpu.kernels import compiling

RANK, N = WORLD.rank, WORLD.size
LAST = N - 1
ODD = RANK == LAST  # the rank that differs

# Two values for every hyperparameter.
VALUES = {
    "lr": (0.1, 0.2),
    "alpha": (0.9, 0.8),
    "eps": (1e-3, 1e-4),
    "weight_decay": (0.1, 0.0),
    "momentum": (0.5, 0.0),
    "centered": (True, False),
    "nesterov": (True, False),
    "eps_in_sqrt": (True, False),
    "lr_in_momentum": (True, False),
    "initial_scale": (1.0, 0.0),
    "bias_correction": (True, False),
    "decoupled_weight_decay": (True, False),
    "maximize": (True, False),
    "clipvalue": (1.0, None),
    "clipnorm": (1.0, 2.0),
    "global_clipnorm": (1.0, None),
    "skip_nonfinite": (True, False),
    "use_ema": (True, False),
    "ema_momentum": (0.9, 0.8),
    "square_avg_dtype": ("uint16", "float32"),
    "store_param_remainders": (True, False),
    "bf16_stochastic_round": (True, False),
    "seed": (1, 0),
}


def either(odd, other):
    """The odd rank's value, or that of the others."""
    return odd if ODD else other


# When an optimizer is built


def check_every_hyperparameter_when_built():
    assert VALUES.keys() == {*RMSPROP}
    for name, (one, other) in VALUES.items():
        p = {"w": np.ones(6, F32)} if name == "square_avg_dtype" else drawn(1)  # float64 has no codes
        texts = f'param_groups[0]["{name}"] is {one!r} on rank {LAST} and {other!r} on rank 0', "nothing was changed"
        with refused(RanksDisagree, *texts, arrays=p.values()):
            ShardedRMSProp(p, WORLD, **{name: either(one, other)})


def check_what_else_must_be_equal_when_built():
    x = np.ones(6, F32)
    two = {"v": np.ones(2), "w": x}
    cases = [
        ({"u": x}, {"w": x}, {}, {}, f'params["w"] is missing on rank {LAST}'),
        ({"w": np.ones(7, F32)}, {"w": x}, {}, {}, f"of shape (7,), group 0 on rank {LAST} and "),
        ({"w": np.ones(6, F64)}, {"w": x}, {}, {}, "float64 of shape (6,)"),
        ({"w": np.ones((2, 3), F32)}, {"w": x}, {}, {}, "shape (2, 3)"),
        ({"w": x}, two, {}, {}, f"the number of parameters is 1 on rank {LAST} and 2 on rank 0"),
        ({"w": x, "v": np.ones(2)}, two, {}, {}, "wanted the same"),
        ([{"params": [x]}, {"params": [two["v"]]}], [x, two["v"]], {}, {}, "is missing on rank"),
        (two, two, {"no_decay": ["v"], "weight_decay": 0.1}, {"weight_decay": 0.1}, f"group 1 on rank {LAST} and"),
        (two, two, {"lr": lambda step: 0.1}, {"lr": 0.1}, f"a callable on rank {LAST} and 0.1 on rank 0"),
        (two, two, {"bucket_bytes": 4096}, {}, f"bucket_bytes is 4096 on rank {LAST} and {32 << 20} on rank 0"),
        (two, two, {"average": False}, {}, f"average is False on rank {LAST} and True on rank 0"),
    ]
    for odd, other, given, others, text in cases:
        with refused(RanksDisagree, text, "wanted the same", "nothing was changed on any rank"):
            ShardedRMSProp(either(odd, other), WORLD, **either(given, others))
    with refused(RanksDisagree, f"the optimizer is ShardedAdaGrad on rank {LAST} and ShardedRMSProp on rank 0"):
        either(ShardedAdaGrad, ShardedRMSProp)(x, WORLD)
    p = ShardedRMSProp(two, WORLD, lr=lambda step: 0.1, average=np.True_, bucket_bytes=np.int32(100))
    p.step({"v": np.ones(2), "w": np.ones(6, F32)})


def check_versions():
    import rmsprop_gpu

    before, rmsprop_gpu.__version__ = rmsprop_gpu.__version__, either("0.0", "0.1")
    with refused(RanksDisagree, f"the version of rmsprop_gpu is 0.0 on rank {LAST} and 0.1 on rank 0"):
        ShardedRMSProp(np.ones(3), WORLD)
    rmsprop_gpu.__version__ = before


def check_what_one_rank_refuses_when_built():
    x = np.ones(6, F32)
    cases = [
        (["no array"], {}, "TypeError: params[0] is a str"),
        (x, {"momentum": 2.0}, "ValueError: momentum is 2.0; wanted"),
        (x, {"average": 1}, "TypeError: average is 1"),
        (x, {"bucket_bytes": 0}, "ValueError: bucket_bytes is 0"),
        (x, {"bucket_bytes": 4096.0}, "ValueError: bucket_bytes is 4096.0"),
        (x, {"bucket_bytes": "many"}, "ValueError: bucket_bytes is 'many'"),
        (np.ones((2, 3), F32).T, {}, "ValueError: params is not C-contiguous"),
        (x, {"no_decay": 3}, "TypeError: no_decay is an int"),
        (x, {"nonsense": 3}, "TypeError: "),
    ]
    for params, given, text in cases:
        for odd in {0, LAST}:
            others = "; the other ranks found nothing; nothing was changed on any rank"
            with refused(RanksDisagree, f"rank {odd}: {text}", others):
                if odd == RANK:
                    with pytest.raises(RanksDisagree) as error:
                        ShardedRMSProp(params, WORLD, **given)
                    assert type(error.value.__cause__).__name__ == text.partition(":")[0]
                    raise error.value
                ShardedRMSProp(x, WORLD)
        with refused({"T": TypeError, "V": ValueError}[text[0]], text.partition(": ")[2]):
            ShardedRMSProp(params, WORLD, **given)
    text = f"rank 0: ValueError: momentum is 2.0; wanted a number with 0 <= momentum <= 1; rank {LAST}: ValueError: lr"
    if N == 2:
        with refused(RanksDisagree, text):
            ShardedRMSProp(x, WORLD, **either({"lr": -1.0}, {"momentum": 2.0}))


def check_presets_that_differ():
    x = np.ones(3)
    with refused(RanksDisagree, f"rank {LAST}: TypeError: keras has no argument 'alpha'"):
        ShardedRMSProp.from_preset("keras", x, WORLD, **either({"alpha": 0.1}, {}))
    with refused(RanksDisagree, f"rank {LAST}: ValueError: "):
        ShardedRMSProp.from_preset(either("caras", "keras"), x, WORLD)
    with refused(RanksDisagree, f"on rank {LAST}"):
        ShardedRMSProp.from_preset(either("torch", "keras"), x, WORLD)
    with refused(TypeError, "keras has no argument 'alpha'"):
        ShardedRMSProp.from_preset("keras", x, WORLD, alpha=1)


def check_what_is_no_communicator():
    from mpi4py import MPI

    for comm in (None, 3, "world", type(WORLD)):
        with refused(TypeError, f"comm is {comm!r}", "wanted an intracommunicator of mpi4py"):
            ShardedRMSProp(np.ones(3), comm)
    freed = WORLD.Dup()
    freed.Free()
    for comm in (MPI.COMM_NULL, freed):
        with pytest.raises(TypeError, match="wanted an intracommunicator of mpi4py"):
            ShardedRMSProp(np.ones(3), comm)


# In a step


class Stepping(Twins):
    """After every refusal comes a valid step, which must match one process."""

    count = 0

    def refuses(self, kind, *texts, mine=None, **given):
        """A step is refused if this rank takes it with these gradients and the others with valid ones."""
        good = grads(self.count)[RANK]
        mine = good if mine is None else mine
        arrays = [x for x in (mine.values() if isinstance(mine, dict) else []) if isinstance(x, np.ndarray)]
        with refused(kind, *texts, opt=self.opt, arrays=arrays):
            self.opt.step(mine, **given)

    def goes_on(self):
        self.step(grads(self.count))
        self.same()
        self.count += 1


def check_every_hyperparameter_in_a_step():
    for name, (one, other) in VALUES.items():
        if name in ("initial_scale", *FIXED):
            continue
        twins = Stepping(**({name: other} if other is not None else {}))
        twins.goes_on()
        before = twins.opt.param_groups[0][name]
        twins.opt.param_groups[0][name] = either(one, other)
        twins.refuses(RanksDisagree, f'param_groups[0]["{name}"] is {one!r} on rank {LAST} and {other!r} on rank 0')
        twins.opt.param_groups[0][name] = before
        twins.goes_on()


def check_rates_of_schedules():
    rate = [0.1]
    twins = Stepping(lr=lambda step: rate[0])
    twins.goes_on()
    rate[0] = either(0.3, 0.2)
    twins.refuses(RanksDisagree, f"the learning rate of group 0 is 0.3 on rank {LAST} and 0.2 on rank 0")
    rate[0] = either(-1.0, 0.2)
    twins.refuses(RanksDisagree, f"rank {LAST}: ValueError: lr(1): lr is -1.0")
    rate[0] = -1.0
    twins.refuses(ValueError, "lr(1): lr is -1.0")
    rate[0] = 1e300  # infinite in float32; nothing may move, and no gradient may be zeroed
    twins.refuses(ValueError, "lr is 1e+300, which is infinite in float32", zero_grads=True)
    rate[0] = 0.2
    twins.goes_on()

    def fails(step):
        return 1 / (0 if ODD else 1)

    twins.opt.lr = fails
    twins.refuses(RanksDisagree, f"rank {LAST}: ZeroDivisionError: division by zero")
    for opt in (twins.opt, twins.twin):
        opt.lr = 0.5
    twins.goes_on()


def check_arguments_of_a_step():
    twins = Stepping(momentum=0.5)
    twins.goes_on()
    said = f"on rank {LAST} and"
    for one, other, text in (
        (2.0, 3.0, f"grad_scale is 2.0 {said} 3.0 on rank 0"),
        (2.0, None, f"grad_scale is 2.0 {said} None on rank 0"),
        (Fraction(1, 2), Fraction(1, 3), f"grad_scale is 0.5 {said} 0.3333333333333333 on rank 0"),
        (np.array(2.0), np.array([4.0], F32), f"grad_scale is 2.0 {said} 4.0 on rank 0"),
        (-1.0, 1.0, f"rank {LAST}: ValueError: grad_scale is -1.0"),
        ("2", 1.0, f"rank {LAST}: TypeError: grad_scale is a str"),
        (np.ones(2), 1.0, f"rank {LAST}: ValueError: grad_scale has shape (2,)"),
    ):
        twins.refuses(RanksDisagree, text, grad_scale=either(one, other), zero_grads=True)
    twins.refuses(RanksDisagree, f"zero_grads is True {said} False on rank 0", zero_grads=ODD)
    twins.refuses(RanksDisagree, f"rank {LAST}: TypeError: zero_grads is 1", zero_grads=either(1, True))
    twins.refuses(RanksDisagree, f"rank {LAST}: TypeError: found_inf is a str", found_inf=either("yes", None))
    twins.refuses(ValueError, "grad_scale is 0", grad_scale=0)
    twins.refuses(ValueError, "reciprocal", grad_scale=1e-39)
    twins.opt.step(grads(1)[RANK], grad_scale=either(np.array(2.0, F32), 2), zero_grads=False)  # same number
    twins.twin.step({k: sum_of(grads(1), k) for k in twins.wanted}, grad_scale=2 * N)
    twins.same()
    twins.count = 2
    twins.goes_on()


def sum_of(of_ranks, key):
    total = of_ranks[0][key]
    for one in of_ranks[1:]:
        total = np.asarray(total + one[key])
    return total


def check_counts_of_steps():
    twins = Stepping()
    twins.goes_on()
    twins.opt._steps[0] += ODD
    twins.refuses(RanksDisagree, f"opt.steps is 2 on rank {LAST} and 1 on rank 0")
    twins.opt._steps[0] -= ODD
    twins.goes_on()


def check_gradients_that_one_rank_refuses():
    twins = Stepping()
    twins.goes_on()
    good = grads(1)[RANK]
    locked = np.zeros((9000, 3), F32)
    locked.flags.writeable = False
    shared = np.zeros((9000, 3), F16)
    bads = [
        ({k: x for k, x in good.items() if k != "w"}, "ValueError: ", {}),
        ({**good, "w": np.ones(4, F32)}, 'ValueError: grads["w"] has shape (4,)', {}),
        ({**good, "w": np.ones(3)}, 'TypeError: grads["w"] has dtype float64', {}),
        ({**good, "w": "no"}, 'TypeError: grads["w"] is a str', {}),
        ({**good, "w": twins.params["w"]}, 'ValueError: grads["w"] ', {}),
        ("no", "TypeError: ", {}),
        (None, "TypeError: ", {}),
        ({**good, "big": locked}, 'ValueError: grads["big"] is read-only', {"zero_grads": True}),
        ({**good, "big": shared, "w": shared.reshape(-1)[:3]}, "ValueError: grads[", {"zero_grads": True}),
        ({**good, "w": np.ones(4, F32), "one": np.ones(2, F32)}, "ValueError: 2 problems", {}),
    ]
    for bad, text, given in bads:
        for odd in {0, LAST}:
            mine = bad if odd == RANK else None
            if bad is None and odd == RANK:
                with refused(RanksDisagree, f"rank {odd}: {text}", opt=twins.opt):
                    twins.opt.step(None)
            else:
                twins.refuses(RanksDisagree, f"rank {odd}: {text}", mine=mine, **given)
        if bad is not None:
            kind = {"T": TypeError, "V": ValueError}[text[0]]
            twins.refuses(kind, text.partition(": ")[2], mine=bad, **given)
    twins.goes_on()
    half = [{**g, "big": g["big"].astype(ml_dtypes.bfloat16)} for g in grads(2)]
    twins.step(half, zero_grads=True)
    twins.same()
    assert not half[RANK]["big"].any()


def check_several_ranks_that_refuse():
    twins = Stepping()
    mine = {**grads(0)[RANK], "w": np.ones(RANK + 4, F32)}
    texts = [f'rank {rank}: ValueError: grads["w"] has shape ({rank + 4},)' for rank in range(N)]
    twins.refuses(RanksDisagree, *texts, mine=mine)
    twins.goes_on()


def check_parameters_that_have_changed():
    twins = Stepping(lambda: drawn(1, {"w": (6, 2), "v": (3,)}, {"w": F32, "v": F32}))
    of_ranks = [{"w": np.ones((6, 2), F32), "v": np.ones(3, F32)} for _ in range(N)]
    if ODD:
        twins.params["v"] = np.ones(3, F32)
    with refused(RanksDisagree, f"rank {LAST}: ValueError: ", '"v"', opt=twins.opt):
        twins.opt.step(of_ranks[RANK])
    if ODD:
        twins.params["v"] = twins.opt.param_groups[0]["params"][1]
    twins.step(of_ranks)
    twins.same()


def check_groups_that_disagree_within():
    p = drawn(1)
    opt = ShardedRMSProp([{"params": {"w": p["w"]}}, {"params": {"m": p["m"]}}], WORLD)
    g = [{"w": np.ones(3, F32)}, {"m": np.ones((70, 77), F32)}]
    opt.step(g)
    if ODD:
        opt.param_groups[1]["global_clipnorm"] = 1.0
    with refused(RanksDisagree, f"rank {LAST}: ValueError: the groups differ in global_clipnorm", opt=opt):
        opt.step(g)
    opt.param_groups[1]["global_clipnorm"] = None
    opt.step(g)


# Turns


def check_a_step_within_a_step_is_refused():
    twins = Stepping()
    twins.goes_on()

    def schedule(step):
        opt.step(grads(0)[RANK])
        return 0.1

    opt = twins.opt
    opt.lr = schedule
    twins.refuses(RuntimeError, "a step was requested inside a step, load or save of the same")
    for one in (twins.opt, twins.twin):
        one.lr = 0.1
    twins.goes_on()


def check_handlers_within_a_step_are_refused():
    """A collective call in one rank's signal handler would be mixed up with the other ranks' step."""
    twins, found = Stepping(momentum=0.9), []
    twins.goes_on()

    def handler(number, frame):
        for call in (lambda: opt.step(grads(0)[RANK]), lambda: opt.save("never"), lambda: opt.gather("square_avg")):
            try:
                call()
            except RuntimeError as error:
                found.append(str(error))

    before = signal.signal(signal.SIGUSR1, handler)
    opt, transport, gather = twins.opt, twins.opt._transport, twins.opt._transport.gather

    def interrupted():
        if ODD:
            os.kill(os.getpid(), signal.SIGUSR1)
        gather()

    transport.gather = interrupted
    twins.goes_on()
    transport.gather = gather
    signal.signal(signal.SIGUSR1, before)
    assert len(found) == 3 * ODD
    assert all("requested inside a step, load or save of the same" in text for text in found)
    twins.goes_on()


def check_a_step_that_was_cut_off():
    """On all ranks, or on one after its last message: no step and no checkpoint until a state is loaded."""
    folder = os.environ["FOLDER"]
    for cut_off in (True, ODD):
        twins = Stepping(momentum=0.9)
        twins.goes_on()
        twins.opt.save(folder)
        params = {k: x.copy() for k, x in twins.params.items()}
        gather = twins.opt._transport.gather

        def fails(cut_off=cut_off, gather=gather):
            gather()
            if cut_off:
                raise OSError("out of order")

        twins.opt._transport.gather = fails
        try:
            twins.opt.step(grads(7)[RANK])
            assert not cut_off
        except (OSError, RuntimeError):
            assert cut_off
        twins.opt._transport.gather = gather
        text = "a step was cut off (OSError: out of order): the optimizer is between two steps"
        with refused(RuntimeError, text):
            twins.opt.step(grads(7)[RANK])
        with refused(RuntimeError, text):
            twins.opt.save(folder)
        twins.opt.load(folder)
        for k, x in twins.params.items():
            x[...] = params[k]
        twins.goes_on()


def check_compilation():
    """A step after compiling compiles nothing. It refuses what it refuses in one process."""
    asked = {"grad_scale": True, "found_inf": True, "zero_grads": True}
    for average in (True, False):
        for told, given in (({}, {}), (asked, {"grad_scale": 2.0, "found_inf": False, "zero_grads": True})):
            opt = ShardedRMSProp({"w": np.ones(9000, F32)}, WORLD, average=average, clipnorm=1.0, bucket_bytes=9000)
            before = {**compiling._compiled}
            compiling._compiled.clear()
            opt.compile(**told)
            made = set(compiling._compiled)
            assert made
            opt.step({"w": np.ones(9000, F32)}, **given)
            assert set(compiling._compiled) == made, set(compiling._compiled) ^ made
            compiling._compiled.update(before)
    for bad, text in (
        ({"grad_scale": 1}, "grad_scale is 1 (a int); wanted True or False"),
        ({"found_inf": "no"}, "found_inf is 'no'"),
        ({"grad_dtype": "int8"}, "grad_dtype is 'int8'; wanted float32"),
    ):
        with refused(TypeError, text, opt=opt):
            opt.compile(**bad)
    opt.compile(grad_dtype=F16)
    assert all("float16" not in name for name in opt.kernels())


# On one rank, and communicators


def check_nothing_is_asked_of_whom_is_alone():
    """One rank has no buckets and no agreement, and its step matches one process."""
    from mpi4py import MPI

    p, q = drawn(1), drawn(1)
    opt, twin = ShardedRMSProp(p, MPI.COMM_SELF, momentum=0.9), RMSProp(q, momentum=0.9)
    assert not hasattr(opt, "_transport")
    assert opt._engine is None

    class Alone:
        size = 1  # and no other attribute

    comm, opt._comm = opt._comm, Alone()
    before = agreement.agree
    sharded.agree = kept.agree = None
    opt.step(grads(1)[0])
    twin.step(grads(1)[0])
    sharded.agree = kept.agree = before
    opt._comm = comm
    for k, x in p.items():
        same_bytes(k, x, q[k])
    assert opt.explain() == twin.explain().replace("RMSProp", "ShardedRMSProp", 1)


def check_communicators_are_duplicated_once():
    from mpi4py import MPI

    from rmsprop_gpu.distributed.mpi import own_communicator

    comm = WORLD.Dup()
    opts = [ShardedRMSProp(drawn(1), comm, bucket_bytes=30_000) for _ in range(3)]
    own = own_communicator(comm)
    assert own is not comm
    assert own != comm
    assert MPI.Comm.Compare(own, comm) == MPI.CONGRUENT
    assert all(opt._comm is own for opt in opts)
    pending = comm.irecv(source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG)  # it must not receive any of our messages
    for opt in opts:
        opt.step(grads(0, comm)[RANK])
        opt.gather("step")
    assert not pending.Test()
    WORLD.barrier()
    comm.send("hers", dest=(RANK + 1) % N)
    assert pending.wait() == "hers"
    again = comm.Dup()
    assert own_communicator(again) is not own
    again.Free()
    del opts, opt
    comm.Free()
    assert own == MPI.COMM_NULL  # freed with it
    halves = WORLD.Split(RANK % 2, RANK)
    p = drawn(1)
    opt = ShardedRMSProp(p, halves)
    opt.step(drawn(halves.rank))
    assert opt._comm.size == halves.size
    halves.Free()


def check_memory_is_freed_with_the_optimizer():
    import weakref

    opt = ShardedRMSProp(drawn(1), WORLD, clipnorm=1.0)
    opt.step(grads(0)[RANK])
    gone = weakref.ref(opt._transport), weakref.ref(opt)
    del opt
    assert [x() for x in gone] == [None, None]


if __name__ == "__main__":
    main(globals())
