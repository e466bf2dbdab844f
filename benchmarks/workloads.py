"""What is updated: lists of shapes, and what the project wants of itself on each."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]

TORCH = ("torch foreach", "torch for-loop")


@dataclass(frozen=True)
class Bar:
    """A wish about rmsprop_gpu: so many times the time of the fastest of `peers`, or so many seconds (no peers)."""

    peers: tuple[str, ...] = ()
    at_most: float | None = None  # our time / the peer's, or seconds
    at_least: float | None = None  # the peer's time / ours


@dataclass(frozen=True)
class Workload:
    """Tensors of these shapes, float32."""

    name: str
    title: str
    shapes: tuple[Shape, ...]
    bars: tuple[Bar, ...]

    @property
    def size(self) -> int:
        """Elements in all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes)


def resnet50_shapes() -> tuple[Shape, ...]:
    """The parameters of torchvision.models.resnet50, in its order (He et al., arXiv:1512.03385)."""

    def convolution(channels: int, inputs: int, width: int) -> list[Shape]:
        return [(channels, inputs, width, width), (channels,), (channels,)]  # no bias, but batch norm's two

    shapes, inputs = convolution(64, 3, 7), 64
    for blocks, channels in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += convolution(channels, inputs, 1) + convolution(channels, channels, 3)
            shapes += convolution(4 * channels, channels, 1)
            if block == 0:
                shapes += convolution(4 * channels, inputs, 1)  # the shortcut
            inputs = 4 * channels
    return (*shapes, (1000, inputs), (1000,))


RESNET50 = Workload(
    "resnet50",
    "ResNet-50: 161 tensors, 25.6 M elements (shapes of torchvision's resnet50)",
    resnet50_shapes(),
    (Bar(("c openmp",), at_most=1.1), Bar(TORCH, at_least=2.8)),
)
assert len(RESNET50.shapes) == 161 and RESNET50.size == 25_557_032  # torchvision's own numbers

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "one-25m",
            "One tensor of 25 M elements",
            ((25_000_000,),),
            (Bar(("c openmp",), at_most=1.05), Bar(TORCH, at_least=5)),
        ),
        RESNET50,
        Workload("many-256", "300 tensors of 256 elements", ((256,),) * 300, (Bar(TORCH, at_least=20),)),
        Workload("one-1000", "One tensor of 1,000 elements", ((1000,),), (Bar(TORCH, at_least=8), Bar(at_most=10e-6))),
    )
}
