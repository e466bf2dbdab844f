"""The state of an optimizer: what is kept for each parameter, and how it goes out and comes in by name."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from .arrays import Layout, NDArray, Problems, Tensor, quoted
from .backends import is_masked
from .plan import allocate
from .table import BUFFERS, COUNTERS

VERSION = 1  # of what state_dict returns


class LoadReport(NamedTuple):
    """What `load_state_dict` found: names that only the optimizer has, and names that only the dict has."""

    missing: list[str]
    unexpected: list[str]


def needed(h: Mapping[str, Any], adagrad: bool) -> list[str]:
    """The names of the state that these hyperparameters need."""
    if adagrad:
        return ["step", "sum"]
    names = ["step", "bias_weight", "square_avg"]
    return names + ["grad_avg"] * h["centered"] + ["momentum_buffer"] * bool(h["momentum"])


def _layout(tensor: Tensor, name: str) -> Layout:
    if name in BUFFERS:
        return tensor.layout
    return Layout((), (), np.dtype(np.int64) if name == "step" else tensor.layout.dtype, 0)


class State(Mapping[str | int, Mapping[str, NDArray]]):
    """By name or index of a parameter: its ``step``, ``square_avg``, ... as arrays, where the parameter lives.

    The arrays are the state itself, not copies. A buffer is made when it is first needed and then stays.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._index = {tensor.key: i for i, tensor in enumerate(tensors)}
        self._guards: list[Any] = []
        self.buffers: list[dict[str, NDArray]] = [{} for _ in tensors]

    def __getitem__(self, key: str | int) -> Mapping[str, NDArray]:
        if isinstance(key, (int, np.integer)) and not isinstance(key, bool) and 0 <= key < len(self.buffers):
            index = int(key)
        elif isinstance(key, str) and key in self._index:
            index = self._index[key]
        else:
            some = ", ".join([*list(self._index)[:8], *["..."] * (len(self) > 8)])
            raise KeyError(f"{key!r}; there are {len(self)} parameters: {some}")
        # Views: what a caller does to their shape, dtype or flags does not reach the state.
        return MappingProxyType({name: buffer.view() for name, buffer in self.buffers[index].items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self.buffers)

    def __repr__(self) -> str:
        return f"<state of {len(self)} parameters, {self.nbytes:,} bytes>"

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffers in self.buffers for buffer in buffers.values())

    def ensure(self, names: Sequence[Sequence[str]], initial_scale: Sequence[float]) -> None:
        """Make what is missing, all of it in one allocation."""
        missing = [(i, name) for i, wanted in enumerate(names) for name in wanted if name not in self.buffers[i]]
        made = allocate([_layout(self._tensors[i], name) for i, name in missing]) if missing else []
        # NumPy resizes no array that has weak references: the memory, which is the base of what we hand out, stays.
        self._guards += [weakref.ref(buffer.base) for buffer in made[:1]]
        for (i, name), buffer in zip(missing, made, strict=True):
            if name in ("square_avg", "sum") and initial_scale[i]:
                buffer.fill(initial_scale[i])
            self.buffers[i][name] = buffer

    def snapshot(self) -> dict[str, dict[str, NDArray]]:
        """Copies of everything, by name."""
        return {
            tensor.key: {name: buffer.copy(order="K") for name, buffer in buffers.items()}
            for tensor, buffers in zip(self._tensors, self.buffers, strict=True)
        }

    def check(self, saved: Mapping[str, Any], names: Sequence[Sequence[str]], problems: Problems) -> dict[int, Any]:
        """What `saved` holds for each of our parameters, validated; `names` is what each must have."""
        found: dict[int, dict[str, NDArray]] = {}
        known = {name for wanted in names for name in wanted} | self.buffers[0].keys()
        known |= {"grad_avg", "momentum_buffer"} if "square_avg" in known else set()
        for i, tensor in enumerate(self._tensors):
            if tensor.key not in saved:
                continue
            label, entry = f"state[{quoted(tensor.key)}]", saved[tensor.key]
            if not isinstance(entry, Mapping):
                problems.add(TypeError, f"{label} is a {type(entry).__name__}; wanted a mapping from name to array")
                continue
            for name in [n for n in names[i] if n not in entry]:
                problems.add(ValueError, f"{label} lacks {name!r}, which its hyperparameters need")
            for name in entry:
                if name not in known:
                    problems.add(ValueError, f"{label} has {name!r}; wanted only {', '.join(sorted(known))}")
                else:
                    array = _check_entry(entry[name], f'{label}["{name}"]', name, _layout(tensor, name), problems)
                    if array is not None:
                        found.setdefault(i, {})[name] = array
        return found

    def load(self, found: Mapping[int, Mapping[str, NDArray]]) -> None:
        """Copy what `check` returned into the buffers where they lie; a buffer of ours that it lacks starts anew."""
        wanted = [list(found.get(i, ())) for i in range(len(self))]
        self.ensure(wanted, [0.0] * len(self))
        for i, entry in found.items():
            for name, buffer in self.buffers[i].items():
                np.copyto(buffer, entry.get(name, 0))


def check_state_dict(saved: Any, optimizer: str, problems: Problems) -> Mapping[str, Any]:
    """The frame of a state dict: which optimizer, which version, what stands where."""
    if not isinstance(saved, Mapping):
        problems.add(TypeError, f"state_dict is a {type(saved).__name__}; wanted a mapping, as state_dict() returns it")
        return {}
    kinds: dict[str, tuple[Any, str]] = {
        "state": (Mapping, "a mapping"),
        "param_groups": ((list, tuple), "a list"),
        "steps": ((int, np.integer), "a count >= 0"),
    }
    for name, (kind, wanted) in kinds.items():
        x: Any = saved.get(name)
        if not isinstance(x, kind) or isinstance(x, bool) or (name == "steps" and not 0 <= x < 2**62):
            problems.add(TypeError, f'state_dict["{name}"] is {_brief(x)}; wanted {wanted}')
    for name, want in (("optimizer", optimizer), ("version", VERSION)):
        x = saved.get(name)
        if type(x) is not type(want) or x != want:
            problems.add(ValueError, f'state_dict["{name}"] is {_brief(x)}; wanted {want!r}')
    return saved


def _brief(x: Any) -> str:
    return repr(x) if isinstance(x, (int, float, str, type(None))) else f"a {type(x).__name__}"


def _counter(x: object, dtype: np.dtype[Any]) -> object:
    """A plain number as an array of this dtype, where that has its value; else as it is."""
    whole = isinstance(x, (int, np.integer)) and not isinstance(x, bool) and abs(x) < 2**53
    if whole or (isinstance(x, (float, np.floating)) and dtype.kind == "f"):
        exact = np.float64(x)  # type: ignore[arg-type]  # a number, as was just asked
        with np.errstate(over="ignore"):
            rounded = exact.astype(dtype)
        if rounded.astype(np.float64) == exact:
            return np.asarray(rounded)
    return x


def _check_entry(x: object, label: str, name: str, layout: Layout, problems: Problems) -> NDArray | None:
    """One saved array: of the shape and dtype that the state has; counters may be plain numbers."""
    if name in COUNTERS:
        x = _counter(x, layout.dtype)
    if not isinstance(x, np.ndarray) or is_masked(x):
        problems.add(TypeError, f"{label} is a {type(x).__name__}; wanted a NumPy array")
    elif x.dtype != layout.dtype:
        problems.add(TypeError, f"{label} has dtype {x.dtype}; wanted {layout.dtype}, no value is rounded on loading")
    elif x.shape != layout.shape:
        problems.add(ValueError, f"{label} has shape {x.shape}; wanted {layout.shape}")
    elif name == "step" and not 0 <= x < 2**62:
        problems.add(ValueError, f"{label} is {x}; wanted a count >= 0")
    elif name not in ("step", "grad_avg", "momentum_buffer") and np.any(x < 0):
        problems.add(ValueError, f"{label} has elements below 0; wanted averages or sums of squares")
    else:
        copy: NDArray = x.copy(order="K")  # it may be a view of the very state that is loaded
        return copy
    return None
