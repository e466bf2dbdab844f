"""The files in the repository's root for people who cite, report or contribute."""

import re

import pytest
from paths import ROOT

import rmsprop_gpu

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
TEXTS = [
    *(ROOT / name for name in ("README.md", "CITATION.cff", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *FORMS,
]


def test_the_citation_is_of_this_version():
    assert f"\nversion: {rmsprop_gpu.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_no_address_is_invented(text):
    """Anything not known yet is a placeholder, each in one place."""
    said = text.read_text()
    assert not re.search(r"[\w.]+@[\w-]+\.\w+", said)
    assert said.count("PLACEHOLDER") == (text.name in ("CITATION.cff", "SECURITY.md"))


@pytest.mark.parametrize("form", [*FORMS, ROOT / "CITATION.cff"], ids=lambda path: path.name)
def test_forms_are_well_formed(form):
    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load(form.read_text())
    for field in content.get("body", []):
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes", "markdown")
        assert {"label"} <= set(field["attributes"])
    fields = [field["id"] for field in content.get("body", [])]
    assert len(set(fields)) == len(fields)
