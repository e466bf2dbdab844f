"""Profile a step: what it launches, how many bytes it moves, how long that takes, and how that compares to a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from ..arrays.checks import Problems, Tensor, check_grad, check_read_apart
from ..arrays.dtypes import compute_dtype
from ..extras import extra
from ..optimizer.base import Optimizer
from ..optimizer.structure import settled
from ..steps.batch import Batch, Written
from ..steps.signals import SILENCE
from .double import check_optimizer, double_of, in_groups
from .host import HostProbe
from .report import Report
from .results import Ceilings, Launch, Times
from .traffic import bytes_per_element, flops_per_element


def profile(opt: Optimizer, grads: Any, *, repeats: int = 30) -> Report:
    """Measure what a step launches and moves and how long it takes, in comparison with a copy of as many bytes.

    The steps are taken by a double: an optimizer over copies of the parameters and of the state, with the same
    hyperparameters. The optimizer itself, its parameters, state, counters and the gradients stay unchanged.

    Parameters
    ----------
    opt : RMSProp or AdaGrad
        On the CPU or on CUDA devices. In the memory of its arrays, as much again as parameters and state is needed, and
        up to 256 MiB to measure the ceilings.
    grads : as for ``opt.step``
        The gradients of every measured step.
    repeats : int
        The number of steps, launches and copies to measure, each on its own, after a few unmeasured ones; above 0.

    Returns
    -------
    Report
        ``print(report)`` shows tables (by rich, or as plain text), a notebook shows them as HTML, ``report.plot()``
        draws a roofline and ``report.plot_repeats()`` every repeat (matplotlib), ``report.to_dict()`` is all of it in
        plain numbers. Times are in seconds. ``report.busy`` lists signs that others used the machine meanwhile.

    Raises
    ------
    TypeError, ValueError
        For anything but an optimizer and a count; for gradients that ``opt.step(grads)`` would refuse, or if there are
        none.
    RuntimeError
        While a stream is being captured in a CUDA graph.

    Notes
    -----
    On a CUDA device, ``host`` is what a step costs the calling thread (``time.perf_counter``) and ``device_times`` what
    its launches take there (CUDA events, by ``cupyx.profiler.benchmark``); launches of a few microseconds are measured
    with their latency. On the CPU, ``host`` is the check of the arrays and ``device_times`` the kernels. A callable
    ``lr`` is not called: a stand-in replaces it, so its own time is not in any figure. The copy is the driver's, device
    to device, of at most 256 MiB. On the CPU it is the same streams in the same loop, with one addition in place of the
    rule: a plain copy writes memory that it did not read, which is a different kind of traffic.

    The ceilings, of memory and of arithmetic, are measured before the steps and after them. If they, the repeats or the
    launches contradict each other, or threads had to wait for a processor, the report says that the machine was busy.

    Arrays that fit in a cache are measured in it, as in a training loop that does nothing else.

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
    check_optimizer(opt)
    if isinstance(repeats, bool) or not isinstance(repeats, (int, np.integer)) or repeats < 1:
        raise ValueError(f"repeats is {repeats!r}; wanted a whole number above 0")
    opt._refuse_capture("measurement")
    grads, repeats = settled(grads), int(repeats)
    given = _with_gradient(opt, opt._flatten(grads))
    double, probe = double_of(opt), _probe(opt._tensors)
    computes = {compute_dtype(t.layout.dtype) for t in given if t.layout.size}
    before = _ceilings(probe, computes, repeats)

    def bind() -> Callable[[], object]:
        arrays = opt._flatten(grads)
        return double._planner.bound([arrays[i] for i in in_groups(opt)], SILENCE).launch

    host, device = probe.step(bind, repeats, _range(f"{type(opt).__name__}.step"))
    plan = double._planner.plan()
    keys = {t.key for t in given}
    measured = {t.label for t in double._tensors if t.key in keys}
    launches = [
        _launch(batch, plan.steps.alone(i), measured, probe, repeats)
        for i, batch in enumerate(plan.batches)
        if sum(_sizes(batch, measured))
    ]
    return Report(
        optimizer=type(opt).__name__,
        device=probe.name,
        repeats=repeats,
        host=Times.of(host),
        device_times=Times.of(device),
        launches=launches,
        before=before,
        after=_ceilings(probe, computes, repeats),
        skipped=len(double._tensors) - len(given),
    )


@contextmanager
def annotate(opt: Optimizer) -> Iterator[None]:
    """Make every ``opt.step`` inside an NVTX range, so that Nsight shows it by name in your own training loop.

    Raises
    ------
    ImportError
        If nvtx is not installed, naming the extra.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> opt = RMSProp(np.ones(3))
    >>> with annotate(opt):
    ...     opt.step(np.ones(3))
    """
    check_optimizer(opt)
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
        if before:  # an annotation around this one
            vars(opt)["step"] = before


def _range(name: str) -> AbstractContextManager[Any]:
    """An NVTX range if nvtx is installed; it may be entered repeatedly."""
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
    from .device import DeviceProbe  # it imports CuPy

    return DeviceProbe(devices)


def _with_gradient(opt: Optimizer, grads: Sequence[Any]) -> list[Tensor]:
    """The parameters that a step would update; all refusals of gradients come from here, and nothing is changed."""
    problems, written = Problems(), Written(opt._tensors, opt._state.buffers)
    pairs = [(t, grad) for t, grad in zip(opt._tensors, grads, strict=True) if grad is not None]
    for tensor, grad in pairs:
        array = check_grad(grad, tensor, problems)
        if array is not None:
            check_read_apart(array, tensor.grad_label, written.near(array), problems)
    problems.raise_any()
    if not any(tensor.layout.size for tensor, _ in pairs):
        raise ValueError("grads has no element to update a parameter with; wanted at least one")
    return [tensor for tensor, _ in pairs]


def _ceilings(probe: Any, computes: set[np.dtype[Any]], repeats: int) -> Ceilings:
    """Measure with half of the repeats; the other half is measured on the other side of the steps."""
    half = -(-repeats // 2)
    memory_rate, processors = probe.memory_rate(half)
    rates = {str(dtype): probe.flop_rate(dtype.type, half) for dtype in sorted(computes, key=str)}
    return Ceilings(memory_rate, rates, processors)


def _sizes(batch: Batch, measured: set[str]) -> list[int]:
    """The elements of the tensors of a batch that have a gradient."""
    return [size for label, size in zip(batch.labels, batch.sizes, strict=True) if label in measured]


def _launch(batch: Batch, call: Callable[[], object], measured: set[str], probe: Any, repeats: int) -> Launch:
    """Everything about the launch over a batch, which is made by this call."""
    name, sizes = batch.title("update_kernel"), _sizes(batch, measured)
    moved = bytes_per_element(batch.variant, batch.dtype, batch.grad_dtype)
    seconds, copies, copied = probe.launch(call, batch, round(moved * sum(sizes)), repeats, _range(name))
    return Launch(
        name=name,
        device="cpu" if batch.device is None else f"cuda:{batch.device}",
        variant=str(batch.variant),
        dtype=str(batch.dtype),
        grad_dtype=str(batch.grad_dtype),
        compute_dtype=str(compute_dtype(batch.dtype)),
        tensors=len(sizes),
        elements=sum(sizes),
        bytes_per_element=moved,
        bytes=round(moved * sum(sizes)),
        flops_per_element=flops_per_element(batch.variant),
        seconds=Times.of(seconds),
        copies=Times.of(copies),
        copied=copied,
        **probe.facts(batch),
    )
