"""How the time of a step grows with a size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import busy
from .measure import profile
from .plot_times import lines
from .report import Report
from .show import Shown, Table
from .units import seconds, size


@dataclass(frozen=True)
class Sizes(Shown):
    """What `profile_sizes` measured: one report per size.

    Attributes
    ----------
    sizes : tuple of int
        As they were given.
    reports : tuple of Report
        One for each size.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> from rmsprop_gpu.profiling import profile_sizes
    >>> found = profile_sizes(lambda n: (RMSProp(np.ones(n)), np.ones(n)), [100, 1000], repeats=3)
    >>> found.sizes, [report.bytes for report in found.reports]
    ((100, 1000), [4000, 40000])
    """

    sizes: tuple[int, ...]
    reports: tuple[Report, ...]

    def plot(self, ax: Any = None) -> Any:
        """Draw the times of host and kernels over the sizes, beside a copy of as many bytes.

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
        >>> from rmsprop_gpu.profiling import profile_sizes
        >>> found = profile_sizes(lambda n: (RMSProp(np.ones(n)), np.ones(n)), [100, 1000], repeats=3)
        >>> ax = found.plot()
        >>> ax.figure.savefig(os.path.join(tempfile.mkdtemp(), "sizes.png"))
        """
        times = {"host": [r.host for r in self.reports], "kernels": [r.device_times for r in self.reports]}
        copies = [sum(launch.bytes / launch.copy_rate for launch in r.launches) for r in self.reports]
        return lines(self.sizes, times, copies, self._lines()[-1], ax)

    def to_dict(self) -> dict[str, Any]:
        """Everything that was measured, in dicts, lists, strings and numbers.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> from rmsprop_gpu.profiling import profile_sizes
        >>> found = profile_sizes(lambda n: (RMSProp(np.ones(n)), np.ones(n)), [100, 1000], repeats=3)
        >>> found.to_dict()["sizes"]
        [100, 1000]
        """
        return {"sizes": list(self.sizes), "reports": [report.to_dict() for report in self.reports]}

    def _lines(self) -> list[str]:
        first, last = self.reports[0], self.reports[-1]
        said = {n: busy.sentence(report, most=1) for n, report in zip(self.sizes, self.reports, strict=True)}
        found = [f"at size {n:,} {text}" for n, text in said.items() if text]
        return [
            f"{first.optimizer} on {first.device}; medians of {first.repeats} repeats",
            *(found or [
                f"from size {self.sizes[0]:,} to {self.sizes[-1]:,} the host's time goes from "
                f"{seconds(first.host.median)} to {seconds(last.host.median)}, the kernels' from "
                f"{seconds(first.device_times.median)} to {seconds(last.device_times.median)}"
            ]),
        ]  # fmt: skip

    def _tables(self) -> list[Table]:
        head = ("size", "tensors", "elements", "moved", "host", "kernels", "GB/s", "of a copy")
        rows: list[tuple[str, ...]] = [
            (
                f"{n:,}",
                f"{sum(launch.tensors for launch in r.launches):,}",
                f"{sum(launch.elements for launch in r.launches):,}",
                size(r.bytes),
                seconds(r.host.median),
                seconds(r.device_times.median),
                f"{r.rate / 1e9:.3g}",
                f"{r.fraction_of_copy:.0%}",
            )
            for n, r in zip(self.sizes, self.reports, strict=True)
        ]
        return [(head, rows)]


def profile_sizes(make: Callable[[int], tuple[Any, Any]], sizes: Iterable[int], *, repeats: int = 30) -> Sizes:
    """Profile the steps of optimizers of several sizes.

    Parameters
    ----------
    make : callable
        Receives a size, whatever that counts, and returns an optimizer and its gradients, as for `profile`. It is
        called for one size after the other, so that only one model at a time is in memory.
    sizes : iterable of int
        Above 0, each once.
    repeats : int
        As for `profile`.

    Returns
    -------
    Sizes
        ``print`` shows one row per size, ``plot()`` draws the times over the sizes; ``reports`` has what `profile`
        returned.

    Raises
    ------
    TypeError, ValueError
        For anything else, before any size is measured; and whatever `profile` raises.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> def make(size):
    ...     return RMSProp(np.ones(size, np.float32)), np.ones(size, np.float32)
    >>> found = profile_sizes(make, [100, 1000], repeats=3)
    >>> [report.bytes for report in found.reports]
    [2000, 20000]
    """
    if not callable(make):
        raise TypeError(f"make is a {type(make).__name__}; wanted a callable of a size")
    sizes = tuple(sizes)
    counts = [n for n in sizes if isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0]
    if not sizes or len(set(counts)) < len(sizes):
        raise ValueError(f"sizes is {list(sizes)!r}; wanted whole numbers above 0, each once")
    counts = list(map(int, counts))
    return Sizes(tuple(counts), tuple(_profiled(make, n, repeats) for n in counts))


def _profiled(make: Callable[[int], tuple[Any, Any]], n: int, repeats: int) -> Report:
    """Profile one size; what was made for it is released here."""
    made = make(n)
    if not isinstance(made, tuple) or len(made) != 2:
        raise TypeError(f"make({n}) returned a {type(made).__name__}; wanted an optimizer and its gradients")
    return profile(*made, repeats=repeats)
