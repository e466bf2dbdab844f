"""The error if MPI is not installed."""

import subprocess
import sys

import pytest
from paths import ROOT

PROGRAM = """
import sys
if {absent}:
    sys.modules["mpi4py"] = None
from rmsprop_gpu.extras import MissingExtraError
try:
    import rmsprop_gpu.distributed
except MissingExtraError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("absent", "said"), [(True, "mpi4py"), (False, "mpi4py does not work: cannot load MPI library")]
)
def test_the_extra_is_named(absent, said, tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").touch()
    (tmp_path / "mpi4py" / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')")
    program = f"import sys; sys.path[:0] = {[str(tmp_path), str(ROOT)]!r}\n" + PROGRAM.format(absent=absent)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert said in ended.stdout
    assert "it comes with the extra mpi" in ended.stdout
