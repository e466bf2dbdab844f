"""Beyond one process: an optimizer whose state is sharded over processes, with MPI and NCCL.

`demo` may import it; no layer below may. The folders that it saves are read by `state/folder.py`.
"""

from ..extras import extra

with extra("mpi"):
    from .sharded import ShardedAdaGrad, ShardedRMSProp

from .agreement import RanksDisagree

__all__ = ["RanksDisagree", "ShardedAdaGrad", "ShardedRMSProp"]
