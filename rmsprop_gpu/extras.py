"""Optional libraries: each belongs to an extra of the package, and is imported where it is used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

NAME = "rmsprop-gpu"  # on no index: pip install NAME would find nothing, or someone else's package


class MissingExtraError(ImportError):
    """A library that an extra of this package brings is not installed, or too old.

    It is an `ImportError`. Its text names the extra and the command that installs it.

    Examples
    --------
    >>> try:
    ...     from rmsprop_gpu.torch import RMSprop
    ... except MissingExtraError as error:
    ...     assert "it comes with the extra torch: " in str(error) and "pip install" in str(error)
    """


@contextmanager
def extra(name: str) -> Iterator[None]:
    """If an import inside fails, name the extra and the command that installs it."""
    try:
        yield
    except ImportError as error:
        why = " ".join(str(error).split())  # some messages have several lines
        raise MissingExtraError(f"{why}; it comes with the extra {name}: {command(name)}") from None


def command(*names: str, upgrade: bool = False) -> str:
    """The command to install these extras from this package's own source; in words if that no longer exists."""
    pip, extras = "pip install -U" if upgrade else "pip install", f"[{','.join(names)}]"
    source = _source()
    url, path = source.get("url", ""), _path(source)
    if "vcs_info" in source:
        vcs = source["vcs_info"]
        return f'{pip} "{NAME}{extras} @ {vcs["vcs"]}+{url}@{vcs["commit_id"]}"'
    if path and path.is_dir():
        editable = " -e" * source.get("dir_info", {}).get("editable", False)
        return f'{pip}{editable} "{path}{extras}"'
    if "archive_info" in source and (path is None or path.is_file()):
        return f'{pip} "{NAME}{extras} @ {url}"'
    return f'in a checkout, {pip} ".{extras}"'


def _source() -> dict[str, Any]:
    """Where this package was installed from, as recorded by installers (PEP 610); empty if unknown."""
    try:
        text = distribution(NAME).read_text("direct_url.json")
        found = json.loads(text) if text else {}
    except (PackageNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _path(source: dict[str, Any]) -> Path | None:
    """The folder or file that a source is; None if it is elsewhere."""
    from urllib.request import url2pathname  # slow to import, and needed only for errors

    url = urlsplit(source.get("url", ""))
    return Path(url2pathname(url.path)) if url.scheme == "file" else None
