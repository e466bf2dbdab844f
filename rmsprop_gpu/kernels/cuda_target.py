"""numba.cuda, imported so that it compiles under a NumPy of which it does not know yet."""

from __future__ import annotations

from typing import Any

import numba.cuda
import numpy as np


def _import_what_compiles() -> None:
    """Import what numba-cuda imports when it first compiles.

    There its 0.30.4, the last, asks for ``numpy.row_stack``, which NumPy 2.5 no longer has.
    """
    np.row_stack = np.vstack  # noqa: NPY201
    try:
        import numba.cuda.np.arrayobj  # noqa: F401
    except AttributeError as error:
        raise ImportError(
            f"numba-cuda does not work with numpy {np.__version__} ({error}); "
            'install one that it knows (pip install "numpy<2.5")'
        ) from error
    finally:
        del np.row_stack  # noqa: NPY201


if not hasattr(np, "row_stack"):
    _import_what_compiles()

target: Any = numba.cuda  # what kernels call it; CUDA's words are attributes of it that no stub knows
