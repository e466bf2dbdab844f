"""How a batch is cut for the blocks of a CUDA device: so many chunks that every multiprocessor has enough."""

import numpy as np
import pytest

pytestmark = pytest.mark.gpu
M = 1 << 20


@pytest.fixture
def chunk_of():
    from rmsprop_gpu.kernels.cuda import chunk_of

    return chunk_of


@pytest.mark.parametrize("multiprocessors", [1, 40, 108, 132, 148])
@pytest.mark.parametrize("elements", [0, 1, 1000, M, 2 * M, 4 * M, 9 * M, 25 * M, 256 * M])
def test_chunks_are_whole_rounds_between_their_bounds(multiprocessors, elements, chunk_of):
    chunk = chunk_of([elements], multiprocessors)
    assert chunk % 1024 == 0
    assert 1024 <= chunk <= 8192
    blocks = -(-elements // chunk)
    if 1024 < chunk < 8192:  # as few as give 16 blocks a multiprocessor, and no fewer
        assert 8 * multiprocessors < blocks <= 16 * multiprocessors
        assert -(-elements // (chunk - 1024)) > 16 * multiprocessors
    if chunk == 1024:
        assert blocks <= 16 * multiprocessors
    if chunk == 8192:
        assert elements > 16 * multiprocessors * 7168


def test_on_132_multiprocessors(chunk_of):
    """An H100: what filled a part of it once fills it several times."""
    sizes = {1: 1024, 2: 1024, 4: 2048, 9: 5120, 16: 8192, 256: 8192}
    assert {m: chunk_of([m * M], 132) for m in sizes} == sizes
    assert chunk_of([256] * 3000, 132) == 1024


def test_a_step_is_cut_so():
    import cupy

    from rmsprop_gpu import RMSProp
    from rmsprop_gpu.kernels import cuda

    multiprocessors = cupy.cuda.Device().attributes["MultiProcessorCount"]
    sizes = [3 * 1024 * cuda.BLOCKS * multiprocessors - 16, 7]
    opt = RMSProp([cupy.ones(size, np.float16) for size in sizes])
    (resident,) = opt._planner.plan().steps._residents
    assert len(resident.chunks) == len(cuda.chunks(sizes, 0)) == cuda.BLOCKS * multiprocessors + 1
