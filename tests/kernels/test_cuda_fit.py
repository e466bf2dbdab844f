"""The error when the packages that compile for CUDA do not fit together. The tests need no CUDA."""

import numpy as np
import pytest
from processes import run, start

from rmsprop_gpu.extras import command
from rmsprop_gpu.kernels import cuda_fit

HERE = {
    "numpy": "2.4.6",
    "numba": "0.68.1",
    "numba-cuda": "0.30.4",
    "cuda-core": "1.2.2",
    "libNVVM": "13.5.37",
    "nvJitLink": "13.0",
    "driver": "12.4",
}
SAID = {
    "nvJitLink is older": (
        "nvJitLinkError: ERROR_OUTDATED_LIBRARY",
        "nvJitLink (13.0) is older than libNVVM (13.5.37), whose code it has to link; install one that is as new (pip "
        "install -U nvidia-nvjitlink)",
    ),
    "the driver is too old": (
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION: the provided PTX was compiled with an unsupported toolchain",
        "the driver, for CUDA 12.4, is too old for libNVVM (13.5.37); install nvJitLink, which links for older ones (",
    ),
    "there is no libNVVM": (
        "libNVVM cannot be found. Do `conda install cudatoolkit`",
        "libNVVM does not load; install it with the extra that fits your driver "
        f"({command('cuda13', upgrade=True)}, or [cuda12] for an older driver)",
    ),
    "there is no libNVVM for pathfinder": (
        'Failure finding "libnvvm.so": No such file: libnvvm.so*',
        "libNVVM does not load; install it with the extra that fits your driver ",
    ),
    "libNVVM is there, and does not take the code": (
        "libNVVM error: parse failed",
        f"versions that fit together come with {command('cuda13', upgrade=True)}",
    ),
    "no memory": ("CUDA_ERROR_OUT_OF_MEMORY: out of memory", "the device has no memory left for it; free some on"),
    "a lost device": ("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal", "this process can no longer use the device, since"),
    "no code for the driver": (
        "CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid",
        "the driver, for CUDA 12.4, does not accept what nvJitLink (13.0) made for it",
    ),
    "anything else": (
        "module 'numpy' has no attribute 'row_stack'",
        f"versions that fit together come with {command('cuda13', upgrade=True)}, or [cuda12] for an older driver",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_an_error_is_told_with_what_helps_and_all_versions(case, monkeypatch):
    monkeypatch.setattr(cuda_fit, "versions", lambda: HERE)
    error, meaning = SAID[case]
    text = cuda_fit.why_not_compiled(AttributeError(error))
    assert text.startswith(f"no kernel could be compiled for CUDA: {meaning}")
    assert f"AttributeError: {error}" in text
    assert text.endswith(", ".join(f"{name} {number}" for name, number in HERE.items()))


def test_the_linker_is_told(monkeypatch):
    monkeypatch.setattr(cuda_fit, "nvjitlink", lambda: "13.5")
    assert cuda_fit.linker().startswith("nvJitLink 13.5")
    monkeypatch.setattr(cuda_fit, "nvjitlink", lambda: None)
    assert "missing (pip install -U nvidia-nvjitlink)" in cuda_fit.linker()


def test_nothing_of_it_needs_cuda():
    code = """
import sys
for name in ("cupy", "cuda", "numba_cuda"):
    sys.modules[name] = None
from rmsprop_gpu.extras import command
from rmsprop_gpu.kernels import cuda_fit
print(cuda_fit.versions()["nvJitLink"], cuda_fit.versions()["driver"])
"""
    assert run(code) == "not installed unknown"


@pytest.mark.gpu
def test_the_first_step_says_what_does_not_fit():
    code = """
import cupy
from rmsprop_gpu import RMSProp
from rmsprop_gpu.kernels import cuda_code
from numba.cuda.dispatcher import CUDADispatcher
def fail(self, *_):
    raise AttributeError("module 'numpy' has no attribute 'row_stack'")
CUDADispatcher.compile = fail
param = cupy.ones(3)
try:
    RMSProp(param).step(param.copy())
except RuntimeError as error:
    print("numba-cuda 0.30" in str(error), "row_stack" in str(error), float(param.sum()))
print(cuda_code.trial()[:22])
"""
    assert run(code, RMSPROP_GPU_CACHE="0").splitlines() == ["True True 3.0", "no kernel could be com"]


@pytest.mark.gpu
def test_row_stack_is_there_while_numba_cuda_asks_for_it():
    """As under NumPy 2.5, which numba-cuda 0.30.4 does not support. If that is installed, every step tests this."""
    code = """
import sys
import numpy
from rmsprop_gpu.kernels import cuda_target
if hasattr(numpy, "row_stack"):
    del numpy.row_stack
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numba.cuda.np.arrayobj":
            print("asked", hasattr(numpy, "row_stack"))
            raise AttributeError("module 'numpy' has no attribute 'vanished'")
sys.modules.pop("numba.cuda.np.arrayobj", None)
sys.meta_path.insert(0, Finder())
try:
    cuda_target._import_what_compiles()
except ImportError as error:
    print(error)
print("afterwards", hasattr(numpy, "row_stack"))
"""
    asked, error, afterwards = run(code).splitlines()
    assert (asked, afterwards) == ("asked True", "afterwards False")
    assert error.startswith(f"numba-cuda does not work with numpy {np.__version__} (module 'numpy' has no attribute")
    assert error.endswith('install one that it supports (pip install "numpy<2.5")')


@pytest.mark.gpu
@pytest.mark.skipif("__import__('devices').device_count() < 2", reason="needs two CUDA devices")
def test_a_process_that_stepped_on_two_devices_ends_quietly():
    code = """
import cupy
from rmsprop_gpu import RMSProp
for i in range(2):
    with cupy.cuda.Device(i):
        param = cupy.ones(3)
        RMSProp(param, momentum=0.9, clipnorm=1.0).step(param.copy())
        cupy.cuda.Device().synchronize()
print("done")
"""
    out, err = start(code, RMSPROP_GPU_CACHE="0").communicate(timeout=120)
    assert (out, "Traceback" in err, "Error" in err) == ("done\n", False, False), err
