"""Tables that may be wider than a window: each in a box of its own that scrolls."""

from __future__ import annotations

from typing import Any

from docutils import nodes


def wrap(app: Any, doctree: nodes.document) -> None:
    """Put every table into a box."""
    for table in list(doctree.findall(nodes.table)):
        box = nodes.container(classes=["wide"])
        table.replace_self(box)
        box += table


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("doctree-read", wrap)
    return {"parallel_read_safe": True}
