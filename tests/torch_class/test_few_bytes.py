"""The class for torch with codes, remainders and stochastic rounding: bit-identical to the class for arrays."""

import io
import itertools
import pickle
from copy import deepcopy

import few_bytes as oracle
import ml_dtypes
import numpy as np
import pytest

from rmsprop_gpu import RMSProp

torch = pytest.importorskip("torch")

from rmsprop_gpu.torch import RMSprop  # noqa: E402

F4, BF = torch.float32, torch.bfloat16
SIZES = [1, 128, 129, 1000]
FORMATS = [
    (moment, store, dtype)
    for moment, store, dtype in itertools.product(["float32", "uint16", "uint8"], ["", "rest", "round"], [F4, BF])
    if (moment, store) != ("float32", "") and (dtype is BF or not store)
]
RULE = {"lr": 0.01, "alpha": 0.97}
each = pytest.mark.parametrize(("moment", "store", "dtype"), FORMATS)


def options(moment, store="", **more):
    rests, rounds = store == "rest", store == "round"
    return {"square_avg_dtype": moment, "store_param_remainders": rests, "bf16_stochastic_round": rounds, **more}


def array(t):
    """A copy of a tensor for NumPy, in the same layout."""
    t = t.detach()
    return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy("K") if t.dtype == BF else t.numpy().copy("K")


def drawn(rng, sizes=SIZES, dtype=F4):
    return [torch.from_numpy(rng.standard_normal(n).astype(np.float32)).to(dtype) for n in sizes]


def parameters(seed=0, sizes=SIZES, dtype=F4):
    return [torch.nn.Parameter(x) for x in drawn(np.random.default_rng(seed), sizes, dtype)]


def step(opt, seed, make=drawn):
    """Take a step with gradients from this seed, and return them."""
    params = [p for group in opt.param_groups for p in group["params"]]
    rng = np.random.default_rng([9, seed])
    for p in params:
        p.grad = make(rng, [p.numel()], p.dtype)[0].view(p.shape)
    opt.step()
    assert opt.why_not_fused() == {}
    return [array(p.grad) for p in params]


def bits(t):
    return t.detach().contiguous().view(-1).view(torch.uint8).numpy()


def same(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert np.array_equal(bits(a), bits(b))


def assert_same_state(mine, other):
    assert mine.keys() == other.keys()
    for name in mine:
        same(mine[name], other[name])


def equal(x, y):
    """Bit-identical, whatever the payload of a NaN."""
    if x.dtype.kind in "iu":
        return np.array_equal(x, y)
    return np.array_equal(oracle.without_payload(x.astype(np.float32)), oracle.without_payload(y.astype(np.float32)))


def assert_like_arrays(opt, params, arrays, like, keys):
    """Parameters and state match those of the optimizer over arrays."""
    for p, x, key in zip(params, arrays, keys, strict=True):
        assert equal(array(p), x)
        theirs = like.state[key]
        assert {*opt.state[p]} == {*theirs} - {"bias_weight"}
        for name, t in opt.state[p].items():
            assert name == "step" or str(t.dtype).removeprefix("torch.") == str(theirs[name].dtype)
            assert equal(t.numpy(), theirs[name]), name


def saved_and_read(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def nasty(rng, sizes, dtype):
    with np.errstate(over="ignore", invalid="ignore"):
        return [torch.from_numpy(oracle.nasty(rng, n)).to(dtype) for n in sizes]


@each
@pytest.mark.parametrize("more", [{}, {"momentum": 0.9, "nesterov": True, "clipnorm": 1e10}], ids=["plain", "more"])
def test_steps_have_the_bits_of_arrays(moment, store, dtype, more):
    given = {**RULE, **more, **options(moment, store, seed=5)}
    params = parameters(dtype=dtype)
    arrays = [array(p) for p in params]
    opt, like = RMSprop(params, **given), RMSProp(arrays, **given)
    for i in range(3):
        like.step(step(opt, i, nasty))
    assert_like_arrays(opt, params, arrays, like, range(len(params)))


def test_codes_are_those_of_the_formula():
    """Against plain NumPy, not the other class. Parameters without names are named by their index."""
    (p,) = parameters(sizes=[1000])
    ref = torch.nn.Parameter(p.detach().clone())
    opt, plain = RMSprop([p], square_avg_dtype="uint16", seed=7), RMSprop([ref])
    for i in range(1, 4):
        step(opt, i)
        step(plain, i)
        v = plain.state[ref]["square_avg"]
        assert np.array_equal(
            opt.state[p]["square_avg"].numpy(), oracle.encode16(v.numpy(), oracle.words("0", 7, i, 1000))
        )
        v.copy_(torch.from_numpy(oracle.decode16(opt.state[p]["square_avg"].numpy())))


def test_names_and_seeds_of_groups_decide():
    groups = [options("uint16", seed=3), options("uint8", "round", seed=4)]
    params, names = parameters(dtype=BF), ["a", "b.weight", "b.bias", "ç"]
    arrays = [array(p) for p in params]
    mine = [{"params": list(zip(names, params, strict=True))[k::2], **given} for k, given in enumerate(groups)]
    theirs = [{"params": dict(list(zip(names, arrays, strict=True))[k::2]), **given} for k, given in enumerate(groups)]
    opt, like = RMSprop(mine, **RULE), RMSProp(theirs, **RULE)
    for i in range(2):
        made = step(opt, i)
        like.step([dict(zip(names[k::2], made[2 * k : 2 * k + 2], strict=True)) for k in range(2)])
    assert_like_arrays(opt, params, arrays, like, names)


def test_numbers_go_on_through_groups():
    params = parameters()
    arrays = [array(p) for p in params]
    given = options("uint16", **RULE)
    opt = RMSprop(params[:1], **given)
    opt.add_param_group({"params": params[1:], "lr": 0.5})
    like = RMSProp([{"params": arrays[:1]}, {"params": arrays[1:], "lr": 0.5}], **given)
    made = step(opt, 0)
    like.step([made[:1], made[1:]])
    assert_like_arrays(opt, params, arrays, like, range(len(params)))


def test_a_counter_of_float64_makes_the_same_keys():
    params, others = parameters(), parameters()
    opt, other = (RMSprop(x, square_avg_dtype="uint16") for x in (params, others))
    torch.set_default_dtype(torch.float64)
    try:
        step(opt, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    step(other, 0)
    for i in range(1, 3):
        step(opt, i)
        step(other, i)
    for p, q in zip(params, others, strict=True):
        assert opt.state[p]["step"].dtype == torch.float64
        same(opt.state[p]["square_avg"], other.state[q]["square_avg"])


def test_skipped_steps_and_missing_gradients_advance_no_key():
    params = parameters(sizes=[300, 300])
    arrays = [array(p) for p in params]
    given = {"skip_nonfinite": True, **options("uint16", **RULE)}
    opt, like = RMSprop(params, **given), RMSProp(arrays, **given)
    for i, change in enumerate(["", "skip", "none", ""]):
        for p, g in zip(params, drawn(np.random.default_rng(i), [300, 300]), strict=True):
            p.grad = g
        if change == "skip":
            params[0].grad[5] = float("nan")
        elif change == "none":
            params[0].grad = None
        opt.step()
        like.step([None if p.grad is None else array(p.grad) for p in params])
    assert [float(opt.state[p]["step"]) for p in params] == [2, 3]
    assert_like_arrays(opt, params, arrays, like, range(2))


def test_another_seed_may_come_between_steps():
    params = parameters()
    arrays = [array(p) for p in params]
    given = options("uint16", **RULE)
    opt, like = RMSprop(params, **given), RMSProp(arrays, **given)
    for i in range(2):
        like.step(step(opt, i))
        opt.param_groups[0]["seed"] = like.param_groups[0]["seed"] = 2**64 - 1
    assert_like_arrays(opt, params, arrays, like, range(len(params)))


def test_codes_of_16_bits_lie_as_the_parameter_does():
    made = np.random.default_rng(0).standard_normal((6, 50)).astype(np.float32)
    p, x = torch.nn.Parameter(torch.from_numpy(made.copy()).mT), made.T.copy("K")
    given = options("uint16", **RULE)
    opt, like = RMSprop([p], **given), RMSProp([x], **given)
    for i in range(2):
        g = np.random.default_rng(i).standard_normal((50, 6)).astype(np.float32)
        p.grad = torch.from_numpy(g)
        opt.step()
        like.step([g])
    assert opt.state[p]["square_avg"].stride() == p.stride()
    assert_like_arrays(opt, [p], [x], like, [0])


def test_a_remainder_makes_float32_steps_of_bfloat16_parameters():
    (p,) = parameters(sizes=[300], dtype=BF)
    master = torch.nn.Parameter(p.detach().float())
    opt, plain = RMSprop([p], lr=1e-5, store_param_remainders=True), RMSprop([master], lr=1e-5)
    for i in range(100):
        step(opt, i)
        master.grad = p.grad.float()
        plain.step()
    got = oracle.join(array(p), opt.state[p]["param_remainder"].numpy())
    assert np.array_equal(got.view(np.uint32), master.detach().numpy().view(np.uint32))


@pytest.mark.parametrize("moment", ["uint16", "uint8"])
def test_state_is_made_when_a_gradient_comes_and_begins_with_the_nearest_codes(moment):
    params = parameters(sizes=[300, 0])
    opt = RMSprop(params, lr=0.0, alpha=0.9, square_avg_dtype=moment, initial_scale=0.3)
    arrays = [array(p) for p in params]
    like = RMSProp(arrays, lr=0.0, alpha=0.9, square_avg_dtype=moment, initial_scale=0.3)
    opt.step()
    assert not opt.state
    like.step(step(opt, 0))
    assert_like_arrays(opt, params, arrays, like, range(2))
    assert [x.numel() for x in opt.state[params[1]].values()] == [1, 0] + [0] * (moment == "uint8")


# Checkpoints


@each
def test_a_resumed_run_goes_on_with_the_same_bits(moment, store, dtype):
    given = options(moment, store, seed=11, lr=0.1, momentum=0.5)
    opt = RMSprop(params := parameters(dtype=dtype), **given)
    for i in range(2):
        step(opt, i)
    saved = saved_and_read(opt.state_dict())
    assert saved["param_groups"][0]["seed"] == 11
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = RMSprop(others, **options(moment, store))
    other.load_state_dict(saved)
    for p, q in zip(params, others, strict=True):
        assert_same_state(other.state[q], opt.state[p])
    for i in range(2, 4):
        step(opt, i)
        step(other, i)
    for p, q in zip(params, others, strict=True):
        same(p, q)
        assert_same_state(other.state[q], opt.state[p])


@pytest.mark.parametrize("way", [deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"])
def test_copies_go_on_alike(way):
    opt = RMSprop(parameters(dtype=BF), **options("uint8", "rest", seed=2))
    step(opt, 0)
    other = way(opt)
    step(opt, 1)
    step(other, 1)
    for p, q in zip(*(x.param_groups[0]["params"] for x in (opt, other)), strict=True):
        same(p, q)
        assert_same_state(opt.state[p], other.state[q])


@pytest.mark.parametrize("cls", [torch.optim.RMSprop, RMSprop], ids=["torch's", "ours"])
@pytest.mark.parametrize("moment", ["uint16", "uint8"])
def test_float32_becomes_the_nearest_codes(moment, cls):
    params = parameters(sizes=[1, 129, 1000])
    plain = cls(params)
    for p in params:
        p.grad = torch.from_numpy(oracle.nasty(np.random.default_rng(0), p.numel()))
    plain.step()
    opt = RMSprop(params, square_avg_dtype=moment)
    opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["square_avg_dtype"] == moment
    for p in params:
        v, state = plain.state[p]["square_avg"].numpy(), opt.state[p]
        if moment == "uint16":
            assert np.array_equal(state["square_avg"].numpy(), oracle.encode16(v, np.int64(0x4000 << 17)))
        else:
            codes, bases = oracle.encode8(v, np.full(v.size, 0x80000 << 12, np.int64))
            assert np.array_equal(state["square_avg"].numpy(), codes)
            assert np.array_equal(state["square_avg_base"].numpy(), bases)
        assert float(state["step"]) == 1
    step(opt, 1)


@pytest.mark.parametrize("dtype", [F4, BF], ids=str)
@pytest.mark.parametrize("moment", ["uint16", "uint8"])
def test_codes_become_the_float32_that_they_stand_for(moment, dtype):
    opt = RMSprop(params := parameters(dtype=dtype), **options(moment, "rest"))
    step(opt, 0)
    other = RMSprop(others := parameters(dtype=dtype))
    other.load_state_dict(saved_and_read(opt.state_dict()))
    assert {name: other.param_groups[0][name] for name in options("", "")} == options("float32")
    for p, q in zip(params, others, strict=True):
        codes, state = opt.state[p]["square_avg"].numpy(), other.state[q]
        want = (
            oracle.decode16(codes)
            if moment == "uint16"
            else oracle.decode8(codes, opt.state[p]["square_avg_base"].numpy())
        )
        assert state.keys() == {"step", "square_avg"}
        same(state["square_avg"], torch.from_numpy(want))
        same(opt.decoded_state(p)["square_avg"], state["square_avg"])
    step(other, 1)


def change_codes(entry):
    entry["square_avg_base"] = entry["square_avg_base"][:-1]


def drop_bases(entry):
    del entry["square_avg_base"]


def raise_bases(entry):
    entry["square_avg_base"] = torch.full_like(entry["square_avg_base"].int(), 1786).to(torch.uint16)


def reshape(entry):
    entry["square_avg"] = entry["square_avg"][:-1]


def widen(entry):
    entry["param_remainder"] = entry["param_remainder"].int()


def count(entry):
    entry["square_avg"] = entry["square_avg"].int()


BAD = {
    count: r"square_avg has dtype torch\.int32; wanted a float, or codes of uint16 or uint8",
    change_codes: r"'?square_avg_base has shape \(7,\); wanted \(8,\)",
    drop_bases: "square_avg has codes of uint8 without the bases that belong to them",
    raise_bases: "square_avg_base has elements above 1785",
    reshape: r"square_avg has shape \(999,\); wanted \(1000,\)",
    widen: r"param_remainder has torch\.int32",
}


def refused(opt, saved, match, kind=ValueError):
    """This state is refused, and nothing changes."""
    groups, kept = deepcopy(opt.state_dict()["param_groups"]), deepcopy(opt.state_dict()["state"])
    with pytest.raises(kind, match=match):
        opt.load_state_dict(saved)
    now = opt.state_dict()
    assert now["param_groups"] == groups
    for key, entry in kept.items():
        assert_same_state(now["state"][key], entry)


@pytest.mark.parametrize("change", BAD, ids=lambda f: f.__name__)
def test_codes_that_do_not_fit_are_refused(change):
    opt = RMSprop(parameters(sizes=[3, 1000], dtype=BF), **options("uint8", "rest"))
    step(opt, 0)
    saved = deepcopy(opt.state_dict())
    change(saved["state"][1])
    step(opt, 1)
    if change is reshape:  # or there would be too many bases
        saved["state"][1]["square_avg"] = saved["state"][1]["square_avg"].clone()
    refused(opt, saved, r"the loaded state of param_groups\[0\]\['params'\]\[1\] does not fit .*: its " + BAD[change])


def test_a_load_that_torch_breaks_off_changes_nothing():
    """torch casts a state to the parameters' dtype and puts it in place before it reads the counters."""
    opt = RMSprop(parameters(dtype=BF), **options("uint8", "rest"))
    step(opt, 0)
    saved = deepcopy(opt.state_dict())
    del saved["state"][1]["step"]
    saved["param_groups"][0]["lr"] = 1.0
    refused(opt, saved, "step", KeyError)
    step(opt, 1)


@pytest.mark.parametrize("moment", ["float32", "uint16", "uint8"])
def test_bases_without_their_codes_go(moment):
    """torch would cast them to the parameter's dtype."""
    opt, other = (RMSprop(parameters(), square_avg_dtype=moment) for _ in range(2))
    step(opt, 0)
    saved = deepcopy(opt.state_dict())
    saved["state"][0]["square_avg_base"] = torch.zeros(9, dtype=torch.uint16)
    if moment == "uint8":
        del saved["state"][0]["square_avg"]
    other.load_state_dict(saved)
    assert "square_avg_base" not in other.state_dict()["state"][0]
    step(other, 1)


def test_codes_of_another_format_are_refused():
    opt, other = (RMSprop(parameters(), square_avg_dtype=moment) for moment in ("uint16", "uint8"))
    for one in (opt, other):
        step(one, 0)
    refused(
        opt, other.state_dict(), "square_avg has codes of uint8; wanted uint16, as this optimizer has them, or float32"
    )
    refused(other, opt.state_dict(), "square_avg has codes of uint16; wanted uint8")


def test_a_state_whose_rule_does_not_go_with_the_format_is_refused():
    plain, opt = RMSprop(parameters(), centered=True), RMSprop(parameters(), square_avg_dtype="uint16")
    step(plain, 0)
    step(opt, 0)
    refused(opt, plain.state_dict(), "does not fit this optimizer: square_avg_dtype is 'uint16' and centered is True")


@pytest.mark.parametrize("moment", ["uint16", "uint8"])
def test_averages_below_zero_are_refused_before_they_are_codes(moment):
    """A code has no sign, so a negative value would become NaN. -0.0 loads as 0."""
    p, q = (torch.nn.Parameter(torch.ones(300)) for _ in range(2))
    p.grad, q.grad = torch.ones(300), torch.ones(300)
    opt, plain = RMSprop([p], square_avg_dtype=moment), RMSprop([q])
    opt.step()
    plain.step()
    plain.state[q]["square_avg"][3] = -1.0
    refused(opt, plain.state_dict(), "square_avg has elements below 0; wanted averages of squares")
    plain.state[q]["square_avg"].fill_(-0.0)
    opt.load_state_dict(plain.state_dict())
    assert (opt.decoded_state(p)["square_avg"] == 0).all()


# Refusals and their messages


@pytest.mark.parametrize(
    ("given", "dtype", "match"),
    [
        (
            {"square_avg_dtype": "float8"},
            F4,
            "square_avg_dtype is 'float8'; wanted one of 'float32', 'uint16', 'uint8'",
        ),
        ({"square_avg_dtype": torch.int8}, F4, "square_avg_dtype is 'int8'; wanted one of"),
        ({"square_avg_dtype": "uint16"}, torch.float64, "square_avg_dtype is 'uint16' and {} is float64"),
        ({"square_avg_dtype": "uint8"}, torch.complex64, "square_avg_dtype is 'uint8' and {} is complex64"),
        ({"square_avg_dtype": "uint16", "centered": True}, F4, "square_avg_dtype is 'uint16' and centered is True"),
        ({"store_param_remainders": True}, torch.float16, "store_param_remainders is True and {} is float16"),
        ({"bf16_stochastic_round": True}, torch.float16, "bf16_stochastic_round is True and {} is float16"),
        (
            options("float32", "rest") | {"bf16_stochastic_round": True},
            BF,
            "store_param_remainders and bf16_stochastic",
        ),
        ({"seed": -1}, F4, "seed is -1"),
    ],
)
def test_what_does_not_go_is_refused(given, dtype, match):
    p = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    with pytest.raises(ValueError, match=match.format(r"param_groups\[0\]\['params'\]\[0\]")):
        RMSprop([p], **given)
    with pytest.raises(ValueError, match=match.format("odd")):
        RMSprop([("odd", p)], **given)
    opt = RMSprop([("fine", torch.nn.Parameter(torch.zeros(3)))])
    with pytest.raises(ValueError, match=match.format("odd")):
        opt.add_param_group({"params": [("odd", p)], **given})
    assert len(opt.param_groups) == 1


def test_bases_want_order():
    p = torch.nn.Parameter(torch.zeros(3, 2).mT)
    with pytest.raises(ValueError, match=r"square_avg_dtype is 'uint8' and p is not C-contiguous; wanted C order"):
        RMSprop([("p", p)], square_avg_dtype="uint8")


def test_a_format_is_a_dtype_too_and_stands_in_the_group_by_name():
    p = torch.nn.Parameter(torch.zeros(3))
    opt = RMSprop([p], square_avg_dtype=torch.uint16)
    assert opt.param_groups[0]["square_avg_dtype"] == "uint16"
    assert RMSprop([p], square_avg_dtype=np.uint8).param_groups[0]["square_avg_dtype"] == "uint8"


@pytest.mark.parametrize(("made", "now"), [("float32", "uint16"), ("uint16", "float32"), ("uint8", "uint16")])
def test_a_format_cannot_change_under_the_state(made, now):
    opt = RMSprop([("p", torch.nn.Parameter(torch.ones(3)))], square_avg_dtype=made)
    step(opt, 0)
    kept = deepcopy(opt.state_dict())
    opt.param_groups[0]["square_avg_dtype"] = now
    with pytest.raises(ValueError, match=f"square_avg_dtype is '{now}', but the square_avg of p is {made}"):
        opt.step()
    opt.param_groups[0]["square_avg_dtype"] = made
    assert_same_state(opt.state_dict()["state"][0], kept["state"][0])
    step(opt, 1)


def test_a_parameter_that_became_another_is_refused():
    opt = RMSprop([("p", p := torch.nn.Parameter(torch.ones(3)))], square_avg_dtype="uint16")
    p.data = p.data.double()
    p.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="square_avg_dtype is 'uint16' and p is float64"):
        opt.step()
    assert not opt.state
    assert torch.equal(p, torch.ones(3, dtype=torch.float64))


def test_torchs_step_has_no_codes():
    opt = RMSprop([("p", p := torch.nn.Parameter(torch.ones(3)))], square_avg_dtype="uint16", fused=False)
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"torch's RMSprop has no square_avg_dtype, .* p: fused=False"):
        opt.step()
    assert not opt.state


def test_decoded_state_is_a_copy_of_what_there_is():
    opt = RMSprop([p := torch.nn.Parameter(torch.ones(300))], square_avg_dtype="uint8", momentum=0.5)
    assert opt.decoded_state(p) == {}
    step(opt, 0)
    found = opt.decoded_state(p)
    assert found.keys() == {"step", "square_avg", "momentum_buffer"}
    assert {x.dtype for x in found.values()} == {F4}
    for x in found.values():
        x.fill_(7)
    assert not any(bool((x == 7).all()) for x in opt.state[p].values())
    with pytest.raises(KeyError, match="not a parameter of this optimizer"):
        opt.decoded_state(torch.ones(300))


def test_torchs_class_reads_a_decoded_state():
    opt = RMSprop([p := torch.nn.Parameter(torch.ones(300))], square_avg_dtype="uint16")
    step(opt, 0)
    theirs = torch.optim.RMSprop([p])
    saved = theirs.state_dict()
    saved["state"] = {0: opt.decoded_state(p)}
    theirs.load_state_dict(saved)
    same(theirs.state[p]["square_avg"], opt.decoded_state(p)["square_avg"])
    p.grad = torch.ones(300)
    theirs.step()
    assert float(theirs.state[p]["step"]) == 2
