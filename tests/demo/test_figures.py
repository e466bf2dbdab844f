"""Text alternatives for the figures in notebooks."""

from base64 import b64decode
from html.parser import HTMLParser

import pytest

from rmsprop_gpu.demo.figures import show


def test_a_figure_is_shown_with_what_it_shows_and_what_was_found(monkeypatch):
    pyplot, display = pytest.importorskip("matplotlib.pyplot"), pytest.importorskip("IPython.display")
    pyplot.switch_backend("Agg")
    shown, images = [], []
    monkeypatch.setattr(display, "display", shown.append)
    figure, (left, right) = pyplot.subplots(1, 2)
    figure.suptitle('the "best"\nis <1>:')
    left.set_title(r"$\alpha$ = 0.9", loc="left")
    right.set_title("the other")
    show(figure, "Two axes")
    HTML = type(
        "Images", (HTMLParser,), {"handle_starttag": lambda self, tag, attrs: images.append((tag, dict(attrs)))}
    )
    HTML().feed(shown[0]._repr_html_())
    ((tag, found),) = images
    assert tag == "img"
    assert found["alt"] == 'Two axes. the "best" is <1>. alpha = 0.9. the other'
    kind, _, data = found["src"].partition(",")
    assert kind == "data:image/png;base64"
    assert b64decode(data).startswith(b"\x89PNG")
    assert not pyplot.fignum_exists(figure.number)  # otherwise it would be shown twice, once without its text
