"""Past one machine: an optimizer whose state is sharded over processes, on MPI and NCCL.

`demo` may import it; nothing below. What reads the folders that it saves is `state/folder.py`.
"""

from ..extras import extra

with extra("mpi"):
    from .sharded import ShardedAdaGrad, ShardedRMSProp

from .agreement import RanksDisagree

__all__ = ["RanksDisagree", "ShardedAdaGrad", "ShardedRMSProp"]
