"""On every number of ranks: bit-identical to one process that steps with the sum of all gradients."""

import contextlib
from fractions import Fraction

import numpy as np
from on_ranks import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    HALVES,
    ONE_BUCKET,
    SHAPES,
    WORLD,
    Twins,
    drawn,
    flat,
    grads,
    main,
    same_bytes,
)

from rmsprop_gpu import AdaGrad, RMSProp
from rmsprop_gpu.distributed import ShardedAdaGrad, ShardedRMSProp

RANK, N = WORLD.rank, WORLD.size
LAST = N - 1

EVERYTHING = {"momentum": 0.83, "centered": True, "bias_correction": True, "use_ema": True}
SWITCHES = [
    {},
    {"momentum": 0.83, "nesterov": True, "weight_decay": 0.07},
    {"momentum": 0.83, "lr_in_momentum": True, "centered": True, "eps_in_sqrt": True},
    {"bias_correction": True, "decoupled_weight_decay": True, "weight_decay": 0.07, "maximize": True},
    {"clipvalue": 0.3, "eps": 0.0, "alpha": 0.9},
    {"clipnorm": 1.7, "momentum": 0.5},
    {"global_clipnorm": 1.7, "use_ema": True, "ema_momentum": 0.87},
    {"global_clipnorm": float("inf"), "initial_scale": 1.0},
    {"skip_nonfinite": True, "global_clipnorm": 3.0, **EVERYTHING},
    {"skip_nonfinite": True},
]


def check_every_switch():
    for hypers in SWITCHES:
        for bucket_bytes in (ONE_BUCKET, 30_000):
            twins = Twins(bucket_bytes=bucket_bytes, **hypers)
            for step in range(3):
                twins.step(grads(step))
                twins.same()


def check_adagrad():
    for hypers in ({"initial_scale": 0.1}, {"clipnorm": 0.7, "use_ema": True, "weight_decay": 0.1}):
        twins = Twins(kind=ShardedAdaGrad, **hypers)
        for step in range(3):
            twins.step(grads(step))
            twins.same()


def check_halves_are_rounded_once():
    for hypers in ({}, {"momentum": 0.9, "global_clipnorm": 2.0, "skip_nonfinite": True}):
        twins = Twins(lambda: drawn(1, dtypes=HALVES), **hypers)
        for step in range(3):
            twins.step(grads(step, dtypes=HALVES))
            twins.same()


def check_none_here_and_there():
    for hypers in ({}, {"clipnorm": 1.0, **EVERYTHING}):
        twins = Twins(**hypers)
        given = [grads(step) for step in range(6)]
        for rank in range(N):
            given[0][rank]["m"] = None  # missing on all ranks
            given[1][rank]["e" if rank % 2 else "big"] = None
            given[2][rank]["s"] = None
            given[2][rank]["e"] = None
        given[1][0]["w"] = None
        given[3][LAST] = dict.fromkeys(SHAPES)  # this rank is out of data
        given[4] = [dict.fromkeys(SHAPES) for _ in range(N)]
        for name in ("w", "b", "big"):
            for rank in range(1, N):
                given[5][rank][name] = None
        for of_ranks in given:
            twins.step(of_ranks)
            twins.same()
        assert twins.opt.gather("step")["m"] == 4 - (N == 1)


def check_a_zero_of_none_is_one_that_is_added():
    """-0.0 + 0.0 is 0.0: a sign only stays if nothing is added after it."""
    twins = Twins(lambda: {"w": np.zeros(8, F32)}, average=False)
    of_ranks = [{"w": np.full(8, -0.0, F32)} for _ in range(N)]
    of_ranks[0]["w"] = None if N > 1 else of_ranks[0]["w"]
    twins.step(of_ranks)
    twins.same()


def check_a_nan_of_one_rank_skips_on_all():
    twins = Twins(skip_nonfinite=True, **EVERYTHING)
    for step, rank in enumerate([None, 0, LAST, None]):
        of_ranks = grads(step)
        if rank is not None:
            of_ranks[rank]["big"][8999, 2] = (np.nan, np.inf)[step % 2]
        twins.step(of_ranks)
        twins.same()
    assert twins.opt.skipped_steps == 2
    huge = grads(9)
    for rank in range(N):  # each is finite, but their sum is not
        huge[rank]["w"][1] = 3e38
    twins.step(huge)
    twins.same()
    assert twins.opt.skipped_steps == 3  # on one rank, the square is not finite


def check_found_inf_of_one_rank_skips_on_all():
    twins = Twins(momentum=0.9)
    yes = [True, 1, np.bool_(True), np.array(1.0, F32), np.array([True]), np.array(-3, np.int64), float("nan")]
    no = [False, 0, None, np.zeros((), F64), np.zeros(1, np.int8)]
    for step, said in enumerate([*yes, *no]):
        for rank in {0, LAST}:
            found = [None] * N
            found[rank] = said
            twins.step(grads(step), found_inf=found)
            twins.same()
    assert twins.opt.skipped_steps == len(yes) * (1 + (N > 1))
    mixed = [no[rank % len(no)] for rank in range(N)]
    twins.step(grads(7), found_inf=mixed)
    twins.same()


def check_grad_scale():
    for average in (True, False):
        twins = Twins(average=average, clipnorm=2.0)
        scales = [3.7, 1024, np.float32(0.1), np.array(65536.0, F32), np.array([0.3]), Fraction(1, 3), None]
        for step, scale in enumerate(scales):
            twins.step(grads(step), grad_scale=scale)
            twins.same()


def check_a_scale_in_an_array_may_be_anything():
    """As in one process, which reads it when the step runs, and skips by the result."""
    for scale in (0.0, np.inf, np.nan, -2.0):
        twins = Twins(skip_nonfinite=True)
        twins.opt.step(grads(1)[RANK], grad_scale=np.array(scale, F32))
        total = grads(1)
        twins.twin.step({k: sum_of(total, k) for k in SHAPES}, grad_scale=np.array(scale * N))
        twins.same()


def sum_of(of_ranks, key):
    total = of_ranks[0][key]
    for one in of_ranks[1:]:
        total = np.asarray(total + one[key])
    return total


def check_the_sum_instead_of_the_average():
    twins = Twins(average=False, momentum=0.9)
    for step in range(2):
        twins.step(grads(step))
        twins.same()
    twins = Twins(average=np.False_, skip_nonfinite=True)
    twins.step(grads(0), found_inf=[rank == LAST for rank in range(N)])
    twins.same()


def check_zeros_into_gradients():
    for hypers in ({}, {"clipnorm": 1.0, "momentum": 0.9}):
        twins = Twins(**hypers)
        for step in range(4):
            of_ranks = grads(step)
            if step == 1:
                of_ranks[LAST]["m"] = None
            if step == 2:  # in other layouts, and another dtype
                for rank in range(N):
                    of_ranks[rank]["big"] = np.asfortranarray(of_ranks[rank]["big"])
                    of_ranks[rank]["b"] = np.repeat(of_ranks[rank]["b"], 2)[::2]
                    of_ranks[rank]["m"] = of_ranks[rank]["m"].astype(BF16)
                    of_ranks[rank]["w"] = of_ranks[rank]["w"].astype(F16)[::-1]
            said = [rank == 0 for rank in range(N)] if step == 3 else None  # also if the step is skipped
            twins.step([{**one} for one in of_ranks], zero_grads=(True, np.True_)[step % 2], found_inf=said)
            # Gradients are summed before they are zeroed, and the other ranks' are intact here.
            others = grads(step)
            if step == 2:
                for rank in range(N):
                    others[rank]["m"] = others[rank]["m"].astype(BF16)
                    others[rank]["w"] = others[rank]["w"].astype(F16)[::-1]
            if step == 1:
                others[LAST]["m"] = None
            assert all(x is None or not x.any() for x in of_ranks[RANK].values())
            for rank in set(range(N)) - {RANK}:
                for k, x in others[rank].items():
                    assert x is None or x.tobytes() == of_ranks[rank][k].tobytes()


def check_gradients_are_only_read():
    twins = Twins()
    of_ranks = grads(0)
    of_ranks[RANK]["big"] = np.asfortranarray(of_ranks[RANK]["big"])
    of_ranks[RANK]["w"].flags.writeable = False
    before = {k: x.copy() for k, x in of_ranks[RANK].items()}
    twins.step(of_ranks)
    twins.same()
    for k, x in of_ranks[RANK].items():
        same_bytes(k, x, before[k])


def check_gradients_of_any_layout_and_of_halves():
    twins = Twins(momentum=0.9)
    for step, dtype in enumerate([F16, BF16, F32, F16]):
        of_ranks = grads(step)
        for rank, given in enumerate(of_ranks):
            given["m"] = given["m"].astype(dtype if rank % 2 == 0 else BF16)  # each rank chooses its own
            given["big"] = np.asfortranarray(given["big"].astype(dtype))
            given["b"] = np.repeat(given["b"], 3)[::3]
            given["w"] = given["w"].astype(dtype)[::-1]
        twins.step(of_ranks)
        twins.same()


def check_fewer_elements_than_ranks():
    shapes = {"a": (1,), "e": (0,), "b": (2,)}
    for hypers in (
        {"clipnorm": 1.0, "use_ema": True},
        {"skip_nonfinite": True, "global_clipnorm": 2.0},
        {"momentum": 0.9},
    ):
        for bucket_bytes in (ONE_BUCKET, 4):
            dtypes = {"a": F32, "e": F16, "b": F64}
            twins = Twins(lambda d=dtypes: drawn(1, shapes, d), bucket_bytes=bucket_bytes, **hypers)
            for step in range(3):
                twins.step(grads(step, WORLD, shapes, dtypes))
                twins.same()
    twins = Twins(lambda: {"e": np.zeros((0, 3), F32)}, clipnorm=1.0)
    twins.step([{"e": np.zeros((0, 3), F32)} for _ in range(N)])
    twins.same()
    assert twins.opt.gather("step")["e"] == 1


def in_groups():
    x = drawn(1)
    names = [["m", "e"], ["w", "s"], ["big", "b", "one"]]
    others = [{}, {"lr": 0.5, "clipnorm": 0.1, "momentum": 0.0}, {"weight_decay": 0.3, "use_ema": True}]
    return [{"params": {k: x[k] for k in some}, **h} for some, h in zip(names, others, strict=True)]


def check_groups():
    for hypers in ({}, {"clipnorm": 1.5, "skip_nonfinite": True, "momentum": 0.8}):
        twins = Twins(in_groups, no_decay=["one"], weight_decay=0.1, **hypers)
        for step in range(3):
            of_ranks = grads(step)
            of_ranks[0]["w"] = None
            twins.step(of_ranks)
            twins.same()
        assert len(twins.opt.param_groups) == len(twins.twin.param_groups) == 4


def check_callable_rates():
    def halves(step):
        return 0.1 / (1 + step)

    asked = []

    def counted(step):
        asked.append(step)
        return 0.01 * (step + 1)

    twins = Twins(lr=halves, clipnorm=1.0)
    other = Twins(lambda: [{"params": drawn(1), "lr": counted}])
    for step in range(3):
        for one in (twins, other):
            one.step(grads(step))
            one.same()
    assert asked == [0, 0, 1, 1, 2, 2]  # once by each of the two


def check_a_schedule_may_assign_for_the_next_step():
    def made():
        def schedule(step):
            if step == 1:
                opt = holder[0]
                opt.param_groups[0]["weight_decay"] = 0.4
                opt.param_groups[0]["momentum"] = 0.7
            if step == 2:
                holder[0].lr = 0.25
            return 0.1

        holder = []
        return schedule, holder

    (mine, opt), (theirs, twin) = made(), made()
    a, b = drawn(1), drawn(1)
    twins = Twins.__new__(Twins)
    twins.comm, twins.average, twins.params, twins.wanted = WORLD, True, a, b
    twins.opt, twins.twin = ShardedRMSProp(a, WORLD, lr=mine, bucket_bytes=30_000), RMSProp(b, lr=theirs)
    opt.append(twins.opt)
    twin.append(twins.twin)
    for step in range(5):
        twins.step(grads(step))
        twins.same()
    assert twins.opt.lr == 0.25


def check_hyperparameters_that_change_between_steps():
    twins = Twins(skip_nonfinite=True)
    changes = [
        {"momentum": 0.9},
        {"clipnorm": 0.5},
        {"use_ema": True},
        {"lr": 0.5},
        {"clipnorm": None, "clipvalue": 0.1},
        {"centered": True, "clipvalue": None},
        {"momentum": 0.0, "skip_nonfinite": False},
        {"lr": lambda step: 0.01 * step},
        {"maximize": True, "weight_decay": 0.2, "global_clipnorm": 1.0},
    ]
    for step, change in enumerate(changes):
        twins.step(grads(step))
        twins.same()
        for opt in (twins.opt, twins.twin):
            opt.param_groups[0].update(change)
    for step in (20, 21):
        twins.step(grads(step))
        twins.same()
    for opt in (twins.opt, twins.twin):
        opt.lr = 0.125
    twins.step(grads(22))
    twins.same()


def check_presets():
    for name, given in (
        ("keras", {"learning_rate": 0.1, "momentum": 0.5, "global_clipnorm": 1.0}),
        ("graves", {}),
        ("hinton", {"lr": 0.01}),
    ):
        a, b = drawn(1), drawn(1)
        opt = ShardedRMSProp.from_preset(name, a, WORLD, average=False, bucket_bytes=30_000, no_decay=["w"], **given)
        twin = RMSProp.from_preset(name, b, no_decay=["w"], **given)
        twins = Twins.__new__(Twins)
        twins.comm, twins.average, twins.params, twins.wanted, twins.opt, twins.twin = WORLD, False, a, b, opt, twin
        for step in range(2):
            twins.step(grads(step))
            twins.same()


def check_structures():
    """A single array, and a list with a mapping in it: as in one process."""
    a, b = np.ones(9000), np.ones(9000)
    opt, twin = ShardedRMSProp(a, WORLD, bucket_bytes=30_000), RMSProp(b)
    total = sum_of([{"x": np.full(9000, rank + 0.1)} for rank in range(N)], "x")
    opt.step(np.full(9000, RANK + 0.1))
    twin.step(total, grad_scale=N)
    same_bytes("one array", a, b)
    same_bytes("its state", opt.gather("square_avg")["0"], twin.state[0]["square_avg"])
    x, y = ([np.ones(5, F32), {"z": np.ones((2, 3))}] for _ in range(2))
    opt, twin = ShardedRMSProp(x, WORLD), RMSProp(y)
    opt.step([np.full(5, RANK, F32), {"z": np.full((2, 3), RANK + 0.5)}])
    twin.step([np.full(5, N * (N - 1) / 2, F32), {"z": np.full((2, 3), N * N / 2)}], grad_scale=N)
    same_bytes("a list", x[0], y[0])
    same_bytes("a mapping in it", x[1]["z"], y[1]["z"])


def check_tensors_of_torch():
    with contextlib.suppress(ImportError):
        import torch

        twins = Twins(momentum=0.9)
        x = {k: torch.from_numpy(v.copy()) for k, v in drawn(1).items()}
        opt = ShardedRMSProp(x, WORLD, bucket_bytes=30_000, momentum=0.9)
        for step in range(2):
            of_ranks = grads(step)
            opt.step({k: torch.from_numpy(v) for k, v in of_ranks[RANK].items()}, grad_scale=torch.tensor(3.0))
            twins.step(of_ranks, grad_scale=3.0)
        for k, v in flat(twins.params).items():
            same_bytes(k, x[k].numpy(), v)


def check_adagrad_is_named_as_itself():
    assert "ShardedAdaGrad(" in repr(ShardedAdaGrad(drawn(1), WORLD))
    assert issubclass(ShardedAdaGrad, AdaGrad)
    assert DTYPES.keys() == SHAPES.keys()


if __name__ == "__main__":
    main(globals())
