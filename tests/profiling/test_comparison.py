"""Comparisons of profiles."""

import sys

import pytest
from fabricated import AFTER, BEFORE, BUSY, made, rows, times

from rmsprop_gpu.profiling import Times, compare


@pytest.mark.parametrize("rich", [True, False])
def test_figures_stand_beside_each_other(rich, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    text = str(compare({"before": BEFORE, "after": AFTER, "torch": Times.of([3e-5])}))
    found = rows(text)
    assert found["medians"] == ["before", "after", "torch", "after / before", "torch / before"]
    assert found["a step"] == ["10 us", "5 us", "30 us", "0.5", "3"]
    assert found["kernels"] == ["9 us", "4 us", "-", "0.444", "-"]
    assert found["bytes"] == ["20 kB", "40 kB", "-", "2", "-"]
    assert found["update_kernel[float32, plain]"] == ["2 us", "1 us", "-", "0.5", "-"]
    assert found["update_kernel[float32, momentum]"] == ["-", "2 us", "-", "-", "-"]
    assert "after: a step takes 0.5 times as long as before\n" in text
    assert "torch: a step takes 3 times as long as before\n" in text


def test_a_notebook_shows_the_same():
    html = compare({"before": BEFORE, "after": AFTER})._repr_html_()
    assert "after / before</th>" in html
    assert "after: a step takes 0.5 times as long as before" in html


def test_a_difference_within_the_repeats_is_said_to_be_one():
    one, other = (made(host=times(1e-9), device_times=times(m, m - 2e-6, m + 2e-6)) for m in (10e-6, 11e-6))
    assert "1.1 times as long as one, but the quartiles overlap: that may be chance" in " ".join(
        str(compare({"one": one, "other": other})).split()
    )


def test_nobody_is_faster_on_a_busy_machine():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    comparison = compare({"before": BEFORE, "after": BUSY})
    text = str(comparison)
    assert "after: the machine was busy: its threads had a processor for 50% of their time" in text
    assert "a step takes" not in text
    assert "fter: the machine was busy" in comparison.plot().get_title()
    pyplot.close("all")


def test_one_roofline_holds_all_of_them():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    far = made(device="another", memory_rate=1e11)
    ax = compare({"before": BEFORE, "after": far, "torch": Times.of([9e-6])}).plot()
    before, after, torch = (line for line in ax.lines if line.get_marker() in "osD")
    assert (before.get_xdata()[0], before.get_ydata()[0]) == pytest.approx((9 / 20, 4.5))
    assert (torch.get_xdata()[0], torch.get_ydata()[0]) == pytest.approx((9 / 20, 1.0))  # 9,000 operations in 9 us
    assert len({line.get_color() for line in (before, after, torch)}) == 3
    labels = [text.get_text() for text in ax.texts]
    assert [x for x in labels if "memory" in x] == ["memory: 50 GB/s, a copy", "memory: 100 GB/s, a copy"]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend[::2] == ["before: float32, plain: 125% of a copy", "torch: 9 us a step"]
    assert ax.get_title().startswith("After: a step takes")
    pyplot.close("all")


@pytest.mark.parametrize(
    ("measured", "error", "match"),
    [
        ([BEFORE, AFTER], TypeError, "measured is a list; wanted a mapping of names to reports"),
        ({"before": BEFORE, "after": 3.0}, TypeError, r"measured\['after'\] is a float; wanted a Report or Times"),
        ({1: BEFORE, "after": AFTER}, TypeError, r"measured\[1\] is a Report; wanted a Report or Times by its name"),
        ({"before": BEFORE}, ValueError, r"measured holds \['before'\]; wanted two or more, one of them a Report"),
        ({"a": times(1.0), "b": times(2.0)}, ValueError, r"holds \['a', 'b'\]; wanted two or more, one of them a Rep"),
    ],
)
def test_what_cannot_be_compared_is_refused(measured, error, match):
    with pytest.raises(error, match=match):
        compare(measured)
