"""Figures in a notebook, with alternative texts for readers who cannot see them."""

from __future__ import annotations

import re
from base64 import b64encode
from html import escape
from io import BytesIO
from typing import Any

from ..extras import extra


def show(figure: Any, description: str) -> None:
    """Show a matplotlib figure in a notebook and close it.

    The description says what is drawn; the titles, which say what was found, follow it in the alternative text. The
    text is part of the HTML that is shown, since nbconvert would drop the text of a plain PNG.
    """
    with extra("notebooks"):
        import matplotlib.pyplot as plt
        from IPython.display import HTML, display
    image = BytesIO()
    figure.savefig(image, format="png", bbox_inches="tight")
    plt.close(figure)
    text = re.sub(r"[$\\\\]", "", ". ".join([description, *_titles(figure)])).replace("\n", " ")
    display(HTML(f'<img alt="{escape(text)}" src="data:image/png;base64,{b64encode(image.getvalue()).decode()}">'))


def _titles(figure: Any) -> list[str]:
    """The titles of the figure and of its axes."""
    found = [ax.get_title(place) for ax in figure.axes for place in ("left", "center", "right")]
    return [title.rstrip(":") for title in (figure.get_suptitle(), *found) if title]
