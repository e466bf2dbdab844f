"""The parameter groups of an optimizer: which parameters each holds, and hyperparameters that may change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import hyper
from ..arrays.checks import Problems, Tensor, a, quoted
from ..arrays.dtypes import compute_dtype
from ..conventions.group_keys import refusal
from ..state.storage import check_storage, kinds_of
from .turn import Turn


@dataclass
class Changes:
    """Whether groups, or only learning rates, were assigned to since the last step, and whether a step is running.

    Groups and optimizer share it, so neither refers to the other.

    With a reference back, the memory of a deleted optimizer would wait for the garbage collector.
    """

    pending: bool = True
    rates: bool = False
    turn: Turn = field(default_factory=Turn)


class ParamGroup(MutableMapping[str, Any]):
    """A parameter group, an entry of ``opt.param_groups``: its hyperparameters, and under ``"params"`` its arrays.

    It behaves as torch's dict does. An assignment is validated at once and takes effect at the next step; a wrong one
    changes nothing. Keys can be neither added nor deleted. ``"params"``, and what the state was made for
    (``"initial_scale"``, ``"square_avg_dtype"``, ...), cannot be changed. Other keys that the group was given, such as
    a ``"name"`` or a scheduler's ``"initial_lr"``, are kept, and no step reads them.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> opt = RMSProp([{"params": {"w": np.ones(2)}, "momentum": 0.9}, {"params": {"b": np.ones(3)}}], lr=0.01)
    >>> group = opt.param_groups[0]
    >>> group["momentum"], group["lr"], len(group["params"])
    (0.9, 0.01, 1)
    >>> group["lr"] = 1e-3  # of this group; opt.lr = 1e-3 is for all
    >>> group["alpha"] = 1.5
    Traceback (most recent call last):
    ValueError: alpha is 1.5; wanted a number with 0 <= alpha < 1
    """

    def __init__(
        self, values: Mapping[str, Any], tensors: Sequence[Tensor], params: tuple[Any, ...], changes: Changes
    ) -> None:
        ours = {*hyper.ALL}
        self._values = {name: value for name, value in values.items() if name in ours}
        self.kept = {name: value for name, value in values.items() if name not in ours}  # keys that are not ours
        self._params, self._changes = params, changes
        self._dtypes = {compute_dtype(tensor.layout.dtype) for tensor in tensors}  # of the arithmetic
        self._kinds = kinds_of(tensors)
        self._check(self._values)

    def _check(self, values: Mapping[str, Any]) -> None:
        hyper.check_clips(values)
        check_storage(values, self._kinds)
        for dtype in self._dtypes:
            hyper.scalars(values, 0.0 if callable(values["lr"]) else values["lr"], dtype)

    def __getitem__(self, name: str) -> Any:
        if name == "params":
            return self._params
        return self.kept[name] if name in self.kept else self._values[name]

    def __setitem__(self, name: str, value: object) -> None:
        if name == "lr" and (rate := self.moved_to(value)) is not None:
            self._changes.turn.refuse("an assignment")
            self.move(rate)
        else:
            self.update({name: value})

    def moved_to(self, lr: object) -> float | None:
        """A learning rate that changes nothing else in a step; None if that takes a closer look."""
        rate = hyper.rate_alone(lr)
        if rate is None or callable(self._values["lr"]) or not hyper.finite(hyper.rates(self._values, rate)):
            return None
        return rate

    def move(self, rate: float) -> None:
        """Set a learning rate from `moved_to`."""
        self._values["lr"] = rate
        self._changes.rates = True

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Assign several hyperparameters at once: all of them or, if one is wrong, none.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> group = RMSProp(np.ones(3)).param_groups[0]
        >>> group.update(lr=1e-3, momentum=0.9)
        >>> group["lr"], group["momentum"]
        (0.001, 0.9)
        """
        self._changes.turn.refuse("an assignment")
        changes = {}
        for name, value in dict(*args, **kwargs).items():
            if name in self.kept:
                changes[name] = value
                continue
            if name not in self._values:
                raise KeyError(f"{name!r} is not a hyperparameter here; there are {', '.join(self._values)}")
            changes[name] = hyper.checked(name, value)
            if name == "initial_scale" and changes[name] != self._values[name]:
                raise ValueError("initial_scale is what the state starts from; it cannot change once the state exists")
            if name in hyper.FIXED and changes[name] != self._values[name]:
                raise ValueError(f"{name} is what the state is made for; it cannot change once the state exists")
        self.replace(self.with_(**changes))

    __eq__, __hash__ = object.__eq__, object.__hash__  # as mappings, groups would compare their arrays

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"a hyperparameter cannot be deleted ({name!r}); assign the value that switches it off instead")

    def __iter__(self) -> Iterator[str]:
        return iter(("params", *self._values, *self.kept))

    def __len__(self) -> int:
        return 1 + len(self._values) + len(self.kept)

    def replace(self, values: Mapping[str, Any]) -> None:
        """Set values that were validated together; keys that are not ours stay unless they are among them."""
        self.kept.update({name: value for name, value in values.items() if name not in self._values})
        self._values = {name: values[name] for name in self._values}
        self._changes.pending = True

    def loaded(self, entry: Any, keys: list[str], label: str, problems: Problems) -> dict[str, Any]:
        """The hyperparameters in a saved group, for parameters with these keys; our current ones if it is wrong."""
        found = entry.get("params") if isinstance(entry, Mapping) else entry
        if not isinstance(entry, Mapping) or not isinstance(found, (list, tuple)) or list(found) != keys:
            problems.add(ValueError, f"{label} has {found!r}; wanted a mapping with params {keys!r}")
            return self.hyper()
        entry = {**{name: value for name, value in hyper.SINCE.items() if name in self._values}, **entry}
        for name in [n for n in self._values if n not in entry]:
            problems.add(ValueError, f"{label} lacks {name!r}")
        others = {n: v for n, v in entry.items() if n not in self._values and n != "params"}
        for name in others:
            if why := refusal(name):
                problems.add(ValueError, f"{label} has {name!r}, {why}")
        values = {**self._values, **{n: v for n, v in entry.items() if n in self._values}}
        ours, before = self._values["lr"], len(problems)
        if (values["lr"] is None) != callable(ours):
            wanted = (
                "a callable lr, as was saved"
                if values["lr"] is None
                else f"a number as lr, as was saved ({values['lr']})"
            )
            problems.add(
                ValueError, f'{label}["lr"] is {ours!r} in this optimizer; wanted {wanted}: assign it before loading'
            )
            values["lr"] = ours
        values["lr"] = ours if callable(ours) else values["lr"]
        for name, value in values.items():
            try:
                values[name] = hyper.checked(name, value)
            except (TypeError, ValueError) as error:
                problems.add(ValueError, f"{label}: {error}")
        values |= {name: self._values[name] for name in hyper.FIXED if name in self._values}  # the state is converted
        if len(problems) == before:
            try:
                self._check(values)
            except ValueError as error:
                problems.add(ValueError, f"{label}: {error}")
        return {**values, **others} if len(problems) == before else self.hyper()

    def with_(self, **changes: Any) -> dict[str, Any]:
        """The hyperparameters with these changes, validated together."""
        values = {**self._values, **changes}
        self._check(values)
        return values

    def hyper(self) -> dict[str, Any]:
        """Only the hyperparameters."""
        return dict(self._values)

    def look(self) -> Mapping[str, Any]:
        """Only the hyperparameters, not copied: just the learning rate may change, the rest is replaced as a whole."""
        return self._values

    def __repr__(self) -> str:
        return repr({"params": f"<{len(self._params)} arrays>", **self._values, **self.kept})


class Groups:
    """All groups of an optimizer, and the group of each tensor."""

    def __init__(
        self,
        overrides: Sequence[Mapping[str, Any]],
        members: Sequence[Sequence[Tensor]],
        defaults: Mapping[str, Any],
        no_decay: Any = None,
    ) -> None:
        self.changes = Changes()
        tensors = [tensor for group in members for tensor in group]
        bare = _undecayed(no_decay, tensors)
        made: list[tuple[ParamGroup, list[Tensor]]] = []
        for i, (own, group) in enumerate(zip(overrides, members, strict=True)):
            without = [tensor for tensor in group if id(tensor) in bare]
            if not without or len(without) < len(group):
                rest = [tensor for tensor in group if id(tensor) not in bare]
                made.append((self._made(i, own, rest, defaults), rest))
            if without:
                made.append((self._made(i, {**own, "weight_decay": 0.0}, without, defaults), without))
        self.all = tuple(group for group, _ in made)
        self.members = [tensors for _, tensors in made]
        group_of = {id(tensor): i for i, tensors in enumerate(self.members) for tensor in tensors}
        self.of_tensor = [group_of[id(tensor)] for tensor in tensors]  # in parameter order

    def _made(
        self, i: int, overrides: Mapping[str, Any], tensors: Sequence[Tensor], defaults: Mapping[str, Any]
    ) -> ParamGroup:
        for name in overrides:
            if name not in defaults and (why := refusal(name)):
                raise TypeError(f"params[{i}] has {name!r}, {why}; wanted hyperparameters among {', '.join(defaults)}")
        try:
            own = {n: hyper.checked(n, value) if n in defaults else value for n, value in overrides.items()}
            values = {**defaults, **own}
            return ParamGroup(values, tensors, tuple(t.array for t in tensors), self.changes)
        except (TypeError, ValueError) as error:
            if not overrides:
                raise
            raise type(error)(f"params[{i}]: {error}") from None

    @property
    def keys(self) -> list[list[str]]:
        """The names of each group's parameters in the state."""
        return [[tensor.key for tensor in tensors] for tensors in self.members]

    def hypers(self) -> list[dict[str, Any]]:
        """The current hyperparameters of each group."""
        return [group.hyper() for group in self.all]

    def look(self) -> list[Mapping[str, Any]]:
        """The same, not copied."""
        return [group.look() for group in self.all]

    def loaded(self, saved: Sequence[Any], problems: Problems) -> list[dict[str, Any]]:
        """The hyperparameters of every group in a state dict, validated; our current ones where they are wrong."""
        if len(saved) != len(self.all):
            problems.add(ValueError, f"param_groups has {len(saved)} groups; wanted {len(self.all)}")
            return self.hypers()
        return [
            group.loaded(entry, names, f"param_groups[{i}]", problems)
            for i, (group, entry, names) in enumerate(zip(self.all, saved, self.keys, strict=True))
        ]

    def replace(self, hypers: Sequence[Mapping[str, Any]]) -> None:
        """Set values for every group that were validated together."""
        for group, values in zip(self.all, hypers, strict=True):
            group.replace(values)

    @property
    def lr(self) -> float | hyper.Schedule:
        """The learning rate that all groups share."""
        rates = [group["lr"] for group in self.all]
        if any(rate != rates[0] for rate in rates):
            raise ValueError(f'the groups differ in lr: {rates}; read param_groups[i]["lr"]')
        return rates[0]  # type: ignore[no-any-return]

    @lr.setter
    def lr(self, value: float | hyper.Schedule) -> None:
        self.changes.turn.refuse("an assignment")
        if all(group.moved_to(value) is not None for group in self.all):
            rate = float(value)  # type: ignore[arg-type]  # a float
            for group in self.all:
                group.move(rate)
            return
        value = hyper.checked("lr", value)
        self.replace([group.with_(lr=value) for group in self.all])


def _undecayed(no_decay: Any, tensors: Sequence[Tensor]) -> set[int]:
    """The ids of the tensors that `no_decay` selects: by name, by a predicate on name and array, or as arrays."""
    if no_decay is None:
        return set()
    problems, found = Problems(), set()
    if callable(no_decay):
        for tensor in tensors:
            answer = no_decay(tensor.key, tensor.array)
            if not isinstance(answer, (bool, np.bool_)):
                said = f"{answer!r} (a {type(answer).__name__})"
                problems.add(TypeError, f"no_decay({tensor.key!r}, ...) is {said}; wanted True or False")
            elif answer:
                found.add(id(tensor))
        problems.raise_any()
        return found
    if isinstance(no_decay, (str, bytes, Mapping)) or not isinstance(no_decay, Iterable):
        wanted = "a list of names, a list of arrays, or a function of name and array"
        raise TypeError(f"no_decay is {a(type(no_decay))}; wanted {wanted}")
    entries = [no_decay] if any(no_decay is tensor.array for tensor in tensors) else list(no_decay)
    by_name = {tensor.key: tensor for tensor in tensors}
    by_array = {id(tensor.array): tensor for tensor in tensors}
    for i, entry in enumerate(entries):
        one = by_name.get(entry) if isinstance(entry, str) else by_array.get(id(entry))
        if one is None:
            said = quoted(entry) if isinstance(entry, str) else a(type(entry))
            some = ", ".join([*list(by_name)[:8], *["..."] * (len(by_name) > 8)])
            problems.add(ValueError, f"no_decay[{i}] is {said}, which is not a parameter here; there are {some}")
        else:
            found.add(id(one))
    problems.raise_any()
    return found
