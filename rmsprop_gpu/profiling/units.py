"""Numbers for people to read: three digits and a unit."""

from __future__ import annotations


def seconds(value: float) -> str:
    return _scaled(value, ("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def size(value: float) -> str:
    return _scaled(value, ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def rate(value: float) -> str:
    return _scaled(value, ("GB/s", 1e9), ("MB/s", 1e6))


def flop_rate(value: float) -> str:
    return _scaled(value, ("GFLOP/s", 1e9))


def _scaled(value: float, *units: tuple[str, float]) -> str:
    """The value in the first unit of which it is at least one, or else in the last."""
    name, unit = next((pair for pair in units if value >= pair[1]), units[-1])
    return f"{value / unit:.3g} {name}" if value < 1000 * unit else f"{value / unit:,.0f} {name}"
