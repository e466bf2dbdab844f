"""A step or a load is indivisible: nothing that changes its optimizer may happen inside it."""

from __future__ import annotations

import sys
from threading import get_ident

HELD_IN = {"step", "_put", "save"}  # the functions that take a turn, held in a local variable `token`


class Torn:
    """Stands in place of a token: a load was cut off, and part of the state is still the old one."""

    def __init__(self, why: str) -> None:
        self._why = why

    def refuse(self) -> None:
        raise RuntimeError(f"{self._why}: load it again before anything else")


class Turn(dict[int, object]):
    """Whose turn it is: empty, or the token of the running step under 0.

    ``turn.setdefault(0, token) is token`` takes the turn; no other thread or signal handler can get in between.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asking: int | None = None  # the thread whose step calls a schedule, which may assign for the next step

    def take_over(self, token: object, what: str) -> None:
        """Refuse `what`, unless the step that has the turn ended without returning it: Ctrl-C may strike anywhere."""
        self.refuse_torn()
        before = self.get(0)
        if before is not None and _is_held(before):
            raise RuntimeError(self._refusal(what))
        self[0] = token

    def take_for_load(self, token: object) -> None:
        """Like `take_over`, but also for an optimizer with a state left incomplete by an earlier load."""
        if isinstance(self.get(0), Torn):
            self[0] = token
        else:
            self.take_over(token, "a load")

    def refuse_torn(self) -> None:
        """Raise if a load has left the state incomplete."""
        before = self.get(0)
        if isinstance(before, Torn):
            before.refuse()

    def share(self, token: object, what: str) -> None:
        """Like `take_over`, for reading only: a signal handler of the same thread may do so inside a step or a save."""
        self.refuse_torn()
        before = self.get(0)
        holder = None if before is None else _holder(before)
        if holder is None:
            self[0] = token
        elif holder[0] != get_ident() or holder[1] == "_put":
            raise RuntimeError(self._refusal(what))

    def refuse(self, what: str) -> None:
        """Refuse an assignment while a step runs, except by the step's own schedule."""
        token = self.get(0)
        if token is None or isinstance(token, Torn) or self.asking == get_ident():
            return
        if _is_held(token):
            raise RuntimeError(self._refusal(what))
        self.pop(0, None)

    @staticmethod
    def _refusal(what: str) -> str:
        return (
            f"{what} was requested inside a step, load or save of the same optimizer (by another thread, a signal "
            "handler, its own schedule or progress), which would mix the two; nothing was changed. Let threads share "
            "a lock, and let handlers set a flag for the loop"
        )


def _is_held(token: object) -> bool:
    """Is any thread inside the function that made this token?"""
    return _holder(token) is not None


def _holder(token: object) -> tuple[int, str] | None:
    """The thread inside the function that made this token, and that function's name; None if there is none."""
    for thread, innermost in sys._current_frames().items():
        frame = innermost
        while frame is not None:
            if frame.f_code.co_name in HELD_IN and frame.f_locals.get("token") is token:
                return thread, frame.f_code.co_name
            frame = frame.f_back  # type: ignore[assignment]
    return None
