"""Checkpoints: from torch's class to ours and back, from old versions, through hooks, pickles and copies."""

import io
import pickle
from copy import deepcopy

import pytest

torch = pytest.importorskip("torch")

from torch.nn import Parameter  # noqa: E402
from torch_configurations import CONFIGURATIONS, LATE_FLAGS  # noqa: E402
from torch_twins import Run, assert_same_run, spread  # noqa: E402

from rmsprop_gpu.torch import RMSprop  # noqa: E402

CLASSES = pytest.mark.parametrize("cls", [torch.optim.RMSprop, RMSprop], ids=["torch's", "ours"])
EACH = pytest.mark.parametrize("given", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
GIVEN = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
OURS = {
    "fused": None,
    **{"nesterov": False, "eps_in_sqrt": False, "lr_in_momentum": False, "initial_scale": 0.0},
    **{"bias_correction": False, "decoupled_weight_decay": False, "skip_nonfinite": False},
    **{"clipvalue": None, "clipnorm": None, "global_clipnorm": None},
    **{"square_avg_dtype": "float32", "store_param_remainders": False, "bf16_stochastic_round": False, "seed": 0},
}
HALVES = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)


def move(run, to, given):
    """Continue a run with another class, from the same parameter values and the saved state."""
    other = Run(to, **given)
    for name, p in run.params.items():
        other.params[name].data.copy_(p.detach())
    other.opt.load_state_dict(saved_and_read(run.opt.state_dict()))
    other.taken = run.taken
    return other


def saved_and_read(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@EACH
@pytest.mark.parametrize("way", ["there", "back", "both"])
def test_a_run_may_move_between_the_classes(given, way, left):
    """torch to ours, ours to torch, and torch to ours and back."""
    theirs = torch.optim.RMSprop
    ways = {"there": (theirs, RMSprop), "back": (RMSprop, theirs), "both": (theirs, RMSprop, theirs)}
    run = Run(ways[way][0], **given).step(3)
    for cls in ways[way][1:]:
        run = move(run, cls, given)
        left.clear()
        run.step(3)
        assert bool(left) == (cls is theirs)
    want = Run(theirs, **given).step(run.taken)
    assert_same_run(run, want)


@EACH
def test_torchs_state_gets_the_neutral_values(given):
    """It lacks our arguments. Whatever ours was built with, torch's rule continues."""
    run = Run(torch.optim.RMSprop, **given).step(2)
    ours = move(run, RMSprop, given | {"nesterov": True, "eps_in_sqrt": True, "initial_scale": 1.0, "clipnorm": 1.0})
    assert {name: ours.group[name] for name in OURS} == OURS
    torchs = run.step(2)
    assert_same_run(ours.step(2), torchs)


def test_ours_stand_in_the_groups_and_travel():
    given = GIVEN | {"nesterov": True, "eps_in_sqrt": True, "clipvalue": 0.5, "bias_correction": True}
    run = Run(RMSprop, **given).step(2)
    other = move(run, RMSprop, GIVEN)
    assert {name: other.group[name] for name in given} == given
    assert_same_run(other.step(2), run.step(2))


@CLASSES
@EACH
def test_state_dict_deterministic(cls, given):
    """As in PyTorch: a copy continues exactly like the original, and the loaded dict is not written to."""
    run = Run(cls, **given).step(3)
    saved = run.opt.state_dict()
    kept = deepcopy(saved)
    other = Run(cls, **given)
    for name, p in run.params.items():
        other.params[name].data.copy_(p.detach())
    other.opt.load_state_dict(saved)
    assert_equal(saved, kept)
    other.opt.load_state_dict(deepcopy(saved))  # otherwise both would share counters
    other.taken = run.taken
    run.step(3), other.step(3)
    assert_equal(run.opt.state_dict(), other.opt.state_dict())
    for name, p in run.params.items():
        assert torch.equal(p, other.params[name])


def assert_equal(a, b):
    """The state dicts are bit-identical."""
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for key, state in a["state"].items():
        assert state.keys() == b["state"][key].keys()
        assert all(torch.equal(x, b["state"][key][name]) for name, x in state.items())


@EACH
def test_what_is_saved_is_what_torch_saves(given):
    """The same names and dtypes for each index. Groups have torch's keys and ours."""
    torchs, ours = (Run(cls, **given).step(2).opt.state_dict() for cls in (torch.optim.RMSprop, RMSprop))
    assert ours["state"].keys() == torchs["state"].keys()
    for key, state in torchs["state"].items():
        assert {n: (x.dtype, x.shape) for n, x in ours["state"][key].items()} == {
            n: (x.dtype, x.shape) for n, x in state.items()
        }
    assert ours["param_groups"][0] == torchs["param_groups"][0] | OURS


@CLASSES
@EACH
@pytest.mark.parametrize("flag", LATE_FLAGS)
def test_can_load_older_state_dict(cls, given, flag):
    """As in PyTorch: flags that were added later are missing."""
    run = Run(cls, **given).step(2)
    saved = run.opt.state_dict()
    for group in saved["param_groups"]:
        del group[flag]
    run.opt.load_state_dict(saved)
    assert run.group[flag] in (False, None)
    run.step()


@CLASSES
@EACH
def test_can_load_from_torch_1(cls, given):
    """All flags are missing, the count is an integer, and there is no momentum_buffer without momentum."""
    run = Run(torch.optim.RMSprop, **given).step(2)
    saved = deepcopy(run.opt.state_dict())
    for group in saved["param_groups"]:
        for name in (*LATE_FLAGS, "param_names"):
            group.pop(name, None)
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    other = Run(cls, **given)
    for name, p in run.params.items():
        other.params[name].data.copy_(p.detach())
    other.opt.load_state_dict(saved)
    other.taken = run.taken
    for name in run.params:
        step = other.state(name)["step"]
        assert (step.dtype, step.shape, step.item()) == (torch.float32, (), 2)
    other.group["maximize"] = run.group["maximize"]  # it was among the missing flags
    assert_same_run(other.step(2), run.step(2))


@CLASSES
def test_load_nontensor_step(cls):
    """As in PyTorch, with a float."""
    run = Run(cls, **GIVEN).step(3)
    saved = run.opt.state_dict()
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    run.opt.load_state_dict(saved)
    run.step()
    assert all(torch.is_tensor(state["step"]) and state["step"] == 4 for state in run.opt.state.values())


@CLASSES
@EACH
def test_save_load_equality_with_weights_only(cls, given):
    run = Run(cls, **given).step(2)
    assert_equal(saved_and_read(run.opt.state_dict()), run.opt.state_dict())


@CLASSES
def test_can_load_from_to_named_state_dict(cls):
    """As in PyTorch: names are optional, and those in the dict replace the optimizer's."""
    for named in (True, False):
        for other_named in (True, False):
            p, q = (Parameter(spread(1, 3, low=-2, high=-1)) for _ in range(2))
            opt = cls([("p", p)] if named else [p], lr=0.05)
            other = cls([("q", q)] if other_named else [q], lr=0.05)
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
            opt.step()
            q.data.copy_(p.detach())
            other.load_state_dict(deepcopy(opt.state_dict()))
            opt.step(), other.step()
            assert torch.equal(p, q)
            names = ["p"] if named else ["q"] if other_named else None
            assert other.param_groups[0].get("param_names") == names


@CLASSES
@pytest.mark.parametrize("change", ["more groups", "more parameters"])
def test_a_state_of_another_shape_is_torchs_error(cls, change):
    run = Run(cls, **GIVEN).step()
    saved = run.opt.state_dict()
    if change == "more groups":
        saved["param_groups"].append(saved["param_groups"][0])
        words = "different number of parameter groups"
    else:
        saved["param_groups"][0]["params"].append(9)
        words = "doesn't match the size of optimizer's group"
    with pytest.raises(ValueError, match=words):
        run.opt.load_state_dict(saved)
    torchs = Run(torch.optim.RMSprop, **GIVEN)
    assert_same_run(run.step(), torchs.step(2))


@CLASSES
def test_hooks_of_state_dicts(cls):
    """As in PyTorch's tests of these hooks: they run in order, and each may replace the dict."""
    run, said = Run(cls, **GIVEN).step(), []

    def note(word):
        return lambda *args: said.append(word)

    run.opt.register_state_dict_pre_hook(note("save 2"))
    run.opt.register_state_dict_pre_hook(note("save 1"), prepend=True)
    run.opt.register_state_dict_post_hook(lambda opt, d: {**d, "note": "kept"})
    saved = run.opt.state_dict()
    assert (said, saved["note"]) == (["save 1", "save 2"], "kept")

    def faster(opt, d):
        d = deepcopy(d)
        d["param_groups"][0]["lr"] = 0.25
        return d

    run.opt.register_load_state_dict_pre_hook(note("load 2"))
    run.opt.register_load_state_dict_pre_hook(note("load 1"), prepend=True)
    run.opt.register_load_state_dict_pre_hook(faster)
    run.opt.register_load_state_dict_post_hook(note("loaded 2"))
    run.opt.register_load_state_dict_post_hook(note("loaded 1"), prepend=True)
    run.opt.load_state_dict(saved)
    assert said[2:] == ["load 1", "load 2", "loaded 1", "loaded 2"]
    assert run.group["lr"] == 0.25
    assert saved["param_groups"][0]["lr"] == 0.05
    run.opt.load_state_dict(saved)
    assert len(said) == 10
    run.step()


@CLASSES
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickling(cls, protocol):
    run = Run(cls, **GIVEN).step(2)
    copy = pickle.loads(pickle.dumps(run, protocol))
    assert copy.opt.param_groups[0]["params"][0] is copy.params["weight"]
    assert_same_run(copy.step(2), Run(torch.optim.RMSprop, **GIVEN).step(4))
    assert all(state["step"] == 2 for state in run.opt.state.values())
    assert_same_run(run.step(2), copy)


@CLASSES
def test_deepcopy(cls):
    """A copied optimizer has its own parameters, and neither sees the other's steps."""
    run = Run(cls, **GIVEN).step(2)
    copy = deepcopy(run)
    assert_same_run(run.step(2), Run(torch.optim.RMSprop, **GIVEN).step(4))
    assert_same_run(copy.step(2), run)


def test_an_optimizer_of_torch_becomes_ours_by_its_pickle():
    """__setstate__ may get the dict of torch's class."""
    run = Run(torch.optim.RMSprop, **GIVEN).step(2)
    opt = RMSprop.__new__(RMSprop)
    opt.__setstate__(run.opt.__getstate__())
    run.opt = opt
    assert {name: run.group[name] for name in OURS} == OURS
    assert_same_run(run.step(2), Run(torch.optim.RMSprop, **GIVEN).step(4))
    assert opt.why_not_fused() == {}


# ------------------------------------------------------------------------------------------ halves
def half_run(cls, half, **given):
    run = Run(cls, dtype=half, **(GIVEN | given))
    return run.step(2)


@HALVES
@pytest.mark.parametrize("rule", [{}, {"centered": True, "bias_correction": True}], ids=str)
def test_the_state_of_halves_is_float32_and_stays_it(rule, half):
    """torch keeps state in halves there, and casts loaded state to them."""
    run = half_run(RMSprop, half, **rule)
    other = move(run, RMSprop, GIVEN | rule | {"dtype": half})
    kept = ["step", "square_avg", "momentum_buffer", *["grad_avg", "bias_weight"] * bool(rule)]
    for name in run.params:
        assert sorted(run.state(name)) == sorted(other.state(name)) == sorted(kept)
        for key in kept:
            assert run.state(name)[key].dtype == torch.float32
            assert torch.equal(other.state(name)[key], run.state(name)[key])
            assert other.state(name)[key].dtype == torch.float32
    run.step(2), other.step(2)
    for name, p in run.params.items():
        assert torch.equal(p, other.params[name])
    assert not other.opt.why_not_fused()


@HALVES
def test_state_in_halves_is_widened(half):
    """State in halves from torch's class loads with its values, and continues in float32."""
    run = half_run(torch.optim.RMSprop, half)
    assert run.state("weight")["square_avg"].dtype == half
    other = move(run, RMSprop, GIVEN | {"dtype": half})
    other.step(2)
    for name in run.params:
        assert other.state(name)["square_avg"].dtype == torch.float32
    assert not other.opt.why_not_fused()


@HALVES
def test_torch_takes_our_state_of_halves(half):
    """torch's load_state_dict casts it."""
    other = move(half_run(RMSprop, half), torch.optim.RMSprop, GIVEN | {"dtype": half})
    assert other.state("weight")["square_avg"].dtype == half
    other.step(2)


@HALVES
def test_users_hooks_see_what_counts(half):
    """Theirs run before ours when loading, and after ours when saving."""
    run = half_run(RMSprop, half)
    saved, seen = run.opt.state_dict(), []

    def doubled(opt, d):
        d = deepcopy(d)
        for state in d["state"].values():
            state["square_avg"] *= 2
        return d

    def look(opt):
        seen.extend(state["square_avg"].dtype for state in opt.state.values())

    other = Run(RMSprop, dtype=half, **GIVEN)
    other.opt.register_load_state_dict_pre_hook(doubled)
    other.opt.register_load_state_dict_post_hook(look, prepend=True)
    other.opt.load_state_dict(saved)
    assert seen == [torch.float32] * len(run.params)
    for name in run.params:
        assert torch.equal(other.state(name)["square_avg"], 2 * run.state(name)["square_avg"])


@HALVES
def test_loaded_state_of_halves_is_a_copy(half):
    run = half_run(RMSprop, half)
    saved = run.opt.state_dict()
    other = Run(RMSprop, dtype=half, **GIVEN)
    other.opt.load_state_dict(saved)
    before = run.state("weight")["square_avg"].clone()
    other.step(2)
    assert torch.equal(run.state("weight")["square_avg"], before)


# ------------------------------------------------------------------------------------------ layouts
@pytest.mark.parametrize("contiguous_first", [True, False])
def test_a_checkpoint_may_lie_otherwise_than_the_model(contiguous_first, left):
    """A channels_last model and a contiguous checkpoint, or the reverse. The layout of the state is changed once."""
    images = torch.channels_last
    first, second = (torch.contiguous_format, images) if contiguous_first else (images, torch.contiguous_format)
    runs = []
    for cls in (torch.optim.RMSprop, RMSprop):
        run = Run(cls, shapes={"kernel": (4, 3, 2, 2)}, **GIVEN)
        run.params["kernel"].data = run.params["kernel"].data.to(memory_format=first)
        run.step(2)
        saved = saved_and_read(run.opt.state_dict())
        run.params["kernel"].data = run.params["kernel"].data.to(memory_format=second)
        run.opt.load_state_dict(saved)
        assert run.state("kernel")["square_avg"].stride() != run.params["kernel"].stride()
        left.clear()
        run.step()
        state = run.state("kernel")
        addresses = {name: x.data_ptr() for name, x in state.items()}
        run.step(2)
        assert {name: x.data_ptr() for name, x in run.state("kernel").items()} == addresses
        runs.append(run)
    assert not left
    assert run.state("kernel")["square_avg"].stride() == run.params["kernel"].stride()
    assert_same_run(runs[1], runs[0])


def test_a_checkpoint_with_expanded_state():
    """All elements share one address, as a user's script may do."""
    runs = []
    for cls in (torch.optim.RMSprop, RMSprop):
        run = Run(cls, lr=0.05).step()
        saved = run.opt.state_dict()
        for state in saved["state"].values():
            state["square_avg"] = torch.full_like(state["square_avg"], 0.5)
        runs.append(run)
        if cls is RMSprop:
            for state in saved["state"].values():
                state["square_avg"] = torch.tensor(0.5, dtype=torch.float64).expand_as(state["square_avg"])
        run.opt.load_state_dict(saved)
        run.step(2)
    assert_same_run(runs[1], runs[0])


# ------------------------------------------------------------------------------------------ groups and defaults
@CLASSES
def test_defaults_that_change_are_those_of_later_groups(cls):
    run = Run(cls, **GIVEN).step()
    run.opt.defaults["lr"] = 0.5
    run.params["more"] = p = Parameter(spread(9, 3, low=-2, high=-1))
    run.opt.add_param_group({"params": [("more", p)]})
    assert [group["lr"] for group in run.opt.param_groups] == [0.05, 0.5]
    twin = Run(torch.optim.RMSprop, **GIVEN).step()
    twin.params["more"] = q = Parameter(p.detach().clone())
    twin.opt.add_param_group({"params": [("more", q)], "lr": 0.5})
    assert_same_run(run.step(2), twin.step(2))


@CLASSES
def test_add_param_group(cls):
    """A tensor, a list, an iterator. For a parameter that is already there or is no leaf, the error is torch's."""
    opt = cls([p := Parameter(torch.ones(2))], lr=0.05)
    opt.add_param_group({"params": Parameter(torch.ones(3)), "alpha": 0.5})
    opt.add_param_group({"params": iter([Parameter(torch.ones(3))])})
    assert [(len(group["params"]), group["alpha"]) for group in opt.param_groups] == [(1, 0.99), (1, 0.5), (1, 0.99)]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.add_param_group({"params": [p]})
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        opt.add_param_group({"params": [p * 2]})
    with pytest.raises(TypeError, match="param_group must be a dict"):
        opt.add_param_group([p])
    with pytest.raises(TypeError, match="optimizer parameters need to be organized in ordered collections"):
        opt.add_param_group({"params": {Parameter(torch.ones(2))}})
    assert len(opt.param_groups) == 3


def test_a_group_may_have_switches_of_its_own():
    p, q = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    opt = RMSprop([{"params": [p]}, {"params": [q], "eps_in_sqrt": True, "clipnorm": 2.0}], lr=0.05, nesterov=True)
    assert [group["nesterov"] for group in opt.param_groups] == [True, True]
    assert [group["eps_in_sqrt"] for group in opt.param_groups] == [False, True]
    assert [group["clipnorm"] for group in opt.param_groups] == [None, 2.0]
