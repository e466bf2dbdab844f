"""Whatever a user does between two steps, the result is the same as with torch's class."""

from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass

import pytest

torch = pytest.importorskip("torch")

from torch_twins import PART, Run, assert_same_run, spread  # noqa: E402

from rmsprop_gpu.torch import RMSprop, side  # noqa: E402

# With all state except centered mode: cancellation needs its own bound, see test_numbers.py.
GIVEN = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
EVERY = frozenset(("weight", "bias", "scale", "empty"))


@dataclass(frozen=True)
class Case:
    """A change, the parameters that torch's step has to update afterwards, and whether the change needs state."""

    change: object
    left: frozenset
    stateful: bool


CASES = {}


def case(left=(), stateful=False):
    def add(change):
        CASES[change.__name__] = Case(change, frozenset(left), stateful)
        return change

    return add


# ------------------------------------------------------------------------------------------ parameters
@case()
def data_is_replaced(run):
    for p in run.params.values():
        p.data = p.data.clone()


@case()
def data_is_replaced_by_another_layout(run):
    p = run.params["weight"]
    p.data = p.data.t().contiguous().t()


@case(left=["weight"])
def data_is_replaced_by_a_view_that_is_not_dense(run):
    p = run.params["weight"]
    wide = torch.zeros(4, 6, dtype=p.dtype)
    wide[:, ::2] = p.data
    p.data = wide[:, ::2]


@case(left=["weight"])
def one_goes_to_float32(run):
    p = run.params["weight"]
    p.data = p.data.float()


@case(left=EVERY)
def the_module_goes_to_float32(run):
    torch.nn.ParameterDict(run.params).to(torch.float32)


@case()
def the_module_goes_to_float64_which_it_is(run):
    torch.nn.ParameterDict(run.params).to(torch.float64)


@case()
def tensors_are_swapped(run):
    for name, p in run.params.items():
        p.grad = None
        torch.utils.swap_tensors(p, torch.nn.Parameter(spread(7, *p.shape, low=-2, high=-1)))
        assert run.params[name] is p


@case()
def memory_is_set_to_other(run):
    p = run.params["weight"]
    p.data.set_(spread(8, 4, 3, low=-2, high=-1))


@case()
def values_are_copied_in(run):
    with torch.no_grad():
        for p in run.params.values():
            p.copy_(spread(9, *p.shape, low=-2, high=-1))


@case(left=["weight", "bias"])
def two_lie_in_one_storage_and_overlap(run):
    base = spread(10, 13, low=-2, high=-1)
    run.params["weight"].data, run.params["bias"].data = base[:12].view(4, 3), base[10:]


@case()
def two_lie_in_one_storage_side_by_side(run):
    base = spread(10, 15, low=-2, high=-1)
    run.params["weight"].data, run.params["bias"].data = base[:12].view(4, 3), base[12:]


@case()
def one_is_frozen(run):
    run.params["weight"].requires_grad_(False)


@case()
def one_is_frozen_and_thawed(run):
    run.params["weight"].requires_grad_(False)
    run.step()
    run.params["weight"].requires_grad_(True)


# ------------------------------------------------------------------------------------------ groups
@case()
def a_group_is_added(run):
    run.params["more"] = p = torch.nn.Parameter(spread(11, 2, 2, low=-2, high=-1))
    run.opt.add_param_group({"params": [("more", p)], "lr": 0.2, "momentum": 0})


@case()
def a_group_is_added_and_removed(run):
    p = torch.nn.Parameter(spread(11, 2, 2, low=-2, high=-1))
    run.opt.add_param_group({"params": [("more", p)]})
    p.grad = torch.ones_like(p)
    run.step()
    run.opt.param_groups.pop()


@case()
def groups_are_reordered(run):
    run.params["more"] = p = torch.nn.Parameter(spread(11, 2, 2, low=-2, high=-1))
    run.opt.add_param_group({"params": [("more", p)], "lr": 0.2})
    run.step()
    run.opt.param_groups.reverse()


@case()
def the_list_of_groups_is_replaced(run):
    run.opt.param_groups = [{**group} for group in run.opt.param_groups]


@case()
def parameters_are_reordered(run):
    run.group["params"].reverse()
    run.group["param_names"].reverse()


@case()
def the_list_of_parameters_is_replaced(run):
    run.group["params"] = list(run.group["params"])


@case()
def a_parameter_is_removed(run):
    run.group["params"].pop(0)
    run.group["param_names"].pop(0)


@case(stateful=True)
def a_parameter_is_replaced_with_its_state_moved(run):
    """As Gaussian splatting grows: more rows, with zero state."""
    old = run.params["weight"]
    more = spread(12, 2, 3, low=-2, high=-1)
    run.params["weight"] = new = torch.nn.Parameter(torch.cat([old.detach(), more]))
    state = run.opt.state.pop(old)
    for name in ("square_avg", "momentum_buffer"):
        state[name] = torch.cat([state[name], torch.zeros_like(more)])
    run.group["params"][0] = new
    run.opt.state[new] = state


@case()
def a_parameter_is_replaced_without_its_state(run):
    run.params["weight"] = new = torch.nn.Parameter(run.params["weight"].detach().clone())
    run.group["params"][0] = new


@case()
def hyperparameters_of_a_group_change(run):
    run.group.update(lr=0.01, alpha=0.5, eps=1e-3, weight_decay=0.0, maximize=True, momentum=0.3)


@case()
def momentum_is_turned_off(run):
    run.group["momentum"] = 0


@case(stateful=True)
def momentum_is_turned_off_and_on(run):
    run.group["momentum"] = 0
    run.step()
    run.group["momentum"] = 0.5


@case()
def lr_becomes_a_tensor_that_changes_in_place(run):
    run.group["lr"] = torch.tensor(0.02)
    run.step()
    run.group["lr"].mul_(0.5)
    run.step()
    run.group["lr"].data = torch.tensor(0.03)


@case()
def hyperparameters_are_numbers_of_other_kinds(run):
    run.group.update(lr=1, weight_decay=0, momentum=0, eps=1, maximize=1, centered=0)


@case(left=EVERY)
def momentum_above_1(run):
    run.group["momentum"] = 1.5


@case(left=EVERY)
def alpha_1(run):
    run.group["alpha"] = 1


@case(left=["more"])
def alpha_1_in_one_group(run):
    run.params["more"] = p = torch.nn.Parameter(spread(11, 2, 2, low=-2, high=-1))
    run.opt.add_param_group({"params": [("more", p)], "alpha": 1, "eps": 0.1})


# ------------------------------------------------------------------------------------------ state
@case()
def the_state_is_replaced(run):
    run.opt.state = defaultdict(dict, {p: deepcopy(state) for p, state in run.opt.state.items()})


@case()
def the_state_is_cleared(run):
    run.opt.state.clear()


@case(stateful=True)
def the_state_of_one_is_deleted(run):
    del run.opt.state[run.params["bias"]]


@case()
def the_state_of_one_is_an_empty_dict(run):
    run.opt.state[run.params["bias"]] = {}


@case(stateful=True)
def the_dict_of_one_is_replaced(run):
    run.opt.state[run.params["bias"]] = dict(run.state("bias"))


@case(stateful=True)
def tensors_of_the_state_are_replaced(run):
    state = run.state("weight")
    state["square_avg"] = torch.full_like(state["square_avg"], 0.25)
    state["step"] = torch.tensor(7.0)


@case(stateful=True)
def the_state_is_written_in_place(run):
    state = run.state("weight")
    state["square_avg"][...] = 0.25
    state["momentum_buffer"].zero_()
    state["step"].fill_(7)


@case(stateful=True)
def the_data_of_the_state_is_replaced(run):
    state = run.state("weight")
    state["square_avg"].data = torch.full_like(state["square_avg"], 0.25)


@case(stateful=True)
def the_state_lies_otherwise_than_its_parameter(run):
    state = run.state("weight")
    state["square_avg"] = state["square_avg"].t().contiguous().t()


@case(stateful=True)
def the_state_is_not_dense(run):
    state = run.state("weight")
    wide = torch.zeros(4, 6, dtype=torch.float64)
    wide[:, ::2] = state["square_avg"]
    state["square_avg"] = wide[:, ::2]


@case(left=["weight", "bias"], stateful=True)
def two_share_their_state(run):
    state = torch.full((12,), 0.25, dtype=torch.float64)
    run.state("weight")["square_avg"], run.state("bias")["square_avg"] = state.view(4, 3), state[:3]


@case(stateful=True)
def there_is_state_of_the_user(run):
    run.state("weight")["note"] = torch.ones(2)


@case()
def the_state_is_that_of_a_state_dict(run):
    run.opt.load_state_dict(deepcopy(run.opt.state_dict()))


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("name", CASES)
def test_the_steps_after_it_are_torchs(name, foreach, left):
    case = CASES[name]
    torchs, ours = (Run(cls, foreach=foreach, **GIVEN) for cls in (torch.optim.RMSprop, RMSprop))
    for run in (torchs, ours):
        run.step(2)
        case.change(run)
        left.clear()
        run.step(2)
    assert {n for n, p in ours.params.items() if id(p) in left} == case.left & ours.params.keys()
    assert ours.opt.why_not_fused().keys() == case.left
    assert_same_run(ours, torchs)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.stateful])
def test_before_there_is_any_state_too(name):
    torchs, ours = (Run(cls, **GIVEN) for cls in (torch.optim.RMSprop, RMSprop))
    for run in (torchs, ours):
        CASES[name].change(run)
        run.step(2)
    assert_same_run(ours, torchs)


@pytest.mark.parametrize(("switch", "name"), [({"momentum": 0.9}, "momentum_buffer"), ({"centered": True}, "grad_avg")])
def test_a_buffer_that_a_switch_wants_later_is_made(switch, name):
    """torch raises KeyError here. Ours equals its step with a buffer of zeros."""
    torchs, ours = (Run(cls, lr=0.05, eps=0.1) for cls in (torch.optim.RMSprop, RMSprop))
    for run in (torchs, ours):
        run.step(2).group.update(switch)
    for p, state in torchs.opt.state.items():
        state[name] = torch.zeros_like(p)
    for run in (torchs, ours):
        run.step(2)
    assert_same_run(ours, torchs)
    assert ours.opt.why_not_fused() == {}


def test_float32_that_goes_to_float64_keeps_what_its_state_knew(left):
    """torch's state stays float32, ours may be kept or widened. The update is torch's, within float32 rounding."""
    torchs, ours = (Run(cls, dtype=torch.float32, **GIVEN) for cls in (torch.optim.RMSprop, RMSprop))
    for run in (torchs, ours):
        run.step(2)
        torch.nn.ParameterDict(run.params).to(torch.float64)
        run.step(2)
    assert_same_run(ours, torchs, PART[torch.float32])


def test_a_parameter_twice_in_a_group_is_updated_twice(left):
    runs = []
    for cls in (torch.optim.RMSprop, RMSprop):
        p, q = (torch.nn.Parameter(spread(i, 3, low=-2, high=-1)) for i in range(2))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            opt = cls([("p", p), ("q", q), ("p again", p)], lr=0.05)
        left.clear()
        for step in range(3):
            p.grad, q.grad = spread(20 + step, 3), spread(30 + step, 3)
            opt.step()
        runs.append((p, q, opt.state[p]["square_avg"], opt.state[p]["step"]))
    for want, got in zip(*runs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert left == {id(p)}
    assert "p" in opt.why_not_fused()
    assert "q" not in opt.why_not_fused()


def test_the_same_parameter_in_a_second_group_by_hand(left):
    runs = [Run(cls, **GIVEN) for cls in (torch.optim.RMSprop, RMSprop)]
    for run in runs:
        run.step(2)
        run.opt.param_groups.append({**run.group, "params": [run.params["bias"]], "param_names": ["bias"], "lr": 0.5})
        left.clear()
        run.step(2)
    assert left == {id(runs[1].params["bias"])}
    assert_same_run(runs[1], runs[0])


def test_a_parameter_that_was_appended_to_a_group_with_names():
    """Only the list of parameters has it, not that of names, which torch's step does not read."""
    runs = [Run(cls, **GIVEN) for cls in (torch.optim.RMSprop, RMSprop)]
    for run in runs:
        run.params["late"] = torch.nn.Parameter(spread(7, 5))
        run.group["params"].append(run.params["late"])
        run.step(2)
        run.opt.load_state_dict(run.opt.state_dict())
        run.step()
    assert_same_run(runs[1], runs[0])
    assert runs[1].opt.why_not_fused() == {}


def test_memory_that_was_given_up_is_an_error_before_anything_is_written():
    """FSDP resizes storages to zero. torch's own step crashes the process then."""
    run = Run(RMSprop, **GIVEN).step(2)
    run.give()
    kept = {name: p.detach().clone() for name, p in run.params.items()}
    counts = {name: run.state(name)["step"].clone() for name in run.params}
    p = run.params["weight"]
    p.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight"):
        run.opt.step()
    for name, q in run.params.items():
        assert torch.equal(run.state(name)["step"], counts[name])
        assert q is p or torch.equal(q, kept[name])
    p.untyped_storage().resize_(12 * 8)
    p.data.copy_(kept["weight"])
    other = Run(RMSprop, **GIVEN).step(3)
    assert_same_run(run.step(), other)


def test_a_first_step_that_was_cut_off_leaves_no_numbers_behind(monkeypatch):
    """For example, Ctrl-C during compilation. Later assignments must count."""

    def interrupted(*_):
        raise KeyboardInterrupt

    p, twin = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    for x in (p, twin):
        x.grad = torch.full_like(x, 0.5)
    opt = RMSprop([p], alpha=0.9)
    with monkeypatch.context() as patch:
        patch.setattr(side, "Plan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step()
    opt.param_groups[0]["alpha"] = 0.5
    opt.step()
    torch.optim.RMSprop([twin], alpha=0.5).step()
    torch.testing.assert_close(p, twin, rtol=1e-12, atol=0)
