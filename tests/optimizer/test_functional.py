"""rmsprop_update and adagrad_update: bit-identical to the optimizer in place, or a refusal that changes nothing."""

import math
from itertools import combinations

import numpy as np
import pytest
from on_host import assert_same_bits, one, refused

from rmsprop_gpu import AdaGrad, RMSProp, adagrad_update, rmsprop_update

RMSPROP = [
    {},
    {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "nesterov": True},
    {"momentum": 0.9, "lr_in_momentum": True, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    {"eps": 0, "alpha": 0.5},
    {"eps_in_sqrt": True, "eps": 1e-3, "centered": True},
]
ADAGRAD = [{}, {"eps": 0.1, "eps_in_sqrt": True, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}]
CASES = [*((RMSProp, rmsprop_update, h) for h in RMSPROP), *((AdaGrad, adagrad_update, h) for h in ADAGRAD)]


def matrix(seed, dtype, order="C"):
    return np.asarray(one(seed, dtype, 6).reshape(2, 3), order=order)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("make", "update", "given"), CASES, ids=lambda x: str(x) if isinstance(x, dict) else x.__name__
)
def test_equals_the_optimizer_to_the_bit(make, update, given, dtype):
    want, param = matrix(1, dtype, "F"), matrix(1, dtype, "F")
    opt = make(want, lr=0.1, **given)
    state = {name: np.zeros_like(param) for name, x in opt.state[0].items() if x.ndim}
    for step in range(3):
        grad = matrix(2 + step, dtype)  # copied, since its layout differs
        opt.step(grad)
        assert update(param, grad, lr=0.1, **state, **given) is None
        assert_same_bits(param, want)
        for name, x in state.items():
            assert_same_bits(x, opt.state[0][name])


def test_defaults_are_those_of_the_optimizer():
    for make, update in ((RMSProp, rmsprop_update), (AdaGrad, adagrad_update)):
        param, want = one(1), one(1)
        make(want, lr=0.1).step(one(2))
        update(param, one(2), np.zeros_like(param), lr=0.1)
        assert_same_bits(param, want)


def test_state_that_is_not_needed_is_not_touched():
    param, momentum_buffer, grad_avg = one(1), one(2), one(3)
    rmsprop_update(
        param, one(4), np.zeros_like(param), lr=0.1, momentum_buffer=momentum_buffer, grad_avg=grad_avg, nesterov=True
    )
    assert_same_bits(momentum_buffer, one(2))
    assert_same_bits(grad_avg, one(3))


@pytest.mark.parametrize("shape", [(), (0,), (1, 0, 2), (1,)])
def test_shapes_without_extent(shape):
    param, total = np.ones(shape), np.zeros(shape)
    adagrad_update(param, np.full(shape, -2.0), total, lr=0.5, eps=0)
    assert (param == 1.5).all()
    assert (total == 4).all()


# Refusals

NAMES = ["param", "grad", "square_avg", "grad_avg", "momentum_buffer"]
STATE = NAMES[2:]
PAIRS = list(combinations(NAMES, 2))


def arguments():
    """The arguments of an update that uses everything."""
    arrays = {name: one(seed, np.float32, 6).reshape(2, 3) for seed, name in enumerate(NAMES)}
    return {**arrays, "lr": 0.1, "momentum": 0.9, "centered": True}


def refuse(kind, *texts, **changed):
    """The update with these changes is refused, and writes nothing."""
    given = {**arguments(), **changed}
    given = {name: x for name, x in given.items() if x is not ABSENT}
    arrays = [x for x in given.values() if type(x) is np.ndarray and x.dtype != object]
    with refused(kind, *texts, of=arrays):
        rmsprop_update(**given)


ABSENT = object()


def read_only(a):
    a.flags.writeable = False
    return a


def test_the_arguments_alone_are_right():
    rmsprop_update(**arguments())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda a: a.astype(np.float64), TypeError, "dtype float64"),
        (lambda a: a.astype(np.int8), TypeError, "dtype int8"),
        (lambda a: a.astype(a.dtype.newbyteorder()), TypeError, "foreign byte order"),
        (lambda a: a.astype(object), TypeError, "dtype object"),
        (lambda a: a.T.copy(), ValueError, "shape (3, 2)"),
        (lambda a: a[:1], ValueError, "shape (1, 3)"),
        (lambda a: a[0], ValueError, "shape (3,)"),
        (lambda a: a.tolist(), TypeError, "is a list"),
        (lambda a: np.float32(1), TypeError, "is a numpy.float32"),
        (lambda a: "text", TypeError, "is a str"),
        (lambda a: None, TypeError, "is"),
        (np.ma.masked_array, TypeError, "is a masked array"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-",
)
def test_wrong_array(name, make, kind, text):
    given = arguments()
    changed = make(given[name])
    if name != "param":
        refuse(kind, name, text, **{name: changed})
    elif isinstance(changed, np.ndarray) and changed.dtype == np.float64:
        refuse(TypeError, "grad_avg has dtype float32", "square_avg has dtype float32", param=changed)
    elif kind is ValueError:
        refuse(ValueError, "square_avg has shape (2, 3)", "grad_avg has", "momentum_buffer has", param=changed)
    else:
        refuse(kind, "param", text, param=changed)


@pytest.mark.parametrize("name", ["param", *STATE])
def test_what_is_written_must_be_writeable_and_lie_alike(name):
    a = arguments()[name]
    refuse(ValueError, f"{name} is read-only", **{name: read_only(a.copy())})
    refuse(ValueError, f"{name} is not dense", **{name: np.zeros((2, 6), np.float32)[:, ::2]})
    refuse(ValueError, f"{name} is not aligned", **{name: np.zeros(25, np.uint8)[1:].view(np.float32).reshape(2, 3)})
    if name != "param":
        refuse(ValueError, f"{name} has shape (2, 3) and strides (4, 8)", **{name: np.asfortranarray(a)})
        refuse(ValueError, f"{name} has shape (2, 3) and strides (-12, 4)", **{name: a[::-1]})


def test_gradient_may_be_read_only_and_lie_anyhow():
    for change in (read_only, np.asfortranarray, lambda g: np.repeat(g, 2, axis=1)[:, ::2]):
        got, want = arguments(), arguments()
        rmsprop_update(**{**got, "grad": change(got["grad"].copy())})
        rmsprop_update(**want)
        assert_same_bits(got["param"], want["param"])


@pytest.mark.parametrize("shift", [0, 1, 5])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_any_two_that_overlap(first, second, shift):
    memory = one(9, np.float32, 12)
    given = {first: memory[:6].reshape(2, 3), second: memory[shift : shift + 6].reshape(2, 3)}
    refuse(ValueError, first, second, "overlap", **given)
    refuse(ValueError, first, second, "overlap", **{second: given[first], first: given[second]})


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_neighbours_in_memory_do_not_overlap(first, second):
    memory = one(9, np.float32, 12)
    rmsprop_update(**{**arguments(), first: memory[:6].reshape(2, 3), second: memory[6:].reshape(2, 3)})


def test_state_that_a_switch_needs_is_asked_for():
    refuse(TypeError, "momentum_buffer", "momentum", momentum_buffer=None)
    refuse(TypeError, "grad_avg", "centered", grad_avg=None)
    refuse(TypeError, "momentum_buffer", "grad_avg", momentum_buffer=ABSENT, grad_avg=ABSENT)


@pytest.mark.parametrize(
    ("changed", "kind", "text"),
    [
        ({"lr": math.sqrt}, TypeError, "lr is a callable"),
        ({"lr": None}, TypeError, "lr is None"),
        ({"lr": -1}, ValueError, "lr is -1"),
        ({"lr": 1e39}, ValueError, "infinite in float32"),
        ({"lr": "0.1"}, TypeError, "lr is '0.1'"),
        ({"alpha": 1}, ValueError, "alpha is 1"),
        ({"eps": 1e-60}, ValueError, "eps is 1e-60"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay is nan"),
        ({"momentum": 2}, ValueError, "momentum is 2"),
        ({"centered": 1}, TypeError, "centered is 1"),
        ({"maximize": None}, TypeError, "maximize is None"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-",
)
def test_wrong_hyperparameter(changed, kind, text):
    refuse(kind, text, **changed)


def test_all_problems_are_named_at_once():
    param = arguments()["param"]
    refuse(
        TypeError,
        *(
            "4 problems",
            "square_avg is a list",
            "grad_avg has dtype float64",
            "momentum_buffer",
            "overlap",
            "grad has shape",
        ),
        param=param,
        grad=np.zeros(6, np.float32),
        square_avg=[0.0],
        grad_avg=np.zeros((2, 3)),
        momentum_buffer=param,
    )


@pytest.mark.parametrize(
    ("changed", "kind", "texts"),
    [
        ({"sum": np.zeros(33)}, TypeError, ["sum has dtype float64"]),
        ({"sum": None}, TypeError, ["sum is"]),
        ({"sum": np.zeros(3, np.float32)}, ValueError, ["sum has shape (3,)"]),
        ({"grad": np.zeros(3, np.float32)}, ValueError, ["grad has shape (3,)"]),
        ({"grad": None}, TypeError, ["grad is"]),
        ({"eps": -1}, ValueError, ["eps is -1"]),
        ({"lr": math.sqrt}, TypeError, ["lr is a callable"]),
    ],
    ids=str,
)
def test_adagrad_refuses_alike(changed, kind, texts):
    given = {"param": one(1), "grad": one(2), "sum": np.abs(one(3)), "lr": 0.1, **changed}
    with refused(kind, *texts, of=[x for x in given.values() if isinstance(x, np.ndarray)]):
        adagrad_update(**given)
    given["sum"] = given["param"]
    given |= {"grad": one(2), "eps": 0, "lr": 0.1}
    with refused(ValueError, "sum", "param", "overlap", of=[given["param"]]):
        adagrad_update(**given)
