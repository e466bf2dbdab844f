"""The class over tensors on a CUDA device. Here they are host tensors in pinned memory, which kernels can reach.

Where torch needs a GPU, CuPy stands in, see `device`. A step is bit-identical to the same step on the host.
"""

import contextlib
import gc
import os
import weakref

import numpy as np
import pytest
from processes import run

torch = pytest.importorskip("torch")
cupy = pytest.importorskip("cupy", exc_type=ImportError)

from torch.utils._device import _device_constructors  # noqa: E402

from rmsprop_gpu.torch import RMSprop, arguments, bound, cuda_steps, gradients, library, rows, side  # noqa: E402


def at_once():
    """Whether work is done as soon as it is enqueued. What torch would enqueue on a device runs on the host here."""
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    return properties["name"].startswith(b"VGPU") and "VGPU_LAZY" not in os.environ


pytestmark = pytest.mark.gpu


class Device:
    """Tensors of torch in pinned memory that stand in for a device's, and records of what torch was asked for."""

    def __init__(self):
        self.starts, self.uploads, self.allocations, self.recorded = {}, [], [], []
        self.elsewhere = set()  # the addresses on the second device

    def empty(self, shape, dtype=torch.float32):
        count = int(np.prod(shape, dtype=np.int64))
        memory = cupy.cuda.alloc_pinned_memory(max(1, count * dtype.itemsize))
        flat = torch.frombuffer(memory, dtype=torch.uint8)[: count * dtype.itemsize]
        self.starts[memory.ptr] = memory  # never freed, so no address comes back
        self.allocations.append(count * dtype.itemsize)
        return flat.view(dtype).view(shape)

    def of(self, tensor):
        """A copy of a tensor on the device, in the same layout."""
        if tensor is None:
            return None
        order = sorted(range(tensor.dim()), key=lambda i: -tensor.stride(i))
        made = self.empty([tensor.shape[i] for i in order], tensor.dtype)
        back = [order.index(i) for i in range(tensor.dim())]
        return made.permute(back).copy_(tensor.detach())

    def place(self, tensor):
        start = tensor.untyped_storage().data_ptr()
        return int(start in self.elsewhere) if start in self.starts else None

    def on_the_second(self, tensor):
        made = self.of(tensor)
        self.elsewhere.add(made.data_ptr())
        return made


@pytest.fixture
def device(monkeypatch):
    if not at_once():
        pytest.skip("needs a device that runs work at once: what torch would enqueue runs on the host here")
    made = Device()
    for module in (arguments, bound, cuda_steps, gradients, rows, side):
        monkeypatch.setattr(module, "place", made.place)
    _device_constructors()  # torch caches this list, and must see the real functions
    real = {name: getattr(torch, name) for name in ("empty", "zeros", "empty_like")}

    def empty(*shape, dtype=None, device=None, pin_memory=False, **more):
        if not str(device).startswith("cuda") and not pin_memory:
            return real["empty"](*shape, dtype=dtype, device=device, **more)
        if pin_memory:
            made.uploads.append(shape[0])
            return real["empty"](*shape, dtype=dtype, device=device)
        return made.empty(shape, dtype)

    def zeros(shape, dtype=None, device="cpu", **more):
        if not str(device).startswith("cuda"):
            return real["zeros"](shape, dtype=dtype, device=device, **more)
        return made.empty((shape,) if isinstance(shape, int) else shape, dtype).zero_()

    def empty_like(like, dtype=None, **more):
        if made.place(like) is None:
            return real["empty_like"](like, dtype=dtype, **more)
        return made.of(real["empty_like"](like, dtype=dtype, memory_format=torch.preserve_format))

    def new(like, shape, value, dtype, requires_grad=False):
        if made.place(like) is None:
            return torch.full(shape, value, dtype=dtype)
        return made.empty(shape, dtype).fill_(value)

    for name, fake in (("empty", empty), ("zeros", zeros), ("empty_like", empty_like)):
        monkeypatch.setattr(torch, name, fake)
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda x, shape, **more: new(x, shape, 0, **more))
    monkeypatch.setattr(torch.Tensor, "new_full", new)
    runtime = cupy.cuda.runtime

    @contextlib.contextmanager
    def current(number):
        with cupy.cuda.Device(number):
            yield

    for name, fake in {
        "device": current,
        "set_device": runtime.setDevice,
        "current_device": runtime.getDevice,
        "is_available": lambda: True,
        "is_current_stream_capturing": capturing,
        "mem_get_info": lambda number: runtime.memGetInfo(),
        "_maybe_exchange_device": runtime.setDevice,
        "current_stream": cupy.cuda.get_current_stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(library.Torch, "errors", (runtime.CUDARuntimeError,))

    def stream(kind, number):
        assert kind == 2  # the number of CUDA in DLPack
        return cupy.cuda.get_current_stream(number).ptr

    monkeypatch.setattr(library, "current_stream", stream)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda x, stream: made.recorded.append((x.data_ptr(), stream.ptr))
    )
    library.why_no_kernels.cache_clear()
    yield made
    library.why_no_kernels.cache_clear()
    cupy.cuda.runtime.deviceSynchronize()


def capturing():
    stream = cupy.cuda.get_current_stream()
    return stream.ptr != 0 and stream.is_capturing()


SHAPES = (7, 5), (1000,), (), (3, 0), (2, 3, 4)


def tensors(seed, dtype=torch.float32, shapes=SHAPES):
    made = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes]
    if dtype.is_complex:
        drawn = [x + 1j * torch.randn(x.shape, generator=made, dtype=torch.float64) for x in drawn]
    return [x.to(dtype) for x in drawn]


class Twins:
    """The same optimizer over tensors on the host and on the device."""

    def __init__(self, device, given, dtype=torch.float32, groups=None):
        self.device = device
        self.host = [torch.nn.Parameter(x) for x in tensors(0, dtype)]
        self.there = [torch.nn.Parameter(device.of(x)) for x in tensors(0, dtype)]
        grouped = groups or (lambda params: params)
        self.opts = [RMSprop(grouped(params), **given) for params in (self.host, self.there)]

    def grads(self, grads):
        for p, q, g in zip(self.host, self.there, grads, strict=True):
            if g is not None:
                p.grad = q.grad = None
                p.grad_dtype = q.grad_dtype = g.dtype
            p.grad, q.grad = g, self.device.of(g)
        return self

    def step(self):
        for opt in self.opts:
            opt.step()
        cupy.cuda.get_current_stream().synchronize()
        assert self.opts[1].why_not_fused() == {}
        return self

    def check(self):
        for p, q in zip(self.host, self.there, strict=True):
            same(p, q)
            mine, its = (opt.state.get(x, {}) for opt, x in zip(self.opts, (p, q), strict=True))
            assert mine.keys() == its.keys()
            for name in mine:
                same(mine[name], its[name])
                assert name == "step" or self.device.place(its[name]) == 0
        return self


def same(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(
        a.detach().contiguous().reshape(-1).view(torch.uint8), b.detach().contiguous().reshape(-1).view(torch.uint8)
    )


ALL_ON = {"momentum": 0.9, "weight_decay": 0.1, "centered": True, "nesterov": True, "bias_correction": True}
RULES = [
    {},
    ALL_ON,
    {"maximize": True, "eps_in_sqrt": True, "initial_scale": 1.0, "lr_in_momentum": True, "momentum": 0.5},
    {"decoupled_weight_decay": True, "weight_decay": 0.1, "clipvalue": 0.5},
    {"clipnorm": 1.0},
    {"global_clipnorm": 1.0, "skip_nonfinite": True, "bias_correction": True},
]


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (RULES[0], torch.float32),
        (RULES[0], torch.complex128),
        (RULES[1], torch.float16),
        (RULES[1], torch.bfloat16),
        (RULES[1], torch.complex64),
    ],
    ids=str,
)
def test_a_step_has_the_bits_of_one_on_the_host(given, dtype, device):
    twins = Twins(device, given, dtype)
    for seed in range(1, 4):
        twins.grads(tensors(seed, dtype)).step().check()


@pytest.mark.parametrize("given", RULES[2:], ids=str)
def test_each_rule_of_ours_has_the_bits_of_the_host(given, device):
    twins = Twins(device, given)
    for seed in range(1, 4):
        twins.grads(tensors(seed)).step().check()


FORMATS = [
    ({"square_avg_dtype": "uint16", "seed": 3}, torch.float32),
    ({"square_avg_dtype": "uint8", "initial_scale": 0.3, "momentum": 0.5}, torch.float32),
    ({"square_avg_dtype": "uint16", "store_param_remainders": True, "clipnorm": 1.0}, torch.bfloat16),
    ({"square_avg_dtype": "uint8", "bf16_stochastic_round": True}, torch.bfloat16),
    ({"store_param_remainders": True}, torch.bfloat16),
    ({"bf16_stochastic_round": True, "skip_nonfinite": True}, torch.bfloat16),
]


@pytest.mark.parametrize(("given", "dtype"), FORMATS, ids=str)
def test_formats_of_fewer_bytes_have_the_bits_of_the_host(given, dtype, device):
    twins = Twins(device, given, dtype)
    for seed in range(1, 4):
        twins.grads(tensors(seed, dtype)).step().check()
    twins.grads([None, *tensors(4, dtype)[1:]]).step().check()
    at_random = "square_avg_dtype" in given or "bf16_stochastic_round" in given
    for p in twins.there:  # stochastic rounding depends on the count, so the device has to have it
        assert device.place(twins.opts[1].state[p]["step"]) == (0 if at_random else None)
    twins.opts[1].load_state_dict(twins.opts[0].state_dict())
    move(twins)
    twins.grads(tensors(5, dtype)).step().check()


def move(twins):
    """Move a loaded state to the device. torch's casts run on the host here."""
    for p in twins.there:
        state = twins.opts[1].state[p]
        state.update({name: twins.device.of(x) for name, x in state.items()})


@pytest.mark.parametrize("moment", ["uint16", "uint8"])
def test_a_format_is_converted_where_the_parameter_lies(moment, device):
    plain = Twins(device, {"momentum": 0.5}).grads(tensors(1)).step()
    coded = Twins(device, {"momentum": 0.5, "square_avg_dtype": moment})
    for one, other in zip(plain.opts, coded.opts, strict=True):
        other.load_state_dict(one.state_dict())
    move(coded)
    coded.grads(tensors(2)).step().check()
    for p, q in zip(coded.host, coded.there, strict=True):
        same(*(opt.decoded_state(x)["square_avg"] for opt, x in zip(coded.opts, (p, q), strict=True)))


def test_half_gradients_none_and_odd_layouts(device):
    twins = Twins(device, {"momentum": 0.9})
    twins.grads(tensors(1, torch.float16)).step().check()
    twins.grads([None, *tensors(2)[1:]]).step().check()
    square = torch.zeros((14, 10))[::2, ::2].copy_(tensors(3)[0])
    odd = device.empty((14, 10))[::2, ::2].copy_(square)
    twins.grads(tensors(3))
    twins.host[0].grad, twins.there[0].grad = square, odd
    twins.step().check()


def test_groups_and_schedules(device):
    def groups(params):
        return [{"params": params[:2]}, {"params": params[2:], "lr": 0.3, "weight_decay": 0.1}]

    twins = Twins(device, {"momentum": 0.5}, groups=groups)
    schedules = [torch.optim.lr_scheduler.StepLR(opt, 1, 0.5) for opt in twins.opts]
    for seed in range(1, 4):
        twins.grads(tensors(seed)).step().check()
        for schedule in schedules:
            schedule.step()
    for opt in twins.opts:
        opt.param_groups[0]["alpha"] = 0.5
    twins.step().check()


def test_steps_of_the_same_tensors_send_nothing_and_allocate_nothing(device):
    twins = Twins(device, {"momentum": 0.5}).grads(tensors(1)).step().step()
    device.uploads.clear()
    device.allocations.clear()
    twins.step().step()
    assert (device.uploads, device.allocations) == ([], [])
    twins.grads(tensors(2))
    device.allocations.clear()
    twins.step()
    assert (device.uploads, device.allocations) == ([8 * len(SHAPES)], [])  # only the column
    for opt in twins.opts:
        opt.param_groups[0]["lr"] = 0.5
    twins.step().check()
    assert device.uploads == [8 * len(SHAPES), 13 * 4]  # the scalars


def test_parameters_that_moved_are_bound_again(device):
    twins = Twins(device, {"momentum": 0.5}).grads(tensors(1)).step()
    for p in (*twins.host, *twins.there):
        p.data = device.of(p.data) if device.place(p) == 0 else p.data.clone()
    twins.step().check()


def test_a_skipped_step_changes_nothing_and_counts_nothing(device):
    twins = Twins(device, {"skip_nonfinite": True, "momentum": 0.5}).grads(tensors(1)).step().check()
    bad = tensors(2)
    bad[1][3] = float("nan")
    twins.grads(bad).step().check()
    twins.grads(tensors(3)).step().check()
    counts = [twins.opts[1].state[p]["step"] for p in twins.there]
    assert [float(x) for x in counts] == [2.0] * len(SHAPES)
    assert all(device.place(x) == 0 for x in counts)  # only the device knows which steps it skipped


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_what_grad_scaler_tells_goes_into_the_pass(found, device):
    twins = Twins(device, {"fused": True})
    twins.grads(tensors(1)).step()
    assert all(opt._step_supports_amp_scaling for opt in twins.opts)
    for opt, make in zip(twins.opts, (torch.tensor, lambda x: device.of(torch.tensor(x))), strict=True):
        opt.grad_scale, opt.found_inf = make(1024.0), make(found)
    twins.grads(tensors(2)).step().check()
    assert float(twins.opts[1].state[twins.there[0]]["step"]) == 2 - found
    twins.opts[1].found_inf = device.of(torch.zeros((), dtype=torch.float64))
    with pytest.raises(
        RuntimeError, match=r"found_inf is a tensor of torch\.float64 .*; wanted one float32 on cuda:0, as"
    ):
        twins.opts[1].step()


def test_counters_go_where_they_belong(device):
    """A state from the host continues on the device, and counters on the device go back."""
    p = torch.nn.Parameter(device.of(torch.ones(3)))
    p.grad = device.of(torch.ones(3))
    opt = RMSprop([p])
    opt.step()
    assert device.place(opt.state[p]["step"]) is None
    opt.param_groups[0]["capturable"] = True
    with (
        pytest.warns(UserWarning, match="capturable=True")
        if torch.accelerator.is_available()
        else contextlib.nullcontext()
    ):
        opt.step()
    assert device.place(opt.state[p]["step"]) == 0
    assert float(opt.state[p]["step"]) == 2
    opt.param_groups[0]["capturable"] = False
    opt.step()
    assert device.place(opt.state[p]["step"]) is None
    assert float(opt.state[p]["step"]) == 3


@pytest.mark.parametrize("where", ["host", "second"])
def test_a_counter_may_come_from_another_device(where, device):
    """From a state dict loaded as it is: torch moves everything but the counters."""
    given = {"skip_nonfinite": True, "bias_correction": True}
    twins = Twins(device, given)
    twins.grads(tensors(1)).step()
    saved = twins.opts[1].state_dict()
    put = device.of if where == "second" else torch.clone
    for key, state in saved["state"].items():
        assert device.place(state["step"]) == 0
        counter = device.on_the_second(state["step"]) if where == "second" else state["step"]
        saved["state"][key] = {name: counter if name == "step" else put(x) for name, x in state.items()}
    it = int(where == "second")
    twins.opts[it].load_state_dict(saved)
    assert twins.opts[it].why_not_fused() == {}
    twins.grads(tensors(2)).step().check()
    counters = [twins.opts[it].state[p]["step"] for p in (twins.host, twins.there)[it]]
    assert [(device.place(x), float(x)) for x in counters] == [(0 if it else None, 2.0)] * len(SHAPES)


def test_host_and_device_in_one_step(device):
    here, there = (torch.nn.Parameter(x) for x in (torch.ones(5), device.of(torch.ones(5))))
    opt = RMSprop([here, there], bias_correction=True)
    for x in (here, there):
        x.grad = torch.full((5,), 0.5) if x is here else device.of(torch.full((5,), 0.5))
    opt.step()
    cupy.cuda.get_current_stream().synchronize()
    same(here, there)
    assert opt.why_not_fused() == {}


def test_a_rate_on_the_device_is_not_asked_by_the_host(device, monkeypatch):
    it = Captured(device)
    it.opt.step()
    cupy.cuda.get_current_stream().synchronize()

    def asked(self):
        raise AssertionError("the host waited")

    for name in ("item", "__float__", "__bool__", "tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, asked)
    it.opt.step()
    it.take(tensors(2))
    it.opt.step()


@pytest.mark.parametrize("change", ["in place", "set_", "another tensor", "a number"])
def test_a_rate_on_the_device_may_become_another(change, device):
    lr, zero = device.of(torch.tensor(0.25)), device.of(torch.tensor(0.0))
    p = torch.nn.Parameter(device.of(torch.ones(5)))
    p.grad = device.of(torch.ones(5))
    opt = RMSprop([p], lr=lr, capturable=True)
    opt.step()
    if change == "in place":
        lr.fill_(0)
    elif change == "set_":
        lr.set_(zero)
    else:
        opt.param_groups[0]["lr"] = zero if change == "another tensor" else 0.0
    cupy.cuda.get_current_stream().synchronize()
    kept = p.detach().clone()
    opt.step()
    cupy.cuda.get_current_stream().synchronize()
    assert torch.equal(p, kept)


def test_a_rate_on_the_device_times_a_decay_is_rounded_once(device):
    given = {"weight_decay": 0.3, "decoupled_weight_decay": True}
    lr = device.of(torch.tensor(0.0, dtype=torch.float64))
    host, there = (torch.nn.Parameter(x) for x in (torch.ones(5), device.of(torch.ones(5))))
    mine, its = RMSprop([host], **given), RMSprop([there], lr=lr, capturable=True, **given)
    host.grad, there.grad = torch.full((5,), 0.5), device.of(torch.full((5,), 0.5))
    for i in range(1, 40):  # so large that the product's last bit shows in the parameter
        host.data.fill_(1)
        there.data.fill_(1)
        mine.param_groups[0]["lr"] = 7.77 * i
        lr.fill_(7.77 * i)
        mine.step()
        its.step()
        cupy.cuda.get_current_stream().synchronize()
        same(host, there)


def test_what_has_no_gradient_is_not_counted_on_the_device(device):
    it = Captured(device)
    it.params[0].grad = None
    it.opt.step()
    it.params[0].grad = device.of(tensors(1)[0])
    it.opt.step()
    it.params[1].grad = None
    it.opt.step()
    cupy.cuda.get_current_stream().synchronize()
    assert [float(it.opt.state[p]["step"]) for p in it.params] == [2.0, 2.0, 3.0, 3.0, 3.0]


def test_autograd_refuses_what_was_saved_before_a_step(device):
    p = torch.nn.Parameter(device.of(torch.ones(3)))
    p.grad = device.of(torch.ones(3))
    loss = (p * p).sum()
    RMSprop([p]).step()
    cupy.cuda.get_current_stream().synchronize()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_that_was_told_by_hand_counts_where_it_is_known(device):
    twins = Twins(device, {}).grads(tensors(1)).step()
    for opt, make in zip(twins.opts, (torch.tensor, lambda x: device.of(torch.tensor(x))), strict=True):
        opt.found_inf = make(1.0)
    twins.grads(tensors(2)).step().check()
    assert float(twins.opts[1].state[twins.there[1]]["step"]) == 1


def test_memory_that_another_stream_uses_is_said_to_be_used_there(device):
    twins = Twins(device, {"skip_nonfinite": True}).grads(tensors(1)).step()
    stream = cupy.cuda.Stream(non_blocking=True)
    device.recorded.clear()
    with stream:
        twins.opts[1].step()
        stream.synchronize()
        assert {at for _, at in device.recorded} == {stream.ptr}
        steps = next(iter(twins.opts[1]._bound._sides[0].plans.values())).steps
        assert {at for at, _ in device.recorded} >= {block.address for x in steps._residents for block in x.blocks}


def test_a_device_by_default_is_no_matter(device):
    twins = Twins(device, {"momentum": 0.5}).grads(tensors(1))
    with torch.device("meta"):
        for opt in twins.opts:
            opt.step()
    cupy.cuda.get_current_stream().synchronize()
    twins.check()


def test_a_rate_on_the_device_stays_there(device):
    given = {"weight_decay": 0.5, "decoupled_weight_decay": True, "momentum": 0.5}
    lr = device.of(torch.tensor(0.25))
    host, there = (torch.nn.Parameter(x) for x in (torch.ones(5), device.of(torch.ones(5))))
    mine, its = RMSprop([host], lr=0.25, **given), RMSprop([there], lr=lr, capturable=True, **given)
    host.grad, there.grad = torch.full((5,), 0.5), device.of(torch.full((5,), 0.5))
    for rate in (0.25, 0.125, 0.5):
        mine.param_groups[0]["lr"] = rate
        lr.fill_(rate)  # the product of a power of two and the decay is exact
        mine.step()
        its.step()
        cupy.cuda.get_current_stream().synchronize()
        same(host, there)
    its.param_groups[0]["lr"] = device.of(torch.tensor(1.0))
    mine.param_groups[0]["lr"] = 1.0
    mine.step()
    its.step()
    cupy.cuda.get_current_stream().synchronize()
    same(host, there)


class Captured:
    """An optimizer that can be captured, with its learning rate on the device and its own stream."""

    def __init__(self, device, **given):
        self.lr = device.of(torch.tensor(0.25))
        self.params = [torch.nn.Parameter(device.of(x)) for x in tensors(0)]
        self.opt = RMSprop(self.params, **(given or {"lr": self.lr, "momentum": 0.5, "capturable": True}))
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.device = device
        self.take(tensors(1))

    def take(self, grads):
        for p, g in zip(self.params, grads, strict=True):
            p.grad = self.device.of(g)

    def capture(self):
        with self.stream:
            self.stream.begin_capture()
            try:
                self.opt.step()
            finally:
                graph = self.stream.end_capture()
        return graph

    def refused(self, match):
        with pytest.raises(RuntimeError, match=match), contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
            self.capture()


def test_a_captured_step_is_replayed(device):
    it, eager = Captured(device), Captured(device)
    for one in (it, eager):
        with one.stream:
            one.opt.step()
        one.stream.synchronize()
    counted = [float(it.opt.state[p]["step"]) for p in it.params]
    graph = it.capture()
    # The graph includes torch's own operations. Here they run at once, and replays do not repeat them.
    assert [float(it.opt.state[p]["step"]) - n for p, n in zip(it.params, counted, strict=True)] == [1.0] * len(SHAPES)
    read = [weakref.ref(p.grad) for p in it.params]
    it.opt.zero_grad()
    it.take(tensors(2))
    with it.stream:
        it.opt.step()  # eagerly, with other gradients
        graph.launch(it.stream)
    it.stream.synchronize()
    held = weakref.ref(it.opt._bound)
    it.opt.param_groups[0]["alpha"] = 0.5  # rebinds; the graph's tables must live on
    it.opt._step()
    assert held() is not it.opt._bound
    gc.collect()
    assert held() is not None
    assert all(x() is not None for x in read)  # because the graph reads them
    with it.stream:
        graph.launch(it.stream)
    it.stream.synchronize()
    for grads, alpha in ((2, 0.99), (1, 0.99), (2, 0.5), (1, 0.99)):
        eager.take(tensors(grads))
        eager.opt.param_groups[0]["alpha"] = alpha
        eager.opt.step()
        cupy.cuda.get_current_stream().synchronize()
    for p, q in zip(it.params, eager.params, strict=True):
        same(p, q)


@pytest.mark.parametrize("moment", ["uint16", "uint8"])
def test_each_replay_rounds_by_the_count_that_it_finds(moment, device):
    given = {"lr": 0.1, "square_avg_dtype": moment, "capturable": True}
    it, eager = Captured(device, **given), Captured(device, **given)
    for one in (it, eager):
        with one.stream:
            one.opt.step()
        one.stream.synchronize()
    graph = it.capture()
    for count in (1, 2, 3):
        for p in it.params:  # on a card the graph contains torch's addition; here it ran at once, and is not repeated
            it.opt.state[p]["step"].fill_(count)
        with it.stream:
            graph.launch(it.stream)
        with eager.stream:
            eager.opt.step()
        for one in (it, eager):
            one.stream.synchronize()
        for p, q in zip(it.params, eager.params, strict=True):
            same(p, q)
            same(it.opt.state[p]["square_avg"], eager.opt.state[q]["square_avg"])


def test_what_a_graph_could_not_keep_is_refused(device):
    it = Captured(device)
    hint = r"take the same step once before the capture, and keep its gradients .*zero_grad\(set_to_none=False\)"

    def refused(match):
        kept = [p.detach().clone() for p in it.params]
        it.refused(f"{match}.*{hint}")
        it.stream.synchronize()
        assert all(map(torch.equal, it.params, kept))

    refused("its tensors are not those of an earlier step")
    it.opt.step()
    it.take(tensors(2))
    refused("the addresses of its gradients")
    it.take(tensors(1))
    it.opt.step()
    it.opt.param_groups[0]["lr"] = 0.5
    refused("its numbers differ from those of the last step")
    it.opt.param_groups[0]["lr"] = it.lr
    it.opt.grad_scale = device.of(torch.tensor(2.0))
    refused("its tensors are not those of an earlier step")  # counters would move to the device
    del it.opt.grad_scale
    it.opt.step()
    assert it.capture()


def test_a_graph_holds_what_it_was_told(device):
    it = Captured(device)
    it.opt.found_inf = device.of(torch.tensor(0.0))
    it.opt.step()
    cupy.cuda.get_current_stream().synchronize()
    it.opt.grad_scale = device.of(torch.tensor(2.0))
    it.refused("this kind of step was not taken before")
    del it.opt.grad_scale
    graph, told = it.capture(), weakref.ref(it.opt.found_inf)
    del it.opt.found_inf
    gc.collect()
    assert graph
    assert told() is not None


def test_a_parameter_of_torchs_is_captured_beside_ours_after_one_step(device):
    it = Captured(device)
    wide = device.of(torch.ones(3, 4))
    odd = torch.nn.Parameter(wide[:, ::2])
    odd.grad = device.of(torch.ones(3, 2))
    it.opt.add_param_group({"params": [odd], "capturable": False})
    it.opt.step()
    cupy.cuda.get_current_stream().synchronize()
    assert it.opt.why_not_fused().keys() == {"param_groups[1]['params'][0]"}
    assert it.capture()


def test_without_the_compiler_it_is_torchs_step(device, monkeypatch):
    p = torch.nn.Parameter(device.of(torch.ones(3)))
    p.grad = device.of(torch.ones(3))
    twin = torch.nn.Parameter(torch.ones(3))
    twin.grad = torch.ones(3)
    asked = []

    def missing():
        asked.append(1)
        return "numba-cuda is not installed; install the extra cuda13"

    monkeypatch.setattr(library, "compiler_missing", missing)
    opt = RMSprop([p])
    opt.step()
    assert len(asked) == 1
    torch.optim.RMSprop([twin]).step()
    same(p, twin)
    (why,) = opt.why_not_fused().values()
    assert why == "numba-cuda is not installed; install the extra cuda13"
    with pytest.raises(RuntimeError, match=r"`fused=True` requires .* numba-cuda is not installed"):
        RMSprop([p], fused=True).step()
    library.why_no_kernels.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm 6.4" in library.why_no_kernels(0)


def test_what_is_decided_for_a_step_as_a_whole_wants_one_device(device):
    here, there = (torch.nn.Parameter(x) for x in (torch.ones(5), device.of(torch.ones(5))))
    here.grad, there.grad = torch.ones(5), device.of(torch.ones(5))
    opt = RMSprop([here, there], global_clipnorm=1.0)
    with pytest.raises(
        ValueError, match=r"global_clipnorm is 1\.0 and the parameters are on devices \['cpu', 'cuda:0'\]"
    ):
        opt.step()
    assert not opt.state


def test_what_grad_scaler_tells_is_for_one_device(device):
    params = [torch.nn.Parameter(x) for x in (device.of(torch.ones(5)), device.on_the_second(torch.ones(5)))]
    for p in params:
        p.grad = device.of(torch.ones(5)) if device.place(p) == 0 else device.on_the_second(torch.ones(5))
    opt = RMSprop(params, fused=True)
    opt.found_inf = device.of(torch.tensor(0.0))
    with pytest.raises(RuntimeError, match="need all parameters on one device; they are on cuda:0, cuda:1"):
        opt.step()


def test_a_launch_that_fails_beside_updated_parameters_says_so(device):
    there, odd = torch.nn.Parameter(device.of(torch.ones(5))), torch.nn.Parameter(torch.ones(5, 4)[:, ::2])
    there.grad, odd.grad = device.of(torch.ones(5)), torch.ones(5, 2)
    opt = RMSprop([there, odd])
    opt.step()
    steps = next(iter(opt._bound._sides[0].plans.values())).steps

    def fail():
        raise RuntimeError("CUDA_ERROR_LAUNCH_FAILED")

    launch, steps._calls[-1] = steps._calls[-1], fail
    fail.kernel = "update_kernel"
    with pytest.raises(RuntimeError, match="other parameters were updated earlier in this step: restore all of them"):
        opt.step()
    steps._calls[-1] = launch
    opt.param_groups[0]["alpha"] = 0.9  # rebinds, and is still broken
    with pytest.raises(RuntimeError, match="restore all of them, then load_state_dict"):
        opt.step()
    opt.load_state_dict(opt.state_dict())
    opt.step()


def test_a_launch_that_fails_before_the_host_s_leaves_both(device):
    here, there = (torch.nn.Parameter(x) for x in (torch.ones(5), device.of(torch.ones(5))))
    here.grad, there.grad = torch.ones(5), device.of(torch.ones(5))
    opt = RMSprop([here, there])
    opt.step()
    cupy.cuda.get_current_stream().synchronize()
    steps = next(iter(opt._bound._sides[0].plans.values())).steps

    def fail():
        raise RuntimeError("CUDA_ERROR_LAUNCH_FAILED")

    fail.kernel = "update_kernel"
    launch, steps._calls[-1] = steps._calls[-1], fail
    kept = here.detach().clone()
    with pytest.raises(RuntimeError, match="nothing was updated, and the optimizer can still be used"):
        opt.step()
    assert torch.equal(here, kept)
    steps._calls[-1] = launch
    opt.step()
    cupy.cuda.get_current_stream().synchronize()
    same(here, there)


def test_a_launch_that_fails_is_one_error(device, monkeypatch):
    twins = Twins(device, {"bias_correction": True}).grads(tensors(1)).step()
    opt = twins.opts[1]
    (one,) = opt._bound._sides
    (plan,) = one.plans.values()

    def fail():
        raise RuntimeError("CUDA_ERROR_LAUNCH_FAILED")

    fail.kernel = "update_kernel"
    kept = [p.detach().clone() for p in twins.there]
    launch, plan.steps._calls[-1] = plan.steps._calls[-1], fail
    with pytest.raises(RuntimeError, match=r"did not launch update_kernel.*1 of the step's 2 launches were made"):
        opt.step()
    plan.steps._calls[-1] = launch
    with pytest.raises(RuntimeError, match="between two steps"):
        opt.step()
    assert all(map(torch.equal, twins.there, kept))
    opt.load_state_dict(twins.opts[0].state_dict())  # as the error says
    for state in opt.state.values():  # on a card torch would put it there
        state.update({name: device.of(x) for name, x in state.items() if name != "step"})
    twins.step().check()


@pytest.mark.parametrize("size", [0, 3])
def test_torch_is_asked_for_memory_and_for_copies(size, device):
    """Through torch's library: each copy gets new pinned memory, which is reusable when the copy is done."""
    torchs = library.TORCH
    block = torchs.zeros(8 * size)
    assert block.owner.tolist() == [0] * 8 * size
    source = np.arange(size)
    if size:
        torchs.upload(torchs.empty(8 * size), source, None)
        torchs.upload(block, source, None)
        assert device.uploads == [8 * size] * 2
        source[:] = 0
        assert block.owner.view(torch.int64).tolist() == list(range(size))
        assert block.address == block.owner.data_ptr()
    assert torchs.knows(block)
    assert not torchs.fails(0)


def test_cupy_is_not_needed():
    """Steps over tensors on devices import numba-cuda's target, but not CuPy."""
    run(
        "import sys\n"
        "sys.modules['cupy'] = None\n"
        "import rmsprop_gpu.torch.cuda_steps\n"
        "from rmsprop_gpu.torch import library\n"
        "assert library.compiler_missing() is None\n"
    )
