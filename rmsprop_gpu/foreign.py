"""States of torch, Keras and optax as our `state_dict`, and ours as torch's; no library is imported to read one."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from . import dtypes
from .arrays import Problems, Tensor, a, plain_array, quoted
from .backends import is_cuda, kind_of
from .extras import extra
from .state import VERSION, check_entry, needed, where
from .structure import is_sequence
from .table import BUFFERS, COUNTERS


class Mine(NamedTuple):
    """The optimizer that is to continue: its class, and of each group the parameters and hyperparameters."""

    optimizer: str
    adagrad: bool
    members: list[list[Tensor]]
    hyper: list[dict[str, Any]]

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensors in self.members for tensor in tensors]


class Entry(NamedTuple):
    """One array of a foreign state: of which parameter, how to write its place, and itself."""

    param: str
    label: str
    value: Any


def translated(framework: object, state: Any, steps: object, mine: Mine, problems: Problems) -> dict[str, Any]:
    """A foreign state in the form of `state_dict`; what cannot be mapped is added to the problems.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> opt = RMSProp(np.ones(3), momentum=0.9)
    >>> opt.load_foreign("keras", {"rms/iteration": 7, "rms/w_velocity": np.ones(4), "rms/w_moment": np.ones(3)})
    Traceback (most recent call last):
        ...
    ValueError: 3 problems, nothing was changed:
      state["rms/w_moment"] has no counterpart here; wanted the variables of keras.optimizers.RMSprop
      state lacks the arrays of "momentum_buffer", which momentum=0.9 in param_groups[0] needs
      state["rms/w_velocity"] has shape (4,); wanted (3,)
    """
    if not isinstance(framework, str) or framework not in READERS:
        raise ValueError(f"framework is {framework!r}; wanted {', '.join(map(repr, READERS))}")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 0):
        problems.add(TypeError, f"steps is {steps!r}; wanted None or a count >= 0")
        steps = None
    return READERS[framework](state, steps, mine, problems)


# torch

# Ours that torch's rule has fixed; what has no counterpart there (clipping, say) stays as it is here.
_TORCH_FIXED = {
    "nesterov": False,
    "eps_in_sqrt": False,
    "lr_in_momentum": False,
    "initial_scale": 0.0,
    "bias_correction": False,
    "decoupled_weight_decay": False,
}
_TORCH = {
    False: ("lr", "alpha", "eps", "weight_decay", "momentum", "centered"),
    True: ("lr", "eps", "weight_decay", "lr_decay"),
}
# How torch computes, and what its schedulers leave in the groups: nothing that the next step reads.
_TORCH_IGNORED = {
    "params", "param_names", "capturable", "foreach", "differentiable", "fused",
    "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum",
}  # fmt: skip


def _from_torch(state: Any, steps: int | None, mine: Mine, problems: Problems) -> dict[str, Any]:
    """torch.optim.RMSprop's or Adagrad's ``state_dict()``."""
    entries, groups = (state.get(n) if isinstance(state, Mapping) else None for n in ("state", "param_groups"))
    if not isinstance(entries, Mapping) or not isinstance(groups, (list, tuple)):
        problems.add(TypeError, f'state is {a(type(state))}; wanted torch\'s, with "state" and a list "param_groups"')
        return _frame(mine)
    if len(groups) != len(mine.members):
        problems.add(ValueError, f'state["param_groups"] has {len(groups)} groups; wanted {len(mine.members)}')
        return _frame(mine)
    known, used = {tensor.key for tensor in mine.tensors}, set()
    frame, counts = _frame(mine), [0]
    for i, (group, tensors) in enumerate(zip(groups, mine.members, strict=True)):
        label = f'state["param_groups"][{i}]'
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            problems.add(TypeError, f'{label} is {a(type(group))}; wanted a mapping with a list "params"')
            return _frame(mine)
        h = frame["param_groups"][i] = {**frame["param_groups"][i], **_torch_hyper(group, mine, i, label, problems)}
        ids = list(group["params"])
        used |= set(ids)
        names = list(group.get("param_names") or ids)
        order = _order(names if len(names) == len(ids) else ids, [t.key for t in tensors], known, label, problems)
        for tensor, at in zip(tensors, order, strict=False):
            place, entry = f'state["state"][{ids[at]!r}]', entries.get(ids[at])
            if entry is not None and not isinstance(entry, Mapping):
                problems.add(TypeError, f"{place} is {a(type(entry))}; wanted a mapping from name to tensor")
                continue
            count, found = _torch_entry(entry or {}, place, tensor, h, mine, problems)
            frame["state"][tensor.key] = {**_counters(count, tensor, h, mine), **found}
            counts.append(count)
    for key in entries:
        if key not in used:
            problems.add(ValueError, f'state["state"][{key!r}] belongs to no parameter of state["param_groups"]')
    return {**frame, "steps": max(counts) if steps is None else steps}


def _torch_hyper(group: Mapping[str, Any], mine: Mine, i: int, label: str, problems: Problems) -> dict[str, Any]:
    """Our hyperparameters for a group of torch's."""
    wanted = _TORCH[mine.adagrad]
    for name in wanted:
        if name not in group:
            problems.add(ValueError, f"{label} lacks {name!r}")
    for name in group:
        if name not in (*wanted, "maximize", "initial_accumulator_value") and name not in _TORCH_IGNORED:
            problems.add(ValueError, f"{label} has {name!r}, which has no counterpart here")
    if mine.adagrad and group.get("lr_decay"):
        problems.add(ValueError, f'{label}["lr_decay"] is {group["lr_decay"]!r}; wanted 0, or here a callable lr')
    ours = mine.hyper[i]
    values = {n: group[n] for n in (*wanted, "maximize") if n in group and n in ours}
    if hasattr(values.get("lr"), "item"):  # torch takes a tensor
        values["lr"] = values["lr"].item()
    fixed = {n: value for n, value in _TORCH_FIXED.items() if n in ours}
    if mine.adagrad:
        fixed["initial_scale"] = group.get("initial_accumulator_value", 0)
    return {**fixed, "maximize": False, **values}


def _torch_entry(
    entry: Mapping[str, Any], place: str, tensor: Tensor, h: Mapping[str, Any], mine: Mine, problems: Problems
) -> tuple[int, dict[str, Any]]:
    """The step and the buffers of one parameter; without an entry, as torch leaves one without gradient, new ones."""
    wanted = [name for name in _needed(h, mine) if name not in COUNTERS]
    if not entry:
        fill = h["initial_scale"] if isinstance(h["initial_scale"], (int, float)) else 0.0
        compute = dtypes.compute_dtype(tensor.layout.dtype)
        new = {name: np.zeros(tensor.layout.shape, compute) for name in wanted if name in _TORCH_BUFFERS}
        if mine.adagrad:
            new["sum"] += compute.type(fill)
        return 0, new
    found = {}
    for name in ["step", *wanted]:
        if name not in entry:
            problems.add(ValueError, f"{place} lacks {name!r}, which its hyperparameters need")
    for name, value in entry.items():
        if name == "step":
            continue
        if name not in _TORCH_BUFFERS or (name == "sum") != mine.adagrad:
            problems.add(ValueError, f"{place} has {name!r}, which has no counterpart here")
        elif value is not None:
            found[name] = _taken(value, f"{place}[{quoted(name)}]", name, tensor, problems)
    return _count(entry.get("step", 0), f'{place}["step"]', problems), found


_TORCH_BUFFERS = ("square_avg", "sum", "grad_avg", "momentum_buffer")


def to_torch(snapshot: Callable[[], Mapping[str, Any]], hyper: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Our `state_dict()`, taken once it is known that torch can have it, as ``load_state_dict`` there takes it."""
    refused = [f"param_groups[{i}][{quoted(n)}] = {h[n]!r}" for i, h in enumerate(hyper) for n in _not_in_torch(h)]
    if refused:
        raise ValueError(f"torch has no {', '.join(refused)}; wanted each at its neutral value")
    with extra("bench"):
        torch: Any = import_module("torch")
    state_dict = snapshot()
    adagrad = state_dict["optimizer"] == "AdaGrad"

    def tensor(x: Any) -> Any:
        return torch.from_numpy(x) if isinstance(x, np.ndarray) else torch.from_dlpack(x)

    groups: list[dict[str, Any]] = []
    state: dict[int, dict[str, Any]] = {}
    for h, keys in zip(hyper, (group["params"] for group in state_dict["param_groups"]), strict=True):
        own = {n: h[n] for n in (*_TORCH[adagrad], "maximize") if n in h}
        ids = list(range(len(state), len(state) + len(keys)))
        for index, key in zip(ids, keys, strict=True):
            arrays = {n: x for n, x in state_dict["state"][key].items() if n in needed(h, adagrad)}
            step = torch.tensor(float(arrays.pop("step")), dtype=torch.float32)
            state[index] = {"step": step, **{n: tensor(x) for n, x in arrays.items() if n in BUFFERS}}
        if adagrad:
            own |= {"lr_decay": 0, "initial_accumulator_value": h["initial_scale"], "fused": None}
        else:
            own |= {"capturable": False}
        groups.append({**own, "foreach": None, "differentiable": False, "params": ids})
    return {"state": state, "param_groups": groups}


def _not_in_torch(h: Mapping[str, Any]) -> list[str]:
    """The hyperparameters of a group that have an effect, and none in torch."""
    off = {"initial_scale"}  # what the state has started from
    if h["eps"] == 0:
        off.add("eps_in_sqrt")
    if not h["weight_decay"]:
        off.add("decoupled_weight_decay")
    if not h.get("momentum"):
        off |= {"lr_in_momentum", "nesterov"}
    if not h.get("use_ema"):
        off |= {n for n in h if n.startswith("ema_")}
    own = {"alpha", "eps", "weight_decay", "momentum", "centered", "maximize"}
    return [n for n, value in h.items() if n not in own | off and value and (n != "lr" or callable(value))]


# Keras

_KERAS = {
    False: {"velocity": "square_avg", "momentum": "momentum_buffer", "average_gradient": "grad_avg", "average": "ema"},
    True: {"accumulator": "sum", "average": "ema"},
}


def _from_keras(state: Any, steps: int | None, mine: Mine, problems: Problems) -> dict[str, Any]:
    """Keras's ``optimizer.variables``, or a mapping from their paths to arrays."""
    if isinstance(state, Mapping):
        variables = list(state.items())
    elif is_sequence(state):
        variables = [(getattr(v, "path", None) or getattr(v, "name", None), v) for v in state]
    else:
        problems.add(TypeError, f"state is {a(type(state))}; wanted optimizer.variables, or a mapping by their paths")
        return _frame(mine)
    kinds, found, lr = _KERAS[mine.adagrad], dict[str, list[Entry]](), None
    for i, (path, value) in enumerate(variables):
        if not isinstance(path, str):
            problems.add(TypeError, f"state[{i}] is {a(type(value))} without a path; wanted a variable of Keras")
            continue
        label, tail = f"state[{quoted(path)}]", path.rpartition("/")[2]
        kind = next((kind for kind in kinds if tail.endswith(f"_{kind}")), None)
        if re.match(r"(n?adam|lamb)\w*/", path):  # of the same two names as RMSprop's with momentum
            problems.add(ValueError, f"{label} is of another optimizer; wanted the variables of {_keras_name(mine)}")
        elif tail in ("iteration", "iterations"):
            steps = _agreed(_count(value, label, problems), label, steps, problems)
        elif tail == "learning_rate":
            lr = _number(value, label, problems)
        elif tail.endswith("_gradient_accumulator"):
            array = _readable(value, None)
            if not isinstance(array, np.ndarray) or array.any():
                problems.add(ValueError, f"{label} holds gradients between two steps; wanted zeros: save after a step")
        elif kind is None:
            problems.add(ValueError, f"{label} has no counterpart here; wanted the variables of {_keras_name(mine)}")
        else:
            found.setdefault(kinds[kind], []).append(Entry(tail[: -len(kind) - 1], label, value))
    if steps is None:
        problems.add(ValueError, 'state lacks "iteration"; wanted it there, or steps=')
    flat = {tensor.key: tensor.key.replace("/", "_") for tensor in mine.tensors}  # as Keras does
    return _by_kind(found, flat, steps or 0, lr, mine, problems)


def _keras_name(mine: Mine) -> str:
    return f"keras.optimizers.{'Adagrad' if mine.adagrad else 'RMSprop'}"


# optax

# States that say nothing but a count or a learning rate, and may hold another one.
_OPTAX_PASSED = {
    "EmptyState", "MaskedState", "ApplyIfFiniteState", "ScaleByScheduleState",
    "InjectHyperparamsState", "InjectStatefulHyperparamsState",
}  # fmt: skip
_OPTAX = {
    "ScaleByRmsState": {"nu": "square_avg"},
    "ScaleByRmsWithCountState": {"nu": "square_avg"},
    "ScaleByRStdDevState": {"nu": "square_avg", "mu": "grad_avg"},
    "ScaleByRStdDevWithCountState": {"nu": "square_avg", "mu": "grad_avg"},
    "ScaleByRssState": {"sum_of_squares": "sum"},
    "TraceState": {"trace": "momentum_buffer"},
}


def _from_optax(state: Any, steps: int | None, mine: Mine, problems: Problems) -> dict[str, Any]:
    """The state of optax.rmsprop or optax.adagrad, inside whatever ``chain``, or ``inject_hyperparams``."""
    found, lr = dict[str, list[Entry]](), None
    before = None  # the kind of the state before this one in the chain
    for label, node in _nodes(state, "state"):
        kind = type(node).__name__
        fields = _OPTAX.get(kind, {})
        if not fields and kind not in _OPTAX_PASSED:
            problems.add(TypeError, f"{label} is {a(type(node))}; wanted the state of optax.rmsprop or optax.adagrad")
        if kind == "TraceState" and not ("square_avg" in found and before in {"EmptyState", "ScaleByScheduleState"}):
            text = "does not come behind the learning rate; wanted the order of optax.rmsprop, lr inside the momentum"
            problems.add(ValueError, f"{label} {text}")
        before = kind
        for field, name in fields.items():
            if name in found:
                problems.add(ValueError, f"{label}.{field} is a second one; wanted the state of one optimizer")
            elif (name == "sum") != mine.adagrad:
                problems.add(ValueError, f"{label}.{field} has no counterpart in {mine.optimizer}")
            else:
                found[name] = list(_leaves(getattr(node, field), (), f"{label}.{field}"))
        if hasattr(node, "_fields") and "count" in node._fields and (fields or kind in _OPTAX_PASSED):
            steps = _agreed(_count(node.count, f"{label}.count", problems), f"{label}.count", steps, problems)
        rate = getattr(node, "hyperparams", {})
        if isinstance(rate, Mapping) and "learning_rate" in rate:
            lr = _number(rate["learning_rate"], f'{label}.hyperparams["learning_rate"]', problems)
    for i, h in enumerate(mine.hyper):
        wants = "bias_correction=True" if h.get("bias_correction") else "a callable lr" if callable(h["lr"]) else ""
        if steps is None and wants:
            problems.add(ValueError, f"state has no count, which {wants} in param_groups[{i}] needs; wanted steps=")
    keys = [tensor.key for tensor in mine.tensors]
    for name, entries in found.items():
        dotted = [entry._replace(param=entry.param.replace("/", ".")) for entry in entries]
        if {entry.param for entry in dotted} == set(keys):
            found[name] = dotted
    return _by_kind(found, {key: key for key in keys}, steps or 0, lr, mine, problems, lambda x: -x)


def _nodes(x: Any, label: str) -> Iterator[tuple[str, Any]]:
    """The named tuples of a state of optax in the order of the chain, with their places."""
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        yield label, x
        if hasattr(x, "inner_state"):
            yield from _nodes(x.inner_state, f"{label}.inner_state")
    elif isinstance(x, (list, tuple)):
        for i, entry in enumerate(x):
            yield from _nodes(entry, f"{label}[{i}]")
    else:
        yield label, x


def _leaves(tree: Any, path: tuple[str, ...], label: str) -> Iterator[Entry]:
    """The arrays of a pytree in the order of jax.tree.leaves, under their names joined by slashes."""
    if isinstance(tree, Mapping):
        for key in tree if isinstance(tree, OrderedDict) else sorted(tree):
            yield from _leaves(tree[key], (*path, str(key)), f"{label}[{quoted(key)}]")
    elif isinstance(tree, (list, tuple)):
        for i, entry in enumerate(tree):
            yield from _leaves(entry, (*path, str(i)), f"{label}[{i}]")
    elif tree is not None:
        yield Entry("/".join(path), label, tree)


# What they share

READERS: dict[str, Callable[[Any, Any, Mine, Problems], dict[str, Any]]] = {
    "torch": _from_torch,
    "keras": _from_keras,
    "optax": _from_optax,
}
_SWITCH = {"momentum_buffer": "momentum", "grad_avg": "centered", "ema": "use_ema"}


def _frame(mine: Mine) -> dict[str, Any]:
    """A state dict without state and with our own hyperparameters."""
    groups = [
        {"params": [t.key for t in tensors], **h, "lr": None if callable(h["lr"]) else h["lr"]}
        for tensors, h in zip(mine.members, mine.hyper, strict=True)
    ]
    return {"optimizer": mine.optimizer, "version": VERSION, "steps": 0, "state": {}, "param_groups": groups}


def _by_kind(
    found: Mapping[str, list[Entry]],
    names: Mapping[str, str],
    steps: int,
    lr: float | None,
    mine: Mine,
    problems: Problems,
    of_steps: Callable[[Any], Any] = lambda x: x,
) -> dict[str, Any]:
    """A state dict from arrays that come by kind, for all parameters alike; `names` are theirs for our keys."""
    frame = _frame(mine)
    for i, h in enumerate(mine.hyper):
        wanted = [name for name in _needed(h, mine) if name not in COUNTERS]
        if "momentum_buffer" in found and h.get("momentum") and not h["lr_in_momentum"]:
            text = "has lr_in_momentum=False, but the momentum in this state has lr inside; wanted True"
            problems.add(ValueError, f"param_groups[{i}] {text}")
        for name in wanted:
            if name not in found:
                switch = _SWITCH.get(name)
                why = f"{switch}={h[switch]!r} in param_groups[{i}]" if switch else mine.optimizer
                problems.add(ValueError, f"state lacks the arrays of {quoted(name)}, which {why} needs")
        for name, entries in found.items():
            if name not in wanted and name in BUFFERS:
                switch = _SWITCH[name]
                text = f"has no use with {switch}={h.get(switch)!r} in param_groups[{i}]; wanted that of the other run"
                problems.add(ValueError, f"{entries[0].label if entries else 'state'} {text}")
        if lr is not None and not callable(h["lr"]):
            frame["param_groups"][i]["lr"] = lr
        for tensor in mine.members[i]:
            frame["state"][tensor.key] = _counters(steps, tensor, h, mine)
    keys = list(names.values())
    for name, entries in found.items():
        if name not in BUFFERS:
            problems.add(ValueError, f"{entries[0].label} has no counterpart here: no {quoted(name)} is kept")
            continue
        order = _order([entry.param for entry in entries], keys, set(keys), f"state's {quoted(name)}", problems)
        for tensor, at in zip(mine.tensors, order, strict=False):
            array = _taken(entries[at].value, entries[at].label, name, tensor, problems)
            if array is not None and name == "momentum_buffer":
                with where(array):
                    array = of_steps(array)
            frame["state"][tensor.key][name] = array
    return {**frame, "steps": steps}


def _order(names: Sequence[Any], keys: Sequence[str], known: set[str], label: str, problems: Problems) -> list[int]:
    """Which of the foreign names each key of ours is: by name where they are the same, by order where none is known."""
    if len(names) != len(keys):
        problems.add(ValueError, f"{label} has {len(names)} parameters; wanted {len(keys)}")
        return []
    if set(names) == set(keys) and len(set(keys)) == len(keys):
        return [list(names).index(key) for key in keys]
    if len(set(names)) == len(names) and any(name in known for name in names):
        found, wanted = ", ".join(map(repr, names)), ", ".join(map(repr, keys))
        problems.add(ValueError, f"{label} is of the parameters {found}; wanted {wanted}, or no name of these")
        return []
    return list(range(len(keys)))


def _needed(h: Mapping[str, Any], mine: Mine) -> list[str]:
    return needed({**h, "centered": bool(h.get("centered"))}, mine.adagrad)


def _counters(step: int, tensor: Tensor, h: Mapping[str, Any], mine: Mine) -> dict[str, Any]:
    """``step``, and ``bias_weight``: after that many steps a moving average of ones is 1 - alpha**step."""
    if mine.adagrad:
        return {"step": step}
    alpha = h["alpha"]
    usable = isinstance(alpha, (int, float)) and 0 <= alpha < 1  # else a problem of the hyperparameters
    weight = 1.0 - float(alpha) ** step if usable else 0.0
    return {"step": step, "bias_weight": np.asarray(weight, dtypes.compute_dtype(tensor.layout.dtype))}


def _readable(x: Any, device: int | None) -> Any:
    """A foreign array as NumPy's, or as what lies on a device where the parameter lies on one."""
    if isinstance(x, np.ndarray):
        return x
    if hasattr(x, "detach") and hasattr(x, "cpu"):  # a tensor of torch
        x = x.detach()
        x = x.float() if "bfloat16" in str(x.dtype) else x  # NumPy and the CUDA array interface have no such dtype
        return x if device is not None and is_cuda(x) else x.cpu().numpy()
    if hasattr(x, "__array__") and not (device is not None and is_cuda(x)):
        try:
            return np.asarray(x)
        except TypeError:  # CuPy's: not without being asked
            return x
    return x


def _taken(value: Any, label: str, name: str, tensor: Tensor, problems: Problems) -> Any:
    """An array of a foreign state, checked as ours is; only a dtype that is too narrow is widened, which is exact."""
    try:
        x = _readable(value, tensor.device)
    except Exception as error:  # whatever another library raises: of a sparse tensor, or one without memory
        problems.add(TypeError, f"{label} is {a(type(value))} that does not hand out its memory ({error})")
        return None
    if kind_of(x) is not None:
        x = plain_array(x, label, problems)
        if x is None:
            return None
        want = dtypes.compute_dtype(tensor.layout.dtype)
        if dtypes.is_supported(x.dtype) and x.dtype.itemsize < want.itemsize:
            with where(x):
                x = x.astype(want)
    return None if check_entry(x, label, name, tensor, problems) is None else x


def _number(value: Any, label: str, problems: Problems) -> float:
    try:
        return float(value)
    except Exception:  # whatever another library raises
        problems.add(TypeError, f"{label} is {a(type(value))}; wanted a number")
        return 0.0


def _count(value: Any, label: str, problems: Problems) -> int:
    """A count, which torch keeps as float32 and others as int32."""
    before = len(problems)
    x = _number(value, label, problems)
    if len(problems) == before and not (math.isfinite(x) and 0 <= x < 2**62 and x == int(x)):
        problems.add(ValueError, f"{label} is {x!r}; wanted a count >= 0")
    return int(x) if len(problems) == before else 0


def _agreed(count: int, label: str, steps: int | None, problems: Problems) -> int:
    """The count of a state; `steps`, given or counted elsewhere in it, has to be the same."""
    if steps is not None and steps != count:
        problems.add(ValueError, f"{label} is {count}, but steps is {steps}; wanted one count")
    return count
