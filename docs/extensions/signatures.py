"""The arguments of a class whose base is mocked, which hides them."""

from __future__ import annotations

import inspect
from typing import Any


def own(app: Any, what: str, name: str, obj: Any, options: Any, signature: Any, annotation: Any) -> Any:
    """Those of its own constructor."""
    if what == "class" and signature == "(*args, **kwargs)" and "__init__" in vars(obj):
        found = inspect.signature(obj.__init__)
        bare = [p.replace(annotation=p.empty) for p in list(found.parameters.values())[1:]]
        return str(inspect.Signature(bare)), None
    return None


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", own)
    return {"parallel_read_safe": True}
