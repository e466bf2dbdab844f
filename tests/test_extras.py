"""The error for a library that is not installed: its command installs the extra from the package's own source."""

import json
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from rmsprop_gpu import extras
from rmsprop_gpu.extras import MissingExtraError, command, extra

HERE = "f00d"  # a commit


class Installed:
    """A distribution with this direct_url.json."""

    def __init__(self, text):
        self.text = text

    def read_text(self, name):
        assert name == "direct_url.json"
        return self.text


@pytest.fixture
def installed_from(monkeypatch):
    def set_(source):
        text = json.dumps(source) if isinstance(source, dict) else source
        monkeypatch.setattr(extras, "distribution", lambda name: Installed(text))

    return set_


@pytest.mark.parametrize(("editable", "option"), [(True, " -e"), (False, "")])
def test_from_a_folder_that_is_there(editable, option, installed_from, tmp_path):
    folder = tmp_path / "my code"  # a space, %20 in an address
    folder.mkdir()
    installed_from({"url": folder.as_uri(), "dir_info": {"editable": editable} if editable else {}})
    assert command("demo") == f'pip install{option} "{folder}[demo]"'
    assert command("cuda13", "sass", upgrade=True) == f'pip install -U{option} "{folder}[cuda13,sass]"'


@pytest.mark.parametrize(
    ("source", "requirement"),
    [
        (
            {"url": "https://example.org/a.git", "vcs_info": {"vcs": "git", "commit_id": HERE}},
            "rmsprop-gpu[demo] @ git+https://example.org/a.git@f00d",
        ),
        (
            {"url": "file:///home/a.git", "vcs_info": {"vcs": "git", "commit_id": HERE}},
            "rmsprop-gpu[demo] @ git+file:///home/a.git@f00d",
        ),
        (
            {"url": "https://example.org/a.whl", "archive_info": {}},
            "rmsprop-gpu[demo] @ https://example.org/a.whl",
        ),
    ],
)
def test_from_elsewhere(source, requirement, installed_from):
    installed_from(source)
    assert command("demo") == f'pip install "{requirement}"'
    packaging = pytest.importorskip("packaging.requirements")
    assert packaging.Requirement(requirement).extras == {"demo"}


def test_from_a_file(installed_from, tmp_path):
    wheel = tmp_path / "a b.whl"
    installed_from({"url": wheel.as_uri(), "archive_info": {}})
    assert command("demo") == 'in a checkout, pip install ".[demo]"'
    wheel.touch()
    assert command("demo") == f'pip install "rmsprop-gpu[demo] @ {wheel.as_uri()}"'


@pytest.mark.parametrize("source", [None, "no JSON", "[]", {"url": "file:///no/such/folder", "dir_info": {}}])
def test_where_the_source_is_not_known_or_gone_a_checkout_is_named(source, installed_from):
    installed_from(source)
    assert command("demo") == 'in a checkout, pip install ".[demo]"'
    assert command("cuda13", upgrade=True) == 'in a checkout, pip install -U ".[cuda13]"'


def test_without_metadata_a_checkout_is_named(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "distribution", absent)
    assert command("demo") == 'in a checkout, pip install ".[demo]"'


def test_the_error_says_the_extra_and_the_command(monkeypatch, installed_from):
    installed_from(None)
    monkeypatch.setitem(sys.modules, "rich", None)
    said = r'^import of rich .*; it comes with the extra demo: in a checkout, pip install "\.\[demo\]"$'
    with pytest.raises(MissingExtraError, match=said), extra("demo"):
        import rich  # noqa: F401


def test_no_word_of_the_package_installs_it_by_name():
    """It is not on any index, so a package that took its name there would be installed."""
    from paths import ROOT

    files = [*(ROOT / "rmsprop_gpu").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "notebooks").iterdir()]
    texts = {path: path.read_text().replace("\\", "") for path in files if path.is_file()}
    assert [path for path, text in texts.items() if 'pip install "rmsprop-gpu[' in text] == []
