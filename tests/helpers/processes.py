"""Programs in fresh interpreters."""

import os
import subprocess
import sys
from pathlib import Path

import rmsprop_gpu

PACKAGE = Path(rmsprop_gpu.__file__).parent


def start(code, path=PACKAGE.parent, **environment):
    """A fresh interpreter that runs this code, on the package in this folder."""
    others = os.environ.get("PYTHONPATH")  # what the device may need
    # Since 3.12 Python warns of forks beside threads; that ours live with them is what some tests are for.
    warnings = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:This process:DeprecationWarning"]))
    paths = os.pathsep.join([str(path), *([others] if others else [])])
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": warnings, **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process):
    """What it printed; it must have ended well and without a warning."""
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()  # or it would take a processor from all tests behind this one
        process.communicate()
        raise
    assert process.returncode == 0, out + err
    assert err == "", err
    return out.strip()


def run(code, path=PACKAGE.parent, **environment):
    """What a fresh interpreter prints."""
    return ended(start(code, path, **environment))
