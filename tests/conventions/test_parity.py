"""from_preset, compared with trajectories recorded from the packages (record_presets.py), and with live ones."""

import importlib.util
import inspect
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import record_presets
from record_presets import DATA, PRESETS, STATE_NAMES, split

from rmsprop_gpu import RMSProp, hyper, reference


class Case(NamedTuple):
    """One recorded case: its arguments and results."""

    preset: str
    dtype: str
    words: str
    arguments: dict
    lrs: list  # None if left at its default
    grads: list  # per step, per tensor
    params: list  # before the first step, and after each
    averages: list | None  # after each step
    state: dict  # the final one


def read(folder):
    """The cases in a folder, by name."""
    presets, cases, arrays = record_presets.load(folder)
    rows, found = {}, {}
    for case in cases:
        preset, dtype = case["preset"], case["dtype"]
        head, row = presets[preset], rows.setdefault((preset, dtype), 0)
        rows[preset, dtype] += 1
        shapes = [tuple(shape) for shape in head["shapes"]]

        def get(key, row=row, prefix=f"{preset}/{dtype}", shapes=shapes):
            array = arrays.get(f"{prefix}/{key}")
            if array is None or np.isnan(array[row]).any():
                return None
            return [split(x, shapes) for x in np.atleast_2d(array[row])]

        lrs = head["lrs"]
        found["-".join([preset, dtype, *case["words"].split()])] = Case(
            preset,
            dtype,
            case["words"],
            case["arguments"],
            lrs if case["lr_changes"] else [None] * len(lrs),
            [split(x, shapes) for x in arrays[f"{preset}/grads"].astype(dtype)],
            [split(arrays[f"{preset}/param"].astype(dtype), shapes), *get("params")],
            get("averages"),
            {key: value[0] for key in STATE_NAMES if (value := get(key)) is not None},
        )
    return found


CASES = read(DATA)

# The bound for an update. Every step starts from the recorded parameter, while the state runs freely over all 25 steps.
# * float64: RELATIVE times the tensor's largest update in that step, plus ULPS ulps of the parameter, for the same
#   reasons as in recorded.py: an update is only known through the parameter, which each side rounds at most twice.
# * float32: ULPS ulps of the parameter or RELATIVE times the element's own update, whichever is more, where
#   - with momentum, an update counts with the magnitudes of its steps (`summed`): where they cancel, their roundings
#     remain;
#   - in centered mode, each step counts (v + 2 |m| sqrt(v)) / (v - m^2 + eps) times, if that is above 1: it magnifies a
#     relative error of v, and of the gradients averaged in m (their magnitudes average at most sqrt(v)), in the term
#     under the root. Decay makes gradients nearly constant, and this factor reaches hundreds;
#   - TensorFlow computes 1 - rho from a rho that was rounded to float32, which shifts v (`relative`).
#   Nothing is added for other differences of packages in float32, such as XLA's rsqrt. bitsandbytes divides exactly on
#   the CPU. Its CUDA kernel, which divides approximately, is not recorded.
RELATIVE = {"float64": 1e-12, "float32": 1e-6}
ULPS = {"float64": 2, "float32": 4}
ALPHA_IN_FLOAT32 = ("tf1", "tf_keras_legacy")


def relative(case, alpha):
    """RELATIVE, plus the effect of a rounded alpha on the root of v in float32."""
    if case.dtype == "float64" or case.preset not in ALPHA_IN_FLOAT32:
        return RELATIVE[case.dtype]
    return RELATIVE[case.dtype] + 0.5 * abs(float(np.float32(alpha)) - alpha) / (1 - alpha)


def bound(case, h, before, after, size):
    """How far an update may be from the recorded one. `size` is the scale for float32."""
    ulps = ULPS[case.dtype] * np.spacing(np.maximum(np.abs(before), np.abs(after))).astype(np.float64)
    if case.dtype == "float64":
        return relative(case, h["alpha"]) * np.abs(difference(after, before)).max(initial=0) + ulps
    return np.maximum(relative(case, h["alpha"]) * size, ulps)


def summed(h, state, old_buffer, old_sum, update):
    """The size of an update with its steps added by magnitude, and the sum that momentum keeps."""
    factor, state = 1.0, {name: value.astype(np.float64) for name, value in state.items()}
    if h["centered"]:
        v, m, eps = state["square_avg"], state["grad_avg"], h["eps"] if h["eps_in_sqrt"] else h["eps"] ** 2
        factor = np.maximum(1.0, (v + 2 * np.abs(m) * np.sqrt(v)) / (np.maximum(v - m**2, 0) + eps))
    if not h["momentum"]:
        return factor * np.abs(update), old_sum
    own = factor * np.abs(state["momentum_buffer"] - h["momentum"] * old_buffer)
    new_sum = h["momentum"] * old_sum + own
    size = h["momentum"] * new_sum + own if h["nesterov"] else new_sum
    return size * (1.0 if h["lr_in_momentum"] else h["lr"]), new_sum


def difference(after, before):
    return after.astype(np.float64) - before


def worst(got, want, allowed):
    """The largest fraction of the bound, or NaN if there is one."""
    return np.max(np.abs(got - want) / allowed, initial=0)


def excess(case, made=lambda opt: opt):
    """The largest |got - want| / bound over a case's updates, averages and final state: above 1, or NaN, is a failure.

    `made` may replace the preset's optimizer before its first step.
    """
    params = [array.copy() for array in case.params[0]]
    opt = made(RMSProp.from_preset(case.preset, params, **case.arguments))
    h, shares, sums = opt.param_groups[0], [], [0.0] * len(params)
    for step, (lr, grads) in enumerate(zip(case.lrs, case.grads, strict=True)):
        for param, before in zip(params, case.params[step], strict=True):
            param[...] = before
        if lr is not None and step > 0:  # the first rate was an argument
            opt.lr = lr
        buffers = [np.array(opt.state[i].get("momentum_buffer", 0), np.float64) for i in range(len(params))]
        opt.step(grads)
        for i, (param, before, after) in enumerate(zip(params, case.params[step], case.params[step + 1], strict=True)):
            size, sums[i] = summed(h, opt.state[i], buffers[i], sums[i], difference(after, before))
            allowed = bound(case, h, before, after, size)
            shares.append(worst(difference(param, before), difference(after, before), allowed))
            if case.averages:
                # An average of parameters has three roundings per step on each side, and keeps those of all steps.
                ulps = 2 * 3 * 0.5 * (step + 1) * np.spacing(np.abs(case.averages[step][i]).max(initial=0))
                shares.append(worst(opt.ema[i], case.averages[step][i], allowed + ulps))
    if case.dtype == "float64":
        shares.append(state_excess(opt, case))
    return np.max(shares)  # unlike max(), this keeps NaN


def state_excess(opt, case):
    """The same for the final state. Infinite if the kinds of state differ."""
    recorded = set(case.state)
    if opt.param_groups[0]["momentum"] == 0:
        recorded -= {"momentum_buffer"}  # TensorFlow 1, Graves and optax's trace have one even so
    if recorded != set(STATE_NAMES) & set(opt.state[0]):
        return np.inf
    return np.max(
        [
            worst(opt.state[i][name], want, RELATIVE["float64"] * np.abs(want).max(initial=0))
            for name in recorded
            for i, want in enumerate(case.state[name])
        ]
    )


def test_every_preset_is_recorded():
    got = {(case.preset, case.dtype) for case in CASES.values()}
    assert got == {(name, dtype) for name, preset in PRESETS.items() for dtype in preset.dtypes}


def kernel(name):
    """What a case compiles. Sorting by this groups a kernel's cases, so that mostly one pytest process makes it."""
    opt = RMSProp.from_preset(CASES[name].preset, np.zeros(1, CASES[name].dtype), **CASES[name].arguments)
    return CASES[name].dtype, hyper.variant(opt.param_groups[0].hyper(), False)


@pytest.mark.parametrize("name", sorted(CASES, key=kernel))
def test_recorded_trajectory(name):
    assert excess(CASES[name]) <= 1


class Oracle:
    """Takes the steps of a fresh optimizer in float64 with reference.py. It compiles nothing, whatever the switches."""

    RULE = set(inspect.signature(reference.rmsprop).parameters) & set(hyper.RMSPROP)

    def __init__(self, opt):
        self.param_groups, self.ema = [opt.param_groups[0].hyper()], {}
        self.params = opt.param_groups[0]["params"]
        self.state = [{"square_avg": np.array(opt.state[i]["square_avg"], np.float64)} for i in range(len(self.params))]

    def __setattr__(self, name, value):
        if name == "lr":
            self.param_groups[0]["lr"] = value
        else:
            super().__setattr__(name, value)

    def step(self, grads):
        h = self.param_groups[0]
        every = reference.clip_factor([g.astype(np.float64) for g in grads], h["global_clipnorm"] or np.inf)
        for i, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
            g = grad.astype(np.float64)
            g = g * reference.clip_factor([g], h["clipnorm"] or np.inf) * every
            after, self.state[i] = reference.rmsprop(param, g, self.state[i], **{name: h[name] for name in self.RULE})
            kept = h["ema_momentum"] if i in self.ema else 0.0
            self.ema[i] = reference.moving_average(self.ema.get(i, 0.0), after, kept, 1 - kept)
            param[...] = after


# What the tests above can detect: a plant changes one thing before the first step, and exactly the cases in which it
# `matters`, by their hyperparameters, must then fail. In float64, where any misplaced eps exceeds the bound; a preset's
# meaning does not depend on the dtype. With the oracle, since each flipped switch would need another kernel.
SEEN = [name for name, case in CASES.items() if case.dtype == PRESETS[case.preset].dtypes[0]]


def test_the_oracle_does_what_the_packages_do():
    shares = {name: excess(CASES[name], Oracle) for name in SEEN}
    assert not {name: share for name, share in shares.items() if not share <= 1}


def flip(name):
    def plant(opt):
        opt.param_groups[0][name] = not opt.param_groups[0][name]

    return plant


def scale(name, factor):
    def plant(opt):
        opt.param_groups[0][name] *= factor

    return plant


def start_from_the_other(opt):
    for i in range(len(opt.state)):
        opt.state[i]["square_avg"][...] = 1 - opt.state[i]["square_avg"]


PLANTS = {
    "eps on the other side of the root": (flip("eps_in_sqrt"), lambda h, case: h["eps"] != 0),
    "eps": (scale("eps", 0.9), lambda h, case: h["eps"] != 0),
    "alpha": (scale("alpha", 0.999), lambda h, case: True),
    "square_avg from 1 for 0, and 0 for 1": (start_from_the_other, lambda h, case: True),
    # If lr is constant, only the buffer shows it.
    "lr on the other side of the momentum": (flip("lr_in_momentum"), lambda h, case: h["momentum"] != 0),
    "momentum": (scale("momentum", 0.999), lambda h, case: h["momentum"] != 0),
    "nesterov": (flip("nesterov"), lambda h, case: h["momentum"] != 0),
    "decay": (scale("weight_decay", 0.999), lambda h, case: h["weight_decay"] != 0),
    "decay of the other form": (flip("decoupled_weight_decay"), lambda h, case: h["weight_decay"] != 0),
    "centered": (flip("centered"), lambda h, case: True),
    "bias correction": (flip("bias_correction"), lambda h, case: True),
    "sign": (flip("maximize"), lambda h, case: True),
    "average": (scale("ema_momentum", 0.999), lambda h, case: h["use_ema"]),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bug_is_seen(plant):
    change, matters = PLANTS[plant]
    got, want = set(), set()
    for name in SEEN:
        case, h = CASES[name], {}

        def planted(opt, h=h):
            h |= opt.param_groups[0]
            opt = Oracle(opt)
            change(opt)
            return opt

        if not excess(case, planted) <= 1:
            got.add(name)
        if matters(h, case):
            want.add(name)
    assert got == want
    assert want


@pytest.mark.parametrize("argument", ["clipvalue", "clipnorm", "global_clipnorm", "ema_momentum"])
def test_wrong_argument_is_seen(argument):
    names = [name for name in SEEN if argument in CASES[name].words.split()]
    assert names
    for name in names:
        arguments = CASES[name].arguments
        wrong = CASES[name]._replace(arguments={**arguments, argument: 0.999 * arguments[argument]})
        assert not excess(wrong, Oracle) <= 1, name


# Other hyperparameters, shapes and gradients, recorded now from the packages that are installed, in a separate process,
# since JAX and TensorFlow choose their devices and precision on import. Once for presets of the same packages, in the
# most telling dtype, and with the oracle: the tests above have compared the kernels.
LIVE = {}
for preset in PRESETS:
    LIVE.setdefault(PRESETS[preset].packages, []).append(preset)


@pytest.mark.parametrize("packages", LIVE)
def test_live_trajectory(packages, tmp_path):
    for package in packages.split():
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, record_presets.__file__, *LIVE[packages], "--to", str(tmp_path), "--live", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    shares = {name: excess(case, Oracle) for name, case in read(tmp_path).items()}
    assert {name.partition("-")[0] for name in shares} == set(LIVE[packages])
    assert not {name: share for name, share in shares.items() if not share <= 1}
