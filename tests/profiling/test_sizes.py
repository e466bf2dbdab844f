"""Profiles over sizes."""

import numpy as np
import pytest
from fabricated import AFTER, BEFORE, BUSY, made, rows

from rmsprop_gpu import RMSProp
from rmsprop_gpu.profiling import profile_sizes
from rmsprop_gpu.profiling import sizes as profile_of_sizes

F4 = np.float32


@pytest.fixture
def over_sizes(monkeypatch):
    """What `profile_sizes` returns for given reports."""

    def run(*reports):
        found = iter(reports)
        monkeypatch.setattr(profile_of_sizes, "profile", lambda opt, grads, repeats: next(found))
        return profile_sizes(lambda n: (n, n), range(10, 10 * (len(reports) + 1), 10))

    return run


def test_every_size_is_profiled(monkeypatch):
    asked = []

    def profile(opt, grads, repeats):
        asked.append((opt._tensors[0].layout.size, grads.size, repeats))
        return made()

    monkeypatch.setattr(profile_of_sizes, "profile", profile)
    sizes = profile_sizes(lambda n: (RMSProp(np.ones(n, F4)), np.ones(n, F4)), [7, np.int64(20)], repeats=4)
    assert asked == [(7, 7, 4), (20, 20, 4)]
    assert sizes.sizes == (7, 20)
    assert sizes.to_dict() == {"sizes": [7, 20], "reports": [made().to_dict()] * 2}


def test_a_row_for_each_size_and_a_curve_over_them(over_sizes):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    sizes = over_sizes(BEFORE, AFTER)
    text = str(sizes)
    assert rows(text)["10"] == ["2", "1,000", "20 kB", "1 us", "9 us", "2.22", "125%"]
    assert rows(text)["20"] == ["4", "2,000", "40 kB", "1 us", "4 us", "10", "125%"]
    said = "from size 10 to 20 the host's time goes from 1 us to 1 us, the kernels' from 9 us to 4 us"
    assert said in text
    ax = sizes.plot()
    curves = {line.get_label(): line for line in ax.lines}
    assert curves["kernels"].get_xdata().tolist() == [10, 20]
    assert curves["kernels"].get_ydata() == pytest.approx([9, 4])
    assert curves["a copy of as many bytes"].get_ydata() == pytest.approx([2.5, 3.75])
    assert ax.get_title().replace("\n", " ") == "F" + said[1:]
    pyplot.close("all")


def test_a_size_at_which_the_machine_was_busy_is_named(over_sizes):
    text = str(over_sizes(BEFORE, BUSY))
    assert "at size 20 the machine was busy: its threads" in text
    assert "goes from" not in text


@pytest.mark.parametrize("sizes", [[], [0], [3, 3], [2.5], [True], ["3"]])
def test_wrong_sizes_are_refused_before_any_is_made(sizes):
    with pytest.raises(ValueError, match="wanted whole numbers above 0, each once"):
        profile_sizes(lambda n: pytest.fail("made"), sizes)


def test_what_makes_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="make is a int; wanted a callable of a size"):
        profile_sizes(3, [1])
    with pytest.raises(TypeError, match=r"make\(5\) returned a RMSProp; wanted an optimizer and its gradients"):
        profile_sizes(lambda n: RMSProp(np.ones(n)), [5])
