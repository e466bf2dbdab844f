"""Profile a step: what it launches, how many bytes it moves, how long that takes, and how far that is from a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from .arrays import Tensor
from .base import Optimizer
from .batch import Batch
from .dtypes import compute_dtype
from .layout import Array, address_of
from .optimizer import AdaGrad, RMSProp
from .profile_host import HostProbe
from .profile_report import Launch, Report, Times
from .traffic import bytes_per_element, flops_per_element

LINE = 4096  # bytes: a copy of an array lies to the cache line and page as the array does

__all__ = ["Launch", "Report", "Times", "annotate", "profile"]


def profile(opt: Optimizer, grads: Any, *, repeats: int = 30) -> Report:
    """Measure what a step of an optimizer launches, moves and takes, beside a copy of as many bytes.

    The steps are taken by a double: an optimizer over copies of the parameters and of the state, with the same
    hyperparameters. The optimizer itself, its parameters, state, counters and the gradients stay as they are.

    Parameters
    ----------
    opt : RMSProp or AdaGrad
        On the CPU or on CUDA devices. Of the memory where they lie, as much is needed as its parameters take and twice
        what its state takes, and on a device up to 256 MiB for the copy.
    grads : as for ``opt.step``
        The gradients of every measured step.
    repeats : int
        Steps, launches and copies that are measured, each by itself, after a few that are not; above 0.

    Returns
    -------
    Report
        ``print(report)`` shows tables (rich), a notebook shows them as HTML, ``report.plot()`` draws a roofline
        (matplotlib), ``report.to_dict()`` is all of it in plain numbers. Times are in seconds.

    Raises
    ------
    TypeError, ValueError
        For anything but an optimizer and a count, and where ``opt.step(grads)`` would.
    RuntimeError
        While a stream is captured in a CUDA graph.

    Notes
    -----
    On a CUDA device, ``host`` is what a step costs the calling thread (``time.perf_counter``) and ``device`` what its
    launches take there (CUDA events, by ``cupyx.profiler.benchmark``); a step of a few microseconds on the device is
    measured with the latency of its launch. On the CPU, ``host`` is the check of the arrays and ``device`` the kernels.
    The copy is the driver's, device to device, or on the CPU the same streams in the same loop, with one addition in
    the place of the rule: a plain copy writes what it did not read, which costs processors more than that.

    Arrays that fit in a cache are measured in it, as they are in a training loop that does nothing else.

    With nvtx installed (the extra ``profile``), the measured steps and launches are NVTX ranges, which Nsight shows by
    name; so are the steps of a training loop inside :func:`annotate`.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> weight, grad = np.ones((256, 128), np.float32), np.ones((256, 128), np.float32)
    >>> opt = RMSProp(weight, momentum=0.9)
    >>> report = profile(opt, grad, repeats=3)
    >>> (launch,) = report.launches
    >>> launch.name, launch.elements, launch.bytes_per_element, launch.bytes
    ('update_kernel[float32, momentum]', 32768, 28, 917504)
    >>> weight.max(), opt.steps
    (np.float32(1.0), 0)
    """
    if not isinstance(opt, Optimizer):
        raise TypeError(f"opt is a {type(opt).__name__}; wanted an RMSProp or AdaGrad")
    if isinstance(repeats, bool) or not isinstance(repeats, (int, np.integer)) or repeats < 1:
        raise ValueError(f"repeats is {repeats!r}; wanted a whole number above 0")
    opt._refuse_capture("measurement")
    arrays = opt._flatten(grads)
    opt._planner.plan().bind(arrays)  # what is refused is refused by its name here, and nothing is launched
    double = _double(opt)

    def bind() -> Callable[[], object]:
        plan = double._planner.plan()
        plan.bind(opt._flatten(grads))
        return plan.launch

    probe, repeats = _probe(opt._tensors), int(repeats)
    host, device = probe.step(bind, repeats, _range(f"{type(opt).__name__}.step"))
    missing = {t.label for t, grad in zip(double._tensors, arrays, strict=True) if grad is None}
    plan = double._planner.plan()
    launches = [_launch(batch, plan.steps.alone(i), missing, probe, repeats) for i, batch in enumerate(plan.batches)]
    computes = sorted({compute_dtype(batch.dtype) for batch in plan.batches}, key=lambda dtype: dtype.itemsize)
    return Report(
        optimizer=type(opt).__name__,
        device=probe.name,
        repeats=repeats,
        host=Times.of(host),
        device_times=Times.of(device),
        launches=launches,
        memory_rate=probe.memory_rate(repeats),
        flop_rates={str(dtype): probe.flop_rate(dtype.type, repeats) for dtype in computes},
        skipped=len(missing),
    )


@contextmanager
def annotate(opt: Optimizer) -> Iterator[None]:
    """Inside, every ``opt.step`` is an NVTX range, so that Nsight shows it by name in a training loop of your own.

    Raises
    ------
    ImportError
        Where nvtx is not installed, naming the extra.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> opt = RMSProp(np.ones(3))
    >>> with annotate(opt):
    ...     opt.step(np.ones(3))
    """
    from .extras import extra

    with extra("profile"):
        import nvtx
    step, before, name = opt.step, vars(opt).get("step"), f"{type(opt).__name__}.step"

    def annotated(*args: Any, **kwargs: Any) -> None:
        with nvtx.annotate(name):
            step(*args, **kwargs)

    vars(opt)["step"] = annotated  # over the method
    try:
        yield
    finally:
        del vars(opt)["step"]
        if before:  # of an annotation around this one
            vars(opt)["step"] = before


def _range(name: str) -> AbstractContextManager[Any]:
    """An NVTX range where nvtx is installed; it may be entered again and again."""
    try:
        import nvtx
    except ImportError:
        return nullcontext()
    made: AbstractContextManager[Any] = nvtx.annotate(name)
    return made


def _probe(tensors: Sequence[Tensor]) -> Any:
    devices = sorted({t.device for t in tensors if t.device is not None})
    if not devices:
        return HostProbe()
    from .profile_device import DeviceProbe  # it imports CuPy

    return DeviceProbe(devices)


def _double(opt: Optimizer) -> Optimizer:
    """The same optimizer over copies that lie in memory as its arrays do."""
    groups = [
        {"params": {tensor.key: _copy(tensor, opt._order) for tensor in tensors}, **group.hyper()}
        for group, tensors in zip(opt.param_groups, opt._members, strict=True)
    ]
    double = (AdaGrad if opt._adagrad else RMSProp)(groups)
    double.load_state_dict(opt.state_dict())
    return double


def _copy(tensor: Tensor, order: Any) -> Array:
    layout, offset = tensor.layout, tensor.address % LINE
    if tensor.device is None:
        memory = np.zeros(layout.nbytes + 2 * LINE, np.uint8)
        copy = layout.over(memory, (offset - address_of(memory)) % LINE)
        np.copyto(copy, tensor.view)
        return copy
    import cupy

    with order.on(tensor.device):  # after the steps before
        memory = cupy.empty(layout.nbytes + 2 * LINE, np.uint8)
        copy = layout.over(memory, (offset - address_of(memory)) % LINE)
        cupy.copyto(copy, tensor.view)
    return copy


def _launch(batch: Batch, call: Callable[[], object], missing: set[str], probe: Any, repeats: int) -> Launch:
    """What is known of the launch over a batch, which is this call."""
    name = batch.title("update_kernel")
    size = sum(n for label, n in zip(batch.labels, batch.sizes, strict=True) if label not in missing)
    moved = bytes_per_element(batch.variant, batch.dtype)
    seconds, copy_rate = probe.launch(call, batch, moved * size, repeats, _range(name))
    return Launch(
        name=name,
        variant=str(batch.variant),
        dtype=str(batch.dtype),
        tensors=sum(label not in missing for label in batch.labels),
        elements=size,
        bytes_per_element=moved,
        bytes=moved * size,
        flops_per_element=flops_per_element(batch.variant),
        seconds=Times.of(seconds),
        copy_rate=copy_rate,
        **probe.facts(batch),
    )
