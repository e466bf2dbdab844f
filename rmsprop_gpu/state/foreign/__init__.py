"""States of other frameworks as our `state_dict`, and ours as torch's; reading them imports no library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...arrays.checks import Problems
from . import bitsandbytes, chainer, keras, optax, tensorflow, timm, torch
from .common import Mine
from .torch import to_torch

__all__ = ["Mine", "to_torch", "translated"]

READERS: dict[str, Callable[[Any, Any, Mine, Problems], dict[str, Any]]] = {
    "torch": torch.read,
    "keras": keras.read,
    "tf_keras_legacy": tensorflow.read_tf_keras_legacy,
    "tf1": tensorflow.read_tf1,
    "optax": optax.read,
    "timm": timm.read,
    "chainer": chainer.read,
    "bitsandbytes": bitsandbytes.read,
}


def translated(framework: object, state: Any, steps: object, mine: Mine, problems: Problems) -> dict[str, Any]:
    """A foreign state in the form of `state_dict`; what cannot be mapped is added to the problems.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> opt = RMSProp(np.ones(3), momentum=0.9)
    >>> opt.load_foreign("keras", {"rms/iteration": 7, "rms/w_velocity": np.ones(4), "rms/w_moment": np.ones(3)})
    Traceback (most recent call last):
        ...
    ValueError: 3 problems, nothing was changed:
      state["rms/w_moment"] has no counterpart here; wanted the variables of keras.optimizers.RMSprop
      state lacks the arrays of "momentum_buffer", which momentum=0.9 in param_groups[0] needs
      state["rms/w_velocity"] has shape (4,); wanted (3,)
    """
    if not isinstance(framework, str) or framework not in READERS:
        raise ValueError(f"framework is {framework!r}; wanted {', '.join(map(repr, READERS))}")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 0):
        problems.add(TypeError, f"steps is {steps!r}; wanted None or a count >= 0")
        steps = None
    return READERS[framework](state, steps, mine, problems)
