"""One framework's RMSProp as data: its arguments, what they mean here, and how its errors are worded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from .. import hyper
from ..arrays.real import one_real

T = TypeVar("T")


class _Required:
    """Stands for the default of an argument that has none."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = _Required()

# Other frameworks' names for our hyperparameters; a name that is not listed has the same meaning as here.
OURS = {
    "learning_rate": "lr",
    "rho": "alpha",
    "decay": "alpha",
    "epsilon": "eps",
    "decoupled_decay": "decoupled_weight_decay",
    "eps_inside_sqrt": "eps_in_sqrt",
}

LABELS = ("name",)  # arguments that are text and have no effect on any step


def _same(value: Any, allowed: Any) -> bool:
    """Is a value the allowed one? A number may be of any library's type, but 0 is not False."""
    if (number := one_real(allowed)) is not None:
        return bool(one_real(value) == number)
    return type(value) is type(allowed) and bool(value == allowed)


@dataclass(frozen=True)
class Preset:
    """One framework's RMSProp.

    Parameters
    ----------
    source : str
        Where the arguments and the formula were taken from, with the version.
    arguments : mapping
        From name to default, in the framework's order; `REQUIRED` if there is none.
    translate : callable
        From a dict of all arguments that are not in `neutral`, validated, to the arguments of `RMSProp`. It refuses
        invalid combinations.
    neutral : mapping
        Arguments that have no counterpart here, from name to the values that need none: those that do not change the
        trajectory.
    none : tuple of str
        Arguments that also accept None, which is not their default.
    own : tuple of str
        Arguments that match none of ours, whatever `OURS` has under their name; `translate` checks them.
    strangers : mapping
        Arguments that it does not have but users might pass, from name to what is wanted instead.
    """

    source: str
    arguments: Mapping[str, Any]
    translate: Callable[[dict[str, Any]], dict[str, Any]]
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    none: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    strangers: Mapping[str, str] = field(default_factory=dict)

    def rmsprop(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `RMSProp` for this framework's; errors use `name`."""
        for key in given:
            if key not in self.arguments:
                wanted = self.strangers.get(key) or f"it has {', '.join(self.arguments)}"
                raise TypeError(f"{name} has no argument {key!r}; {wanted}")
        for key, default in self.arguments.items():
            if default is REQUIRED and key not in given:
                raise TypeError(f"{key} is missing; wanted a value, since {name} has no default for it")
        arguments = self.effective(name, given)
        return self.translate({key: self._checked(key, value) for key, value in arguments.items()})

    def effective(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments for `translate`; those without a counterpart are refused unless they are neutral."""
        arguments = {**self.arguments, **given}
        for key, allowed in self.neutral.items():
            value = arguments.pop(key)
            if key in LABELS and (value is None or isinstance(value, str)):
                continue
            if not any(_same(value, x) for x in allowed):
                wanted = " or ".join(map(repr, allowed))
                raise ValueError(f"{key} is {hyper.written(value)}; wanted {wanted}: {name}'s {key} is not done here")
        return arguments

    def built(self, name: str, given: Mapping[str, Any], make: Callable[..., T]) -> T:
        """The result of `make` for this framework's arguments as `RMSProp`'s; errors use the framework's names."""
        ours = self.rmsprop(name, given)
        try:
            return make(**ours)
        except (TypeError, ValueError) as error:
            text = self.in_its_words(str(error))  # errors that depend on the parameters
            if text == str(error):
                raise
            raise type(error)(text) from None

    def _checked(self, key: str, value: Any) -> Any:
        ours = OURS.get(key, key)
        if key in self.own or ours not in hyper.ALL:
            return value
        if value is None and (self.arguments[key] is None or key in self.none):
            return value
        try:
            return hyper.checked(ours, value)
        except (TypeError, ValueError) as error:
            raise type(error)(self.in_its_words(str(error))) from None

    def in_its_words(self, text: str) -> str:
        """An error about a hyperparameter, ``alpha is 2; wanted ...``, with the framework's names for ours.

        Names are replaced before and after the value, but not inside it, which may be the caller's own text.
        """
        theirs = {ours: key for key, ours in OURS.items() if key in self.arguments and key not in self.own}
        said, _, rest = text.partition(" is ")
        if not set(said.split(" * ")) <= {*hyper.ALL}:
            return text  # it is about a parameter
        found, semicolon, wanted = rest.rpartition("; wanted ")

        def renamed(part: str) -> str:
            return re.sub(r"\w+", lambda word: theirs.get(word[0], word[0]), part)

        return f"{renamed(said)} is {found}{semicolon}{renamed(wanted)}"
