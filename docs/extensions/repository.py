"""Files of the repository as pages: the notebooks, the committed results, the changelog.

They are copied beside the pages before these are read. A link in a page is written as it holds in the repository, so
that it also works where somebody reads the file there; here it is led to the page that the file has become, or to the
file itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
MADE = "made"  # the folder of copies below docs; nothing in it is kept
NEEDS = {"04_in_torch": "torch"}  # what a notebook imports that `.[docs]` does not bring
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def pages() -> dict[Path, Path]:
    """Which file of the repository becomes which page, or picture of one."""
    files = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("benchmarks/results/*.md")]
    files += [*ROOT.glob("benchmarks/results/*.png"), *ROOT.glob("benchmarks/results/gpu-*/*.md")]
    files += [*ROOT.glob("benchmarks/results/gpu-*/*.png")]
    files += [
        ROOT / "benchmarks/README.md",
        *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")),
    ]
    return {file: DOCS / MADE / file.relative_to(ROOT) for file in sorted(files)}


def copy(app: Any, config: Any) -> None:
    """Before pages are read: the copies, made anew."""
    shutil.rmtree(DOCS / MADE, ignore_errors=True)
    for file, page in pages().items():
        page.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".ipynb":
            page.write_text(json.dumps(notebook(file)), encoding="utf-8")
        else:
            shutil.copyfile(file, page)


def notebook(file: Path) -> dict[str, Any]:
    """A notebook; where what it needs is absent it is not run, and says so."""
    content = json.loads(file.read_text(encoding="utf-8"))
    needed = NEEDS.get(file.stem)
    if needed and find_spec(needed) is None:
        text = f"```{{note}}\nThese pages were built without {needed}: the notebook is shown without its outputs.\n```"
        cell = {"cell_type": "markdown", "id": "not-run", "metadata": {}, "source": text}
        content["cells"].insert(1, cell)
        content["metadata"]["mystnb"] = {"execution_mode": "off"}
    return content


def lead(app: Any, docname: str, source: list[str]) -> None:
    """Lead the links of a page to pages, or out of docs to the files that they name."""
    page = Path(app.env.doc2path(docname))
    if page.suffix not in (".md", ".ipynb"):
        return
    became = pages()
    back = {made: file for file, made in became.items()}
    origin = back.get(page, page)

    def led(match: re.Match[str]) -> str:
        before, link, anchor, after = match.groups()
        target = Path(os.path.normpath(origin.parent / link))
        if target not in became and target.is_relative_to(DOCS) and origin is page:
            return match[0]
        if not target.exists():
            return match[0]  # which is then reported
        if target == ROOT / "README.md":
            target, anchor = DOCS / "index.md", None
        new = os.path.relpath(became.get(target, target), page.parent)
        if target.is_dir():
            return f"{before}{os.path.relpath(DOCS / 'index.md', page.parent)}{after}"
        return f"{before}{new}{anchor or ''}{after}"

    source[0] = LINK.sub(led, source[0])


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("config-inited", copy)
    app.connect("source-read", lead)
    return {"parallel_read_safe": True}
