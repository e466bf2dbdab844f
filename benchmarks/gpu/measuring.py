"""Inside a part: what it finds is written to its file at once, so that a part that is stopped loses nothing."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.worker import reason


class Record:
    """Facts, and rows, each of which was found or failed on its own."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.found: dict[str, Any] = {}
        self.failed = False

    def fact(self, name: str, find: Callable[[], Any]) -> None:
        """Record something that may be unknown: then the reason is recorded, and nothing has failed."""
        try:
            self._add(name, find())
        except Exception as error:
            self.found.setdefault("unknown", {})[name] = reason(error)
            self._add(name, None)

    def row(self, keys: dict[str, Any], find: Callable[..., dict[str, Any]], *given: Any, **more: Any) -> None:
        """Record what `find` finds for these keys, or why it found nothing."""
        start = time.perf_counter()
        try:
            row = {**keys, **find(*given, **more)}
        except Exception as error:
            traceback.print_exc()
            row = {**keys, "failed": reason(error)}
            self.failed = True
        self._add("rows", [*self.found.get("rows", []), row])
        print(f"{json.dumps(row)} [{time.perf_counter() - start:.1f} s]", flush=True)

    def _add(self, name: str, value: Any) -> None:
        self.found[name] = value
        part = self._file.with_suffix(".part")  # if stopped here, the old file stays
        part.write_text(json.dumps(self.found))
        os.replace(part, self._file)


def main(measure: Callable[[Record, bool], None]) -> None:
    """The command line of a part; the exit status is 1 if a row has failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path, help="where the findings go")
    parser.add_argument("--rehearse", action="store_true", help="small sizes")
    options = parser.parse_args()
    record = Record(options.file)
    measure(record, options.rehearse)
    sys.exit(1 if record.failed else 0)
