"""Profiles side by side: before and after a change, ours and another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from . import busy
from .plot import roofline
from .report import Report
from .results import Times
from .show import Shown, Table
from .units import seconds, size

Measured: TypeAlias = Report | Times


@dataclass(frozen=True)
class Comparison(Shown):
    """The profiles passed to `compare`, shown in comparison with the first.

    Attributes
    ----------
    measured : dict from str to Report or Times
        What was passed to `compare`.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> from rmsprop_gpu.profiling import compare, profile
    >>> plain = profile(RMSProp(np.ones(1000)), np.ones(1000), repeats=3)
    >>> both = profile(RMSProp(np.ones(1000), momentum=0.9, centered=True), np.ones(1000), repeats=3)
    >>> list(compare({"plain": plain, "both": both}).measured)
    ['plain', 'both']
    """

    measured: dict[str, Measured]

    def plot(self, ax: Any = None) -> Any:
        """Draw one roofline: the launches of each report, and the steps for which only Times are known.

        The latter are drawn as if they moved the bytes of the first report's step and did its arithmetic.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw; by default on a new figure of pyplot.

        Returns
        -------
        matplotlib.axes.Axes

        Examples
        --------
        >>> import os, tempfile
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> from rmsprop_gpu.profiling import Times, compare, profile
        >>> ours = profile(RMSProp(np.ones(1000)), np.ones(1000), repeats=3)
        >>> ax = compare({"ours": ours, "theirs": Times.of([2e-5, 3e-5])}).plot()
        >>> ax.figure.savefig(os.path.join(tempfile.mkdtemp(), "both.png"))
        """
        return roofline(self.measured, ax, "; ".join(self._busy()[:1] or self._findings()))

    def _lines(self) -> list[str]:
        return self._busy() or self._findings()

    def _busy(self) -> list[str]:
        """The profiles during which others are known to have used the machine."""
        said = {name: busy.sentence(x, most=1) for name, x in self.measured.items() if isinstance(x, Report)}
        return [f"{name}: {text}" for name, text in said.items() if text]

    def _findings(self) -> list[str]:
        """How long a step of each of the others takes, compared with the first's."""
        (first, base), *others = ((name, _step(x)) for name, x in self.measured.items())
        found = []
        for name, times in others:
            apart = times.q1 > base.q3 or times.q3 < base.q1
            doubt = "" if apart else ", but the quartiles overlap: that may be chance"
            found.append(f"{name}: a step takes {times.median / base.median:.3g} times as long as {first}{doubt}")
        return found

    def _tables(self) -> list[Table]:
        """A row per figure, a column per profile, then the ratio of each of the others to the first."""
        first, *others = self.measured
        rows: dict[str, dict[str, tuple[str, float]]] = {}
        for name, x in self.measured.items():
            for row, cell in _figures(x).items():
                rows.setdefault(row, {})[name] = cell
        made: list[tuple[str, ...]] = []
        for row, cells in rows.items():
            shown = [cells[name][0] if name in cells else "-" for name in self.measured]
            ratios = [
                f"{cells[name][1] / cells[first][1]:.3g}" if name in cells and first in cells else "-"
                for name in others
            ]
            made.append((row, *shown, *ratios))
        return [(("medians", *self.measured, *(f"{name} / {first}" for name in others)), made)]


def compare(measured: Mapping[str, Measured]) -> Comparison:
    """Compare profiles: before and after a change, one optimizer and another.

    Parameters
    ----------
    measured : mapping of name to Report or Times
        Two or more; the others are compared with the first, and at least one is a `Report`. For a step of another
        package, pass its seconds to ``Times.of``; for a report from another run, see ``Report.from_dict``.

    Returns
    -------
    Comparison
        ``print`` shows a table, a notebook shows it as HTML, ``plot()`` draws all in one roofline. On the CPU a step is
        host and kernels, on a device the longer of the two. If a report says that the machine was busy, this is shown
        instead of which one is faster.

    Raises
    ------
    TypeError, ValueError
        For anything else.

    Examples
    --------
    >>> from timeit import repeat
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> from rmsprop_gpu.profiling import profile
    >>> param, grad, v = (np.ones(1000, np.float32) for _ in range(3))
    >>> def numpy_step():
    ...     v[:] = 0.99 * v + 0.01 * grad * grad
    ...     param[:] -= 1e-3 * grad / (np.sqrt(v) + 1e-8)
    >>> ours = profile(RMSProp(param), grad, repeats=3)
    >>> comparison = compare({"ours": ours, "numpy": Times.of(repeat(numpy_step, number=1, repeat=3))})
    >>> list(comparison.measured)
    ['ours', 'numpy']
    """
    if not isinstance(measured, Mapping):
        raise TypeError(f"measured is a {type(measured).__name__}; wanted a mapping of names to reports")
    for name, x in measured.items():
        if not isinstance(name, str) or not isinstance(x, Report | Times):
            raise TypeError(f"measured[{name!r}] is a {type(x).__name__}; wanted a Report or Times by its name")
    if len(measured) < 2 or not any(isinstance(x, Report) for x in measured.values()):
        raise ValueError(f"measured holds {list(measured)}; wanted two or more, one of them a Report")
    return Comparison(dict(measured))


def _step(x: Measured) -> Times:
    return x.step if isinstance(x, Report) else x


def _figures(x: Measured) -> dict[str, tuple[str, float]]:
    """The known figures, as text and as numbers."""

    def all_of(times: Mapping[str, Times]) -> dict[str, tuple[str, float]]:
        return {name: (seconds(t.median), t.median) for name, t in times.items()}

    if isinstance(x, Times):
        return all_of({"a step": x})
    numbers: dict[str, tuple[float, Callable[[float], str]]] = {
        "bytes": (x.bytes, size),
        "GB/s": (x.rate, lambda rate: f"{rate / 1e9:.3g}"),
        "of a copy": (x.fraction_of_copy, lambda fraction: f"{fraction:.0%}"),
    }
    return {
        **all_of({"a step": x.step, "host": x.host, "kernels": x.device_times}),
        **{name: (show(value), value) for name, (value, show) in numbers.items()},
        **all_of({x.title_of(launch): launch.seconds for launch in x.launches}),
    }
