"""A busy machine: the report says so, judging by its measurements, and then names no limit."""

from dataclasses import replace

import pytest
from fabricated import made, times

from rmsprop_gpu.profiling import Ceilings

IDLE = Ceilings(5e10, {"float32": 2e11}, 1.0)
SLOW = times(8e-3)  # makes the microseconds of a clock negligible

# Contradicting measurements, and what the report says about them.
BUSY = {
    "threads": ({"after": replace(IDLE, processors=0.5)}, "its threads had a processor for 50% of their time"),
    "memory": (
        {"before": replace(IDLE, memory_rate=2e10)},
        "copies ran at 20 GB/s at best before the steps, at 50 GB/s after them",
    ),
    "arithmetic": (
        {"after": replace(IDLE, flop_rates={"float32": 3e9})},
        "float32 ran at 200 GFLOP/s at best before the steps, at 3 GFLOP/s after them",
    ),
    "roof": ({"flop_rates": {"float32": 3e9}}, "a launch computed 4.5 GFLOP/s, above the ceiling of 3 GFLOP/s"),
    "copy": ({"launches": [{"copies": times(4e-6)}]}, "a launch had 200% of a copy's speed"),
    "step": (
        {"device_times": times(8e-3, 7e-3, 15e-3)},
        "the middle half of the repeats spreads over 100% of their median",
    ),
    "launch": (
        {"launches": [{}, {"seconds": times(8e-3, 7e-3, 15e-3), "copies": SLOW}]},
        "the middle half of the repeats spreads over 100% of their median",
    ),
    "copies": (
        {"launches": [{"seconds": SLOW, "copies": times(8e-3, 1e-4, 8.1e-3)}]},
        "the middle half of the repeats spreads over 100% of their median",
    ),
}


@pytest.mark.parametrize("case", BUSY)
def test_contradictions_are_seen(case):
    given, said = BUSY[case]
    assert made(**given).busy == [said]


@pytest.mark.parametrize("case", BUSY)
def test_every_form_says_so_and_none_names_a_limit(case):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    given, said = BUSY[case]
    report = made(**given)
    sentence = f"he machine was busy: {said}; measure again on an idle one"
    title = report.plot().get_title().replace("\n", " ")
    assert title == "T" + sentence
    assert report.plot_repeats().get_title().replace("\n", " ") == title
    assert "t" + sentence in " ".join(str(report).split())
    assert "t" + sentence.replace("'", "&#x27;") in report._repr_html_()
    pyplot.close("all")


QUIET = {
    "as measured": {},
    "two threads that wait for memory": {"before": replace(IDLE, processors=0.98)},
    "a device, whose users are not known": {"before": replace(IDLE, processors=None)},
    "ceilings apart as on an idle machine": {"after": replace(IDLE, memory_rate=4.75e10)},
    "a step that is a little faster than a copy": {"launches": [{"copies": times(2.1e-6)}]},
    "microseconds that a clock adds": {"device_times": times(5e-6, 3e-6, 7.5e-6)},
    "repeats apart as on an idle machine": {"device_times": times(33e-6, 31e-6, 36e-6)},
}


@pytest.mark.parametrize("case", QUIET)
def test_an_idle_machine_is_not_called_busy(case):
    report = made(**QUIET[case])
    assert report.busy == []
    assert "busy" not in str(report)


def test_several_reasons_are_one_sentence():
    low = Ceilings(2e10, {"float32": 3e9}, 0.25)
    (line,) = [x for x in made(after=low)._lines() if "busy" in x]
    assert line.count("the machine was busy: ") == 1
    assert line.count("; ") == 3
    assert line.endswith("; measure again on an idle one")
