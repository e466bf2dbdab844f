"""numba.cuda, imported so that it also compiles under a NumPy that it does not support yet."""

from __future__ import annotations

from typing import Any

import numba.cuda
import numpy as np


def _import_what_compiles() -> None:
    """Import what numba-cuda imports when it first compiles.

    There its latest version, 0.30.4, looks up ``numpy.row_stack``, which NumPy 2.5 no longer has.
    """
    np.row_stack = np.vstack  # noqa: NPY201
    try:
        import numba.cuda.np.arrayobj  # noqa: F401
    except AttributeError as error:
        raise ImportError(
            f"numba-cuda does not work with numpy {np.__version__} ({error}); "
            'install one that it supports (pip install "numpy<2.5")'
        ) from error
    finally:
        del np.row_stack  # noqa: NPY201


if not hasattr(np, "row_stack"):
    _import_what_compiles()

target: Any = numba.cuda  # the name in kernels; its attributes, CUDA's terms, are in no stub
