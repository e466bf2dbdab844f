"""The number of buckets, computed on one rank alone."""

import numpy as np
import pytest

from rmsprop_gpu.arrays.checks import Problems, make_tensor
from rmsprop_gpu.distributed.memory import HostMemory
from rmsprop_gpu.distributed.transport import Transport
from rmsprop_gpu.kernels.norms import BLOCK


class Engine:
    rank, ranks, turns, receives = 0, 2, 1, True


def transport(size, bucket_bytes):
    label = dict.fromkeys(("key", "label", "grad_label", "state_label"), "w")
    tensor = make_tensor(np.zeros(size, np.float32), Problems(), **label)
    return Transport([tensor], bucket_bytes, Engine(), HostMemory())


@pytest.mark.parametrize(("bucket_bytes", "buckets"), [(1, 5), (8 * BLOCK, 5), (16 * BLOCK, 3), (1 << 30, 1)])
def test_a_bucket_has_a_block_for_each_rank_however_small_it_is_asked_to_be(bucket_bytes, buckets):
    """Otherwise a large model would have as many buckets as bytes, almost all of them empty."""
    made = transport(10 * BLOCK, bucket_bytes)
    assert len(made._packed) == buckets
    assert sum(x.piece.stop - x.piece.start for x in made.own) == 5 * BLOCK
