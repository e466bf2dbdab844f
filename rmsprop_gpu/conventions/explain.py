"""What ``opt.explain()`` says: the update with its numbers, line by line, and how it differs from the default.

The lines are Python, so that a test can run them and compare them with ``reference.py``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import hyper
from .latex import latex_line

Hyper = Mapping[str, Any]


class Explanation(str):
    """What `explain` returns: a str that a terminal shows as it is, and a notebook as mathematics.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> text = RMSProp(np.ones(3)).explain()  # as the last line of a notebook's cell: equations
    >>> text.splitlines()[2].strip()
    'u = g / (sqrt(v) + 1e-08)'
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

    def _repr_markdown_(self) -> str:
        """What Jupyter renders: the text with its equations converted to LaTeX, so that both say the same."""
        blocks: list[str] = []
        equations: list[str] = []
        for line in [*self.splitlines(), ""]:
            if line.startswith("  ") and not line.startswith("  - "):
                equations.append(latex_line(line))
                continue
            if equations:
                blocks.append("$$\\begin{aligned}\n" + " \\\\\n".join(equations) + "\n\\end{aligned}$$")
                equations = []
            blocks.append(line.strip().replace("<", "&lt;"))
        return "\n\n".join(blocks).replace("\n\n- ", "\n- ").strip()


def explain(kind: type, hypers: Sequence[Hyper], steps: int, *, adagrad: bool) -> Explanation:
    """The explanation of an optimizer of this class: one block for all groups with the same hyperparameters."""
    groups: list[tuple[Hyper, list[int]]] = []
    for i, h in enumerate(hypers):
        same = [members for other, members in groups if other == h]
        if same:
            same[0].append(i)
        else:
            groups.append((h, [i]))
    schedules = {id(h["lr"]): h["lr"] for h, _ in groups}
    rates = {key: hyper.lr_at(lr, steps) for key, lr in schedules.items()}  # called once, as in a step
    lines = []
    for h, members in groups:
        if len(groups) == 1:
            lines.append(f"{kind.__name__}:")
        else:
            lines.append(f"{kind.__name__}, group{'s' * (len(members) > 1)} {', '.join(map(str, members))}:")
        lines += _aligned(_update(h, rates[id(h["lr"])], steps, adagrad))
        lines += _differences(h, rates[id(h["lr"])], _defaults(kind))
    return Explanation("\n".join(lines))


# The update. g is the gradient, p the parameter, v, m, w, b the state, in the order of rule.py.


def _update(h: Hyper, lr: float, step: int, adagrad: bool) -> list[tuple[str, str]]:
    """The lines of a step, each with a note; a switch that is off adds none."""
    alpha, eps, decay, momentum = h.get("alpha", 0.0), h["eps"], h["weight_decay"], h.get("momentum")
    rest = f"{1 - alpha:.15g}"  # without the roundings of the subtraction
    inside = bool(momentum) and h["lr_in_momentum"]
    lines: list[tuple[str, str]] = []

    def add(line: str, note: str = "") -> None:
        lines.append((line, note))

    if h["skip_nonfinite"]:
        add(
            "",
            "a step is skipped if a gradient, or its square after scaling and clipping, is not finite",
        )
    if callable(h["lr"]):
        add(f"lr = {lr!r}", f"{hyper.shown(h['lr'])}({step})")
    rate = "lr" if callable(h["lr"]) else repr(lr)

    if h["maximize"]:
        add("g = -g", "maximize")
    if h["clipvalue"] and h["clipvalue"] < math.inf:
        add(f"g = clip(g, -{h['clipvalue']!r}, {h['clipvalue']!r})", "clipvalue")
    if h["clipnorm"] and h["clipnorm"] < math.inf:
        add(f"g = g * minimum(1, {h['clipnorm']!r} / norm(g))", "clipnorm, of each parameter")
    if h["global_clipnorm"] and h["global_clipnorm"] < math.inf:
        add(f"g = g * minimum(1, {h['global_clipnorm']!r} / norm(every_g))", "global_clipnorm, of all together")
    if decay and not h["decoupled_weight_decay"]:
        add(f"g = g + {decay!r} * p", "weight decay")

    if adagrad:
        add("v = v + g**2", "sum")
    else:
        add(f"v = {alpha!r} * v + {rest} * g**2", "square_avg")
    if (moment := hyper.moment_dtype(h)) != "float32":
        add("", f"v is stored in {moment[4:]} bits, rounded stochastically")
    d = "v"
    if h.get("centered"):
        add(f"m = {alpha!r} * m + {rest} * g", "grad_avg")
        d = "maximum(v - m**2, 0)"
    if h.get("bias_correction"):
        add(f"w = {alpha!r} * w + {rest}", "bias_weight")
        d = f"{d} / w"

    if not eps:
        add(f"r = sqrt({d})")
        add("u = where(r > 0, g / r, 0)", "an element without any gradient yet stays")
    elif h["eps_in_sqrt"]:
        add(f"u = g / sqrt({d} + {eps!r})")
    else:
        add(f"u = g / (sqrt({d}) + {eps!r})")
    if inside:
        add(f"u = {rate} * u", "lr in momentum")
    if decay and h["decoupled_weight_decay"]:
        add(f"p = p - {rate} * {decay!r} * p", "decoupled weight decay")
    s = "u"
    if momentum:
        add(f"b = {momentum!r} * b + u", "momentum_buffer")
        s = "b"
        if h["nesterov"]:
            add(f"s = {momentum!r} * b + u", "nesterov")
            s = "s"
    add(f"p = p - {s}" if inside else f"p = p - {rate} * {s}")
    if h["use_ema"]:
        kept = h["ema_momentum"]
        add(f"e = {kept!r} * e + {1 - kept:.15g} * p", "ema, which the first step sets to p")
    return lines


def _aligned(lines: list[tuple[str, str]]) -> list[str]:
    width = max(len(line) for line, _ in lines)
    return [f"  {line:{width}}  # {note}" if line and note else f"  {line or '# ' + note}" for line, note in lines]


# How it differs from the default


def _defaults(cls: type) -> dict[str, Any]:
    """The defaults of the constructors of a class and its bases: a subclass may just pass arguments on."""
    made = [vars(base)["__init__"] for base in reversed(cls.__mro__[:-1]) if "__init__" in vars(base)]
    parameters = {name: p for init in made for name, p in inspect.signature(init).parameters.items()}
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def _differences(h: Hyper, lr: float, defaults: Mapping[str, Any]) -> list[str]:
    said = [
        f"  - {name}={hyper.shown(value)} ({hyper.shown(defaults[name])}): "
        f"{WORDS[name](h, lr) if name in WORDS else 'set'}"
        for name, value in h.items()
        if name in defaults and value != defaults[name]
    ]
    return ["It differs from the default:", *said] if said else ["That is the default."]


def _stored(h: Hyper) -> str:
    bits = {"uint16": "2 bytes instead of 4", "uint8": "1 byte instead of 4, with a base for 128 neighbours"}
    return f"v takes {bits.get(hyper.moment_dtype(h), '4 bytes')}, and its rounding is unbiased"


def _floor(h: Hyper) -> str:
    if not h["eps"]:
        return "no floor: an element that never saw a gradient stays where it is"
    return f"a floor of {math.sqrt(h['eps']) if h['eps_in_sqrt'] else h['eps']:.3g} on the RMS"


def _inside(h: Hyper) -> str:
    if not h["eps"]:
        return "without effect, since eps is 0.0"
    if h["eps_in_sqrt"]:
        return f"eps stands inside the root, so that the floor is sqrt(eps) = {math.sqrt(h['eps']):.3g}"
    return "eps stands outside the root"


def _memory(h: Hyper) -> str:
    said = f"the averages remember about {1 / (1 - h['alpha']):.3g} steps"
    if h["bias_correction"] or h["initial_scale"] or h["centered"]:
        return said
    return f"{said}, and the first step is about {1 / math.sqrt(1 - h['alpha']):.3g} lr"


def _decay(h: Hyper, lr: float) -> str:
    if not h["weight_decay"]:
        return "no decay"
    if h["decoupled_weight_decay"]:
        taken = f"{lr * h['weight_decay']:.3g}"
        return f"each step removes lr * weight_decay = {taken} of the parameter, whatever its gradient"
    return "added to the gradient (L2), so that it is divided by the RMS with it"


def _clip(name: str, text: str) -> Callable[[Hyper, float], str]:
    def words(h: Hyper, lr: float) -> str:
        if not h[name]:
            return "off, as with None"
        if h[name] == math.inf:
            return "clips nothing" + ", but computes the norm: last_grad_norm" * name.endswith("norm")
        return f"{text} {h[name]!r}"

    return words


def _only_with(name: str, text: str) -> Callable[[Hyper, float], str]:
    return lambda h, lr: text if h.get(name) else f"without effect, since {name} is {h.get(name)!r}"


# What a hyperparameter changes, in words.
WORDS: dict[str, Callable[[Hyper, float], str]] = {
    "lr": lambda h, lr: "the size of a step",
    "alpha": lambda h, lr: _memory(h),
    "eps": lambda h, lr: _floor(h),
    "weight_decay": _decay,
    "momentum": lambda h, lr: (
        f"a constant gradient takes steps up to {1 / (1 - h['momentum']):.3g} times as long"
        if h["momentum"] < 1
        else "steps add up and never decay"
    ),
    "centered": lambda h, lr: "divided by the standard deviation of the gradient, not by its RMS",
    "nesterov": _only_with("momentum", "looks ahead by one step of the momentum"),
    "eps_in_sqrt": lambda h, lr: _inside(h),
    "lr_in_momentum": _only_with("momentum", "the buffer holds steps, so that a new lr applies to new gradients only"),
    "initial_scale": lambda h, lr: f"v starts from {h['initial_scale']!r}, so that the first steps are smaller",
    "bias_correction": lambda h, lr: "v is the average of the squares seen so far, without the 0 it started from",
    "decoupled_weight_decay": lambda h, lr: (
        "the parameter itself decays, not through the gradient"
        if h["weight_decay"]
        else _only_with("weight_decay", "")(h, lr)
    ),
    "maximize": lambda h, lr: "steps go up the gradient",
    "clipvalue": _clip("clipvalue", "each element of the gradient is clipped to at most"),
    "clipnorm": _clip("clipnorm", "each parameter's gradient is scaled down to a norm of at most"),
    "global_clipnorm": _clip("global_clipnorm", "all gradients together are scaled down to a norm of at most"),
    "skip_nonfinite": lambda h, lr: (
        "a step is skipped if a gradient, or its square after scaling and clipping, is not finite"
    ),
    "use_ema": lambda h, lr: "an average of the parameters is kept beside them",
    "ema_momentum": _only_with("use_ema", "how slowly the average of the parameters follows them"),
    "square_avg_dtype": lambda h, lr: _stored(h),
    "sum_dtype": lambda h, lr: _stored(h),
    "store_param_remainders": lambda h, lr: "bfloat16 parameters move like float32 ones: their missing bits are kept",
    "bf16_stochastic_round": lambda h, lr: "bfloat16 parameters are rounded stochastically, so that small steps count",
    "seed": lambda h, lr: "the seed of stochastic rounding",
}
