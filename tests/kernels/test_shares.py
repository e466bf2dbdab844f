"""How a step is shared among threads: equally, whatever the tensors. For bit-identity, see test_bits.py."""

import json
from itertools import pairwise

import numpy as np
import pytest
from paths import ROOT

from rmsprop_gpu import RMSProp
from rmsprop_gpu.kernels import cpu_drive
from rmsprop_gpu.kernels.norms import BLOCK

SHAPES = json.loads((ROOT / "benchmarks" / "shapes.json").read_text())
SIZES = {
    **{name: [int(np.prod(shape)) for shape in model["shapes"]] for name, model in SHAPES.items()},
    "one of 0.7 M": [700_000],
    "one of 1 M": [1_000_000],
    "one of 5 M": [5_000_000],
    "one of 25 M": [25_000_000],
    "3,000 of 256": [256] * 3000,
    "one large, many small": [20_000_000, *[3] * 5000],
    "many small, one large": [*[3] * 5000, 20_000_000],
    "with empty ones": [0, 1_000_000, 0, 0, 4_000_000, 0],
    "ragged": np.random.default_rng(3).integers(0, 40_000, 300).tolist(),
}
THREADS = range(1, 193)


def elements(sizes, parts, unit):
    """The number of elements of each part."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    bounds = cpu_drive.shares(np.array(sizes, np.int64), parts, unit)
    return np.diff(starts[bounds[:, 0]] + bounds[:, 1])


@pytest.mark.parametrize("model", SIZES)
def test_no_thread_has_much_more_than_its_share(model):
    total = sum(SIZES[model])
    most = 1.05 if total >= 5_000_000 else 1.15
    assert total >= 700_000
    for threads in THREADS:
        assert elements(SIZES[model], threads, cpu_drive.UNIT).max() <= most * total / threads


@pytest.mark.parametrize("model", SIZES)
def test_partial_sums_are_shared_to_a_block(model):
    total = sum(SIZES[model])
    for threads in THREADS:
        assert elements(SIZES[model], threads, BLOCK).max() <= total / threads + BLOCK


@pytest.mark.parametrize("unit", [1, 64, BLOCK])
@pytest.mark.parametrize("parts", [1, 2, 7, 64, 1000])
def test_every_element_has_one_part_and_so_has_a_tensor_without(parts, unit):
    sizes = np.array([0, 1, 63, 64, 65, 0, 0, 5000, 12_345, 1, 0])
    seen, starts = [np.zeros(size, int) for size in sizes], np.zeros(len(sizes), int)
    bounds = cpu_drive.shares(sizes, parts, unit)
    for (first, begin), (last, end) in pairwise(bounds):
        for k in range(first, last + (end > 0)):
            start, stop = begin if k == first else 0, end if k == last else sizes[k]
            assert start % unit == 0
            seen[k][start:stop] += 1
            starts[k] += start == 0
    assert all((s == 1).all() for s in seen)
    assert (starts == 1).all()  # the part with a tensor's start counts its step


@pytest.mark.parametrize(("hyper", "units"), [({}, [cpu_drive.UNIT]), ({"clipnorm": 1.0}, [BLOCK, cpu_drive.UNIT])])
def test_a_step_is_shared_so(hyper, units, monkeypatch):
    """Also after the number of threads changes. Small arrays use one thread."""
    asked, shares, threads = [], cpu_drive.shares, 24
    monkeypatch.setattr(cpu_drive, "shares", lambda *a: asked.append(a[1:]) or shares(*a))
    monkeypatch.setattr(cpu_drive, "get_num_threads", lambda: threads)
    param, small = (np.ones(cpu_drive.SERIAL_BELOW - less, np.float32) for less in (0, 1))
    opt = RMSProp(param, **hyper)
    for _ in range(2):
        opt.step(param.copy())
    assert asked == [(24, unit) for unit in units]
    asked.clear()
    threads = 5
    opt.step(param.copy())
    assert asked == [(5, unit) for unit in units]
    asked.clear()
    RMSProp(small, **hyper).step(small.copy())
    assert asked == [(1, unit) for unit in units]


def test_a_cut_is_between_cache_lines():
    assert cpu_drive.UNIT * 2 % 64 == 0  # also for halves


def test_pieces_are_the_calls_of_a_kernel(monkeypatch):
    monkeypatch.setattr(cpu_drive, "get_num_threads", lambda: 3)
    assert cpu_drive.pieces([100_000, 50_000, 150_000]) == 4  # shares meet after the first array, and inside the last
    assert cpu_drive.pieces([100_000, 100_000, 100_000]) == 3
    assert cpu_drive.pieces([10, 20]) == 2
    assert cpu_drive.pieces([99_930, 100_070, 100_000]) == 4  # 70 elements after the start of the second array
    assert cpu_drive.pieces([99_930, 100_070, 100_000], 128) == 3


def test_a_handler_may_step_another_optimizer_in_the_middle_of_a_step(monkeypatch):
    """Between the lock and the parallel region: the process once hung there, waiting for its own thread."""
    lock, handled = type(cpu_drive.in_parallel)(), []
    params, want = [np.ones(100, np.float32) for _ in range(2)], np.ones(100, np.float32)
    first, second = map(RMSProp, params)
    grad = np.ones(100, np.float32)

    class Interrupted:
        def __enter__(self):
            assert lock.acquire(timeout=5), "deadlock: the thread waits for itself"
            if not handled:
                handled.append(True)
                second.step(grad)

        def __exit__(self, *error):
            lock.release()

    monkeypatch.setattr(cpu_drive, "in_parallel", Interrupted())
    monkeypatch.setattr(cpu_drive, "parts_of", lambda size: 2)
    first.step(grad)
    assert handled
    monkeypatch.undo()
    RMSProp(want).step(grad)
    for param in params:
        assert param.tobytes() == want.tobytes()
