"""Figures in sentences and hand-made tables match a committed result, which their section links to, or are calculated.

`tests/test_benchmarks.py` compares generated tables with their results.
"""

import json
import math
import re
import sys
from functools import cache, partial
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from pages import OTHERS, PAGES, named
from paths import ROOT

sys.path.append(str(ROOT))  # last, as in test_benchmarks.py

from benchmarks import scaling_model as model
from benchmarks.busy import SIZES
from benchmarks.check import Tolerance
from benchmarks.contenders_torch import traffic
from benchmarks.gpu.bits import STEPS
from benchmarks.measure import PAUSE_SECONDS
from benchmarks.report import digits, duration
from benchmarks.scaling_page import GPUS
from benchmarks.worker import BURST_SECONDS
from benchmarks.workloads import ASSIGNED, C_OPENMP, DROP_IN, OURS, PLAIN, TORCH
from rmsprop_gpu import RMSProp, hyper
from rmsprop_gpu.kernels import disk
from rmsprop_gpu.state.pieces import PIECE

GENERATED = re.compile(r"<!-- figures of .*?<!-- end of figures -->", re.DOTALL)
FENCED = re.compile(r"^(`{3,}|:{3,}).*?^\1\s*$", re.DOTALL | re.MULTILINE)
UNITS = "ns|us|ms|s|GB/s|TB/s|times|x|%|[KMGT]i?B|M|bytes|ulp|cases|tests|registers|instructions"
FIGURE = re.compile(rf"(?<![\w.^])\d[\d.,]*\s(?:{UNITS})(?!\w)")
LINKS = ("benchmarks/results/", "](results/", "benchmarks/shapes.json", "measured/")
NOT_MEASURED = {
    "a published recipe": ["0.97 times the rate", "0.045, times 0.94", "0.045, times 0.98"],
    "a condition of a measurement": ["1 ms of other work", "with 25 M elements", "of 25 M elements", "Off by 4 bytes"],
    "when a figure joins two curves": ["within 1 % of each other share a line"],
    "a bound that a test checks": ["From 5 M elements on", "at most 1.05 times its share", "1 ulp of the parameter"],
    "what the project wants": ["64 registers and 64 instructions", "more than 64 instructions"],
    "bytes of a float32, or of a code": ["five times 4 bytes", "4 bytes per float32 element on top", "in 2 bytes or 1",
                                         "20 bytes per float32 element", "8 bytes per element", "2 or 1.02 bytes"],
}  # fmt: skip
MIB = 2**20
WORDS = {3: "three", 4: "four"}
BOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
COMPARED = [*PAGES, *OTHERS, *BOOKS]


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


def speeds(of):
    """What was measured of the device time of steps on a card, by what and how many elements: GB/s, % of a copy."""
    rows = result(of)["parts"]["speed"]["result"]["rows"]
    return {
        (r["what"], r["elements"]): (
            r["bytes"] / r["seconds"]["median"] / 1e9,
            100 * r["copy_seconds"]["median"] / r["seconds"]["median"],
        )
        for r in rows
    }


def of_runs_on_a_card():
    """What the parts measure, and what they found."""
    parts = result("gpu-nvidia-h200/summary")["parts"]
    cases = parts["bits"]["result"]["rows"]
    dtypes = {case["dtype"] for case in cases}
    yield f"{len(cases)} cases, {WORDS[len(dtypes)]} dtypes, {WORDS[STEPS]} steps each"
    sizes = [elements for what, elements in speeds("gpu-nvidia-h200/summary") if what == "plain float32"]
    yield f"{min(sizes) / 1e6:.0f} to {max(sizes) / 1e6:.0f} M elements"
    yield f"**{WORDS[parts['tests']['result']['failures']].capitalize()} of its tests failed**"
    size, before = 2**26, speeds("gpu-nvidia-h200-before/summary")
    rate, of_copy = before["plain float32", size]
    both, clipped = (before[what, size][1] for what in ("momentum, centered", "clipped by the norm"))
    yield f"a step of {size / 1e6:.0f} M elements moved {rate:,.0f} GB/s, {of_copy:.0f} % of a copy"
    yield f"momentum and centered together {both:.0f} %, clipped by the norm {clipped:.0f} %"


def of_ranks():
    """How many were measured, and for how many there is a model."""
    ranks = [job["ranks"] for job in result("scaling")["jobs"]]
    yield f"{min(ranks)} to {max(ranks)} ranks on this machine"
    yield f"{min(GPUS)} to {max(GPUS):,} GPUs"


def of_codes():
    """By how much steps with codes are off: on gradients like the notebook's and of networks, and on decaying ones."""
    streams = result("step-error")["steps"]

    def rms(name, *some):
        return [100 * found[name]["rms"] for stream in some for found in streams[stream].values()]

    alike = "narrow", "four decades", "digits", "a small CNN"
    yield f"within about {max(rms('uint16', *alike)):.0f} % of float32's"
    yield f"within {max(rms('uint16', 'decaying')):.0f} % where gradients die away"
    least, most = min(rms("uint8", *alike)), max(rms("uint8", *alike))
    yield f"scatter by {least:.0f} to {most:.0f} %, by up to {max(rms('uint8', 'decaying')):.0f} % where"


def of_changes():
    """What the changelog says of speed."""
    yield f"`uint16` is {ratio('cpu-bytes', 'bytes-25m', OURS, 'rmsprop_gpu, uint16'):.2g} times as fast as float32"
    found = [
        (what, x) for (what, size), (_, x) in speeds("gpu-nvidia-h200/summary").items() if size >= 2**23
    ]  # beyond caches
    clipped = dict(found)["clipped by the norm"]
    of_copy = [x for what, x in found if not re.search("clipped|off by", what)]
    yield f"run at {min(of_copy):.0f} to {max(of_copy):.0f} % of a copy's speed, clipped by the norm at {clipped:.0f} %"
    (one, each), (again, more) = (map(float, re.findall(r"[\d.]+(?= us)", said)) for said in of_schedules())
    yield f"adds {one} to {again} us to a step on the CPU and less than {math.ceil(max(each, more))} us for each"
    yield of_the_class_for_torch()
    rows = result("gpu-nvidia-h200/summary")["parts"]["torch"]["result"]["rows"]
    ours, theirs = (
        next(r for r in rows if r["what"].startswith("ResNet-50") and r["how"] == "eager" and r["who"] == who)
        for who in ("rmsprop_gpu.torch", "torch foreach")
    )
    host, device = (theirs[key]["median"] / ours[key]["median"] for key in ("host_seconds", "device_seconds"))
    yield f"torch's foreach {host:.2g} times as long on the host and {device:.2g} times on the device"


def of_rosenbrock():
    """How much more the walls of the valley curve than its floor, at the minimum of the function."""
    floor, walls = np.linalg.eigvalsh([[802.0, -400.0], [-400.0, 200.0]])
    return f"curve {round(walls / floor, -2):,.0f} times as much"


def of_first_steps():
    """How much too long they are on a constant gradient."""
    most = (f"{1 / math.sqrt(1 - alpha):.2g} times with" for alpha in (0.9, 0.999))
    return "{} $\\alpha = 0.9$, but {} 0.999".format(*most)


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
    """Registers and instructions beyond the limit."""
    rows = {(r["dtype"], r["grad_dtype"], r["cc"]): r for r in result("sass")["rows"]}
    most = (rows["bfloat16", "bfloat16", cc]["most_instructions"]["instructions"] for cc in ("10.0", "12.0"))
    yield f"on 10.0 and 12.0 ({' and '.join(map(digits, most))} instructions"
    kernels = [kernel for row in result("sass")["formats"] for kernel in row["kernels"]]
    assert max(kernel["registers"] for kernel in kernels) <= 64
    yield f"instructions per element, at most {max(kernel['instructions'] for kernel in kernels):g}"


@cache
def gpt2():
    """The shapes of its parameters."""
    return json.loads((ROOT / "benchmarks" / "shapes.json").read_text())["gpt2"]["shapes"]


def of_whole_tensors():
    """The fraction of GPT-2 in its largest tensor."""
    (rows, columns), total = max(gpt2(), key=math.prod), sum(map(math.prod, gpt2()))
    yield f"{rows:,} x {columns} of {total / 1e6:.0f} M elements"
    yield f"{100 * rows * columns / total:.0f} % of the state instead of {100 / 8} %"
    yield f"{total:_}"


def of_sharding():
    """What a rank holds besides parameters and gradients, for GPT-2."""
    size = sum(map(math.prod, gpt2()))
    for ranks in (1, 2, 4, 8):
        held = ((model.held(ranks, size, kind) - model.WHOLE) * size / MIB for kind in (model.PLAIN, model.EVERYTHING))
        yield f"| {ranks} | {' | '.join(f'{x:,.0f} MiB' for x in held)} |"
    yield f"{model.LEAST // MIB} MiB, or {model.LEAST_A_RANK // MIB} MiB per rank where that is more"


def of_uploads():
    """Bytes of an address, and of the hyperparameters that a kernel reads."""
    group = RMSProp(np.ones(1, np.float32)).param_groups[0].hyper()
    address, scalars = np.int64(), np.asarray(hyper.scalars(group, group["lr"], np.dtype(np.float32)))
    return f"a copy of {address.nbytes} bytes per tensor, new hyperparameters one of {scalars.nbytes} bytes"


def of_passes():
    """Bytes per element that torch's RMSprop moves, by the passes in its source."""
    switches = {}, {"momentum": 0.9}, {"momentum": 0.9, "centered": True}
    plain, momentum, both = (traffic(SimpleNamespace(hyper=given)) for given in switches)
    return f"moves {plain} bytes per element, {momentum} with momentum, and {both} with momentum and centered"


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
        f"moves {row('cpu', 'one-25m', TORCH[0])['bytes_per_element']} bytes per element, not {model.PLAIN.moved}",
    ],
    "docs/measured/torch.md": list(of_iterations()),
    "docs/measured/gpu.md": list(of_a_card()),
    "docs/understand/same_bits.md": list(of_a_card())[:1],
    "docs/understand/one_pass.md": list(of_traffic()),
    "docs/reference/limits.md": list(of_sass()),
    "benchmarks/README.md": list(of_runs_on_a_card()),
    "notebooks/05_fewer_bytes.ipynb": list(of_codes()),
    "CHANGELOG.md": list(of_changes()),
}
# Not from a result, but from the code or a formula.
CALCULATED = {
    "docs/howto/arrays.md": [of_uploads()],
    "docs/howto/checkpoints.md": [f"in pieces of {PIECE // MIB} MiB"],
    "docs/howto/many_processes.md": list(of_sharding()),
    "docs/howto/threads.md": [f"At most {disk.LIMIT // MIB} MiB are kept"],
    "docs/understand/one_pass.md": [of_passes()],
    "benchmarks/README.md": [
        f"for plain RMSProp, {Tolerance({}, partial(dict)).roundings // 2} ulp of the update",  # one is two roundings
        f"one burst of about {BURST_SECONDS['cpu']} s",
        f"a pause of {PAUSE_SECONDS['cpu']} s",
        *of_ranks(),
    ],
    "notebooks/02_why_rmsprop.ipynb": [of_rosenbrock(), of_first_steps()],
}


def flat(text):
    """The text on one line."""
    return " ".join(text.split())


def text_of(page):
    """What is in a page; of a notebook, its cells of Markdown."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def prose(page):
    """What is written by hand, without code."""
    return FENCED.sub("", GENERATED.sub("", text_of(page)))


@pytest.mark.parametrize("page", sorted({*FIGURES, *CALCULATED}))
def test_sentences_say_what_the_results_say(page):
    text = flat(text_of(ROOT / page))
    assert [figure for kind in (FIGURES, CALCULATED) for figure in kind.get(page, []) if figure not in text] == []


@pytest.mark.parametrize("page", COMPARED, ids=named)
def test_every_figure_in_a_sentence_is_of_a_result(page):
    for section in re.split(r"^#+ ", prose(page), flags=re.MULTILINE):
        left = flat(section)
        for figure in FIGURES.get(named(page), []):
            if figure in left:
                assert any(link in section for link in LINKS) or page.stem == "CHANGELOG", figure
            left = left.replace(figure, "")
        for figure in [*CALCULATED.get(named(page), []), *chain(*NOT_MEASURED.values())]:
            left = left.replace(figure, "")
        assert FIGURE.findall(left) == []


def test_what_is_not_measured_occurs():
    text = " ".join(flat(prose(page)) for page in COMPARED)
    assert [figure for figures in NOT_MEASURED.values() for figure in figures if figure not in text] == []
