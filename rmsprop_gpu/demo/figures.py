"""Figures of a notebook, with a text for whoever does not see them."""

from __future__ import annotations

import re
from base64 import b64encode
from html import escape
from io import BytesIO
from typing import Any

from ..extras import extra


def show(figure: Any, description: str) -> None:
    """Show a figure of matplotlib in a notebook and close it.

    The description says what is drawn; the titles, which say what was found, follow it in the alternative text. It is
    part of the HTML that is shown: of a plain PNG, an export by nbconvert leaves it out.
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
    """Of the figure and of its axes, wherever they stand."""
    found = [ax.get_title(place) for ax in figure.axes for place in ("left", "center", "right")]
    return [title.rstrip(":") for title in (figure.get_suptitle(), *found) if title]
