"""Arrays and optimizers on the host or on a device, with the other arguments of a step."""

import ml_dtypes
import numpy as np
from variants import bits

from rmsprop_gpu import RMSProp

F4, F8, F2, BF = np.float32, np.float64, np.float16, ml_dtypes.bfloat16
DTYPES = [F4, F8, F2, BF]

# Few sets of switches, so that few kernels are compiled.
CLIPPED = {"global_clipnorm": 0.7}
AVERAGED = {"use_ema": True, "bias_correction": True}
ALL = {"skip_nonfinite": True, "use_ema": True, "ema_momentum": 0.87, "bias_correction": True, **CLIPPED}


def host(x):
    return x.get() if hasattr(x, "get") else np.asarray(x)


def draw(seed, *shapes, dtype=F4):
    """Arrays over four decades; the same seed gives the same arrays."""
    rng = np.random.default_rng(seed)
    return [
        np.asarray(rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 1, shape)).astype(dtype) for shape in shapes
    ]


def seeds(*parts):
    return [x for part in parts for x in (part if isinstance(part, list) else [part])]


def copies(xp, arrays):
    return [None if x is None else xp.array(x) for x in arrays]


def params_of(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def everything(opt):
    """Every byte that a skipped step must not change."""
    return [bits(p) for p in params_of(opt)], [
        {name: bits(x) for name, x in buffers.items()} for buffers in opt.state.values()
    ]


def assert_same(opt, twin):
    assert everything(opt) == everything(twin)


SIZES = [0, 1, 127, 128, 129, 4095, 4096, 4097, 300, 3 * 4096 + 130]


MIXED = [[F4, F2, F4, F4], [F8, F8, F8], [F2, F4]]


def mixed_arrays(seed):
    groups = []
    for i, row in enumerate(MIXED):
        arrays = draw(seeds(seed, i), *[SIZES[3 * i + j] for j in range(len(row))])
        groups.append([x.astype(T) for x, T in zip(arrays, row, strict=True)])
    return groups


def mixed(xp, seed, **given):
    """Groups whose batches (dtypes, Variants) come in a different order from the parameters."""
    own = [{}, {"momentum": 0.83}, {"lr": 0.2}]
    return RMSProp(
        [{"params": xs, **h} for xs, h in zip(on(xp, mixed_arrays(seed)), own, strict=True)], **{**ALL, **given}
    )


def mixed_grads(seed, absent=()):
    """Gradients for it, in host memory. Those with the numbers in `absent` are None."""
    numbers = iter(range(9))
    return [[None if next(numbers) in absent else x for x in group] for group in mixed_arrays([seed, 50])]


def flat(groups):
    return [x for group in groups for x in group]


def on(xp, groups):
    return [copies(xp, group) for group in groups]


def refusing(opt, kind, *texts):
    """A context: expect exactly this error, with no byte and no number changed."""
    return Refusing(opt, kind, texts)


class Refusing:
    def __init__(self, opt, kind, texts):
        self.opt, self.kind, self.texts = opt, kind, texts

    def state(self):
        opt = self.opt
        return everything(opt), opt.steps, opt.skipped_steps, opt.last_grad_norm, [g.hyper() for g in opt.param_groups]

    def __enter__(self):
        self.before = self.state()

    def __exit__(self, kind, error, trace):
        assert kind is self.kind, f"{kind} for {self.kind}: {error}"
        for text in self.texts:
            assert text in str(error)
        assert self.state() == self.before
        return True
