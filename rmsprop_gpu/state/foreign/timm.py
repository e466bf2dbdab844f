"""The state of timm.optim.RMSpropTF."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...arrays.checks import Problems
from ...conventions.presets import PRESETS
from .common import Mine, empty
from .param_groups import Dialect, read_groups

_PRESET = PRESETS["timm"]
# Later versions also have these, the last only with corrected_weight_decay.
_LATER = ("corrected_weight_decay", "caution", "foreach", "max_lr_snapshot")


def _translate(group: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: group[name] for name in _PRESET.arguments if name in group}
    return _PRESET.translate(_PRESET.effective("timm", given))


_DIALECT = Dialect(
    tuple(name for name in _PRESET.arguments if name not in _LATER),
    _LATER,
    _translate,
    {name: name for name in ("square_avg", "grad_avg", "momentum_buffer")},
)


def read(state: Any, steps: int | None, mine: Mine, problems: Problems) -> dict[str, Any]:
    """Read the ``state_dict()`` of timm.optim.RMSpropTF."""
    if mine.adagrad:
        problems.add(ValueError, "framework is 'timm', which has no AdaGrad; wanted 'torch', or RMSProp")
        return empty(mine)
    return read_groups(state, steps, _DIALECT, mine, problems)
