"""How a profile is shown: tables in a terminal and in a notebook, a roofline, and the distribution of its repeats."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

from ..optimizer.summary import counted
from . import busy
from .plot import roofline
from .plot_times import strips
from .results import Code, Launch, Results, Times
from .show import Shown, Table
from .units import rate, seconds, size

LAUNCHES = ("launch", "tensors", "elements", "chunks", "bytes per element", "time", "GB/s", "of a copy")
TIMES = ("time of", "min", "quartile", "median", "quartile", "max")
CODES = ("launch", "grid x block", "registers", "spilled", "local memory", "occupancy")


@dataclass(frozen=True)
class Report(Results, Shown):
    """What `profile` measured, and how it is shown.

    Attributes
    ----------
    optimizer : str
        The name of its class.
    device : str
        The processor, or the devices.
    repeats : int
        How often each was measured.
    host, device_times : Times
        Of a step: on a device ``host`` is the time of the calling thread, on the CPU
        that of checking the arrays; ``device_times`` are those of the kernels.
    launches : list of Launch
        One for each kernel of a step.
    before, after : Ceilings
        Measured before the steps and after them.
    skipped : int
        Tensors without a gradient.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> from rmsprop_gpu.profiling import profile
    >>> report = profile(RMSProp(np.ones(1000)), np.ones(1000), repeats=3)
    >>> report.bytes, report.flops > 0, report.rate > 0
    (40000, True, True)
    """

    @property
    def busy(self) -> list[str]:
        """Signs that others used the machine meanwhile, so that the times prove nothing."""
        return busy.reasons(self)

    def title_of(self, launch: Launch) -> str:
        """The name of a launch, with the device if launches are on several.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> from rmsprop_gpu.profiling import profile
        >>> report = profile(RMSProp(np.ones(1000)), np.ones(1000), repeats=3)
        >>> [report.title_of(launch) for launch in report.launches]
        ['update_kernel[float64, plain]']
        """
        several = len({x.device for x in self.launches}) > 1
        return f"{launch.name} on {launch.device}" if several else launch.name

    def plot(self, ax: Any = None) -> Any:
        """Draw the roofline: the ceilings of this machine as measured, each launch a point.

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
        >>> from rmsprop_gpu.profiling import profile
        >>> ax = profile(RMSProp(np.ones(1000)), np.ones(1000), repeats=3).plot()
        >>> ax.figure.savefig(os.path.join(tempfile.mkdtemp(), "roofline.png"))
        """
        return roofline({"": self}, ax)

    def plot_repeats(self, ax: Any = None) -> Any:
        """Draw the distribution of the repeats: each a dot, the first at the top of its strip; median and quartiles.

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
        >>> from rmsprop_gpu.profiling import profile
        >>> ax = profile(RMSProp(np.ones(1000)), np.ones(1000), repeats=3).plot_repeats()
        >>> ax.figure.savefig(os.path.join(tempfile.mkdtemp(), "repeats.png"))
        """
        return strips(self._times(), busy.sentence(self, most=1), ax)

    def _times(self) -> list[tuple[str, Times]]:
        """The times of the host, of all kernels together, and of each launch and the copy beside it."""
        launches = ([(self.title_of(x), x.seconds), ("a copy beside it", x.copies)] for x in self.launches)
        return [("host", self.host), ("kernels", self.device_times), *chain.from_iterable(launches)]

    def _lines(self) -> list[str]:
        """Lines about the step as a whole."""
        tensors, elements = (sum(getattr(x, name) for x in self.launches) for name in ("tensors", "elements"))
        without = f", {self.skipped} without a gradient" if self.skipped else ""
        said = busy.sentence(self)
        return [
            f"{self.optimizer} over {counted(tensors, 'tensor')}, {counted(elements, 'element')}{without}, "
            f"on {self.device}",
            f"a step: host {self.host}, kernels {self.device_times}; median (quartiles) of {self.repeats} repeats",
            f"moved: {size(self.bytes)} at {rate(self.rate)}, {self.fraction_of_copy:.0%} of a copy's speed",
            *([said] if said else []),
        ]

    def _tables(self) -> list[Table]:
        """A row per launch; the distribution of the repeats; and facts about the machine code if known."""
        rows: list[tuple[str, ...]] = [
            (
                self.title_of(x),
                f"{x.tensors:,}",
                f"{x.elements:,}",
                f"{x.chunks:,}",
                f"{x.bytes_per_element:.6g}",
                seconds(x.seconds.median),
                f"{x.rate / 1e9:.3g}",
                f"{x.fraction_of_copy:.0%}",
            )
            for x in self.launches
        ]
        times: list[tuple[str, ...]] = [
            (name, *map(seconds, (x.min, x.q1, x.median, x.q3, x.max))) for name, x in self._times()
        ]
        tables: list[Table] = [(LAUNCHES, rows), (TIMES, times)]
        codes = [(x, x.code) for x in self.launches if x.code]
        if codes:
            tables.append((CODES, [(self.title_of(x), f"{x.grid:,} x {x.block}", *_cells(code)) for x, code in codes]))
            head = ("launch", f"instructions of {codes[0][1].instructions_of}")
            tables.append((head, [(self.title_of(x), _mix(code)) for x, code in codes]))
        return tables


def _cells(code: Code) -> tuple[str, ...]:
    return (
        str(code.registers),
        "not known" if code.spill_bytes is None else f"{code.spill_bytes} B",
        f"{code.local_bytes} B",
        f"{code.occupancy:.0%} ({code.blocks_per_multiprocessor} blocks)",
    )


def _mix(code: Code) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in code.instructions.items())
