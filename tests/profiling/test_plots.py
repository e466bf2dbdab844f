"""Text in a plot stays inside it, whatever was measured."""

import pytest
from fabricated import LAUNCH, made, times

from rmsprop_gpu.profiling import Ceilings, Sizes, Times, compare

LONG = "bias_correction+centered+clipnorm+clipvalue+decoupled_weight_decay+momentum+nesterov"
MEMORY, FLOPS = [3e9, 5e10, 4.3e12], [3e9, 2e11, 6e13]


@pytest.fixture
def pyplot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    yield pyplot
    pyplot.close("all")


def lies_in(inner, outer):
    """One box is inside the other, up to pixel rounding."""
    return (
        inner.x0 >= outer.x0 - 0.5
        and inner.x1 <= outer.x1 + 0.5
        and inner.y0 >= outer.y0 - 0.5
        and inner.y1 <= outer.y1 + 0.5
    )


def check(ax):
    """Labels and points are inside the axes, everything else is inside the figure."""
    ax.figure.draw_without_rendering()
    renderer, frame = ax.figure.canvas.get_renderer(), ax.get_window_extent()
    for text in ax.texts:
        assert lies_in(text.get_window_extent(renderer), frame), text.get_text()
    for line in ax.lines:
        if line.get_marker() not in ("None", "", "|"):
            assert all(frame.contains(*ax.transData.transform(point)) for point in line.get_xydata()), line.get_label()
    assert lies_in(ax.get_tightbbox(renderer), ax.figure.bbox)


def disjoint(ax):
    """No label covers another."""
    renderer = ax.figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in ax.texts]
    return not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize("memory_rate", MEMORY)
@pytest.mark.parametrize("flops", FLOPS)
@pytest.mark.parametrize("seconds", [1e-3, 2e-6, 1e-9])
def test_the_labels_of_a_roofline_lie_in_its_axes(memory_rate, flops, seconds, pyplot):
    launches = [
        {"seconds": times(seconds)},
        {"name": f"update_kernel[float64, {LONG}]", "variant": LONG, "compute_dtype": "float64", "dtype": "float64",
         "bytes_per_element": 72, "flops_per_element": 40},
    ]  # fmt: skip
    ax = made(launches, memory_rate=memory_rate, flop_rates={"float32": flops, "float64": flops / 2}).plot()
    check(ax)
    assert disjoint(ax)


@pytest.mark.parametrize("flops", FLOPS)
def test_so_do_those_of_several_reports(flops, pyplot):
    reports = {
        "before": made(),
        "after": made([{"variant": LONG}], device="another, with a longer name", flop_rates={"float32": flops}),
        "theirs": Times.of([3e-2]),
    }
    ax = compare(reports).plot()
    check(ax)
    assert disjoint(ax)


@pytest.mark.parametrize("size", [(8, 5), (4, 3)])
def test_so_do_those_on_axes_of_any_size(size, pyplot):
    _, ax = pyplot.subplots(figsize=size, layout="constrained")
    made().plot(ax)
    ax.figure.draw_without_rendering()
    renderer = ax.figure.canvas.get_renderer()
    assert all(lies_in(text.get_window_extent(renderer), ax.get_window_extent()) for text in ax.texts)


def test_repeats_and_sizes_lie_in_their_figures(pyplot):
    busy = made([{"name": f"update_kernel[float32, {LONG}]"}, {}], after=Ceilings(1e9, {"float32": 2e11}, 0.3))
    for report in (made(), busy):
        check(report.plot_repeats())
        check(Sizes((10, 1000), (report, report)).plot())


def test_a_dot_is_a_repeat(pyplot):
    report = made(host=Times.of([3e-6, 1e-6, 8e-6]))
    ax = report.plot_repeats()
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "host", "kernels", LAUNCH["name"], "a copy beside it"]  # fmt: skip
    dots = next(line for line in ax.lines if line.get_marker() == ".")
    assert dots.get_xdata().tolist() == pytest.approx([3, 1, 8])
    assert list(dots.get_ydata()) == sorted(dots.get_ydata())  # in order, since the axis points down
    assert ax.yaxis_inverted()
    said = "The slowest repeat took 2.67 times the median of 3 us (host)"
    assert ax.get_title().replace("\n", " ") == said
