"""Which attributes of an optimizer can be assigned: a misspelt hyperparameter would otherwise be silently ignored."""

from __future__ import annotations

from .. import hyper
from ..conventions.group_keys import refusal as looks_like_one
from ..conventions.preset import OURS

PACKAGE = __name__.partition(".")[0]


def refusal(cls: type, name: str, value: object) -> str | None:
    """Why this attribute cannot be assigned on an optimizer of this class; None if it can.

    A function may replace a method, to wrap it for example. A subclass may have its own attributes: any that it
    declares, and any that does not look like a hyperparameter.
    """
    home = next((x for x in cls.__mro__ if name in vars(x)), None)
    if home is not None:
        if not _is_ours(home) or (callable(vars(home)[name]) and callable(value)):
            return None
        return f"{name!r} of {cls.__name__} cannot be assigned" + "; wanted a function" * callable(vars(home)[name])
    meant = OURS.get(name, name)
    if meant in hyper.ALL:
        return f"{name!r} cannot be assigned here; wanted opt.param_groups[i][{meant!r}] = ..."
    why = looks_like_one(name)
    if why or _is_ours(cls):
        said = f"{name!r} cannot be assigned to {cls.__name__}" + f", {why}" * bool(why)
        return f"{said}; wanted opt.param_groups[i][...] = ..., or a subclass that declares it ({name} = None)"
    return None


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == PACKAGE
