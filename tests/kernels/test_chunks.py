"""How a batch is cut for the blocks of a CUDA device: one vector per thread, whatever the sizes."""

import ml_dtypes
import numpy as np
import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("dtype", "elements"), [(np.float32, 1024), (np.float64, 512), (np.float16, 1024), (ml_dtypes.bfloat16, 1024)]
)
def test_a_block_goes_once_through_its_chunk(dtype, elements):
    """That is 128 bits of state for each of its 256 threads, all of it loaded at once."""
    import cupy

    from rmsprop_gpu import RMSProp
    from rmsprop_gpu.kernels.cuda import chunk_of

    assert chunk_of(np.dtype(dtype)) == elements
    opt = RMSProp([cupy.ones(size, dtype) for size in (3 * elements - 5, 7, 0, elements)])
    (resident,) = opt._planner.plan().steps._residents
    assert resident.chunks.owner.view(np.int64).reshape(-1, 3).get().tolist() == [
        [0, 0, elements],
        [0, elements, 2 * elements],
        [0, 2 * elements, 3 * elements - 5],
        [1, 0, 7],
        [2, 0, 0],
        [3, 0, elements],
    ]
