"""What PyTorch's own tests build RMSprop with: the configurations and the errors that the installed torch ships.

``torch.testing._internal.common_optimizers`` imports most of torch's test suite, which needs packages that a wheel does
not bring. The import itself uses only what decorates tests, and that is stubbed here.
"""

import sys
from types import ModuleType
from unittest.mock import patch

import torch


class _Nothing:
    """A base class, a decorator, or a decorator's value: calling it has no effect."""

    def __init__(self, *args, **kwargs):
        pass


class _Stub(ModuleType):
    TEST_WITH_TORCHDYNAMO = False

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


def _shipped():
    """Import the module with stubs that nobody else sees."""
    heavy = ("common_device_type", "common_methods_invocations", "common_utils")
    names = [f"torch.testing._internal.{name}" for name in heavy]
    name = "torch.testing._internal.common_optimizers"
    with patch.dict(sys.modules, {stub: _Stub(stub) for stub in names}):
        __import__(name)
        return sys.modules.pop(name)


_info = next(info for info in _shipped().optim_db if info.optim_cls is torch.optim.RMSprop)

# The keyword arguments of each, by its description. Those that capture a CUDA graph are listed only for devices.
CONFIGURATIONS = {case.desc: case.kwargs for case in _info.optim_inputs_func(device="cpu")}
_ON_DEVICES = {case.desc: case.kwargs for case in _info.optim_inputs_func(device="cuda")}
CAPTURABLE = {desc: given for desc, given in _ON_DEVICES.items() if desc not in CONFIGURATIONS}
# Schedulers as functions of the optimizer, in PyTorch's own combinations.
SCHEDULERS = _info.scheduler_inputs
# Flags that are missing in old checkpoints.
LATE_FLAGS = _info.not_og_supported_flags


def errors():
    """Bad input, newly made: (description, params or None, keyword arguments, kind, pattern of the message)."""
    for case in _info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = case.optimizer_error_input
        assert case.error_on.name == "CONSTRUCTION_ERROR"
        yield given.desc, given.params, given.kwargs, case.error_type, case.error_regex
