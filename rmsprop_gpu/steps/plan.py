"""Which kernel launches a step needs: the batches, their tables and scalars, and what runs them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from .. import hyper
from ..arrays.checks import Problems, Tensor, check_read_apart
from ..arrays.dtypes import compute_dtype
from ..arrays.layout import Array, NDArray
from ..hyper import NOTHING_ASKED, Asked, Rates
from ..kernels.rule import Variant
from ..kernels.table import SEED
from .batch import Batch, Norms, Parts, Written, make_batch
from .host import HostSteps
from .signals import SILENCE, Signals

if TYPE_CHECKING:
    from .order import Order

# What a step of one parameter group needs, by the dtype of its tensors.
Settings: TypeAlias = Mapping[tuple[int, np.dtype[Any]], tuple[Variant, NDArray]]


def settings_of(
    kinds: Iterable[tuple[int, np.dtype[Any]]],
    hypers: Sequence[Any],
    rates: Sequence[float],
    asked: Asked = NOTHING_ASKED,
    *,
    adagrad: bool,
) -> Settings:
    """Variant and scalars of a step for each of these groups and dtypes, from each group's hyperparameters and rate."""
    return {
        (i, dtype): (
            hyper.variant(hypers[i], adagrad, asked, dtype),
            hyper.scalars(hypers[i], rates[i], compute_dtype(dtype)),
        )
        for i, dtype in kinds
    }


def variants_of(settings: Settings) -> dict[Any, Variant]:
    """What a plan is made for: it stays valid with other numbers, but other variants need another plan."""
    return {kind: variant for kind, (variant, _) in settings.items()}


def batched(
    tensors: Sequence[Tensor],
    groups: Sequence[int],
    variants: Mapping[tuple[int, np.dtype[Any]], Variant],
    grad_dtypes: Sequence[np.dtype[Any]],
) -> dict[tuple[int | None, np.dtype[Any], np.dtype[Any], Variant], list[int]]:
    """Which tensors, by number, one launch updates: those that share device, dtype, gradient dtype and Variant."""
    batches: dict[tuple[int | None, np.dtype[Any], np.dtype[Any], Variant], list[int]] = {}
    for i, (tensor, group, grad_dtype) in enumerate(zip(tensors, groups, grad_dtypes, strict=True)):
        dtype = tensor.layout.dtype
        batches.setdefault((tensor.device, dtype, grad_dtype, variants[group, dtype]), []).append(i)
    return batches


def _norms_of(
    tensors: Sequence[Tensor], measured: Collection[int], outcome: Mapping[int | None, int], parts: Parts | None
) -> tuple[dict[int | None, Norms], list[tuple[int, int]], list[list[int]]]:
    """The norms of each device; each tensor's place in them (a number, a block of it); which tensors share scalars."""
    on: dict[int | None, list[int]] = {}  # the tensors of each device
    for i, tensor in enumerate(tensors):
        on.setdefault(tensor.device, []).append(i)
    narrow = {
        device: any(compute_dtype(tensors[i].layout.dtype) == np.float32 for i in rows) for device, rows in on.items()
    }
    if parts is None:
        number = {i: k for rows in on.values() for k, i in enumerate(rows)}
        norms = {
            device: Norms(
                [tensors[i].layout.size for i in rows],
                [i in measured for i in rows],
                outcome[device],
                narrow=narrow[device],
            )
            for device, rows in on.items()
        }
        return norms, [(number[i], 0) for i in range(len(tensors))], [[number[i]] for i in range(len(tensors))]
    ((device, is_narrow),) = narrow.items()
    whole = [i in measured for i in parts.likes]
    made = {device: Norms(parts.sizes, whole, outcome[device], narrow=is_narrow, parts=parts)}
    alike: list[list[int]] = [[] for _ in tensors]
    for number_, i in enumerate(parts.likes):
        alike[i].append(number_)
    return made, list(zip(parts.of, parts.blocks, strict=True)), alike


class Steps(Protocol):
    """The steps of a plan, on the host or on devices, wherever its arrays are stored."""

    def bind(self, grads: list[Any], signals: Signals) -> None: ...

    def launch(self) -> None: ...

    def send(self) -> None: ...

    def send_tables(self) -> None: ...

    def alone(self, i: int) -> Callable[[], object]: ...

    @property
    def captured(self) -> bool: ...


# From the order in which batches take the tensors, the batches, and what they write.
MakeSteps: TypeAlias = Callable[[Sequence[int], Sequence[Batch], Written], Steps]


def array_steps(
    tensors: Sequence[Tensor], grad_dtypes: Sequence[np.dtype[Any]], steps: NDArray, order: Order | None
) -> MakeSteps:
    """Steps over NumPy arrays, or with an order of streams over arrays on devices; they are counted in `steps`."""

    def make(at: Sequence[int], batches: Sequence[Batch], written: Written) -> Steps:
        ordered = [tensors[i] for i in at]
        layouts = [tensors[i].layout.of(grad_dtypes[i]) for i in at]  # for gradients laid out like their parameters
        if order is None:
            return HostSteps(ordered, layouts, batches, written, steps)
        from .device import DeviceSteps  # it imports Numba's CUDA target
        from .gradients import Gradients  # it imports CuPy

        zeros = any(batch.variant.zero_grads for batch in batches)
        grads = Gradients(ordered, layouts, written, zeros=zeros)
        return DeviceSteps(ordered, batches, grads, partial(np.add, steps, 1, steps), order)

    return make


class Plan:
    """Everything a step needs that does not change from step to step, for gradients of these dtypes.

    `bind` checks all of a step's arrays and raises before anything is written; `launch` runs the step.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        groups: Sequence[int],
        buffers: Sequence[Mapping[str, Array]],
        settings: Settings,
        grad_dtypes: Sequence[np.dtype[Any]],
        make_steps: MakeSteps,
        outcome: Mapping[int | None, int],
        asked: Asked = NOTHING_ASKED,
        parts: Parts | None = None,
    ) -> None:
        self.asked, self.grad_dtypes = asked, tuple(grad_dtypes)
        self.variants = variants_of(settings)
        by_batch = batched(tensors, groups, self.variants, grad_dtypes)
        self._order = [i for rows in by_batch.values() for i in rows]
        self._in_order = self._order == list(range(len(tensors)))
        measured = {i for (*_, variant), rows in by_batch.items() if variant.measures for i in rows}
        norms, own, alike = _norms_of(tensors, measured, outcome, parts)
        self.batches: list[Batch] = [
            make_batch(
                variant,
                dtype,
                grad_dtype,
                device,
                [(tensors[i], groups[i], buffers[i]) for i in rows],
                [own[i] for i in rows],
                [(number, row) for row, i in enumerate(rows) for number in alike[i]],
                norms[device],
            )
            for (device, dtype, grad_dtype, variant), rows in by_batch.items()
        ]
        self._written = Written(tensors, buffers)
        self._write(settings)
        self._rows = list(by_batch.values())
        self.steps = make_steps(self._order, self.batches, self._written)

    def _write(self, settings: Settings) -> None:
        for batch in self.batches:
            for row, group in enumerate(batch.groups):
                batch.scalars[row] = settings[group, batch.dtype][1]

    @property
    def settings(self) -> Settings:
        """What it is made for, with the numbers as last written."""
        kinds = {(g, b.dtype): b.scalars[row] for b in self.batches for row, g in enumerate(b.groups)}
        return {kind: (self.variants[kind], row) for kind, row in kinds.items()}

    def write_scalars(self, settings: Settings) -> None:
        """Write the numbers for the next steps."""
        self._write(settings)
        self.steps.send()

    def write_seeds(self, seeds: Sequence[int]) -> None:
        """Write what each tensor's keys of dither are made from: see codes.py."""
        changed = False
        for batch, rows in zip(self.batches, self._rows, strict=True):
            if batch.variant.dithers:
                wanted = np.array([seeds[i] for i in rows], np.uint64).view(np.int64)
                if not np.array_equal(batch.table[:, SEED], wanted):
                    batch.table[:, SEED], changed = wanted, True
        if changed:
            self.steps.send_tables()

    def write_rates(self, rates: Sequence[Rates]) -> None:
        """Write the learning rates of all groups for the next steps; all else stays."""
        for batch in self.batches:
            batch.write_rates(rates)
        self.steps.send()

    @property
    def captured(self) -> bool:
        """Does a CUDA graph hold a step of this plan?"""
        return self.steps.captured

    def bind(self, grads: list[Any], signals: Signals = SILENCE) -> None:
        """Accept the gradients of the next step, in the order of the tensors; all refusals come from here.

        Gradients with other dtypes than it was made for raise `OtherDtypes`.
        """
        if signals.arrays:
            self._check_apart(grads, signals)
        self.steps.bind(self._ordered(grads), signals)

    def _ordered(self, grads: list[Any]) -> list[Any]:
        return grads if self._in_order else [grads[i] for i in self._order]

    def _check_apart(self, grads: list[Any], signals: Signals) -> None:
        problems = Problems()
        for name, _, array in signals.arrays:  # a batch may count before another has read them
            check_read_apart(array, name, self._written.near(array), problems)
        if problems:
            with problems.taking():
                self.steps.bind(self._ordered(grads), signals)
        problems.raise_any()

    def launch(self) -> None:
        """Run the bound step."""
        self.steps.launch()
