"""explain() describes what a step does: its lines are run as Python and compared with the oracle."""

import ast
import re

import numpy as np
import pytest
from on_host import one, random, refused
from variants import cover, name, optimizer

from rmsprop_gpu import AdaGrad, RMSProp, hyper, reference
from rmsprop_gpu.conventions import explain
from rmsprop_gpu.conventions.explain import Explanation

FUNCTIONS = {
    "sqrt": np.sqrt,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "clip": np.clip,
    "where": np.where,
    "norm": np.linalg.norm,
}
STATE = {"v": "square_avg", "m": "grad_avg", "w": "bias_weight", "b": "momentum_buffer", "e": "ema"}


def code(text, group=0):
    """The lines of a group's explanation that are Python."""
    block = re.split(r"^(?:RMSProp|AdaGrad).*:$", text, flags=re.MULTILINE)[1 + group]
    return "\n".join(re.findall(r"^  (?!- )(.*)$", block, re.MULTILINE))


def run(lines, variables):
    """Run the lines of an explanation over float64 arrays. They are all that is known of the rule here."""
    scope = dict(variables)
    with np.errstate(all="ignore"):
        exec(lines, {"__builtins__": {}, **FUNCTIONS}, scope)
    return scope


def trajectory(opt, grads, param, others):
    """The parameter after each gradient and the last state, computed only from the text of `explain`.

    `others` are the gradients of a second parameter.
    """
    scope = {"p": param, **{x: np.full_like(param, opt.param_groups[0]["initial_scale"]) for x in "v"}}
    scope |= {"m": np.zeros_like(param), "b": np.zeros_like(param), "w": 0.0, "e": np.zeros_like(param)}
    for i, (g, other) in enumerate(zip(grads, others, strict=True)):
        scope = run(code(opt.explain()), scope | {"g": g, "every_g": np.concatenate([g, other])})
        if i == 0 and "which the first step sets to p" in opt.explain():
            scope["e"] = scope["p"]
        yield scope


def problem(seed):
    """The gradients of a parameter, the parameter, and the gradients of another one."""
    rng = np.random.default_rng(seed)
    grads, others = rng.standard_normal((2, 4, 40)) * 10.0 ** rng.uniform(-6, 2, (2, 4, 40))
    grads[:, ::7] = 0
    return grads, rng.standard_normal(40), others


# 1 - alpha is written with 15 digits, so its relative error is at most 5e-15. The numbers beside it are exact. Four
# steps with that error and 20 roundings stay under 1e-13. In centered mode, v - m^2 magnifies that as in recorded.py.
# Each side rounds the parameter at most twice per step by half an ulp: 8 ulps in four steps.
RELATIVE = 1e-12

# What reference.py leaves to its caller.
AROUND = (
    *("clipnorm", "global_clipnorm", "skip_nonfinite", "use_ema", "ema_momentum", "square_avg_dtype", "sum_dtype"),
    *("store_param_remainders", "bf16_stochastic_round", "seed"),
)


def excess(variant):
    """The largest difference between text and oracle relative to its bound, over four steps, parameter and state."""
    grads, param, others = problem([*str(variant).encode()])
    opt = optimizer(variant, [param.copy(), np.zeros(40)])
    h = opt.param_groups[0].hyper()
    step = reference.adagrad if variant.adagrad else reference.rmsprop
    rule = {key: value for key, value in h.items() if key not in AROUND}
    state, worst, want, average = None, 0.0, param, None
    for got, g, other in zip(trajectory(opt, grads, param, others), grads, others, strict=True):
        before = want
        shortened = g * reference.clip_factor([g, other], h["global_clipnorm"] or np.inf)
        want, state = step(want, shortened, state, **rule)
        bound = RELATIVE * np.max(np.abs(want - before)) + 8 * np.spacing(np.abs(want).max())
        worst = np.maximum(worst, np.max(np.abs(got["p"] - want) / bound))
        seen = {key: value for key, value in state.items() if key != "bias_weight" or variant.bias_correction}
        if variant.ema:
            kept = 0.0 if average is None else h["ema_momentum"]
            seen["ema"] = average = reference.moving_average(want if average is None else average, want, kept, 1 - kept)
        for key, value in seen.items():
            letter = "v" if key == "sum" else next(x for x, y in STATE.items() if y == key)
            worst = np.maximum(worst, np.max(np.abs(got[letter] - value)) / (RELATIVE * np.max(np.abs(value))))
    return worst


@pytest.mark.parametrize("variant", cover(3), ids=name)
def test_lines_do_what_the_oracle_does(variant):
    assert excess(variant) <= 1


def test_lines_name_their_state():
    opt = RMSProp(one(1), momentum=0.5, centered=True, bias_correction=True, use_ema=True)
    for letter, buffer in STATE.items():
        assert re.search(rf"^  {letter} = .*# {buffer}\b", opt.explain(), re.MULTILINE)
    assert re.search(r"^  v = .*# sum$", AdaGrad(one(1)).explain(), re.MULTILINE)


def test_lines_do_what_a_step_does():
    """In float64, compared with the package itself, not only the oracle. All switches are on."""
    param, another, *grads = random(3, *[40] * 8, dtype=np.float64)
    switches = dict.fromkeys(["nesterov", "eps_in_sqrt", "bias_correction", "skip_nonfinite", "use_ema"], True)
    opt = RMSProp([param, another], 0.01, 0.93, 1e-3, 0.07, 0.83, True, **switches, global_clipnorm=5)
    text = trajectory(opt, grads[:3], param.copy(), grads[3:])
    for g, other in zip(grads[:3], grads[3:], strict=True):
        before = param.copy()
        opt.step([g, other])
        assert opt.last_grad_norm > 5
        got = next(text)
        for x, want in ((got["p"], param), (got["e"], opt.ema[0])):
            bound = RELATIVE * np.max(np.abs(param - before)) + 8 * np.spacing(np.abs(want).max())
            assert np.max(np.abs(x - want)) <= bound


def test_initial_scale_is_where_the_state_starts():
    opt = RMSProp(one(1), initial_scale=1)
    assert "v starts from 1.0" in opt.explain()


def test_only_lines_that_the_switches_leave():
    assert code(RMSProp(one(1)).explain()).splitlines() == [
        "v = 0.9 * v + 0.1 * g**2   # square_avg",
        "u = g / (sqrt(v) + 1e-08)",
        "p = p - 0.01 * u",
    ]
    opt = RMSProp(one(1), nesterov=True, lr_in_momentum=True, decoupled_weight_decay=True, ema_momentum=0.5)
    assert code(opt.explain()) == code(RMSProp(one(1)).explain())


@pytest.mark.parametrize("off", [None, 0, np.inf])
@pytest.mark.parametrize("clip", hyper.CLIPS)
def test_clip_that_clips_nothing_leaves_no_line(clip, off):
    assert code(RMSProp(one(1), **{clip: off}).explain()) == code(RMSProp(one(1)).explain())


# Steps around the rule. The text of each is run.


def ran(**more):
    g = np.array([3.0, -4.0])
    scope = {"p": np.array([10.0, 20.0]), "v": 0.0, "g": g, "every_g": np.array([6.0, -8.0, 0.0]), "e": 5.0}
    return run(code(RMSProp(one(1), **more).explain()), scope)


@pytest.mark.parametrize("clip", [1.0, 5.0, 50.0])
def test_clip_by_norm_is_said(clip):
    assert np.allclose(ran(clipnorm=clip)["g"], np.array([3.0, -4.0]) * min(1, clip / 5), rtol=1e-15, atol=0)
    assert np.allclose(ran(global_clipnorm=clip)["g"], np.array([3.0, -4.0]) * min(1, clip / 10), rtol=1e-15, atol=0)


def test_average_of_the_parameter_is_said_last():
    after = ran(use_ema=True, ema_momentum=0.75)
    assert np.array_equal(after["e"], 0.75 * 5 + 0.25 * after["p"])
    assert ran(use_ema=False, ema_momentum=0.75)["e"] == 5.0


def test_skipped_steps_are_said_first():
    text = RMSProp(one(1), skip_nonfinite=True).explain()
    assert text.splitlines()[1] == (
        "  # a step is skipped if a gradient, or its square after scaling and clipping, is not finite"
    )


# Schedules and groups


def warmup(step):
    return 0.25 * step


def test_schedule_is_named_with_its_value_and_asked_once():
    asked = []

    def counted(step):
        asked.append(step)
        return 0.25 * step

    counted.__qualname__ = "counted"
    opt = RMSProp([{"params": one(1)}, {"params": one(2), "alpha": 0.5}], lr=counted)
    opt.step([one(3), one(4)])
    asked.clear()
    text = opt.explain()
    assert asked == [1]
    assert len(re.findall(r"^  lr = 0\.25 +# counted\(1\)$", text, re.MULTILINE)) == 2
    assert "  - lr=counted (0.01)" in text
    for i in range(2):
        assert code(text, i).endswith("p = p - lr * u")


def test_schedule_without_a_name_is_named_by_its_type():
    class Decay:
        def __call__(self, step):
            return 0.5

    assert (
        "# test_schedule_without_a_name_is_named_by_its_type.<locals>.Decay(0)" in RMSProp(one(1), lr=Decay()).explain()
    )


def test_schedule_that_goes_wrong_is_refused():
    opt = RMSProp(one(1), lr=lambda step: -1)
    with refused(ValueError, "lr(0): lr is -1", of=[opt]):
        opt.explain()


def test_groups_that_agree_are_said_together():
    groups = [{"params": one(i), "alpha": alpha} for i, alpha in enumerate([0.5, 0.9, 0.5])]
    text = RMSProp(groups).explain()
    assert re.findall(r"^RMSProp.*", text, re.MULTILINE) == ["RMSProp, groups 0, 2:", "RMSProp, group 1:"]
    assert "v = 0.5 * v + 0.5 * g**2" in code(text, 0)
    assert "v = 0.9 * v + 0.1 * g**2" in code(text, 1)


def test_numbers_are_those_of_now():
    opt = RMSProp(one(1))
    opt.lr = 0.125
    opt.param_groups[0]["momentum"] = 0.5
    assert code(opt.explain()).splitlines()[2:] == ["b = 0.5 * b + u            # momentum_buffer", "p = p - 0.125 * b"]


# Differences


def differences(opt):
    return [line for line in opt.explain().splitlines() if line.startswith("  - ")]


def test_default_is_said_to_be_it():
    for opt in (RMSProp(one(1)), AdaGrad(one(1)), RMSProp(one(1), weight_decay=None, lr=0.01)):
        assert opt.explain().endswith("\nThat is the default.")
        assert differences(opt) == []


DIFFERENCES = [
    ({"lr": 0.5}, "lr=0.5 (0.01): the size of a step"),
    ({"alpha": 0.99}, "alpha=0.99 (0.9): the averages remember about 100 steps, and the first step is about 10 lr"),
    ({"eps": 1e-6}, "eps=1e-06 (1e-08): a floor of 1e-06 on the RMS"),
    ({"eps": 0}, "eps=0.0 (1e-08): no floor: an element that never saw a gradient stays where it is"),
    (
        {"eps_in_sqrt": True},
        "eps_in_sqrt=True (False): eps stands inside the root, so that the floor is sqrt(eps) = 0.0001",
    ),
    ({"weight_decay": 0.5}, "weight_decay=0.5 (0.0): added to the gradient (L2)"),
    ({"momentum": 0.9}, "momentum=0.9 (0.0): a constant gradient takes steps up to 10 times as long"),
    ({"momentum": 1}, "momentum=1.0 (0.0): steps add up and never decay"),
    ({"centered": True}, "centered=True (False): divided by the standard deviation"),
    ({"nesterov": True}, "nesterov=True (False): without effect, since momentum is 0.0"),
    ({"lr_in_momentum": True}, "lr_in_momentum=True (False): without effect, since momentum is 0.0"),
    ({"initial_scale": 1}, "initial_scale=1.0 (0.0): v starts from 1.0"),
    ({"bias_correction": True}, "bias_correction=True (False): v is the average of the squares seen so far"),
    (
        {"decoupled_weight_decay": True},
        "decoupled_weight_decay=True (False): without effect, since weight_decay is 0.0",
    ),
    ({"maximize": True}, "maximize=True (False): steps go up the gradient"),
    ({"clipvalue": 2}, "clipvalue=2.0 (None): each element of the gradient is clipped to at most 2.0"),
    ({"clipvalue": 0}, "clipvalue=0.0 (None): off, as with None"),
    ({"clipvalue": np.inf}, "clipvalue=inf (None): clips nothing"),
    ({"clipnorm": 2}, "clipnorm=2.0 (None): each parameter's gradient is scaled down to a norm of at most 2.0"),
    ({"clipnorm": 0}, "clipnorm=0.0 (None): off, as with None"),
    ({"clipnorm": np.inf}, "clipnorm=inf (None): clips nothing, but computes the norm: last_grad_norm"),
    (
        {"global_clipnorm": 2},
        "global_clipnorm=2.0 (None): all gradients together are scaled down to a norm of at most 2.0",
    ),
    (
        {"skip_nonfinite": True},
        "skip_nonfinite=True (False): a step is skipped if a gradient, or its square after scaling and clipping, "
        "is not finite",
    ),
    ({"use_ema": True}, "use_ema=True (False): an average of the parameters is kept beside them"),
    ({"ema_momentum": 0.5}, "ema_momentum=0.5 (0.99): without effect, since use_ema is False"),
]


@pytest.mark.parametrize(("given", "text"), DIFFERENCES, ids=[str(given) for given, _ in DIFFERENCES])
def test_difference_is_said_in_words(given, text):
    (line,) = differences(RMSProp(one(1), **given))
    assert line.startswith(f"  - {text}")


def test_differences_that_need_each_other():
    text = RMSProp(one(1), eps_in_sqrt=True, eps=0, weight_decay=0.5, decoupled_weight_decay=True, lr=0.5).explain()
    assert "eps_in_sqrt=True (False): without effect, since eps is 0.0" in text
    assert "weight_decay=0.5 (0.0): each step removes lr * weight_decay = 0.25 of the parameter" in text
    assert "a floor of 0.001 on the RMS" in RMSProp(one(1), eps=1e-6, eps_in_sqrt=True).explain()
    assert "looks ahead" in RMSProp(one(1), momentum=0.5, nesterov=True).explain()


def test_every_hyperparameter_has_words():
    assert set(explain.WORDS) >= {*hyper.RMSPROP, *hyper.ADAGRAD}


def test_subclass_that_passes_arguments_on_has_its_bases_defaults():
    class Mine(RMSProp):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    assert Mine(one(1)).explain().endswith("That is the default.")
    assert differences(Mine(one(1), lr=0.5)) == ["  - lr=0.5 (0.01): the size of a step"]


# In a notebook


def test_text_shows_itself():
    text = RMSProp(one(1)).explain()
    assert isinstance(text, str)
    assert type(text) is Explanation
    assert repr(text) == str(text)


def test_notebook_shows_mathematics():
    text = RMSProp(one(1), lr=lambda step: 1.5e-20, weight_decay=0.25, decoupled_weight_decay=True, eps=0, clipvalue=2)
    shown = text.explain()._repr_markdown_()
    assert shown.startswith("RMSProp:\n\n$$\\begin{aligned}\n")
    for line in (
        r"\mathrm{lr} &\leftarrow 1.5 \cdot 10^{-20} && \text{test}\_\text{notebook}\_\text{shows}\_\text{mathematics"
        r".locals.lambda(0)} \\",
        r"g &\leftarrow \mathrm{clip}(g,\ -2.0,\ 2.0) && \text{clipvalue} \\",
        r"v &\leftarrow 0.9\,v + 0.1\,g^{2} && \text{square}\_\text{avg} \\",
        r"r &\leftarrow \sqrt{v} \\",
        r"u &\leftarrow \begin{cases} \frac{g}{r} & \text{if } r > 0 \\ 0 & \text{else} \end{cases} && \text{an "
        r"element without any gradient yet stays} \\",
        r"p &\leftarrow p - \mathrm{lr} \cdot 0.25\,p && \text{decoupled weight decay} \\",
        r"p &\leftarrow p - \mathrm{lr}\,u",
        r"\end{aligned}$$",
        r"- lr=test_notebook_shows_mathematics.&lt;locals>.&lt;lambda> (0.01): the size of a step",
    ):
        assert line in shown.splitlines()
    assert (
        r"u &\leftarrow \frac{g}{\sqrt{\max(v - m^{2},\ 0)} + 10^{-8}}"
        in RMSProp(one(1), centered=True).explain()._repr_markdown_()
    )


@pytest.mark.parametrize("variant", cover(2), ids=name)
def test_every_line_has_its_equation(variant):
    text = optimizer(variant, np.ones(3)).explain()
    shown = text._repr_markdown_()
    lines = [line for line in code(text).splitlines() if not line.startswith("#")]
    assert shown.count(r"\leftarrow") == len(lines)
    assert shown.count("{") == shown.count("}")
    assert not any("\\" in words for words in re.findall(r"\\text\{(.*?)\}", shown))  # MathJax would show it
    for line in lines:  # it contains every number of the text
        for node in ast.walk(ast.parse(line)):
            if isinstance(node, ast.Constant) and "e" not in repr(node.value):
                assert repr(node.value) in shown


def test_notebook_shows_what_is_done_around_the_rule():
    shown = RMSProp(one(1), clipnorm=1.0, skip_nonfinite=True, use_ema=True).explain()._repr_markdown_()
    assert r"g &\leftarrow g\,\min(1,\ \frac{1.0}{\lVert g \rVert})" in shown
    assert (
        r"& && \text{a step is skipped if a gradient, or its square after scaling and clipping, is not finite} \\"
        in shown
    )
    assert r"e &\leftarrow 0.99\,e + 0.01\,p && \text{ema, which the first step sets to p}" in shown
    assert r"\lVert \text{every } g \rVert" in RMSProp(one(1), global_clipnorm=2.0).explain()._repr_markdown_()
