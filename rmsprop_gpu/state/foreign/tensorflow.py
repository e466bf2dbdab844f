"""The states of the optimizers of TensorFlow 1, and of tf.keras up to 2.10."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...arrays.checks import Problems, a, is_sequence, quoted
from ...conventions.schedules import InverseTimeDecay
from .by_kind import by_kind, by_path
from .common import Entry, Mine, agreed, check_counted, count, empty, number

_SLOTS = {False: {"rms": "square_avg", "mg": "grad_avg", "momentum": "momentum_buffer"}, True: {"accumulator": "sum"}}
# An object-based checkpoint, from tf.train.Checkpoint or model.save_weights, names the slots.
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_NAMED = re.compile(rf"(.+)/\.OPTIMIZER_SLOT/(.+)/([^/]+){re.escape(_VALUE)}")
# A name-based one, from tf.train.Saver, numbers them in the order in which TensorFlow 1 makes them: w/RMSProp, then
# w/RMSProp_1.
_NUMBERED = re.compile(r"(.+)/([^/]+?)(?:_(\d+))?")
_ORDER: dict[bool, dict[int, tuple[str, ...]]] = {
    False: {2: ("square_avg", "momentum_buffer"), 3: ("square_avg", "grad_avg", "momentum_buffer")},
    True: {1: ("sum",)},
}
_DEFAULT = {False: "RMSProp", True: "Adagrad"}
_OTHERS = ("Adam", "Adadelta", "Momentum", "Ftrl", "AdagradDA", "ProximalAdagrad", *_DEFAULT.values())
_HYPER = ("learning_rate", "decay", "rho", "momentum")  # what tf.keras stores as variables

_Variables = dict[str, tuple[str, Any]]  # by name, its place in words and its value
_Found = dict[str, list[Entry]]


def read_tf1(state: Any, steps: int | None, mine: Mine, problems: Problems) -> dict[str, Any]:
    """Read a checkpoint as a mapping from names to arrays; anything but the optimizer's slots belongs to the model."""
    variables = _variables(state, problems)
    if variables is None:
        return empty(mine)
    found, optimizer = _named(variables, mine, problems)
    if optimizer is None:
        found = _numbered(variables, mine, problems)
    for name in ("global_step", f"global_step{_VALUE}"):
        if name in variables:
            steps = _count(variables[name], steps, problems)
    check_counted(steps, mine, problems)
    # It has a slot for momentum even without momentum.
    return _by_kind(found, steps, mine, problems, spare=("momentum_buffer",))


def read_tf_keras_legacy(state: Any, steps: int | None, mine: Mine, problems: Problems) -> dict[str, Any]:
    """Read ``optimizer.variables()``, or a mapping from names to arrays, those of the variables or of a checkpoint."""
    variables = _variables(state, problems)
    if variables is None:
        return empty(mine)
    found, optimizer = _named(variables, mine, problems)
    if optimizer is None:
        found, own = _listed(variables, mine, problems)
    else:
        own = {tail: f"{optimizer}/{tail}{_VALUE}" for tail in ("iter", *_HYPER)}
    there = {tail: variables[name] for tail, name in own.items() if name in variables}
    if "iter" in there:
        steps = _count(there["iter"], steps, problems)
    elif steps is None:
        problems.add(ValueError, 'state lacks "iter"; wanted it there, or steps=')
    rates = {tail: (label, number(value, label, problems)) for tail, (label, value) in there.items() if tail != "iter"}
    _check_decay(rates, mine, problems)
    lr = rates["learning_rate"][1] if "learning_rate" in rates else None
    found = {name: [entry._replace(lr=lr) for entry in entries] for name, entries in found.items()}
    return _by_kind(found, steps, mine, problems)


def _variables(state: Any, problems: Problems) -> _Variables | None:
    """The given state by name, without the ``:0`` that TensorFlow appends to the names of variables."""
    if isinstance(state, Mapping):
        pairs = list(state.items())
    elif is_sequence(state):
        pairs = [(getattr(v, "name", None), v) for v in state]
    else:
        problems.add(TypeError, f"state is {a(type(state))}; wanted a mapping from names to arrays, or variables")
        return None
    variables = {}
    for i, (name, value) in enumerate(pairs):
        if isinstance(name, str):
            variables[re.sub(r":\d+$", "", name)] = (f"state[{quoted(name)}]", value)
        else:
            problems.add(TypeError, f"state[{i}] is {a(type(value))} without a name; wanted a variable of TensorFlow")
    return variables


def _named(variables: _Variables, mine: Mine, problems: Problems) -> tuple[_Found, str | None]:
    """The slots in an object-based checkpoint, and the optimizer's path in it; None if it is not such a checkpoint."""
    slots = {name: match for name in variables if (match := _NAMED.fullmatch(name))}
    optimizers = list(dict.fromkeys(match[2] for match in slots.values()))
    _check_one(optimizers, problems)
    found = _Found()
    for name, (param, _, slot) in ((name, match.groups()) for name, match in slots.items()):
        label, value = variables[name]
        if slot in _SLOTS[mine.adagrad]:
            found.setdefault(_SLOTS[mine.adagrad][slot], []).append(Entry(param, label, value))
        else:
            problems.add(ValueError, f"{label} has no counterpart here; wanted the slots of {_DEFAULT[mine.adagrad]}")
    return found, optimizers[0] if optimizers else None


def _numbered(variables: _Variables, mine: Mine, problems: Problems) -> _Found:
    """The slots in a name-based checkpoint."""
    slots = dict[str, dict[str, dict[int, str]]]()
    for name in variables:
        if match := _NUMBERED.fullmatch(name):
            slots.setdefault(match[2], {}).setdefault(match[1], {})[int(match[3] or 0)] = name
    found = _Found()
    optimizer = _optimizer(slots, variables, mine, problems)
    for param, names in (slots[optimizer] if optimizer else {}).items():
        kinds = _ORDER[mine.adagrad].get(len(names), ())
        if set(names) != set(range(len(kinds))):
            said = ", ".join(quoted(name) for name in names.values())
            problems.add(ValueError, f"state has the slots {said}; wanted those of one {_DEFAULT[mine.adagrad]}")
            continue
        for number_, kind in enumerate(kinds):
            found.setdefault(kind, []).append(Entry(param, *variables[names[number_]]))
    return found


def _optimizer(
    slots: Mapping[str, Mapping[str, Mapping[int, str]]], variables: _Variables, mine: Mine, problems: Problems
) -> str | None:
    """The optimizer's name: the default, or any other name under which variables have slots."""
    if _DEFAULT[mine.adagrad] in slots:
        return _DEFAULT[mine.adagrad]
    another = next((next(iter(names.values())) for n in _OTHERS for names in slots.get(n, {}).values()), None)
    if "beta1_power" in variables:  # Adam, whatever its slots are called
        another = "beta1_power"
    if another:
        text = f"is from another optimizer; wanted the slots of {_DEFAULT[mine.adagrad]}"
        problems.add(ValueError, f"{variables[another][0]} {text}")
        return None
    named = [] if mine.adagrad else [n for n, of in slots.items() if _is_one(of, variables)]
    _check_one(named, problems)
    return named[0] if named else None


def _is_one(slots: Mapping[str, Mapping[int, str]], variables: _Variables) -> bool:
    """Are these the slots of an RMSProp? Only averages also lie in the scope of a variable, one for each variable."""
    return all(param in variables and len(names) > 1 for param, names in slots.items())


def _listed(variables: _Variables, mine: Mine, problems: Problems) -> tuple[_Found, dict[str, str]]:
    """The slots among an optimizer's variables, without the scope of its count, and the names of the others."""
    slots, found, own = _SLOTS[mine.adagrad], _Found(), dict[str, str]()
    first = f"/{next(iter(slots))}"  # every parameter has it; others may have the name of a hyperparameter
    params = {name.removesuffix(first) for name in variables if name.endswith(first)}
    for name, (label, value) in variables.items():
        param, _, tail = name.rpartition("/")
        if param in params and tail in slots:
            found.setdefault(slots[tail], []).append(Entry(param, label, value))
        elif tail in ("iter", *_HYPER):
            own[tail] = name
        else:
            text = f"has no counterpart here; wanted the variables of {_DEFAULT[mine.adagrad]} of tf.keras up to 2.10"
            problems.add(ValueError, f"{label} {text}")
    scope = own.get("iter", "").removesuffix("iter")
    if all(param.startswith(scope) for param in params):
        found = {n: [e._replace(param=e.param.removeprefix(scope)) for e in them] for n, them in found.items()}
    return found, own


def _check_one(optimizers: list[str], problems: Problems) -> None:
    if len(optimizers) > 1:
        said = ", ".join(map(repr, optimizers))
        problems.add(ValueError, f"state holds the slots of the optimizers {said}; wanted those of one")


def _check_decay(rates: Mapping[str, tuple[str, float]], mine: Mine, problems: Problems) -> None:
    """Refuse a `decay` that differs from ours, and a decaying learning rate with a different start."""
    for i, h in enumerate(mine.hyper):
        decays = isinstance(h["lr"], InverseTimeDecay)
        if callable(h["lr"]) and not decays:
            continue  # a schedule of the user's own
        ours = {"decay": h["lr"].decay, "learning_rate": h["lr"].lr} if decays else {"decay": 0.0}
        for name, x in ours.items():
            label, there = rates.get(name, ("", x))
            if not callable(x) and np.float32(x) != np.float32(there):  # TensorFlow stores them in float32
                wanted = f"wanted {x!r}, as here in param_groups[{i}], or build with {name}={there!r}"
                problems.add(ValueError, f"{label} is {there!r}; {wanted}")


def _count(variable: tuple[str, Any], steps: int | None, problems: Problems) -> int:
    label, value = variable
    return agreed(count(value, label, problems), label, steps, problems)


def _by_kind(
    found: _Found, steps: int | None, mine: Mine, problems: Problems, spare: tuple[str, ...] = ()
) -> dict[str, Any]:
    keys = {tensor.key: tensor.key for tensor in mine.tensors}
    return by_kind(by_path(found, mine, problems), keys, steps or 0, mine, problems, anew=("ema",), spare=spare)
