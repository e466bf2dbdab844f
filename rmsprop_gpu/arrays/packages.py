"""Do the installed versions of the packages for CUDA fit? Nothing is imported to find out."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

# The lowest and the highest versions, as in the extras cuda12 and cuda13 (pyproject.toml).
FITTING: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "numba-cuda": ((0, 30, 4), (0, 31)),
    "cuda-core": ((1, 0), None),
    "cupy-cuda13x": ((14,), None),
    "cupy-cuda12x": ((14,), None),
}


def misfits(*names: str) -> list[str]:
    """A line for each of these packages (all by default) with an unfit version, and the command that installs one."""
    found = []
    for name in names or FITTING:
        low, high = FITTING[name]
        try:
            here = version(name)
        except PackageNotFoundError:
            continue
        numbers = tuple(int(word) for word in re.findall(r"\d+", here)[:3])
        if numbers < low or (high and numbers >= high):
            wanted = f">={_text(low)}" + (f",<{_text(high)}" if high else "")
            found.append(f'{name} {here} does not fit; wanted {wanted} (pip install "{name}{wanted}")')
    return found


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
