"""Programs in fresh interpreters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rmsprop_gpu

PACKAGE = Path(rmsprop_gpu.__file__).parent


def start(code, path=PACKAGE.parent, **environment):
    """A fresh interpreter that runs this code, with the package from this folder."""
    others = os.environ.get("PYTHONPATH")  # what the device may need
    # Since 3.12 Python warns about forks beside threads; some tests show that ours survive them.
    warnings = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:This process:DeprecationWarning"]))
    paths = os.pathsep.join([str(path), *([others] if others else [])])
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": warnings, **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process):
    """What it printed. It must have ended successfully and without warnings."""
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()  # otherwise it would slow down all later tests
        process.communicate()
        raise
    assert process.returncode == 0, out + err
    assert err == "", err
    return out.strip()


def run(code, path=PACKAGE.parent, **environment):
    """What a fresh interpreter prints."""
    return ended(start(code, path, **environment))


def counted(program, tmp_path, request):
    """The lines that a program prints, and its launches of our kernels, as counted by a virtual device."""
    import cupy

    if b"on the CPU" not in cupy.cuda.runtime.getDeviceProperties(0)["name"]:
        pytest.skip("only a virtual device counts the bytes of its launches")
    if request.config.getoption("--no-pool"):
        pytest.skip("it runs a separate process, in which the pool stays on")
    statistics = tmp_path / "launches.jsonl"
    environment = {**os.environ, "VGPU_STATS": str(statistics), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    launches = [json.loads(line) for line in statistics.read_text().splitlines()]
    return done.stdout.splitlines(), [x for x in launches if "_kernel" in x["kernel"]]
