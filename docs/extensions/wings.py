"""``python docs/extensions/wings.py``: the picture of the wings, _static/wings.svg, from the import contract."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1]
WIDTH, HEIGHT, GAP = 680, 40, 10

DOES = {
    "cli": "the command rmsprop-gpu",
    "demo": "trains on digits, beside an oracle",
    "profiling": "bytes, times and rooflines of a step",
    "distributed": "shards the state over processes",
    "optimizer": "RMSProp and AdaGrad of arrays",
    "torch": "the class for torch",
    "state": "buffers, checkpoints, other frameworks",
    "conventions": "presets, explain()",
    "steps": "check, bind and launch a step",
    "hyper": "hyperparameters: names, ranges, defaults",
    "kernels": "the rule, loops and norms; what compiles",
    "arrays": "what an array is, and where it lies",
    "reference": "the mathematics in NumPy",
    "extras": "errors for absent libraries",
}


def layers() -> list[list[str]]:
    """From the top down, wings that stand beside each other together."""
    text = (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8")
    names = re.findall(r'^    "(.+?)",$', text[text.index("layers = [") :], re.MULTILINE)
    return [name.split(" | ") for name in names if name != "__main__"]


def picture() -> str:
    """The SVG."""
    rows = layers()
    total = len(rows) * (HEIGHT + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" height="{total}" '
        'font-family="sans-serif" font-size="14" role="img">',
        "<title>The wings, from the top down; each imports only what stands below it</title>",
        f'<rect width="{WIDTH}" height="{total}" fill="#ffffff"/>',
    ]
    for i, row in enumerate(rows):
        y, width = GAP + i * (HEIGHT + GAP), (WIDTH - GAP) / len(row) - GAP
        for j, name in enumerate(row):
            x = GAP + j * (width + GAP)
            parts += [
                f'<rect x="{x:g}" y="{y}" width="{width:g}" height="{HEIGHT}" rx="5" fill="#e8f0f8" stroke="#006ba4"/>',
                f'<text x="{x + 12:g}" y="{y + 25}" font-weight="bold" fill="#003a5c">{name}</text>',
                f'<text x="{x + width - 12:g}" y="{y + 25}" text-anchor="end" font-size="12" fill="#333333">'
                f"{DOES[name]}</text>",
            ]
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (DOCS / "_static" / "wings.svg").write_text(picture(), encoding="utf-8")
