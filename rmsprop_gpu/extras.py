"""Optional libraries: each belongs to an extra of the package, and is imported where it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtraError(ImportError):
    """A library of an extra is not installed."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Name the extra where an import inside fails."""
    try:
        yield
    except ImportError as error:
        why = " ".join(str(error).split())  # some have several lines
        raise MissingExtraError(f'{why}; it comes with pip install "rmsprop-gpu[{name}]"') from None
