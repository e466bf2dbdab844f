"""The state of an optimizer: the buffers of each parameter, and how they are saved and loaded by name."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays.checks import Problems, Tensor, quoted
from ..arrays.layout import Array, Layout
from ..kernels.table import BUFFERS
from ..steps.on_numpy import allocate, touch
from .container import Entry
from .formats import coded, in_format, joined
from .kinds import BASES, MOMENTS, REMAINDER, layout_of
from .pieces import Stored
from .saved import check_entry

if TYPE_CHECKING:
    from ..steps.order import Order


class State(Mapping[str | int, Mapping[str, Array]]):
    """The state of an optimizer, ``opt.state``: for each parameter a mapping from names of buffers to arrays.

    ``opt.state["w"]``, or ``opt.state[0]`` by index, is what is kept for a parameter. Iteration goes over the names of
    parameters; without names they are ``"0"``, ``"1"``, ... All mappings are read-only. The arrays are where the
    parameter is: NumPy's in host memory, CuPy's on its device. There can be:

    ``step``
        int64, 0-d: how many steps have updated the parameter, without skipped ones and those that got no gradient
    ``square_avg`` (`AdaGrad`: ``sum``)
        the second moment; with a `square_avg_dtype` (`sum_dtype`) of ``"uint16"`` or ``"uint8"`` codes of that dtype
    ``square_avg_base`` (``sum_base``)
        with ``"uint8"``: uint16, 1-d, a base for each 128 elements in the order of memory
    ``bias_weight``
        0-d: the sum of the weights in the averages, ``1 - alpha**step`` while alpha is constant; not in `AdaGrad`
    ``grad_avg``, ``momentum_buffer``, ``ema``
        with `centered`, with `momentum`, with `use_ema`
    ``param_remainder``
        with `store_param_remainders`: int16, what bfloat16 drops of a float32 parameter

    Where nothing else is said, the dtype is float64 for float64 parameters and float32 for all others, and the shape
    and memory layout are the parameter's.

    Raises
    ------
    KeyError
        For a name or index that no parameter has, with the names there are. Indices are not counted from the end.
    TypeError
        For an assignment to an entry: write into its array.

    Notes
    -----
    The arrays are the state itself, not copies: they change with each step, and the next step reads what you write into
    them. It does not check them: a negative second moment can make the parameter NaN. `RMSProp.state_dict` returns
    copies, and `RMSProp.decoded_state` the values that codes stand for.

    A buffer is made when it is first needed and then stays, also when its switch is off again; a mapping that you hold
    does not show buffers made later. On a device, ``opt.state[key]`` lets the current stream wait for earlier steps, so
    what it does with the arrays comes after them; the host does not wait. Work on any other stream is yours to order.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> weights = {"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}
    >>> opt = RMSProp(weights, momentum=0.9)
    >>> opt.state
    <state of 2 parameters, 96 bytes>
    >>> list(opt.state), list(opt.state["w"])
    (['w', 'b'], ['step', 'bias_weight', 'square_avg', 'momentum_buffer'])
    >>> opt.step({"w": np.ones((2, 3), np.float32), "b": None})
    >>> {name: int(buffers["step"]) for name, buffers in opt.state.items()}
    {'w': 1, 'b': 0}
    >>> opt.state["w"]["momentum_buffer"][...] = 0  # forget the momentum
    >>> opt.state["bias"]
    Traceback (most recent call last):
    KeyError: "'bias'; there are 2 parameters: w, b"
    """

    def __init__(self, tensors: Sequence[Tensor], order: Order | None, moments: Sequence[str]) -> None:
        self._tensors, self._order = tensors, order
        self._moments = moments  # the format of each parameter's second moment
        self.order: Sequence[int] = range(len(tensors))  # in which a step goes through the parameters
        self._index = {tensor.key: i for i, tensor in enumerate(tensors)}
        self._guards: list[Any] = []
        self.buffers: list[dict[str, Array]] = [{} for _ in tensors]

    def at(self, i: int) -> AbstractContextManager[Any]:
        """The context for work on the state of a parameter: on its device, after the work enqueued before."""
        device = self._tensors[i].device
        return nullcontext() if self._order is None or device is None else self._order.on(device)

    def number(self, key: str | int) -> int:
        """The number of a parameter."""
        if isinstance(key, (int, np.integer)) and not isinstance(key, bool) and 0 <= key < len(self.buffers):
            return int(key)
        if isinstance(key, str) and key in self._index:
            return self._index[key]
        some = ", ".join([*list(self._index)[:8], *["..."] * (len(self) > 8)])
        raise KeyError(f"{key!r}; there are {len(self)} parameters: {some}")

    def __getitem__(self, key: str | int) -> Mapping[str, Array]:
        index = self.number(key)
        if self._order is not None and not self._order.capturing():
            with self.at(index):
                pass
        # Views: changes by a caller to their shape, dtype or flags do not reach the state.
        return MappingProxyType({name: buffer.view() for name, buffer in self.buffers[index].items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self.buffers)

    def __repr__(self) -> str:
        return f"<state of {len(self)} parameters, {self.nbytes:,} bytes>"

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers together, on the host and on devices.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> RMSProp(np.ones(1000)).state.nbytes  # square_avg, and two numbers
        8016
        """
        return sum(buffer.nbytes for buffers in self.buffers for buffer in buffers.values())

    def ensure(self, names: Sequence[Sequence[str]], initial_scale: Sequence[float]) -> None:
        """Allocate what is missing, with one allocation per device."""
        missing = [(i, name) for i, wanted in enumerate(names) for name in wanted if name not in self.buffers[i]]
        made: list[tuple[int, str, Array]] = []
        for device in dict.fromkeys(self._tensors[i].device for i, _ in missing):
            here = [(i, name) for i, name in missing if self._tensors[i].device == device]
            arrays = self._allocate([self._layout(i, name) for i, name in here], device)
            made += [(i, name, array) for (i, name), array in zip(here, arrays, strict=True)]
        starts: dict[tuple[int, str], Any] = {}  # initial values other than zero
        for i, name, _ in made:
            if name in MOMENTS and initial_scale[i]:
                starts[i, name], base = self._coded(i, initial_scale[i])
                if base is not None:
                    starts[i, MOMENTS[name]] = base
            elif name == "ema":
                starts[i, name] = self._master(i, self.buffers[i])
        self._place({(i, name): buffer for i, name, buffer in made if (i, name) in starts})
        for i, name, buffer in made:
            if (i, name) in starts:
                with self.at(i):
                    buffer[...] = starts[i, name]
        for i, name, buffer in made:
            self.buffers[i][name] = buffer

    def _master(self, i: int, buffers: Mapping[str, Array]) -> Array:
        """The master weights: the parameter, with its remainder if there is one."""
        p, rest = self._tensors[i].view, buffers.get(REMAINDER)
        if rest is None:
            return p
        with self.at(i):
            return joined(p.reshape(-1), rest.reshape(-1)).reshape(p.shape)

    def _layout(self, i: int, name: str) -> Layout:
        return layout_of(self._tensors[i], name, self._moments[i])

    def _coded(self, i: int, start: float) -> tuple[float, int | None]:
        """The initial value of a second moment in the format of this parameter, and the base that goes with it."""
        if self._moments[i] == "float32":
            return start, None
        codes, bases = coded(np.full(1, start), self._moments[i])
        return int(codes[0]), None if bases is None else int(bases[0])

    def _place(self, filled: Mapping[tuple[int, str], Array]) -> None:
        """Let the threads of a step write first to host buffers that a single thread is about to fill."""
        if self._order is None:
            for name in dict.fromkeys(name for _, name in filled if name not in BASES):
                touch([self._tensors[i].layout.size for i in self.order], [filled.get((i, name)) for i in self.order])

    def _allocate(self, layouts: list[Layout], device: int | None) -> list[Array]:
        if device is None or self._order is None:
            made = allocate(layouts)
            # NumPy does not resize an array with weak references, so the memory, the base of what we hand out, stays.
            self._guards += [weakref.ref(buffer.base) for buffer in made[:1]]
            return made
        from ..steps.on_cupy import allocate as allocate_on_device  # it imports CuPy

        return allocate_on_device(layouts, device, self._order)

    def snapshot(self, names: Sequence[Sequence[str]], *, on_host: bool = False) -> dict[str, dict[str, Array]]:
        """Copies of everything, by name, in the place of the state; in C order, since bytes in a file have no strides.

        With `on_host` they are NumPy arrays, for which the host waits. State in `names` that does not exist yet gets
        its initial value.
        """
        copies = {}
        for i, tensor in enumerate(self._tensors):
            away = on_host and tensor.device is not None
            with self.at(i):
                copies[tensor.key] = {
                    name: x.get(order="C") if away and not isinstance(x, np.ndarray) else x.copy(order="C")
                    for name, x in self.kept(i, names[i]).items()
                }
        return copies

    def entries(self, names: Sequence[Sequence[str]]) -> list[Entry]:
        """The arrays themselves, by their names in files; those in `names` that do not exist yet at initial values."""
        return [
            Entry(f"{tensor.key}/{name}", buffer, partial(self.at, i))
            for i, tensor in enumerate(self._tensors)
            for name, buffer in self.kept(i, names[i]).items()
        ]

    def kept(self, i: int, names: Sequence[str]) -> dict[str, Array]:
        """The buffers of a parameter, and the initial values of those in `names` that no step has made yet."""
        missing = [name for name in names if name not in self.buffers[i]]
        return {**self.buffers[i], **{name: self._start(i, name) for name in missing}}

    def _start(self, i: int, name: str) -> Array:
        """The initial value of a new buffer."""
        layout = self._layout(i, name)
        if name == "ema":
            return self._master(i, self.buffers[i]).astype(layout.dtype)
        return np.zeros(layout.shape, layout.dtype)

    def check(self, saved: Mapping[str, Any], names: Sequence[Sequence[str]], problems: Problems) -> dict[int, Any]:
        """The entries of `saved` for each of our parameters, validated; `names` says what each must have."""
        found: dict[int, dict[str, Array]] = {}
        for i, tensor in enumerate(self._tensors):
            if tensor.key not in saved:
                continue
            label, entry = f"state[{quoted(tensor.key)}]", saved[tensor.key]
            if not isinstance(entry, Mapping):
                problems.add(TypeError, f"{label} is a {type(entry).__name__}; wanted a mapping from name to array")
                continue
            known = {*names[i], *self.buffers[i]}
            known |= {"grad_avg", "momentum_buffer", "ema"} if "square_avg" in known else {"ema"}
            if tensor.layout.dtype.name == "bfloat16":
                known.add(REMAINDER)
            before = len(problems)
            entry = in_format(entry, self._moments[i], tensor, label, problems)
            if len(problems) == before:  # otherwise a refused array would be reported as missing too
                for name in [n for n in names[i] if n not in entry and n != REMAINDER]:  # which starts at 0
                    problems.add(ValueError, f"{label} lacks {name!r}, which its hyperparameters need")
            for name in entry:
                if name not in known:
                    problems.add(ValueError, f"{label} has {name!r}; wanted only {', '.join(sorted(known))}")
                else:
                    with self.at(i):
                        array = check_entry(
                            entry[name], f'{label}["{name}"]', name, self._layout(i, name), tensor, problems
                        )
                    if array is not None and (name != REMAINDER or name in names[i]):  # else dropped
                        found.setdefault(i, {})[name] = array
        return found

    def make_room(self, found: Mapping[int, Mapping[str, Array]]) -> None:
        """Allocate what is missing for what `check` returned."""
        self.ensure([list(found.get(i, ())) for i in range(len(self))], [0.0] * len(self))

    def load(self, found: Mapping[int, Mapping[str, Array]], *, fresh: bool) -> None:
        """Copy or read what `check` returned into the buffers in place; buffers missing there get initial values.

        `fresh` means that no step has been taken yet, so that no page of them has been placed by a first write.
        """
        if fresh:
            self._place({(i, name): x for i in found for name, x in self.buffers[i].items() if name in BUFFERS})
        for i, entry in found.items():
            with self.at(i):
                buffers = self.buffers[i]
                for name in sorted(buffers, key="ema".__eq__):  # last, since it may start from the remainder
                    source = entry.get(name, 0)
                    if name == "ema" and name not in entry:
                        source = self._master(i, buffers)
                    if isinstance(source, Stored):
                        source.read_into(buffers[name])
                    else:
                        buffers[name][...] = source


class Averages(Mapping[str, Array]):
    """The moving averages of the parameters, ``opt.ema``: a read-only mapping from a parameter's name to its array.

    It contains the parameters of groups with `use_ema`, also those in which that is off again, whose averages no longer
    change. A parameter's index works, too. An average has its parameter's shape, memory layout and place. It is float64
    for float64 parameters and float32 for all others.

    Raises
    ------
    KeyError
        For a parameter without an average, and for a name or index that no parameter has.
    TypeError
        For an assignment to an entry: write into its array.

    Notes
    -----
    The arrays are those in `RMSProp.state` under ``"ema"``, not copies: the next step continues from what you write
    into them. To evaluate a model with its averages, copy them into its parameters, and the parameters back before the
    next step.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> averaged, others = {"w": np.ones(3), "u": np.ones(3)}, {"b": np.zeros(1)}
    >>> opt = RMSProp([{"params": averaged, "use_ema": True}, {"params": others}])
    >>> opt.ema
    <averages of 2 parameters>
    >>> list(opt.ema), np.shares_memory(opt.ema["w"], opt.state["w"]["ema"])
    (['w', 'u'], True)
    >>> opt.ema["b"]
    Traceback (most recent call last):
    KeyError: "'b' has no average; wanted a parameter of a group with use_ema=True"
    """

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
