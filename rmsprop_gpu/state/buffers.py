"""The state of an optimizer: what is kept for each parameter, and how it goes out and comes in by name."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..arrays.checks import Problems, Tensor, plain_array, quoted
from ..arrays.dtypes import compute_dtype
from ..arrays.interop import copied
from ..arrays.layout import Array, Layout, device_of
from ..arrays.selector import kind_of
from ..kernels.table import BUFFERS, COUNTERS
from ..steps.host import allocate

if TYPE_CHECKING:
    from ..steps.streams import Order

VERSION = 1  # of what state_dict returns


class LoadReport(NamedTuple):
    """What `load_state_dict` found: names that only the optimizer has, and names that only the dict has."""

    missing: list[str]
    unexpected: list[str]


def needed(h: Mapping[str, Any], adagrad: bool) -> list[str]:
    """The names of the state that these hyperparameters need."""
    names = ["step", "sum"] if adagrad else ["step", "bias_weight", "square_avg"]
    if not adagrad:
        names += ["grad_avg"] * h["centered"] + ["momentum_buffer"] * bool(h["momentum"])
    return names + ["ema"] * h["use_ema"]


def _layout(tensor: Tensor, name: str) -> Layout:
    compute = compute_dtype(tensor.layout.dtype)
    if name in BUFFERS:
        return tensor.layout.of(compute)
    return Layout((), (), np.dtype(np.int64) if name == "step" else compute, 0)


class State(Mapping[str | int, Mapping[str, Array]]):
    """By name or index of a parameter: its ``step``, ``square_avg``, ... as arrays, where the parameter lives.

    The arrays are the state itself, not copies. A buffer is made when it is first needed and then stays. On a device,
    the current stream waits for the steps before: what it does with the arrays comes after them.
    """

    def __init__(self, tensors: Sequence[Tensor], order: Order | None) -> None:
        self._tensors, self._order = tensors, order
        self._index = {tensor.key: i for i, tensor in enumerate(tensors)}
        self._guards: list[Any] = []
        self.buffers: list[dict[str, Array]] = [{} for _ in tensors]

    def _at(self, i: int) -> AbstractContextManager[Any]:
        """Where work on the state of a parameter belongs: on its device, after what was enqueued before."""
        device = self._tensors[i].device
        return nullcontext() if self._order is None or device is None else self._order.on(device)

    def __getitem__(self, key: str | int) -> Mapping[str, Array]:
        if isinstance(key, (int, np.integer)) and not isinstance(key, bool) and 0 <= key < len(self.buffers):
            index = int(key)
        elif isinstance(key, str) and key in self._index:
            index = self._index[key]
        else:
            some = ", ".join([*list(self._index)[:8], *["..."] * (len(self) > 8)])
            raise KeyError(f"{key!r}; there are {len(self)} parameters: {some}")
        if self._order is not None and not self._order.capturing():
            with self._at(index):
                pass
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
        """Make what is missing, on each device in one allocation."""
        missing = [(i, name) for i, wanted in enumerate(names) for name in wanted if name not in self.buffers[i]]
        made: list[tuple[int, str, Array]] = []
        for device in dict.fromkeys(self._tensors[i].device for i, _ in missing):
            here = [(i, name) for i, name in missing if self._tensors[i].device == device]
            arrays = self._allocate([_layout(self._tensors[i], name) for i, name in here], device)
            made += [(i, name, array) for (i, name), array in zip(here, arrays, strict=True)]
        for i, name, buffer in made:
            if name in ("square_avg", "sum") and initial_scale[i]:
                with self._at(i):
                    buffer.fill(initial_scale[i])
            elif name == "ema":
                with self._at(i):
                    buffer[...] = self._tensors[i].view
        for i, name, buffer in made:
            self.buffers[i][name] = buffer

    def _allocate(self, layouts: list[Layout], device: int | None) -> list[Array]:
        if device is None or self._order is None:
            made = allocate(layouts)
            # NumPy resizes no array that has weak references: the memory, which is the base of what we hand out, stays.
            self._guards += [weakref.ref(buffer.base) for buffer in made[:1]]
            return made
        from ..steps.resident import allocate as allocate_on_device  # it imports CuPy

        return allocate_on_device(layouts, device, self._order)

    def snapshot(self) -> dict[str, dict[str, Array]]:
        """Copies of everything, by name, where the state lies."""
        copies = {}
        for i, tensor in enumerate(self._tensors):
            with self._at(i):
                copies[tensor.key] = {name: x.copy(order="K") for name, x in self.buffers[i].items()}
        return copies

    def check(self, saved: Mapping[str, Any], names: Sequence[Sequence[str]], problems: Problems) -> dict[int, Any]:
        """What `saved` holds for each of our parameters, validated; `names` is what each must have."""
        found: dict[int, dict[str, Array]] = {}
        known = {name for wanted in names for name in wanted} | self.buffers[0].keys()
        known |= {"grad_avg", "momentum_buffer", "ema"} if "square_avg" in known else {"ema"}
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
                    with self._at(i):
                        array = check_entry(entry[name], f'{label}["{name}"]', name, tensor, problems)
                    if array is not None:
                        found.setdefault(i, {})[name] = array
        return found

    def load(self, found: Mapping[int, Mapping[str, Array]]) -> None:
        """Copy what `check` returned into the buffers where they lie; a buffer of ours that it lacks starts anew."""
        wanted = [list(found.get(i, ())) for i in range(len(self))]
        self.ensure(wanted, [0.0] * len(self))
        for i, entry in found.items():
            with self._at(i):
                for name, buffer in self.buffers[i].items():
                    buffer[...] = entry.get(name, self._tensors[i].view if name == "ema" else 0)


class Averages(Mapping[str, Array]):
    """The averaged parameters in a state, by name or index."""

    def __init__(self, state: State) -> None:
        self._state = state

    def __getitem__(self, key: str | int) -> Array:
        found = self._state[key]
        if "ema" not in found:
            raise KeyError(f"{key!r} has no average; wanted a parameter of a group with use_ema=True")
        return found["ema"]

    def __iter__(self) -> Iterator[str]:
        return (str(key) for key, buffers in zip(self._state, self._state.buffers, strict=True) if "ema" in buffers)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"<averages of {len(self)} parameters>"


def check_skipped(saved: Mapping[str, Any], problems: Problems) -> int:
    """The count of skipped steps in a state dict, which those of earlier versions lack."""
    x = saved.get("skipped_steps", 0)
    if kind_of(x) is not None and getattr(x, "shape", None) == () and x.dtype == np.int64:
        with where(x):
            x = int(x)
    if not isinstance(x, (int, np.integer)) or isinstance(x, bool) or not 0 <= x < 2**62:
        problems.add(TypeError, f'state_dict["skipped_steps"] is {_brief(x)}; wanted a count >= 0')
        return 0
    return int(x)


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


def check_entry(entry: object, label: str, name: str, tensor: Tensor, problems: Problems) -> Array | None:
    """One saved array, of the host or a device, of the shape and dtype that the state has; counters may be numbers.

    Returned as a copy where the parameter lies: it may be a view of the very state that is loaded.
    """
    layout = _layout(tensor, name)
    if name in COUNTERS:
        entry = _counter(entry, layout.dtype)
    if kind_of(entry) is None:
        problems.add(TypeError, f"{label} is a {type(entry).__name__}; wanted a NumPy or CuPy array")
        return None
    x = plain_array(entry, label, problems)
    if x is None:
        return None
    with where(x):
        return _checked_entry(x, label, name, layout, tensor.device, problems)


def where(x: Array) -> AbstractContextManager[Any]:
    """The device of an array: what is asked of it there comes after what made it."""
    device = device_of(x)
    if device is None:
        return nullcontext()
    import cupy

    return cupy.cuda.Device(device)  # type: ignore[no-any-return]  # CuPy has no stubs


def _checked_entry(
    x: Array, label: str, name: str, layout: Layout, device: int | None, problems: Problems
) -> Array | None:
    if x.dtype != layout.dtype:
        problems.add(TypeError, f"{label} has dtype {x.dtype}; wanted {layout.dtype}, no value is rounded on loading")
    elif x.shape != layout.shape:
        problems.add(ValueError, f"{label} has shape {x.shape}; wanted {layout.shape}")
    elif name == "step" and not 0 <= x < 2**62:
        problems.add(ValueError, f"{label} is {x}; wanted a count >= 0")
    elif name not in ("step", "grad_avg", "momentum_buffer", "ema") and bool((x < 0).any()):
        problems.add(ValueError, f"{label} has elements below 0; wanted averages or sums of squares")
    else:
        return copied(x, device)
    return None
