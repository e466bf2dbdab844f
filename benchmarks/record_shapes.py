"""``python -m benchmarks.record_shapes``: shapes.json, the parameters' shapes of models that people train.

Needs ``pip install torchvision transformers``. No weights are made (the device "meta" has none) or downloaded.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

FILE = Path(__file__).with_name("shapes.json")

# Elements in all parameters together, as the models' own pages and papers count them.
WANTED = {
    "dqn": 1_693_362,
    "mobilenet-v2": 3_504_872,
    "efficientnet-b0": 5_288_548,
    "inception-v3": 27_161_264,
    "resnet50": 25_557_032,
    "vit-b16": 86_567_656,
    "gpt2": 124_439_808,
}


def main() -> None:
    """Build each model, read its shapes, write them."""
    import torch

    with torch.device("meta"):
        models = {name: (source, shapes_of(build())) for name, (source, build) in sources().items()}
    for name, (_, shapes) in models.items():
        assert sum(map(math.prod, shapes)) == WANTED[name], name
    FILE.write_text("{\n" + ",\n".join(entry(name, *model) for name, model in models.items()) + "\n}\n")


def sources() -> dict[str, tuple[str, Callable[[], nn.Module]]]:
    """For each model: where its shapes come from, in words, and how to build it."""
    models, transformers = torchvision_models(), f"transformers {metadata.version('transformers')}"
    torchvision = f"torchvision {metadata.version('torchvision')}"
    return {
        "dqn": ("Mnih et al. 2015, doi:10.1038/nature14236, with 18 actions", dqn),
        "mobilenet-v2": (f"{torchvision}, mobilenet_v2()", models.mobilenet_v2),
        "efficientnet-b0": (f"{torchvision}, efficientnet_b0()", models.efficientnet_b0),
        "inception-v3": (f"{torchvision}, inception_v3()", lambda: models.inception_v3(init_weights=False)),
        "resnet50": (f"{torchvision}, resnet50()", models.resnet50),
        "vit-b16": (f"{torchvision}, vit_b_16()", models.vit_b_16),
        "gpt2": (f"{transformers}, GPT2LMHeadModel(GPT2Config()): its head is the embedding, once", gpt2),
    }


def torchvision_models() -> Any:
    """torchvision.models, even if torchvision's operators were compiled for a different torch."""
    import torch

    try:
        from torchvision import models
    except RuntimeError:  # it describes operators that were not loaded: declare them, no model here calls them
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        from torchvision import models
    return models


def dqn() -> nn.Module:
    """The network that played Atari: 4 frames of 84 x 84 pixels in, the value of each of 18 actions out."""
    from torch import nn

    convolutions = (nn.Conv2d(4, 32, 8, stride=4), nn.Conv2d(32, 64, 4, stride=2), nn.Conv2d(64, 64, 3))
    return nn.Sequential(*convolutions, nn.Linear(7 * 7 * 64, 512), nn.Linear(512, 18))


def gpt2() -> nn.Module:
    """GPT-2 with 124 M parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config())


def shapes_of(model: nn.Module) -> list[list[int]]:
    """The shapes of trained tensors, in the model's order; a tensor that is used twice is listed once."""
    return [list(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]


def entry(name: str, source: str, shapes: list[list[int]]) -> str:
    """JSON with many shapes on a line: a space only between shapes, where the lines may break."""
    words = " ".join(json.dumps(shape, separators=(",", ":")) + "," for shape in shapes).rstrip(",")
    lines = textwrap.fill(words, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return f' {json.dumps(name)}: {{"source": {json.dumps(source)}, "shapes": [\n{lines}\n ]}}'


if __name__ == "__main__":
    main()
