"""What is updated: lists of shapes, hyperparameters, and what the project wants of itself on each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]

SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text())  # record_shapes.py makes it

OURS, AGAIN, COPY = "rmsprop_gpu", "rmsprop_gpu, again", "copy"
VIEWS = "rmsprop_gpu, views"  # of one large array, as whoever allocates the parameters may have it
PLAIN = "rmsprop_gpu, plain"  # without the hyperparameters and the schedule of the workload
DROP_IN = "rmsprop_gpu.torch"  # over torch's tensors
ASSIGNED = "rmsprop_gpu, assigned"  # opt.lr = ... before each step, in the place of a schedule
BITSANDBYTES = ("bitsandbytes", "bitsandbytes, 8 bits")  # of its RMSprop, by the bits of the second moment
TORCH = ("torch foreach", "torch for-loop")  # of its RMSprop: the default on a GPU, and the default on a CPU
COMPILED, FUSED, OPTAX, C_OPENMP = "torch compile", "torch fused adagrad", "optax", "c openmp"

# Formats of fewer bytes: the dtype of parameters and gradients, the arguments, the bytes per element.
_UINT16, _UINT8 = {"square_avg_dtype": "uint16"}, {"square_avg_dtype": "uint8"}
_DITHERED, _REMAINDER = {"bf16_stochastic_round": True}, {"store_param_remainders": True}
FORMATS: dict[str, tuple[str, Mapping[str, Any], float]] = {
    f"{OURS}, uint16": ("float32", _UINT16, 16),
    f"{OURS}, uint8": ("float32", _UINT8, 14.03125),
    f"{OURS}, bfloat16": ("bfloat16", {}, 14),
    f"{OURS}, bfloat16 dithered, uint16": ("bfloat16", _DITHERED | _UINT16, 10),
    f"{OURS}, bfloat16 dithered, uint8": ("bfloat16", _DITHERED | _UINT8, 8.03125),
    f"{OURS}, remainder": ("bfloat16", _REMAINDER, 18),
    f"{OURS}, remainder, uint16": ("bfloat16", _REMAINDER | _UINT16, 14),
    f"{OURS}, remainder, uint8": ("bfloat16", _REMAINDER | _UINT8, 12.03125),
}
# All formats, by their short names: those above, and those that move as many bytes as one of them.
STORED = {name.removeprefix(f"{OURS}, "): how for name, how in FORMATS.items()} | {
    "bfloat16 dithered": ("bfloat16", _DITHERED, 14),
    "bfloat16, uint16": ("bfloat16", _UINT16, 10),
    "bfloat16, uint8": ("bfloat16", _UINT8, 8.03125),
}

# On most workloads the others would cost more time and memory than a run has. A name that a device does not have is not
# run there.
ESSENTIAL = (OURS, AGAIN, DROP_IN, "cupy fuse", "cupy elementwise", *TORCH, FUSED, OPTAX, C_OPENMP, COPY)


@dataclass(frozen=True)
class Bar:
    """A wish about one of ours on a CPU: so many times the time of the fastest of `peers`, or so many seconds."""

    peers: tuple[str, ...] = ()
    at_most: float | None = None  # our time / the peer's, or seconds where there are no peers
    at_least: float | None = None  # the peer's time / ours
    who: str = OURS


@dataclass(frozen=True)
class Workload:
    """Tensors of these shapes, float32, and what a step does to them beside plain RMSProp."""

    name: str
    title: str
    shapes: tuple[Shape, ...]
    bars: tuple[Bar, ...] = ()
    hyper: Mapping[str, Any] = field(default_factory=dict)  # in rmsprop_gpu.RMSProp's argument names
    groups: bool = False  # each tensor is a parameter group of its own
    scheduled: bool = False  # a schedule says the learning rate of each step
    contenders: tuple[str, ...] | None = ESSENTIAL  # None: all in float32
    scaling: bool = False  # measure it with fewer threads too

    def has(self, contender: str) -> bool:
        """Is it run on this workload, where a device has it?"""
        return contender not in (*FORMATS, *BITSANDBYTES) if self.contenders is None else contender in self.contenders

    @property
    def size(self) -> int:
        """Elements in all tensors together."""
        return sum(map(math.prod, self.shapes))

    def moved_by(self, contender: str) -> float:
        """The bytes per element that a contender cannot do without: a format of fewer bytes has its own."""
        return FORMATS[contender][2] if contender in FORMATS else self.bytes_per_element

    @property
    def bytes_per_element(self) -> int:
        """What a step cannot do without: the gradient is read, the parameter and each buffer are read and written."""
        buffers = 1 + sum(bool(self.hyper.get(name)) for name in ("centered", "momentum", "use_ema"))
        looks = any(self.hyper.get(name) for name in ("clipnorm", "global_clipnorm", "skip_nonfinite"))
        return 4 * (3 + looks + 2 * buffers)


def in_torch(at_least: float) -> tuple[Bar, Bar]:
    """The wishes about the class for torch: so many times as fast as torch's, and hardly slower than its fused one."""
    return Bar(TORCH, at_least=at_least, who=DROP_IN), Bar((FUSED,), at_most=1.1, who=DROP_IN)


def one_tensor(millions: int, **more: Any) -> Workload:
    """One tensor of so many million elements."""
    title = f"One tensor of {millions} M elements"
    return Workload(f"one-{millions}m", title, ((1_000_000 * millions,),), **more)


def model(name: str, title: str, **more: Any) -> Workload:
    """The trainable parameters of a model, in its own order."""
    shapes = tuple(tuple(shape) for shape in SHAPES[name]["shapes"])
    size = sum(map(math.prod, shapes))
    return Workload(name, f"{title}: {len(shapes)} tensors, {size / 1e6:.3g} M elements", shapes, **more)


RESNET50 = model(
    "resnet50",
    "ResNet-50",
    contenders=None,
    bars=(Bar(TORCH, at_least=2.8), Bar((C_OPENMP,), at_most=1.1), *in_torch(2)),
)

TORCHS_SWITCHES = {"momentum": 0.9, "centered": True, "weight_decay": 0.01, "maximize": True}
ALL_SWITCHES = TORCHS_SWITCHES | {
    "nesterov": True,
    "decoupled_weight_decay": True,
    "eps_in_sqrt": True,
    "lr_in_momentum": True,
    "bias_correction": True,
    "clipvalue": 1.0,
}

WORKLOADS = {
    workload.name: workload
    for workload in (
        one_tensor(1),
        one_tensor(5),
        one_tensor(
            25,
            contenders=None,
            scaling=True,
            bars=(
                Bar(TORCH, at_least=5),
                Bar((OPTAX,), at_least=1.8),
                Bar((FUSED,), at_least=1),
                Bar((C_OPENMP,), at_most=1 / 0.95),
                *in_torch(5),
            ),
        ),
        one_tensor(100),
        model("dqn", "DQN (Mnih et al. 2015)", bars=in_torch(3)),
        model("mobilenet-v2", "MobileNetV2"),
        model("efficientnet-b0", "EfficientNet-B0"),
        model("inception-v3", "Inception-v3 with its auxiliary head"),
        RESNET50,
        model("vit-b16", "ViT-B/16"),
        model("gpt2", "GPT-2"),
        Workload(
            "many-300",
            "300 tensors of 256 elements",
            ((256,),) * 300,
            (Bar(TORCH, at_least=20), *in_torch(8)),
            contenders=None,
        ),
        Workload("many-3000", "3,000 tensors of 256 elements", ((256,),) * 3000),
        Workload(
            "one-1000",
            "One tensor of 1,000 elements",
            ((1000,),),
            (Bar(TORCH, at_least=8), Bar(at_most=10e-6), *in_torch(1.5)),
            contenders=None,
        ),
        Workload(
            "scheduled-1000",
            "One tensor of 1,000 elements, a learning rate that a schedule says anew for each step",
            ((1000,),),
            scheduled=True,
            contenders=(OURS, AGAIN, DROP_IN, ASSIGNED, PLAIN, *TORCH),
        ),
        Workload(
            "scheduled-30",
            "30 groups of one tensor of 1,000 elements, a learning rate that a schedule says anew for each step",
            ((1000,),) * 30,
            groups=True,
            scheduled=True,
            contenders=(OURS, AGAIN, DROP_IN, ASSIGNED, PLAIN, *TORCH),
        ),
        Workload("host-161", "161 tensors of one element: what a step costs before any arithmetic", ((1,),) * 161),
        Workload(
            "switches-25m",
            "One tensor of 25 M elements, every switch that torch has too: momentum, centered, weight decay, maximize",
            ((25_000_000,),),
            hyper=TORCHS_SWITCHES,
            contenders=(OURS, AGAIN, DROP_IN, *TORCH, COPY),
        ),
        Workload(
            "all-25m",
            "One tensor of 25 M elements, every switch there is, which no other has: Nesterov momentum with lr in it, "
            "centered, bias correction, decoupled weight decay, clipping, eps in the root, maximize",
            ((25_000_000,),),
            hyper=ALL_SWITCHES,
            contenders=(OURS, AGAIN, COPY),
        ),
        Workload(
            "clipped-25m",
            "One tensor of 25 M elements, clipped by the norm of all gradients",
            ((25_000_000,),),
            hyper={"global_clipnorm": 1.0},
            contenders=(OURS, AGAIN, DROP_IN, PLAIN, *TORCH, OPTAX, COPY),
            bars=(Bar((PLAIN,), at_most=1.5),),
        ),
        Workload(
            "clipped-resnet50",
            f"{RESNET50.title}, clipped by the norm of all gradients",
            RESNET50.shapes,
            hyper={"global_clipnorm": 1.0},
            contenders=(OURS, AGAIN, DROP_IN, PLAIN, *TORCH, OPTAX, COPY),
        ),
        Workload(
            "guarded-25m",
            "One tensor of 25 M elements, with momentum, a moving average of the parameters, clipped by the norm of all"
            " gradients, skipped where one is not finite",
            ((25_000_000,),),
            hyper={"momentum": 0.9, "use_ema": True, "global_clipnorm": 1.0, "skip_nonfinite": True},
            contenders=(OURS, AGAIN, PLAIN, COPY),
        ),
        Workload(
            "bytes-25m",
            "One tensor of 25 M elements, the second moment or the parameters stored in fewer bytes",
            ((25_000_000,),),
            contenders=(OURS, AGAIN, *FORMATS, *BITSANDBYTES, COPY),
            bars=(
                Bar((OURS,), at_least=1.12, who=f"{OURS}, uint16"),
                Bar((OURS,), at_least=1.55, who=f"{OURS}, bfloat16 dithered, uint16"),
                Bar((OURS,), at_least=1.2, who=f"{OURS}, remainder, uint16"),
                Bar((OURS,), at_least=1.07, who=f"{OURS}, remainder"),
                Bar((OURS,), at_least=1, who=f"{OURS}, uint8"),
            ),
        ),
    )
}
