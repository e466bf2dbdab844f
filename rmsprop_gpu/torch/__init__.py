"""For users of torch: tensors and memory are torch's; only the pass over the memory is ours.

`profiling`, `demo` and `cli` may import it; no layer below may, nor `optimizer`, which is beside it.
"""

from ..extras import extra

with extra("torch"):  # also if torch is too old
    from .rmsprop import RMSprop

__all__ = ["RMSprop"]
