"""The pages that people read, and their contents: code, links, headings."""

import ast
import doctest
import re
from dataclasses import dataclass

from paths import ROOT

DOCS = ROOT / "docs"
# Written by hand: the README, and all of docs except the copies that its build makes.
PAGES = [ROOT / "README.md", *sorted(p for p in DOCS.rglob("*.md") if not {"made", "generated"} & set(p.parts))]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md",
                                   "notebooks/README.md")]  # fmt: skip
LIBRARIES = {"cupy", "torch", "mpi4py", "keras", "optax"}


def named(page):
    """A page's name in test ids."""
    return page.relative_to(ROOT).as_posix()


@dataclass
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    needs: str | None = None  # the library that it needs to run

    @property
    def tree(self):
        """Its syntax tree."""
        examples = doctest.DocTestParser().get_examples(self.text) if self.language == "pycon" else []
        return ast.parse("".join(x.source for x in examples) or self.text)


def code(page):
    """The Python blocks. A block needs a library if it imports it, or uses names from an earlier block that does."""
    found, makes = list(blocks(page, "python", "pycon")), {}
    for block in found:
        used, made = set(), set()
        for node in ast.walk(block.tree):
            if isinstance(node, ast.Name):
                (made if isinstance(node.ctx, ast.Store) else used).add(node.id)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                made |= {(x.asname or x.name).split(".")[0] for x in node.names}
                imported = {(getattr(node, "module", None) or x.name).split(".")[0] for x in node.names}
                block.needs = next(iter(imported & LIBRARIES), block.needs)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                made.add(node.name)
        for name in used - made:
            block.needs = block.needs or makes.get(name)
        for name in made:
            makes[name] = None if name in makes and makes[name] is None else block.needs
    return found


def blocks(page, *languages):
    """The blocks in these languages, in order."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\S+)[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if match[1] in languages:
            yield Block(match[1], match[2], text[: match.start()].count("\n") + 2)


def without_code(page):
    """The page's text without blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page):
    """The targets of its links and pictures, except those on other hosts."""
    text = without_code(page)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [link for link in found if "://" not in link and not link.startswith("mailto:")]


def anchors(page):
    """The anchors of its headings, as GitHub and Sphinx generate them."""
    found = re.findall(r"^#{1,4} (.+)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}
