"""The built pages in a browser: no requests to servers, nothing cut off, mathematics typeset.

``RMSPROP_GPU_PAGES`` is the folder of the built pages, which CI sets. ``RMSPROP_GPU_SCREENSHOTS`` is a folder for
pictures of them, to be looked at.
"""

import os
import re
from pathlib import Path

import pytest
from browser import Browser, program

BUILT = os.environ.get("RMSPROP_GPU_PAGES")
SHOTS = os.environ.get("RMSPROP_GPU_SCREENSHOTS")
pytestmark = pytest.mark.skipif(not BUILT, reason="RMSPROP_GPU_PAGES is not set to the folder of the built pages")
SITE = Path(BUILT or ".")

# A page of each kind, and whether it has mathematics.
KINDS = {
    "index": True,
    "howto/gradients": False,
    "understand/eps": True,
    "understand/rmsprop": True,
    "understand/a_step": False,
    "made/notebooks/02_why_rmsprop": True,
    "made/notebooks/03_profile_kernels": False,
    "made/notebooks/04_in_torch": False,
    "reference/generated/rmsprop_gpu.RMSProp": False,
    "reference/generated/rmsprop_gpu.torch.RMSprop": False,
    "measured/cpu": False,
}
WIDTHS = {"wide": 1400, "narrow": 400}

# Elements that stick out of the window, except inside a box that scrolls by itself.
TOO_WIDE = """
[...document.querySelectorAll("body *")].filter(x => {
    const box = x.getBoundingClientRect();
    if (!box.width || !box.height || box.right <= document.documentElement.clientWidth + 1) return false;
    for (let up = x.parentElement; up; up = up.parentElement) {
        const way = getComputedStyle(up), clip = up.getBoundingClientRect();
        if (way.position === "fixed") return false;
        if (way.overflowX !== "visible" && clip.right <= document.documentElement.clientWidth + 1) return false;
    }
    return !x.closest("dialog, .sr-only, .visually-hidden, mjx-assistive-mml");
}).map(x => x.tagName + "." + x.className + ": " + x.textContent.trim().slice(0, 40)).slice(0, 5)
"""
WITHOUT_TEXT = "document.querySelectorAll(\"article img:not([alt]), article img[alt='']\").length"
SET = """({set: document.querySelectorAll("mjx-container").length,
  raw: [...document.querySelectorAll("article .math")].filter(x => !x.querySelector("mjx-container")).length,
  wrong: document.querySelectorAll("mjx-merror, [data-mjx-error]").length})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not program():
        pytest.skip("Chromium is not installed: the pages were not opened")
    with Browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", KINDS)
def test_page_holds(browser, page, width, dark):
    browser.open(SITE / f"{page}.html", width=WIDTHS[width], dark=dark)
    if SHOTS:
        name = f"{page.replace('/', '-')}-{width}-{'dark' if dark else 'light'}.png"
        browser.picture(Path(SHOTS) / name, whole=True)
    assert list(browser.complaints()) == []
    assert browser.run("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    assert browser.run(TOO_WIDE) == []
    assert browser.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 1
    assert browser.run(WITHOUT_TEXT) == 0
    mathematics = browser.run(SET)
    assert (mathematics["set"] > 0) == KINDS[page]
    assert (mathematics["raw"], mathematics["wrong"]) == (0, 0)


def test_what_is_wrong_is_found(browser, tmp_path):
    """The checks of this file can fail."""
    page = tmp_path / "wrong.html"
    page.write_text(
        "<html><body><article><div style='width:3000px'>wide</div><img src='nothing.png'><span class='math'>x</span>"
        "<script>throw Error('planted')</script><script src='http://example.org/x.js'></script></article></body></html>"
    )
    browser.open(page)
    said = " ".join(browser.complaints())
    assert "nothing.png" in said
    assert "example.org" in said
    assert "Uncaught" in said
    assert browser.run(TOO_WIDE)[0].startswith("DIV")
    assert browser.run(WITHOUT_TEXT) == 1
    assert browser.run(SET)["raw"] == 1


@pytest.mark.parametrize("page", sorted(SITE.rglob("*.html")) if BUILT else [], ids=lambda page: page.stem)
def test_nothing_is_fetched_from_anywhere(page):
    text = page.read_text(encoding="utf-8")
    fetched = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]+|//[^"]+)"', text)
    fetched += re.findall(
        r'<link[^>]*rel="(?:stylesheet|preload|preconnect|icon)"[^>]*href="(https?:[^"]+|//[^"]+)"', text
    )
    assert fetched == []
