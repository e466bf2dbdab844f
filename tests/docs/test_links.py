"""Every link between files leads to an existing file, and to a heading in it."""

import re
import xml.etree.ElementTree as ET

import pytest
from pages import DOCS, OTHERS, PAGES, anchors, links, named
from paths import ROOT


def dead(page):
    """The links of a page that lead nowhere."""
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        # Copies exist only where the pages are built, so links must point to the files in the repository.
        copied = {DOCS / "made", DOCS / "reference" / "generated"} & set(target.parents)
        if copied or not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=named)
def test_links_lead_somewhere(page):
    assert list(dead(page)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[a](nowhere.md)", ["nowhere.md"]),
        ("[a](here.md#no-heading)", ["here.md#no-heading"]),
        ("[a](#no-heading)", ["#no-heading"]),
        ('<img src="nothing.png" alt="">', ["nothing.png"]),
        ("[a](here.md#one-heading) [b](#one-heading) [c](https://example.org/x)", []),
    ],
)
def test_dead_links_are_found(text, found, tmp_path):
    page = tmp_path / "here.md"
    page.write_text(f"# One heading\n\n{text}\n")
    assert list(dead(page)) == found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_pictures_have_a_text(page):
    text = page.read_text()
    assert all(re.findall(r"!\[(.*?)\]\(", text))
    assert len(re.findall(r"<img", text)) == len(re.findall(r'<img[^>]* alt="[^"]+"', text))


def test_every_page_is_in_a_table_of_contents():
    listed = {DOCS / "index.md"}
    for page in PAGES:
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            entries = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / f"{entry}.md").resolve() for entry in entries}
    assert set(PAGES) - listed == {ROOT / "README.md"}


def test_the_picture_of_the_wings_is_of_today():
    scope = {"__name__": "wings", "__file__": str(DOCS / "extensions" / "wings.py")}
    exec((DOCS / "extensions" / "wings.py").read_text(), scope)
    shown = (DOCS / "_static" / "wings.svg").read_text()
    assert shown == scope["picture"]()
    bold = [x.text for x in ET.fromstring(shown).iter() if x.get("font-weight") == "bold"]
    assert {f"{path.parent.name}" for path in ROOT.glob("rmsprop_gpu/*/__init__.py")} <= set(bold)
