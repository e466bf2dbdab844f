"""For users of torch: its tensors are torch's, and so is its memory; ours is the pass over it.

`profiling`, `demo` and `cli` may import it; nothing below, and not `optimizer`, which stands beside it.
"""

from ..extras import extra

with extra("torch"):  # where torch is too old, too
    from .rmsprop import RMSprop

__all__ = ["RMSprop"]
