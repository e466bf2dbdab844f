"""The output of a profile: in the terminal, in a notebook, and as a roofline."""

import json
import sys
from html.parser import HTMLParser

import pytest
from fabricated import CODE, made, times

from rmsprop_gpu.extras import MissingExtraError
from rmsprop_gpu.profiling import Report, Times
from rmsprop_gpu.profiling.results import Code


def test_rates_follow_from_times():
    report = made()
    (launch,) = report.launches
    assert launch.rate == pytest.approx(1e10)
    assert launch.fraction_of_copy == pytest.approx(1.25)
    assert launch.flop_rate == pytest.approx(4.5e9)
    assert report.rate == pytest.approx(8e9)
    assert report.fraction_of_copy == pytest.approx(1.25)
    two = made([{}, {"bytes": 80_000, "seconds": times(8e-6)}])
    assert two.bytes == 100_000
    assert two.fraction_of_copy == pytest.approx((2.5e-6 + 10e-6) / 10e-6)


def test_times_are_the_median_and_the_quartiles():
    found = Times.of([5.0, 1.0, 2.0, 4.0, 30.0])
    assert found == Times(median=4.0, q1=2.0, q3=5.0, min=1.0, max=30.0, each=(5.0, 1.0, 2.0, 4.0, 30.0))
    assert found.spread == 3.0
    with pytest.raises(ValueError, match="seconds is empty; wanted the time of at least one repeat"):
        Times.of([])


def test_a_step_is_host_and_kernels_or_on_a_device_the_longer():
    host, kernels = Times.of([1.0, 3.0]), Times.of([20.0, 10.0])
    assert made(host=host, device_times=kernels).step.each == (21.0, 13.0)
    assert made([{"device": "cuda:0"}], host=host, device_times=kernels).step == kernels
    assert made([{"device": "cuda:0"}], host=kernels, device_times=host).step == kernels


def test_a_report_survives_json():
    report = made([{"code": CODE, "grid": 2, "block": 256}, {}])
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize("data", [{}, {**made().to_dict(), "speed": 3}, {"launches": None}])
def test_what_is_no_report_is_refused(data):
    with pytest.raises(ValueError, match=r"data is not a report: .*; wanted what to_dict of one returned"):
        Report.from_dict(data)


def test_the_terminal_shows_all_of_it():
    text = str(made(skipped=3))
    assert "RMSProp over 2 tensors, 1,000 elements, 3 without a gradient, on a <processor>" in text
    assert "a step: host 1.5 us (1 us to 2 us), kernels 2.5 us (2 us to 3 us); median (quartiles) of 5 repeats" in text
    assert "moved: 20 kB at 8 GB/s, 125% of a copy's speed" in text
    row = next(line for line in text.splitlines() if "update_kernel[float32, plain]" in line)
    assert row.split()[2:] == ["2", "1,000", "2", "20", "2", "us", "10", "125%"]
    (row,) = [line for line in text.splitlines() if line.strip().startswith("kernels")]
    assert " ".join(row.split()) == "kernels 2 us 2 us 2.5 us 3 us 3 us"


def test_the_notebook_shows_the_same():
    class Cells(HTMLParser):
        found = ()

        def handle_data(self, data):
            self.found = (*self.found, data)

    html = made([{"code": CODE, "grid": 2, "block": 256}])._repr_html_()
    parser = Cells()
    parser.feed(html)
    assert {"update_kernel[float32, plain]", "1,000", "125%", "bytes per element"} <= set(parser.found)
    assert {"2 x 256", "40", "4 B", "8 B", "75% (6 blocks)", "30 float32, 5 memory"} <= set(parser.found)
    assert "RMSProp over 2 tensors, 1,000 elements, on a <processor>" in parser.found
    assert "<processor>" not in html
    assert "a&lt;b" in made([{"name": "a<b"}])._repr_html_()


def test_what_is_known_of_the_code_is_shown():
    text = str(made([{"code": CODE, "grid": 2, "block": 256}]))
    rows = [line.split("plain]")[1].split() for line in text.splitlines() if "update_kernel" in line]
    rows = [rows[0], *rows[2:]]  # the second row has times
    assert rows[1] == ["2", "x", "256", "40", "4", "B", "8", "B", "75%", "(6", "blocks)"]
    assert " ".join(rows[2]) == "30 float32, 5 memory"
    assert "instructions of the vector loop" in text
    unknown = Code(40, 8, None, 6, 0.75, "the vector loop", {})
    assert "not known" in str(made([{"code": unknown, "grid": 2, "block": 256}]))


def test_launches_on_several_devices_are_told_apart():
    text = str(made([{"device": "cuda:0"}, {"device": "cuda:1"}]))
    assert "plain] on cuda:0" in text
    assert "plain] on cuda:1" in text
    assert "on cuda:0" not in str(made([{"device": "cuda:0"}]))


def test_the_roofline_has_the_ceilings_and_a_point_a_launch():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    report = made()
    ax = report.plot()
    point = next(line for line in ax.lines if line.get_marker() == "o")
    assert point.get_xdata()[0] == pytest.approx(9 / 20)
    assert point.get_ydata()[0] == pytest.approx(4.5)
    roof = ax.lines[0]
    assert roof.get_ydata()[-1] == pytest.approx(200)
    assert roof.get_ydata()[0] == pytest.approx(roof.get_xdata()[0] * 50)
    assert ax.get_title() == "A step moves 8.0 GB/s, 125% of a copy: it is far below both ceilings"
    (label,) = [text.get_text() for text in ax.get_legend().get_texts()]
    assert label == "float32, plain: 125% of a copy"
    assert "FLOP/byte" in ax.get_xlabel()
    _, mine = pyplot.subplots()
    assert report.plot(mine) is mine
    pyplot.close("all")


@pytest.mark.parametrize(
    ("memory_rate", "flop_rates", "said"),
    [
        (1e10, {"float32": 2e11}, "its limit is memory"),
        (1e13, {"float32": 5e9}, "its limit is arithmetic"),
        (1e10, {"float32": 2e11, "float64": 4e9}, "its limit is memory"),
        (1e12, {"float32": 2e11}, "it is far below both ceilings"),
    ],
)
def test_the_title_of_the_roofline_says_what_holds_the_step_back(memory_rate, flop_rates, said):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    title = made(memory_rate=memory_rate, flop_rates=flop_rates).plot().get_title()
    assert title.endswith(said)
    pyplot.close("all")


def test_the_ceiling_that_counts_is_that_of_the_launch():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    rates = {"float32": 2e11, "float64": 5e9}
    title = made([{"compute_dtype": "float64"}], memory_rate=2e10, flop_rates=rates).plot().get_title()
    assert title.endswith("its limit is arithmetic")
    pyplot.close("all")


@pytest.mark.parametrize("show", [Report.plot, Report.plot_repeats])
def test_a_missing_library_names_the_extra(show, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingExtraError, match=r'the extra profile: .*pip install .*\[profile\]"$'):
        show(made())


def test_without_rich_the_same_is_plain_text(monkeypatch):
    report = made([{"code": CODE, "grid": 2, "block": 256}], skipped=3)
    cells = [line.split() for line in str(report).splitlines()]
    monkeypatch.setitem(sys.modules, "rich.console", None)
    plain = str(report)
    assert [x for x in map(str.split, plain.splitlines()) if x and set("".join(x)) != {"-"}] == [
        x for x in cells if x and set("".join(x)) != {"─"}
    ]
    assert plain.isascii()
    head, row = (line for line in plain.splitlines() if "bytes per element" in line or line.endswith("125%"))
    assert head.index("elements") + len("elements") == row.index("1,000") + len("1,000")  # right-aligned
