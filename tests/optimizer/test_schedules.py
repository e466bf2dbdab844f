"""The schedules in the docs: their values, and runs that follow them, on both backends and through replays."""

import re
from itertools import pairwise

import numpy as np
import pytest
from on_host import assert_same_bits
from paths import ROOT

from rmsprop_gpu import RMSProp, reference

PAGE = ROOT / "docs/howto/schedules.md"
(CODE,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "def warmup_" in block)
SCHEDULES = {}
exec(CODE, SCHEDULES)
warmup_cosine, efficientnet = SCHEDULES["warmup_cosine"], SCHEDULES["efficientnet"]

# Values at marked steps, computed by hand from the page's description.
EPOCH = 312
WARMUP_COSINE = {
    0: 2e-6,
    249: 5e-4,
    499: 1e-3,
    500: 1e-3,
    2875: 5e-4 * (1 + 0.5**0.5),  # a quarter of the way down
    5250: 5e-4,
    10_000: 0,
    20_000: 0,
}
EFFICIENTNET = {
    0: 0.0,
    EPOCH: 0.0512,  # a fifth of the way
    5 * EPOCH - 1: 0.256 * 1559 / 1560,
    5 * EPOCH: 0.256 * 0.9409,  # the staircase counts from the start: 5 / 2.4 is 2 whole stairs
    2246: 0.256 * 0.9409,  # 7.2 epochs are 2246.4 steps
    2247: 0.256 * 0.912673,
    24 * EPOCH - 1: 0.256 * 0.97**9,
    24 * EPOCH: 0.256 * 0.97**10,
}


@pytest.mark.parametrize(("step", "lr"), WARMUP_COSINE.items())
def test_warmup_then_cosine(step, lr):
    assert warmup_cosine(step) == pytest.approx(lr, rel=1e-12, abs=1e-18)


def test_warmup_then_cosine_between_its_marks():
    rates = [warmup_cosine(step) for step in range(10_001)]
    assert all(a < b for a, b in pairwise(rates[:500]))
    assert all(a > b for a, b in pairwise(rates[500:]))
    for step in (777, 4321, 9999):
        z = np.exp(1j * np.pi * (step - 500) / 9500)  # a half cosine is the projection of this half circle
        assert rates[step] == pytest.approx(5e-4 * (1 + z.real), rel=1e-9)


@pytest.mark.parametrize(("step", "lr"), EFFICIENTNET.items())
def test_efficientnet(step, lr):
    assert efficientnet(step) == pytest.approx(lr, rel=1e-12)


def test_efficientnet_takes_a_stair_every_2_point_4_epochs():
    rates = [efficientnet(step) for step in range(5 * EPOCH, 36 * EPOCH)]
    falls = [5 * EPOCH + 1 + i for i, (a, b) in enumerate(pairwise(rates)) if a != b]
    assert falls == [int(np.ceil(stair * 2.4 * EPOCH - 1e-9)) for stair in range(3, 15)]


# Short enough that a run sees the warm-up and the schedule after it.
def short_cosine(step):
    return warmup_cosine(step, peak=0.1, warmup=4, steps=20)


def short_efficientnet(step):
    return efficientnet(step, peak=0.1, epoch=2)


SHORT = {"warmup_cosine": short_cosine, "efficientnet": short_efficientnet}
STEPS = 24
GIVEN = {"momentum": 0.9, "eps_in_sqrt": True, "eps": 1e-3, "lr_in_momentum": True, "initial_scale": 1.0}


def problem(dtype=np.float32):
    """A parameter and its gradients."""
    rng = np.random.default_rng(7)
    return rng.standard_normal(300).astype(dtype), rng.standard_normal((STEPS, 300)).astype(dtype)


@pytest.mark.parametrize("name", SHORT)
def test_a_run_follows_its_schedule(name):
    """In float64, where a step has fewer than 20 roundings on each side, and the parameter two, each half an ulp."""
    param, grads = problem(np.float64)
    opt, state = RMSProp(param, lr=SHORT[name], **GIVEN), None
    for step, grad in enumerate(grads):
        before = param.copy()
        opt.step(grad)
        want, state = reference.rmsprop(before, grad, state, lr=SHORT[name](step), **GIVEN)
        bound = 1e-12 * np.max(np.abs(want - before)) + 2 * np.spacing(np.maximum(np.abs(before), np.abs(want)))
        assert np.all(np.abs(param - want) <= bound)
    assert opt.steps == STEPS


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHORT)
def test_eager_steps_and_replays_have_the_bits_of_the_cpu(name):
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    param, grads = problem()
    here = RMSProp(param, lr=SHORT[name], **GIVEN)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        weights = [cupy.asarray(problem()[0]) for _ in range(2)]
        eager, replayed = (RMSProp(weight, lr=SHORT[name], **GIVEN) for weight in weights)
        grad = cupy.asarray(grads[0])  # the only array that the graph reads
        replayed.step(grad)  # compiles, and sends the addresses
        stream.begin_capture()
        replayed.step(grad)
        graph = stream.end_capture()
        for step in range(STEPS):
            here.step(grads[step])
            eager.step(cupy.asarray(grads[step]))
            if step > 0:
                grad[...] = cupy.asarray(grads[step])
                replayed.refresh()
                graph.launch(stream)
            stream.synchronize()
            for weight in weights:
                assert_same_bits(weight.get(), param)
        assert eager.steps == replayed.steps == here.steps == STEPS
