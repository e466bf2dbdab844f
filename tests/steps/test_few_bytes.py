"""16-bit and 8-bit codes, remainders and stochastic rounding: bit-identical to plain NumPy, on both backends."""

import importlib
import itertools
from functools import cache

import few_bytes as oracle
import ml_dtypes
import numpy as np
import pytest
from devices import MODULES

from rmsprop_gpu import AdaGrad, RMSProp
from rmsprop_gpu.kernels import cpu_drive
from rmsprop_gpu.kernels.codes import LARGEST_BASE

BF, F4 = ml_dtypes.bfloat16, np.float32
SIZES = [1, 127, 128, 129, 1024, 4097, 9001]
either = pytest.mark.parametrize("module", MODULES)
FORMATS = [
    (moment, store, dtype)
    for moment, store, dtype in itertools.product(["float32", "uint16", "uint8"], ["", "rest", "round"], [F4, BF])
    if (moment, store) != ("float32", "") and (dtype is BF or not store)
]
SWITCHES = {
    "plain": {},
    "buffers": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "use_ema": True},
    "norm": {"clipnorm": 1e10, "bias_correction": True, "eps_in_sqrt": True},
}


def to_host(x):
    return x if isinstance(x, np.ndarray) else x.get()


def options(moment, store, seed=0):
    return {
        "square_avg_dtype": moment,
        "store_param_remainders": store == "rest",
        "bf16_stochastic_round": store == "round",
        "seed": seed,
    }


def moments(state, moment):
    """The float32 values of a state."""
    codes = to_host(state["square_avg"])
    if moment == "uint8":
        return oracle.decode8(codes, to_host(state["square_avg_base"]))
    return oracle.decode16(codes) if moment == "uint16" else codes.reshape(-1)


def same(x, y):
    """Bit-identical, whatever the payload of a NaN."""
    return np.array_equal(oracle.without_payload(x), oracle.without_payload(y))


def check(opt, params, ref, plain, moment, store, step, seed=0):
    """The state is what the float32 step computed, encoded by the oracle."""
    for name, x in params.items():
        w, v = oracle.words(name, seed, step, ref[name].size), plain.state[name]["square_avg"].reshape(-1)
        state, got = opt.state[name], to_host(x)
        codes = to_host(state["square_avg"]).reshape(-1)
        if moment == "uint16":
            assert np.array_equal(codes, oracle.encode16(v, w)), name
        elif moment == "uint8":
            wanted, bases = oracle.encode8(v, w)
            assert np.array_equal(to_host(state["square_avg_base"]), bases), name
            assert np.array_equal(codes, wanted), name
        else:
            assert same(codes, v), name
        if store == "rest":
            upper, rest = oracle.split(ref[name])
            assert np.array_equal(got.reshape(-1).view(np.uint16), upper), name
            assert np.array_equal(to_host(state["param_remainder"]).reshape(-1), rest), name
        elif store == "round":
            assert np.array_equal(got.reshape(-1).view(np.uint16), oracle.dithered(ref[name], w)), name
        else:
            assert same(got.astype(F4), ref[name].astype(got.dtype).astype(F4)), name


# Every format alone, and each kind of storage once with the other switches.
SOME = [("uint16", "", F4), ("uint8", "rest", BF), ("float32", "round", BF), ("uint8", "", F4)]
CASES = [(*x, "plain") for x in FORMATS] + [(*x, switches) for switches in ("buffers", "norm") for x in SOME]


# A kernel takes seconds on a device: those of SOME here, the rest in the exhaustive run.
PLACED = [("numpy", *case) for case in CASES]
PLACED += [
    pytest.param("cupy", *case, marks=[pytest.mark.gpu] + [pytest.mark.exhaustive] * (case[:3] not in SOME))
    for case in CASES
]


@pytest.mark.parametrize(("module", "moment", "store", "dtype", "switches"), PLACED)
def test_steps_are_float32_steps_stored_in_fewer_bytes(module, moment, store, dtype, switches):
    """Over 42 decades, with NaN, infinities, subnormals and zeros. Each step starts from the state of the last one."""
    xp, rng, h = importlib.import_module(module), np.random.default_rng(3), SWITCHES[switches]
    start = {f"p{n}": rng.standard_normal(n).astype(F4).astype(dtype) for n in SIZES}
    params = {name: xp.asarray(x) for name, x in start.items()}
    ref = {name: x.astype(F4) for name, x in start.items()}
    opt = RMSProp(params, lr=1e-2, alpha=0.97, **h, **options(moment, store, seed=5))
    plain = RMSProp(ref, lr=1e-2, alpha=0.97, **h)
    for step in range(1, 4):
        grads = {name: oracle.nasty(rng, x.size, dtype) for name, x in start.items()}
        for name in start if step > 1 else []:
            plain.state[name]["square_avg"][...] = moments(opt.state[name], moment)
        for name in start if store != "rest" else []:
            ref[name][...] = to_host(params[name]).astype(F4)
        opt.step({name: xp.asarray(g) for name, g in grads.items()})
        plain.step({name: g.astype(F4) for name, g in grads.items()})
        check(opt, params, ref, plain, moment, store, step, seed=5)
        if h.get("use_ema"):
            for name in start:
                assert same(to_host(opt.ema[name]), plain.ema[name])


EVERY_FORMAT = [x for x in PLACED if getattr(x, "values", x)[-1] == "plain"]
# More than two million elements. The second number is the offset of each tensor in its memory.
LARGE = {"whole": (2_000_003, 0), "moved": (70_001, 3), "short": (130, 1)}
PARTS = (2, 7, 100)


@cache
def large(step):
    rng = np.random.default_rng([11, step])
    return {name: oracle.nasty(rng, size) for name, (size, _) in LARGE.items()}


def placed(xp, arrays, dtype):
    """Each is a slice of its own array."""
    found = {}
    for name, x in arrays.items():
        with np.errstate(over="ignore", invalid="ignore"):
            found[name] = xp.asarray(np.concatenate([np.zeros(LARGE[name][1], dtype), x.astype(dtype)]))
        found[name] = found[name][LARGE[name][1] :]
    return found


@pytest.mark.parametrize(("module", "moment", "store", "dtype", "switches"), EVERY_FORMAT)
def test_two_million_elements_over_42_decades(module, moment, store, dtype, switches, monkeypatch):
    """For parameters and gradients. On the CPU, the parts meet anywhere."""
    xp = importlib.import_module(module)
    params, gone = placed(xp, large(0), dtype), placed(np, large(0), dtype)
    ref = {name: x.astype(F4) for name, x in gone.items()}
    opt = RMSProp(params, lr=1e-2, alpha=0.97, **options(moment, store, seed=2**63))
    plain = RMSProp(ref, lr=1e-2, alpha=0.97)
    for step, parts in enumerate(PARTS, start=1):
        grads = {name: x.astype(F4) for name, x in placed(np, large(step), dtype).items()}
        for name in LARGE if step > 1 else ():
            plain.state[name]["square_avg"][...] = moments(opt.state[name], moment)
        for name in LARGE if store != "rest" else ():
            ref[name][...] = to_host(params[name]).astype(F4)
        plain.step(grads)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_drive, "parts_of", lambda size, parts=parts: parts)
            opt.step(placed(xp, large(step), dtype))
        check(opt, params, ref, plain, moment, store, step, seed=2**63)


@either
def test_a_remainder_makes_float32_steps_of_bfloat16_parameters(module):
    """A thousand steps, each too small to move a bfloat16 parameter."""
    xp, rng = importlib.import_module(module), np.random.default_rng(0)
    count = 1000 if xp is np else 20
    p = xp.asarray(rng.standard_normal(300).astype(BF))
    master = to_host(p).astype(F4)
    opt, plain = RMSProp(p, lr=1e-5, store_param_remainders=True), RMSProp(master, lr=1e-5)
    for _ in range(count):
        g = rng.standard_normal(300).astype(BF)
        opt.step(xp.asarray(g))
        plain.step(g.astype(F4))
    rest = to_host(opt.state[0]["param_remainder"])
    assert np.array_equal(oracle.join(to_host(p), rest).view(np.uint32), master.view(np.uint32))


@either
def test_an_average_that_begins_later_begins_with_the_master(module):
    """As beside a float32 parameter. Also when loading a state that has no average."""
    xp, rng = importlib.import_module(module), np.random.default_rng(6)
    p = xp.asarray(rng.standard_normal((20, 15)).astype(BF))
    master = to_host(p).astype(F4)
    opt, plain = RMSProp(p, lr=1e-4, store_param_remainders=True), RMSProp(master, lr=1e-4)

    def step():
        g = rng.standard_normal((20, 15)).astype(BF)
        opt.step(xp.asarray(g))
        plain.step(g.astype(F4))

    step()
    without = opt.state_dict()
    assert (without["state"]["0"]["param_remainder"] != 0).any()
    for x in (opt, plain):
        x.param_groups[0]["use_ema"] = True
    assert to_host(opt.state_dict()["state"]["0"]["ema"]).tobytes() == master.tobytes()
    step()
    assert to_host(opt.ema[0]).tobytes() == plain.ema[0].tobytes()
    p[...] = xp.asarray(rng.standard_normal((20, 15)).astype(BF))
    opt.load_state_dict({**without, "state": {"0": {**without["state"]["0"]}}})
    wanted = oracle.join(to_host(p), to_host(opt.state[0]["param_remainder"]))
    assert to_host(opt.ema[0]).tobytes() == wanted.tobytes()


@either
def test_a_parameter_written_between_steps_has_a_master_beside_it(module):
    """It is within half an ulp of the value written, also for zeros as pruning writes them, and never a NaN."""
    xp, rng = importlib.import_module(module), np.random.default_rng(8)
    p = xp.asarray(rng.standard_normal(1000).astype(F4).astype(BF))
    opt = RMSProp({"w": p}, lr=1e-3, store_param_remainders=True)
    opt.step({"w": xp.asarray(rng.standard_normal(1000).astype(F4).astype(BF))})
    rest = to_host(opt.state["w"]["param_remainder"]).copy()
    written = np.concatenate([np.zeros(250), np.full(250, -0.0), rng.standard_normal(500)]).astype(BF)
    p[...] = xp.asarray(written)
    opt.step({"w": xp.asarray(np.zeros(1000, BF))})
    got = oracle.join(to_host(p), to_host(opt.state["w"]["param_remainder"]))
    assert (rest[:500] < 0).sum() > 100
    assert np.array_equal(oracle.bits_of(got), oracle.bits_of(oracle.join(written, rest)))
    half = np.spacing(np.abs(written.astype(F4)).clip(2.0**-126)) * 2**15
    assert (np.abs(got - written.astype(F4)) <= half).all()
    p[...] = xp.asarray(np.full(1000, np.inf, BF))
    opt.step({"w": xp.asarray(np.zeros(1000, BF))})
    assert not np.isnan(to_host(p).astype(F4)).any()


@either
@pytest.mark.parametrize("moment", ["uint16", "uint8"])
def test_a_skipped_step_writes_no_code_and_advances_no_key(module, moment):
    xp, rng = importlib.import_module(module), np.random.default_rng(1)
    a, b = (xp.ones(1000, F4) for _ in range(2))
    opt, twin = (RMSProp(x, skip_nonfinite=True, square_avg_dtype=moment) for x in (a, b))
    first, last = (rng.standard_normal(1000).astype(F4) for _ in range(2))
    bad = first.copy()
    bad[7] = np.nan
    for g in (first, bad, last):
        opt.step(xp.asarray(g))
    for g in (first, last):
        twin.step(xp.asarray(g))
    assert to_host(a).tobytes() == to_host(b).tobytes()
    for name, x in twin.state[0].items():
        assert to_host(opt.state[0][name]).tobytes() == to_host(x).tobytes(), name


@either
def test_the_order_of_parameters_and_groups_changes_no_dither(module):
    """Dither depends on names. So runs can resume in another order, and shards are bit-identical to the whole."""
    xp, rng = importlib.import_module(module), np.random.default_rng(2)
    a = {"v": xp.ones(500, F4), "w": xp.ones(700, F4)}
    b = [{"params": {"w": xp.ones(700, F4)}}, {"params": {"v": xp.ones(500, F4)}}]
    opt, twin = (RMSProp(x, square_avg_dtype="uint8", seed=9) for x in (a, b))
    for _ in range(3):
        v, w = xp.asarray(rng.standard_normal(500).astype(F4)), xp.asarray(rng.standard_normal(700).astype(F4))
        opt.step({"v": v, "w": w})
        twin.step([{"w": w}, {"v": v}])
    for name in ("v", "w"):
        assert to_host(opt.state[name]["square_avg"]).tobytes() == to_host(twin.state[name]["square_avg"]).tobytes()


@either
def test_a_new_seed_reaches_every_kept_plan(module):
    """Each dtype of gradients has a plan, which is kept while gradients have another."""
    xp, rng = importlib.import_module(module), np.random.default_rng(3)
    grads = rng.standard_normal((3, 700)).astype(np.float16)
    p, q = xp.ones(700, F4), xp.ones(700, F4)
    opt, twin = (RMSProp(x, square_avg_dtype="uint16") for x in (p, q))
    for i, dtype in enumerate((F4, np.float16, F4)):
        if i == 2:
            opt.param_groups[0]["seed"] = twin.param_groups[0]["seed"] = 5
        opt.step(xp.asarray(grads[i].astype(dtype)))
        twin.step(xp.asarray(grads[i].astype(F4)))
    assert to_host(opt.state[0]["square_avg"]).tobytes() == to_host(twin.state[0]["square_avg"]).tobytes()


@either
def test_adagrad_has_codes_of_its_sum(module):
    xp, rng = importlib.import_module(module), np.random.default_rng(4)
    p, ref = xp.ones(1000, F4), np.ones(1000, F4)
    opt, plain = AdaGrad(p, sum_dtype="uint16", initial_scale=0.1), AdaGrad(ref, initial_scale=0.1)
    assert set(oracle.decode16(to_host(opt.state[0]["sum"])).tolist()) == {410 / 4096}  # the nearest code
    for step in range(1, 4):
        plain.state[0]["sum"][...] = oracle.decode16(to_host(opt.state[0]["sum"]))
        g = rng.standard_normal(1000).astype(F4)
        opt.step(xp.asarray(g))
        plain.step(g)
        codes = oracle.encode16(plain.state[0]["sum"], oracle.words("0", 0, step, 1000))
        assert np.array_equal(to_host(opt.state[0]["sum"]), codes)
        assert np.array_equal(to_host(p), ref)


def test_every_finite_code_stores_to_itself_under_any_dither():
    codes = np.arange(0xFF00, dtype=np.uint16)
    for w in (0, 1, 2**31, 2**32 - 1):
        assert np.array_equal(oracle.encode16(oracle.decode16(codes), np.full(codes.size, w)), codes)


def every_code(moment):
    """All finite codes. 8-bit codes come over every base, in two blocks: one keeps its base, the other does not."""
    if moment == "uint16":
        return {"sum": np.arange(0xFF00, dtype=np.uint16)}
    codes = np.resize(np.arange(256, dtype=np.uint8), (LARGEST_BASE + 1) * 256)
    codes[-1] = 254  # above the largest base 255 is infinity
    return {"sum": codes, "sum_base": np.arange(LARGEST_BASE + 1, dtype=np.uint16).repeat(2)}


@either
@pytest.mark.parametrize("moment", ["uint16", "uint8"])
def test_every_finite_code_stays_where_nothing_is_added(module, moment):
    """Adding zeros to a sum encodes it again in each step, with other words of dither."""
    xp = importlib.import_module(module)
    start = every_code(moment)
    opt = AdaGrad(xp.ones(start["sum"].size, F4), lr=1.0, sum_dtype=moment, seed=1)
    for name, x in start.items():
        opt.state[0][name][...] = xp.asarray(x)
    decode = oracle.decode16 if moment == "uint16" else oracle.decode8
    want = decode(*start.values())
    assert np.isfinite(want).all()
    for _ in range(20 if xp is np else 3):
        opt.step(xp.zeros(want.size, F4))
        assert decode(*(to_host(opt.state[0][name]) for name in start)).tobytes() == want.tobytes()


@either
def test_every_finite_bfloat16_stays_where_nothing_is_added(module):
    xp = importlib.import_module(module)
    every = np.arange(2**16, dtype=np.uint16).view(BF)
    start = every[np.isfinite(every.astype(F4))]
    p = xp.asarray(start.copy())
    opt = RMSProp(p, bf16_stochastic_round=True, square_avg_dtype="uint16")
    for _ in range(20 if xp is np else 3):
        opt.step(xp.zeros(start.size, BF))
        assert to_host(p).tobytes() == start.tobytes()


@pytest.mark.parametrize("moment", ["uint16", "uint8"])
@pytest.mark.parametrize("alpha", [0.9, 0.999])
def test_rounding_is_unbiased(moment, alpha):
    """Over many steps with one gradient, the mean of v matches float32's. Rounded to nearest, v would stick below."""
    count, size = 4000, 2048
    opt = RMSProp(np.ones(size, F4), lr=0.0, alpha=alpha, square_avg_dtype=moment)
    g, v, means = np.full(size, 0.7, F4), 0.0, []
    for step in range(count):
        opt.step(g)
        v = alpha * v + (1 - alpha) * 0.49
        if step >= count - 200:
            means.append(opt.decoded_state(0)["square_avg"].astype(np.float64).mean() / v)
    # Each v wanders by about an ulp times the root of half the memory. There are 2,048, and neighbours share a lattice.
    ulp = 2.0**-8 if moment == "uint16" else 2.0**-3
    assert abs(np.mean(means) - 1) < 4 * ulp * np.sqrt(0.5 / (1 - alpha) * (1 - alpha)) / np.sqrt(size)


@pytest.mark.parametrize("moment", ["uint16", "uint8"])
@pytest.mark.parametrize("alpha", [0.9, 0.99])
def test_steps_scatter_around_those_of_float32(moment, alpha):
    """A step errs by half the error of v before it is stored, which is alpha times what earlier steps left."""
    size, count = 1024, round(10 / (1 - alpha))
    grads = np.random.default_rng(5).standard_normal((count, size), dtype=F4)
    errors, lengths = [], {}
    params = {name: np.zeros(size, F4) for name in ("float32", moment)}
    opts = {name: RMSProp(p, lr=1.0, alpha=alpha, square_avg_dtype=name) for name, p in params.items()}
    for g in grads:
        for name, p in params.items():
            p[...] = 0
            opts[name].step(g)
            lengths[name] = lengths.get(name, 0.0) + np.abs(p, dtype=np.float64).sum()
        errors.append(params[moment].astype(np.float64) / params["float32"] - 1)
    # An ulp of v is at most 2**-8 or 2**-3 of v. Rounding up or down at random has a variance of at most a quarter of
    # its square, and at most an ulp times the distance to the previous v, (1 - alpha) |g**2 - v|. For normally
    # distributed g, that is 0.97 (1 - alpha) v. Errors decay as v does, so 1 / (1 - alpha**2) of them add up.
    ulp = 2.0**-8 if moment == "uint16" else 2.0**-3
    bound = alpha / 2 * np.sqrt(ulp * min(ulp / 4, 0.97 * (1 - alpha)) / (1 - alpha**2))
    assert np.sqrt(np.mean(np.square(errors))) < bound
    # 1 / sqrt(1 + x) is on average 1 + 3/8 x**2, and x is twice the step's error. The noise here is far smaller.
    assert abs(lengths[moment] / lengths["float32"] - 1) < 3 / 2 * bound**2 + 4 * bound / np.sqrt(
        count * size * (1 - alpha)
    )
