"""Did others use the machine during a measurement? Then the measurements of one profile contradict each other.

The bounds leave room for the variation of an idle machine. The figures beside them were measured on two cores of a
server, with models of a thousand to twenty million elements, beside no, one and two busy programs.
"""

from __future__ import annotations

from .results import Results, Times
from .units import flop_rate, rate

# The fraction of their time in which threads have a processor: 0.91 to 1 alone, 0.25 to 0.74 beside one or two.
PROCESSORS = 0.8
# Ratio between ceilings before and after, each the best of ten or more: 1.00 to 1.05 alone, up to 84 beside others.
CEILINGS = 1.2
# Distance of the quartiles over the median: 0.01 to 0.16 alone, up to 11 beside others; on an H200, in 122 us, 0.35
# alone.
SPREAD = 0.5
CLOCK = 5e-6  # seconds that an interrupt, or a device's clock, may add to a time: smaller distances mean nothing
# Fraction of a copy's speed: up to 1.03 alone, since a launch does all that a copy does; some room, since caches are
# odd.
COPY = 1.5


def sentence(results: Results, most: int | None = None) -> str | None:
    """A sentence on how others disturbed a measurement, with at most this many reasons; None if nothing shows it."""
    found = reasons(results)[:most]
    return f"the machine was busy: {'; '.join(found)}; measure again on an idle one" if found else None


def reasons(results: Results) -> list[str]:
    """The contradictions, the plainest first; empty on an idle machine."""
    return [reason for reason in (_threads(results), *_ceilings(results), *_launches(results)) if reason]


def _threads(results: Results) -> str | None:
    known = [x.processors for x in (results.before, results.after) if x.processors is not None]
    if not known or min(known) >= PROCESSORS:
        return None
    return f"its threads had a processor for {min(known):.0%} of their time"


def _ceilings(results: Results) -> list[str | None]:
    """Compare ceilings measured before the steps and after them."""
    before, after = results.before, results.after
    pairs = [("copies", rate, before.memory_rate, after.memory_rate)]
    pairs += [(dtype, flop_rate, best, after.flop_rates[dtype]) for dtype, best in before.flop_rates.items()]
    return [
        f"{name} ran at {shown(a)} at best before the steps, at {shown(b)} after them"
        for name, shown, a, b in pairs
        if max(a, b) > CEILINGS * min(a, b)
    ]


def _launches(results: Results) -> list[str | None]:
    """Compare launches with their ceilings, and repeats with each other; the worst of each."""
    launches, rates = results.launches, results.flop_rates
    above = max(launches, key=lambda x: x.flop_rate / rates[x.compute_dtype])
    roof = rates[above.compute_dtype]
    ahead = max(launches, key=lambda x: x.fraction_of_copy)
    times = [results.device_times, *(x.seconds for x in launches), *(x.copies for x in launches)]
    wide = max(times, key=_scatter)
    return [
        f"a launch computed {flop_rate(above.flop_rate)}, above the ceiling of {flop_rate(roof)}"
        if above.flop_rate > roof  # divisions and roots take longer than the fma that make the ceiling
        else None,
        f"a launch had {ahead.fraction_of_copy:.0%} of a copy's speed" if ahead.fraction_of_copy > COPY else None,
        f"the middle half of the repeats spreads over {wide.spread / wide.median:.0%} of their median"
        if _scatter(wide) > SPREAD
        else None,
    ]


def _scatter(times: Times) -> float:
    """The spread as a fraction of the median, without what the clock may add."""
    return max(0.0, times.spread - CLOCK) / times.median
