"""Figures in sentences and hand-made tables match a committed result, and their section links to it.

`tests/test_benchmarks.py` compares generated tables with their results.
"""

import json
import math
import re
import sys
from functools import cache

import pytest
from pages import PAGES, named
from paths import ROOT

sys.path.append(str(ROOT))  # last, as in test_benchmarks.py

from benchmarks.busy import SIZES
from benchmarks.report import digits, duration
from benchmarks.workloads import ASSIGNED, C_OPENMP, DROP_IN, OURS, PLAIN, TORCH

GENERATED = re.compile(r"<!-- figures of .*?<!-- end of figures -->", re.DOTALL)
FENCED = re.compile(r"^(`{3,}|:{3,}).*?^\1\s*$", re.DOTALL | re.MULTILINE)
FIGURE = re.compile(r"(?<![\w.^])\d[\d.,]*\s(?:ns|us|ms|s|GB/s|TB/s|times|x|%)(?!\w)")
LINKS = ("benchmarks/results/", "benchmarks/shapes.json", "measured/")
# From a recipe, a condition of a measurement, a test's bound, and the sizes of a matrix.
NOT_MEASURED = ("0.97 times the rate", "1 ms of other work", "at most 1.05 times its share", "50,257 x 768")


@cache
def result(name):
    """A committed result."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def row(name, workload, who):
    """The result of one contender."""
    return result(name)["workloads"][workload]["results"][who]


def us(name, workload, who):
    """Its time in microseconds."""
    return row(name, workload, who)["seconds"]["median"] * 1e6


def ratio(name, workload, who, to=OURS):
    """Its time relative to another's."""
    return row(name, workload, who)["ratio_to"][to]["median"]


def faster_mode(name, workload, to=OURS):
    """The same for the faster of torch's own modes."""
    return min(ratio(name, workload, who, to) for who in TORCH)


def of_the_class_for_torch():
    """The range over all workloads."""
    gains = [faster_mode("cpu-in-torch", workload, DROP_IN) for workload in result("cpu-in-torch")["workloads"]]
    return f"{min(gains):.2g} to {max(gains):.2g} times as fast"


def of_schedules():
    """The cost of a changing rate, for one group and for each further one."""
    for who, begin, between, end in (
        (OURS, "a callable `lr` adds", "to a step over one group and", " for each further group"),
        (ASSIGNED, "adds", "and", ""),
    ):
        one, thirty = (
            us("cpu-schedules", w, who) - us("cpu-schedules", w, PLAIN) for w in ("scheduled-1000", "scheduled-30")
        )
        yield f"{begin} {one:.2g} us {between} {(thirty - one) / 29:.2g} us{end}"


def of_busy_machines():
    """The rows of a table."""
    rows = {
        "idle machine, one step after the other": "idle, one step behind the other",
        "idle machine, 1 ms of other work between steps": "idle, 1 ms of other work between steps",
        "five other processes per core": "five other processes a core",
    }
    for said, key in rows.items():
        times = (result("busy")["busy"][key][who][SIZES.index(300_000)] for who in (OURS, "OpenMP's default"))
        yield f"| {said} | {' | '.join(map(duration, times))} |"


def of_models():
    """How much less time the C loop takes on models, at most."""
    models = ("dqn", "mobilenet-v2", "efficientnet-b0", "inception-v3", "resnet50", "vit-b16", "gpt2")
    least = min(ratio("cpu", model, C_OPENMP) for model in models)
    return f"at most {100 * (1 - min(least, ratio('cpu-resnet50', 'resnet50', C_OPENMP))):.0f} % less time"


def of_iterations():
    """An iteration with torch's class, relative to one with ours."""
    theirs, ours = (result("in-torch")["medians"][who] for who in ("torch.optim.RMSprop", "rmsprop_gpu.torch.RMSprop"))
    agent, network = (theirs[key] / ours[key] for key in theirs if key.startswith("an iteration"))
    yield f"is {agent:.2g} times as fast as with torch's class"
    yield f"is {network:.3g} times as fast"


def of_a_card():
    """What a run on a card checked."""
    parts = result("gpu-nvidia-h200/summary")["parts"]
    cases = parts["bits"]["result"]["rows"]
    same = sum(case["differ"] == 0 for case in cases)
    numbers = sum(case["of"] for case in cases) / 1e6
    yield f"{same} of {len(cases)} cases were bit-identical to the CPU, {numbers:.1f} M numbers"
    tests = parts["tests"]["result"]
    failed = tests["failures"] + tests["errors"]
    yield f"{tests['tests'] - tests['skipped'] - failed} passed and {failed} failed"


def of_traffic():
    """Counted bytes and sectors, relative to the model."""
    rows = result("cuda-traffic")["rows"]
    assert max(r["bytes_an_element"] / r["model"] for r in rows) < 1.01
    yield "within 1 %"
    plain, formats = (
        [100 * (r["sectors_over_bytes"] - 1) for r in rows if bool(r["said"]) is few] for few in (False, True)
    )
    yield f"{min(plain):.0f} to {max(plain):.0f} % more"
    yield f"up to {max(formats):.0f} % more"


def of_sass():
    """The instructions beyond the limit."""
    rows = {(r["dtype"], r["grad_dtype"], r["cc"]): r for r in result("sass")["rows"]}
    most = (rows["bfloat16", "bfloat16", cc]["most_instructions"]["instructions"] for cc in ("10.0", "12.0"))
    return f"on 10.0 and 12.0 ({' and '.join(map(digits, most))} instructions"


def of_whole_tensors():
    """The fraction of GPT-2 in its largest tensor."""
    shapes = json.loads((ROOT / "benchmarks" / "shapes.json").read_text())["gpt2"]["shapes"]
    sizes = [math.prod(shape) for shape in shapes]
    yield f"{100 * max(sizes) / sum(sizes):.0f} % of the state instead of {100 / 8} %"
    yield f"{sum(sizes):_}"


FIGURES = {
    "README.md": [of_the_class_for_torch()],
    "docs/howto/torch.md": [of_the_class_for_torch()],
    "docs/howto/gradients.md": [
        f"takes {1 / ratio('cpu', 'clipped-25m', PLAIN):.3g} times as long as a plain one",
        f"takes {faster_mode('cpu', 'clipped-25m'):.3g} times as long as ours",
    ],
    "docs/howto/schedules.md": list(of_schedules()),
    "docs/howto/threads.md": list(of_busy_machines()),
    "docs/howto/many_processes.md": list(of_whole_tensors()),
    "docs/measured/cpu.md": [
        of_models(),
        f"{faster_mode('cpu-torch-huge-pages', 'one-25m'):.3g} times our time",
        f"instead of {faster_mode('cpu', 'one-25m'):.3g} (the table above)",
        f"takes {us('cpu-schedules', 'scheduled-30', OURS):.3g} us",
        f"{faster_mode('cpu-schedules', 'scheduled-30'):.3g} times as long",
    ],
    "docs/measured/torch.md": list(of_iterations()),
    "docs/measured/gpu.md": list(of_a_card()),
    "docs/understand/same_bits.md": list(of_a_card())[:1],
    "docs/understand/one_pass.md": list(of_traffic()),
    "docs/reference/limits.md": [of_sass()],
}


def flat(text):
    """The text on one line."""
    return " ".join(text.split())


@pytest.mark.parametrize("page", FIGURES)
def test_sentences_say_what_the_results_say(page):
    text = flat((ROOT / page).read_text())
    assert [figure for figure in FIGURES[page] if figure not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_figure_in_a_sentence_is_of_a_result(page):
    for section in re.split(r"^#+ ", FENCED.sub("", GENERATED.sub("", page.read_text())), flags=re.MULTILINE):
        left = flat(section)
        for figure in FIGURES.get(named(page), []):
            if figure in left:
                assert any(link in section for link in LINKS), figure
            left = left.replace(figure, "")
        for figure in NOT_MEASURED:
            left = left.replace(figure, "")
        assert FIGURE.findall(left) == []
