"""The class over torch's tensors on a real card: bit-identical to the host, streams, graphs, and when the host waits.

test_on_devices.py fakes torch's part, this file fakes nothing. Skipped if torch finds no CUDA device.
"""

import contextlib
import io

import pytest

torch = pytest.importorskip("torch")

from torch_twins import Twins as OneStep  # noqa: E402
from torch_twins import assert_same_numbers, assert_same_update, spread  # noqa: E402

from rmsprop_gpu.torch import RMSprop  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    # A string is evaluated when a test runs, so torch looks for devices only if such a test was chosen.
    pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="torch finds no CUDA device"),
    pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
]

CARD = torch.device("cuda", 0)
F4, F8, F2, B2, C8, C16 = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.complex64, torch.complex128),
)
SHAPES = (7, 5), (1000,), (), (3, 0), (2, 3, 4), (70_001,)
SPIN = 1_000_000_000  # clock cycles of the card, about half a second

ALL_ON = {"momentum": 0.9, "weight_decay": 0.1, "centered": True, "nesterov": True, "bias_correction": True}
SKIPPING = {"global_clipnorm": 1.0, "skip_nonfinite": True, "bias_correction": True}
RULES = [
    {"momentum": 0.9},
    {"centered": True},
    {"maximize": True, "eps_in_sqrt": True, "initial_scale": 1.0, "lr_in_momentum": True, "momentum": 0.5},
    {"decoupled_weight_decay": True, "weight_decay": 0.1, "clipvalue": 0.5},
    {"clipnorm": 1.0},
    SKIPPING,
    {"skip_nonfinite": True, "momentum": 0.9},
]
CASES = [(given, dtype) for given in ({}, ALL_ON) for dtype in (F4, F8, F2, B2, C8, C16)]
CASES += [(given, F4) for given in RULES] + [(SKIPPING, dtype) for dtype in (F8, F2, B2, C8)]


def on_card(x):
    """A copy on the card, in the same layout."""
    return x.detach().to(CARD, copy=True)


def wait():
    """Wait until the card has finished."""
    torch.cuda.synchronize(CARD)


@contextlib.contextmanager
def no_waiting():
    """Raise an error where torch sees the host wait for the card."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def draw(seed, dtype=F4, shapes=SHAPES):
    """Values over several decades, for one step."""
    return [spread(100 * seed + i, *shape, dtype=dtype, low=-5, high=2) for i, shape in enumerate(shapes)]


def same(a, b):
    """Bit-identical, with the same dtype and shape, on whichever device."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    a, b = (x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    assert torch.equal(a, b)


class Twins:
    """The same optimizer over equal tensors, on the host and on the card."""

    def __init__(self, given, dtype=F4, shapes=SHAPES, grouped=lambda params: params, **on_the_card):
        start = [spread(i, *shape, dtype=dtype, low=-2, high=0) for i, shape in enumerate(shapes)]
        self.host = [torch.nn.Parameter(x) for x in start]
        self.there = [torch.nn.Parameter(on_card(x)) for x in start]
        self.mine = RMSprop(grouped(self.host), **given)
        self.its = RMSprop(grouped(self.there), **{**given, **on_the_card})
        self.shapes, self.dtype = shapes, dtype

    def grads(self, grads):
        """Set these gradients for the next step, in new memory."""
        for p, q, g in zip(self.host, self.there, grads, strict=True):
            p.grad, q.grad = (None, None) if g is None else (g, on_card(g))
        return self

    def write(self, grads):
        """Write these values into the existing gradients."""
        for p, q, g in zip(self.host, self.there, grads, strict=True):
            p.grad.copy_(g)
            q.grad.copy_(g)
        return self

    def draw(self, seed):
        return draw(seed, self.dtype, self.shapes)

    def step(self):
        self.mine.step()
        self.its.step()
        return self

    def check(self):
        wait()
        assert self.its.why_not_fused() == {}
        for p, q in zip(self.host, self.there, strict=True):
            same(p, q)
            mine, its = self.mine.state.get(p, {}), self.its.state.get(q, {})
            assert mine.keys() == its.keys()
            for name in mine:
                same(mine[name], its[name])
                assert name == "step" or its[name].device == CARD
        return self


# Bit-identity


@pytest.mark.parametrize(("given", "dtype"), CASES, ids=str)
def test_steps_have_the_bits_of_the_host(given, dtype):
    twins = Twins(given, dtype)
    for seed in range(1, 5):
        twins.grads(twins.draw(seed)).step().check()


def test_many_small_tensors_have_the_bits_of_the_host():
    shapes = [(256,)] * 300 + [(n,) for n in range(1, 40)]
    twins = Twins({"momentum": 0.9, "global_clipnorm": 1.0}, shapes=shapes, foreach=True)
    for seed in range(1, 4):
        twins.grads(twins.draw(seed)).step().check()


def test_gradients_of_new_addresses_each_step():
    """As after zero_grad(set_to_none=True). Old gradients are kept, so that no address comes back."""
    twins, kept = Twins({"momentum": 0.9}), []
    for seed in range(1, 6):
        for opt in (twins.mine, twins.its):
            opt.zero_grad(set_to_none=True)
        twins.grads(twins.draw(seed))
        kept += [p.grad for p in twins.there if p.numel()]
        twins.step().check()
    assert len({g.data_ptr() for g in kept}) == len(kept)


def test_gradients_that_are_freed_at_once():
    """Their memory is reused on the stream after the step that reads it."""
    twins = Twins({"momentum": 0.9}, shapes=[(1000, 1000)])
    for seed in range(1, 6):
        twins.grads(twins.draw(seed)).step()
        twins.its.zero_grad()
        torch.full((1000, 1000), torch.nan, device=CARD)
    twins.check()


@pytest.mark.parametrize("dtype", [F2, B2], ids=str)
def test_half_gradients_of_float32_parameters(dtype):
    twins = Twins({"momentum": 0.9})
    for p in (*twins.host, *twins.there):
        p.grad_dtype = dtype
    for seed in range(1, 4):
        twins.grads(draw(seed, dtype)).step().check()


def test_no_gradients_and_those_that_lie_otherwise():
    twins = Twins({"momentum": 0.9}, shapes=[(8, 6), (4, 3, 5, 5)])
    for opt_params in (twins.host, twins.there):
        opt_params[1].data = opt_params[1].data.contiguous(memory_format=torch.channels_last)
    twins.grads(twins.draw(1)).step().check()
    first = twins.draw(2)[0]
    twins.grads([first, None]).step().check()
    twins.host[0].grad, twins.there[0].grad = first.t().contiguous().t(), on_card(first).t().contiguous().t()
    twins.step().check()
    twins.host[0].grad, twins.there[0].grad = (x.repeat_interleave(2, 1)[:, ::2] for x in (first, on_card(first)))
    twins.step().check()


def test_groups_and_schedules():
    def grouped(params):
        return [{"params": params[:2]}, {"params": params[2:], "lr": 0.3, "weight_decay": 0.1}]

    twins = Twins({"momentum": 0.5}, grouped=grouped)
    schedules = [torch.optim.lr_scheduler.StepLR(opt, 1, 0.5) for opt in (twins.mine, twins.its)]
    for seed in range(1, 5):
        twins.grads(twins.draw(seed)).step().check()
        for schedule in schedules:
            schedule.step()


def test_a_step_that_is_not_finite_is_skipped_and_not_counted():
    twins = Twins({"skip_nonfinite": True, "momentum": 0.5}).grads(draw(1)).step().check()
    bad = draw(2)
    bad[-1][-1] = torch.nan
    twins.grads(bad).step().check()
    twins.grads(draw(3)).step().check()
    counts = [twins.its.state[p]["step"] for p in twins.there]
    assert [float(x) for x in counts] == [2.0] * len(SHAPES)
    assert all(x.device == CARD for x in counts)


def test_host_and_card_in_one_step():
    there, here = (torch.nn.Parameter(x) for x in (on_card(torch.ones(1000)), torch.ones(1000)))
    opt = RMSprop([here, there], momentum=0.9)
    for seed in range(1, 4):
        (g,) = draw(seed, shapes=[(1000,)])
        here.grad, there.grad = g, on_card(g)
        opt.step()
    same(here, there)
    assert opt.why_not_fused() == {}


# Against torch's own class

TORCHS = [{}, {"momentum": 0.9}, {"momentum": 0.5, "weight_decay": 0.1, "maximize": True}, {"alpha": 0.9, "eps": 0.1}]


@pytest.mark.parametrize("dtype", [F4, F8, C8], ids=str)
@pytest.mark.parametrize("given", TORCHS, ids=str)
def test_each_step_is_torchs_within_rounding(given, dtype):
    """From the same start. The bounds are those of torch_twins.PART, which count the roundings of both."""
    shapes = (7, 5), (33,), (3, 2, 4)
    start = [on_card(spread(i, *shape, dtype=dtype, low=-2.5, high=-1.5)) for i, shape in enumerate(shapes)]
    twins = OneStep(RMSprop, lambda cls, params: cls(params, **given), start)
    for seed in range(1, 5):
        before = twins.step([on_card(g) for g in draw(seed, dtype, shapes)])
        for (p, q), old in zip(twins.pairs(), before, strict=True):
            assert_same_update(p, q, old["param"])
    assert twins.ours.why_not_fused() == {}


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double().to(CARD)


def batches(n):
    made = torch.Generator().manual_seed(1)
    return [on_card(torch.randn(32, 8, generator=made, dtype=F8)) for _ in range(n)]


def test_a_model_that_trains_takes_torchs_course():
    ends = []
    for cls in (torch.optim.RMSprop, RMSprop):
        model = network()
        opt = cls(model.parameters(), lr=1e-3, momentum=0.9)
        for i, x in enumerate(batches(30)):
            opt.zero_grad(set_to_none=i % 3 > 0)
            (model(x) - 1).square().mean().backward()
            opt.step()
        ends.append(list(model.parameters()))
    for got, want in zip(ends[1], ends[0], strict=True):
        assert_same_numbers(got, want, 1e-9)  # rounding in one step affects the next gradient


def test_autograd_refuses_what_was_saved_before_a_step():
    p = torch.nn.Parameter(on_card(torch.ones(3)))
    p.grad = on_card(torch.ones(3))
    loss = (p * p).sum()
    RMSprop([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Streams, memory and the host


@pytest.mark.parametrize("given", [{"momentum": 0.9}, SKIPPING], ids=str)
@pytest.mark.parametrize("before", ["on the default stream", "on that stream"])
def test_a_step_is_on_the_current_stream(before, given):
    """Gradients arrive late on that stream: a step on any other would read the old ones."""
    twins, stream = Twins(given).grads(draw(1)), torch.cuda.Stream(CARD)
    wait()
    with contextlib.nullcontext() if before == "on the default stream" else torch.cuda.stream(stream):
        twins.step().check()
    late = [on_card(g) for g in draw(2)]
    wait()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SPIN // 4)
        for p, q, g, on in zip(twins.host, twins.there, draw(2), late, strict=True):
            p.grad.copy_(g)
            q.grad.copy_(on, non_blocking=True)
        twins.step()
    stream.synchronize()
    twins.check()
    twins.grads(draw(3)).step().check()


WAYS = {
    "plain": {},
    "skipping": {"skip_nonfinite": True, "momentum": 0.9},
    "clipped": {"global_clipnorm": 1.0},
    "capturable": {"capturable": True},
}


@pytest.mark.parametrize("given", WAYS.values(), ids=WAYS)
def test_a_step_does_not_wait(given):
    """Checked with torch's sync debug mode, and behind a spinning kernel. Gradients and learning rate change."""
    params = [torch.nn.Parameter(on_card(x)) for x in draw(0)]
    opt, grads = RMSprop(params, **given), [[on_card(g) for g in draw(seed)] for seed in range(1, 6)]

    def step(i):
        for p, g in zip(params, grads[i], strict=True):
            p.grad = g
        opt.step()

    step(0)
    step(1)
    opt.param_groups[0]["lr"] = 0.5
    step(0)
    wait()
    with no_waiting():
        step(2)
        opt.param_groups[0]["lr"] = 0.25
        step(3)
    wait()
    event = torch.cuda.Event()
    torch.cuda._sleep(2 * SPIN)
    event.record()
    opt.param_groups[0]["lr"] = 0.125
    step(4)
    assert not event.query(), "the host waited"
    wait()


def test_steps_of_the_same_tensors_allocate_nothing():
    twins = Twins({"momentum": 0.9}).grads(draw(1)).step().step()
    wait()

    def allocations():
        return torch.cuda.memory_stats(CARD)["allocation.all.allocated"]

    before = allocations()
    twins.step().step()
    assert allocations() == before
    twins.check()


# Graphs


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"momentum": 0.9, "centered": True},
        {"decoupled_weight_decay": True, "weight_decay": 0.5},
        {"bias_correction": True, "momentum": 0.5},
        SKIPPING,
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F4, B2], ids=str)
def test_replays_have_the_bits_of_the_host(given, dtype):
    """With other values in the gradients and another learning rate. Powers of two are exact in float32."""
    lr = on_card(torch.tensor(0.25))
    twins = Twins({"lr": 0.25, **given}, dtype, capturable=True, lr=lr)
    twins.grads(twins.draw(1)).step().check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twins.its.step()
    twins.check()  # capturing takes no step
    for seed, rate in ((2, 0.25), (3, 0.125), (4, 0.5), (5, 0.5)):
        twins.write(twins.draw(seed))
        lr.fill_(rate)
        twins.mine.param_groups[0]["lr"] = rate
        graph.replay()
        twins.mine.step()
        twins.check()
    twins.write(twins.draw(6)).step().check()  # an eager step after the graph
    if "skip_nonfinite" in given:
        bad = twins.draw(7)
        bad[1][5] = torch.inf
        twins.write(bad)
        graph.replay()
        twins.mine.step()
        twins.check()


def test_a_graph_lives_beside_steps_of_other_gradients():
    twins = Twins({"momentum": 0.5}, capturable=True).grads(draw(1)).step().check()
    graph, captured = torch.cuda.CUDAGraph(), [p.grad for p in twins.there]
    with torch.cuda.graph(graph):
        twins.its.step()
    twins.its.zero_grad()
    twins.grads(draw(2)).step().check()
    twins.its.param_groups[0]["alpha"] = twins.mine.param_groups[0]["alpha"] = 0.5  # rebinds
    twins.grads(draw(3)).step().check()
    for p, g, old in zip(twins.host, draw(4), captured, strict=True):
        p.grad.copy_(g)
        old.copy_(g)
    graph.replay()  # with the hyperparameters at capture
    twins.mine.param_groups[0]["alpha"] = 0.99
    twins.mine.step()
    twins.check()


def test_what_a_graph_could_not_keep_is_refused():
    twins = Twins({"momentum": 0.5}, capturable=True).grads(draw(1))

    def refused(match):
        with pytest.raises(RuntimeError, match=match), torch.cuda.graph(torch.cuda.CUDAGraph()):
            twins.its.step()

    refused("its tensors are not those of an earlier step")
    twins.step().check()
    twins.grads(draw(2))
    refused("the addresses of its gradients")
    twins.step().check()
    twins.its.param_groups[0]["lr"] = 0.5
    refused("its numbers differ from those of the last step")
    twins.mine.param_groups[0]["lr"] = 0.5
    twins.step().check()


def test_a_whole_iteration_is_captured():
    """Forward, backward and step in one graph, as in torch's notes on CUDA graphs."""
    ends, given = [], {"lr": 1e-3, "momentum": 0.9, "capturable": True}
    for captured in (False, True):
        model, x = network(), torch.zeros(32, 8, dtype=F8, device=CARD)
        opt = RMSprop(model.parameters(), **given)

        def iterate(model=model, opt=opt, x=x):
            opt.zero_grad(set_to_none=False)
            (model(x) - 1).square().mean().backward()
            opt.step()

        stream = torch.cuda.Stream(CARD)
        stream.wait_stream(torch.cuda.current_stream(CARD))
        with torch.cuda.stream(stream):
            for _ in range(3):
                iterate()
        torch.cuda.current_stream(CARD).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                iterate()
        for batch in batches(20):
            x.copy_(batch)
            graph.replay() if captured else iterate()
        wait()
        ends.append(list(model.parameters()))
        assert float(opt.state[ends[-1][0]]["step"]) == 23
        assert opt.why_not_fused() == {}
    for got, want in zip(ends[1], ends[0], strict=True):
        assert_same_numbers(got, want, 1e-9)


# GradScaler


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
@pytest.mark.parametrize("given", [{"momentum": 0.9}, {"global_clipnorm": 1.0}], ids=str)
def test_scaled_steps_have_the_bits_of_the_host(given, dtype, fused):
    """One step has an infinite gradient: it is skipped and not counted. With fused=True, the host never waits."""
    twins = Twins({"fused": fused, **given}, dtype)
    scalers = [torch.amp.GradScaler(device.type, init_scale=2.0**8) for device in (torch.device("cpu"), CARD)]
    ones = torch.ones(()), on_card(torch.ones(()))
    for seed in range(1, 6):
        scale = [scaler.scale(one).item() for scaler, one in zip(scalers, ones, strict=True)]
        assert scale[0] == scale[1]
        grads = [scale[0] * g for g in twins.draw(seed)]
        if seed == 3:
            grads[1][7] = torch.inf
        twins.grads(grads)
        scalers[0].step(twins.mine)
        scalers[0].update()
        with no_waiting() if fused and seed > 1 else contextlib.nullcontext():
            scalers[1].step(twins.its)
            scalers[1].update()
        twins.check()
    assert {float(twins.its.state[p]["step"]) for p in twins.there} == {4.0}
    assert scalers[0].get_scale() == scalers[1].get_scale() == 2.0**7


# Saved states


@pytest.mark.parametrize("saved", ["loaded as it is", "through a file"])
@pytest.mark.parametrize("dtype", [F4, B2], ids=str)
@pytest.mark.parametrize("given", [{"momentum": 0.9, "centered": True}, {"bias_correction": True}], ids=str)
def test_a_state_goes_from_either_to_the_other(given, dtype, saved):
    twins = Twins(given, dtype).grads(draw(1, dtype)).step().check()

    def handed_over(opt, device):
        state = opt.state_dict()
        if saved == "through a file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, map_location=device, weights_only=True)
        return state

    mine, its = handed_over(twins.its, "cpu"), handed_over(twins.mine, CARD)
    twins.mine.load_state_dict(mine)
    twins.its.load_state_dict(its)
    for seed in (2, 3):
        twins.grads(twins.draw(seed)).step().check()


@pytest.mark.parametrize("given", [{"capturable": True}, {"fused": True}, {"skip_nonfinite": True}], ids=str)
def test_a_state_that_is_counted_on_the_card_is_saved_and_loaded_there(given):
    twins = Twins({"momentum": 0.9}, **given).grads(draw(1)).step().check()
    twins.its.load_state_dict(twins.its.state_dict())
    twins.grads(draw(2)).step().check()
    other = RMSprop(twins.there, **given)
    other.load_state_dict(twins.its.state_dict())
    twins.its = other
    twins.grads(draw(3)).step().check()
    assert {float(twins.its.state[p]["step"]) for p in twins.there} == {3.0}


@pytest.mark.parametrize("given", [SKIPPING, {"capturable": True}], ids=str)
def test_a_state_that_is_counted_on_the_card_goes_on_on_the_host(given):
    """Counters load as they were saved: torch moves everything else."""
    twins = Twins({**given, "capturable": False}, **given)
    for seed in range(1, 3):
        twins.grads(twins.draw(seed)).step().check()
    saved = twins.its.state_dict()
    for group in saved["param_groups"]:
        group["capturable"] = False
    assert all(state["step"].device == CARD for state in saved["state"].values())
    twins.mine.load_state_dict(saved)
    twins.grads(twins.draw(3)).step().check()
    assert twins.mine.why_not_fused() == {}


def test_torchs_class_takes_over_and_hands_back():
    """On the card. Each loads the state of the other."""
    start = [on_card(x) for x in draw(0, F8, [(7, 5), (33,)])]
    params, twins = [[torch.nn.Parameter(x.clone()) for x in start] for _ in range(2)]
    ours, torchs = RMSprop(params, momentum=0.9), torch.optim.RMSprop(twins, momentum=0.9)

    def step(opts, seed):
        for p, q, g in zip(params, twins, draw(seed, F8, [(7, 5), (33,)]), strict=True):
            p.grad, q.grad = on_card(g), on_card(g)
        for opt in opts:
            opt.step()

    step((ours, torchs), 1)
    other = torch.optim.RMSprop(params, momentum=0.9)
    other.load_state_dict(ours.state_dict())
    step((other, torchs), 2)
    ours.load_state_dict(other.state_dict())
    step((ours, torchs), 3)
    for p, q in zip(params, twins, strict=True):
        assert_same_numbers(p, q, 1e-12)


FEWER = [
    {"square_avg_dtype": moment, **store}
    for moment in ("float32", "uint16", "uint8")
    for store in ({"store_param_remainders": True}, {"bf16_stochastic_round": True})
]


@pytest.mark.parametrize("replayed", [False, True], ids=["eager", "replayed"])
@pytest.mark.parametrize("given", FEWER, ids=str)
@pytest.mark.parametrize("dtype", [F4, B2], ids=str)
def test_fewer_bytes_have_the_bits_of_the_host(dtype, given, replayed):
    """Codes, bases, remainders and stochastically rounded parameters. Each replay has its own key."""
    shapes, count = ((1000,), (37, 129), (5,)), 6
    start, grads = draw(0, dtype, shapes), [draw(step + 1, dtype, shapes) for step in range(count)]
    here = [torch.nn.Parameter(x.clone()) for x in start]
    there = [torch.nn.Parameter(on_card(x)) for x in start]
    host = RMSprop(here, lr=1e-2, momentum=0.9, seed=4, **given)
    card = RMSprop(there, lr=1e-2, momentum=0.9, seed=4, capturable=replayed, **given)
    for p in (*here, *there):
        p.grad = torch.zeros_like(p)

    def put(params, step):
        for p, g in zip(params, grads[step], strict=True):
            p.grad.copy_(g)

    for step in range(count):
        put(here, step)
        host.step()
    stream = torch.cuda.Stream(CARD)
    with torch.cuda.stream(stream):
        put(there, 0)
        card.step()
    torch.cuda.current_stream(CARD).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    if replayed:
        with torch.cuda.graph(graph, stream=stream):
            card.step()
    for step in range(1, count):
        put(there, step)
        graph.replay() if replayed else card.step()
    wait()
    for p, q in zip(here, there, strict=True):
        same(p, q)
        for kind, x in host.state[p].items():
            if kind != "step":  # it is a number on the host and an array there
                same(x, card.state[q][kind])
