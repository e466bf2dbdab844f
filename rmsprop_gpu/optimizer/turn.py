"""A step, or a load, is one thing: nothing that changes its optimizer may happen inside of it."""

from __future__ import annotations

import sys
from threading import get_ident

HELD_IN = {"step", "_put", "save"}  # the functions that have a turn, in a local variable `token`


class Torn:
    """In the place of a token: a load was cut off, and the state is partly the old one."""

    def __init__(self, why: str) -> None:
        self._why = why

    def refuse(self) -> None:
        raise RuntimeError(f"{self._why}: load it again before anything else")


class Turn(dict[int, object]):
    """Whose turn it is: empty, or under 0 the token of the step that runs.

    ``turn.setdefault(0, token) is token`` takes it, which no other thread and no signal handler can come between.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asking: int | None = None  # the thread whose step asks a schedule: that may assign, for the next step

    def take_over(self, token: object, what: str) -> None:
        """Refuse `what`, unless the step whose turn it is has ended without giving it back: Ctrl-C may hit anywhere."""
        self.refuse_torn()
        before = self.get(0)
        if before is not None and _is_held(before):
            raise RuntimeError(self._refusal(what))
        self[0] = token

    def take_for_load(self, token: object) -> None:
        """As `take_over`, also of an optimizer that a load before has left in pieces."""
        if isinstance(self.get(0), Torn):
            self[0] = token
        else:
            self.take_over(token, "a load")

    def refuse_torn(self) -> None:
        """Raise where a load has left the state in pieces."""
        before = self.get(0)
        if isinstance(before, Torn):
            before.refuse()

    def share(self, token: object, what: str) -> None:
        """As `take_over`, for what only reads: it may be a handler of this very thread within a step or a save."""
        self.refuse_torn()
        before = self.get(0)
        holder = None if before is None else _holder(before)
        if holder is None:
            self[0] = token
        elif holder[0] != get_ident() or holder[1] == "_put":
            raise RuntimeError(self._refusal(what))

    def refuse(self, what: str) -> None:
        """Refuse an assignment while a step runs, but for one by the step's own schedule."""
        token = self.get(0)
        if token is None or isinstance(token, Torn) or self.asking == get_ident():
            return
        if _is_held(token):
            raise RuntimeError(self._refusal(what))
        self.pop(0, None)

    @staticmethod
    def _refusal(what: str) -> str:
        return (
            f"{what} was asked for inside a step of the same optimizer, or a load or a save (by another thread, a "
            "signal handler, its own schedule or progress), which would mix the two; nothing was changed. Let threads "
            "share a lock, and let handlers leave a note for the loop"
        )


def _is_held(token: object) -> bool:
    """Does any thread stand in the function whose token it is?"""
    return _holder(token) is not None


def _holder(token: object) -> tuple[int, str] | None:
    """The thread that stands in the function whose token it is, and its name; None where none does."""
    for thread, innermost in sys._current_frames().items():
        frame = innermost
        while frame is not None:
            if frame.f_code.co_name in HELD_IN and frame.f_locals.get("token") is token:
                return thread, frame.f_code.co_name
            frame = frame.f_back  # type: ignore[assignment]
    return None
