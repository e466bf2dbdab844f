"""What benchmarks/ reports about a run, without running one. Nothing is timed here."""

import importlib
import json
import math
import re
import subprocess
import sys

import ml_dtypes  # noqa: F401  # registers the name bfloat16 with NumPy
import numpy as np
import pytest
from paths import ROOT

from rmsprop_gpu import RMSProp, hyper
from rmsprop_gpu.profiling.traffic import bytes_per_element

# An installed package does not include benchmarks/. It comes last, so that the installed package is the one tested.
sys.path.append(str(ROOT))

from benchmarks import check, machine, measure, readme, step_error, worker
from benchmarks.contenders import CONTENDERS
from benchmarks.contenders_base import Running
from benchmarks.report import digits, markdown
from benchmarks.workloads import DROP_IN, FORMATS, FUSED, SHAPES, WORKLOADS

OURS = "rmsprop_gpu"
TENSORS_AND_ELEMENTS = {  # as counted by the models' pages and papers
    "dqn": (10, 1_693_362),
    "mobilenet-v2": (158, 3_504_872),
    "efficientnet-b0": (213, 5_288_548),
    "inception-v3": (292, 27_161_264),
    "resnet50": (161, 25_557_032),
    "vit-b16": (152, 86_567_656),
    "gpt2": (148, 124_439_808),
    "one-1m": (1, 1_000_000),
    "one-5m": (1, 5_000_000),
    "one-25m": (1, 25_000_000),
    "one-100m": (1, 100_000_000),
    "many-300": (300, 76_800),
    "many-3000": (3000, 768_000),
    "one-1000": (1, 1000),
    "scheduled-1000": (1, 1000),
    "scheduled-30": (30, 30_000),
    "host-161": (161, 161),
    "switches-25m": (1, 25_000_000),
    "all-25m": (1, 25_000_000),
    "clipped-25m": (1, 25_000_000),
    "clipped-resnet50": (161, 25_557_032),
    "guarded-25m": (1, 25_000_000),
    "bytes-25m": (1, 25_000_000),
}
BYTES = {"switches-25m": 36, "all-25m": 36, "clipped-25m": 24, "clipped-resnet50": 24, "guarded-25m": 40}


@pytest.mark.parametrize("name", WORKLOADS)
def test_workload_has_the_tensors_of_its_name(name):
    workload = WORKLOADS[name]
    assert workload.name == name
    assert (len(workload.shapes), workload.size) == TENSORS_AND_ELEMENTS[name]
    assert workload.bytes_per_element == BYTES.get(name, 20)
    variant = hyper.variant({**RMSProp(np.ones(3)).param_groups[0].hyper(), **workload.hyper}, adagrad=False)
    assert workload.bytes_per_element == bytes_per_element(variant, np.dtype(np.float32))


def test_shapes_have_sources_and_the_order_of_their_models():
    assert all(model["source"] for model in SHAPES.values())
    first_and_last = [(WORKLOADS[name].shapes[0], WORKLOADS[name].shapes[-1]) for name in ("dqn", "resnet50", "gpt2")]
    assert first_and_last == [((32, 4, 8, 8), (18,)), ((64, 3, 7, 7), (1000,)), ((50257, 768), (768,))]


@pytest.mark.parametrize("name", BYTES)
def test_switches_are_ours(name):
    RMSProp(np.ones(3, np.float32), **WORKLOADS[name].hyper)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_move_as_many_bytes_as_they_say(name):
    dtype, options, moved = FORMATS[name]
    opt = RMSProp(np.ones(3, np.dtype(dtype)), **options)
    variant = hyper.variant(opt.param_groups[0].hyper(), adagrad=False, dtype=np.dtype(dtype))
    assert bytes_per_element(variant, np.dtype(dtype)) == moved
    assert [work for work, workload in WORKLOADS.items() if workload.has(name)] == ["bytes-25m"]


def row(seconds, ours):
    """A contender's row: this time in each of three rounds, with a spread of 2 %."""
    ratio = seconds / ours
    return {
        "steps_a_burst": 3,
        "extra_memory_bytes": 0,
        "rounds": 3,
        "seconds": {"median": seconds, "q1": 0.98 * seconds, "q3": 1.02 * seconds, "min": 0.98 * seconds},
        "bytes_per_element": None,
        "gigabytes_per_second": 0.5 / seconds,
        "fraction_of_copy": 0.01 / seconds,
        "ratio_to": {OURS: {"median": ratio, "q1": 0.98 * ratio, "q3": 1.02 * ratio}},
        "seconds_by_round": [seconds] * 3,
    }


def result_of(workload, times, **left_out):
    """A run with these times per contender. The rest of its JSON is made up."""
    ours = times[OURS]
    results = {name: row(seconds, ours) for name, seconds in times.items()}
    results[OURS]["ratio_to"] = {name: {"median": ours / seconds} for name, seconds in times.items() if name != OURS}
    for name, seconds in times.items() if DROP_IN in times else ():
        results[name]["ratio_to"][DROP_IN] = {"median": seconds / times[DROP_IN]}
        if name != OURS:
            results[DROP_IN]["ratio_to"][name] = {"median": times[DROP_IN] / seconds}
    results |= {name: {"left_out": reason} for name, reason in left_out.items()}
    return {
        "name": "made-up",
        "date": "2020-01-01T00:00:00+00:00",
        "command": "python -m benchmarks",
        "device": {"kind": "cpu", "name": "A processor"},
        "rounds": 3,
        "threads": 2,
        "machine": {
            "cpu": "A processor",
            "cores": 2,
            "memory_gib": 8.0,
            "os": "An OS",
            "transparent_huge_pages": None,
            "load_at_start": 0.0,
        },
        "versions": {"python": "3", "torch": None},
        "workloads": {
            workload: {
                "title": WORKLOADS[workload].title,
                "tensors": len(WORKLOADS[workload].shapes),
                "elements": WORKLOADS[workload].size,
                "bytes_per_element": 20,
                "hyper": {},
                "results": results,
            }
        },
    }


TIMES = {
    OURS: 0.010,
    "rmsprop_gpu, again": 0.0101,
    "torch foreach": 0.026,
    "c openmp": 0.009,
    "copy": 0.0085,
}


def line_of(page, begin, number=0):
    """The cells of a line in a table of the page."""
    return [cell.strip() for cell in [line for line in page.splitlines() if line.startswith(begin)][number].split("|")]


def test_a_rival_that_is_faster_is_bold_and_stays():
    page = markdown(result_of("resnet50", TIMES))
    summary = dict(zip(line_of(page, "| workload"), line_of(page, "| `resnet50`"), strict=True))
    assert summary["our time"] == "10 ms"
    assert summary["torch foreach"] == "2.6"
    assert summary["c openmp"] == "**0.9**"
    assert summary["copy"] == "0.85"  # not a rival
    assert "**0.9 (0.882 to 0.918), faster than ours**" in line_of(page, "| c openmp")
    assert page.count("faster than ours") == 1


def test_a_rival_that_may_be_faster_is_not_bold():
    page = markdown(result_of("resnet50", {**TIMES, "c openmp": 0.0099}))  # its upper quartile is 1.01
    assert "**0.99" not in page


def test_a_row_that_was_left_out_stays_and_says_why():
    page = markdown(result_of("resnet50", TIMES, optax="jax is\nnot | installed"))
    assert line_of(page, "| workload")[-2] == "optax"
    assert line_of(page, "| `resnet50`")[-2] == "left out"
    assert "| optax | not timed: jax is not \\| installed |" in page


def test_noise_is_held_against_the_smallest_difference():
    page = markdown(result_of("resnet50", TIMES))
    assert "a factor of 1.11 (c openmp on `resnet50`): above the noise there, 1.03" in page
    page = markdown(result_of("resnet50", {**TIMES, "rmsprop_gpu, again": 0.0125}))
    assert "a factor of 1.11 (c openmp on `resnet50`): not above the noise there, 1.27" in page
    assert "1 lies within the noise of the workload: c openmp" in page


@pytest.mark.parametrize(("torch", "met"), [(0.026, "**no**"), (0.029, "yes")])
def test_a_bar_that_is_missed_is_bold(torch, met):
    page = markdown(result_of("resnet50", {**TIMES, "torch foreach": torch}))
    got = f"{torch / TIMES[OURS]:.3g} x"
    assert f"| `resnet50` | {OURS} | torch foreach or torch for-loop | at least 2.8 x as fast | {got} | {met} |" in page
    assert f"| `resnet50` | {OURS} | c openmp | at most 1.1 x its time | 1.11 x | **no** |" in page
    assert f"| {DROP_IN} |" not in page  # not asked for


@pytest.mark.parametrize(("ours", "faster", "slower"), [(0.01, "yes", "yes"), (0.02, "**no**", "**no**")])
def test_the_class_for_torch_has_bars_of_its_own(ours, faster, slower):
    page = markdown(result_of("resnet50", {OURS: 0.01, DROP_IN: ours, "torch foreach": 0.03, FUSED: 0.01}))
    start, faster_by, of_its_time = f"| `resnet50` | {DROP_IN} |", f"{0.03 / ours:.3g} x", f"{ours / 0.01:.3g} x"
    assert f"{start} torch foreach or torch for-loop | at least 2 x as fast | {faster_by} | {faster} |" in page
    assert f"{start} torch fused adagrad | at most 1.1 x its time | {of_its_time} | {slower} |" in page


def test_wishes_are_not_held_against_a_gpu():
    result = result_of("resnet50", TIMES)
    result["device"] = {"kind": "cuda", "name": "A GPU"}
    page = markdown(result)
    assert "at least 2.8 x" not in page
    assert "A GPU, in this machine:" in page


def test_fewer_threads_have_a_table():
    result = result_of("one-25m", TIMES)
    result["workloads"]["one-25m"]["scaling"] = {"1": {OURS: row(0.016, 0.016), "copy": row(0.012, 0.016)}}
    page = markdown(result)
    assert "| contender | 1 thread | 2 threads | speed-up |" in page
    assert f"| {OURS} | 16 ms | 10 ms | 1.6 x |" in page


def test_a_result_from_before_there_was_a_copy_still_prints():
    result = result_of("resnet50", TIMES)
    del result["device"], result["workloads"]["resnet50"]["bytes_per_element"], result["workloads"]["resnet50"]["hyper"]
    for one in result["workloads"]["resnet50"]["results"].values():
        del one["fraction_of_copy"], one["bytes_per_element"]
        one["gigabytes_per_second"] = None
    assert "| c openmp | 9 ms |" in markdown(result)


def rehearsal():
    """A run that checked and timed nothing."""
    result = {**result_of("resnet50", TIMES, optax="jax is not installed"), "rehearsal": True}
    rows = result["workloads"]["resnet50"]["results"]
    for name in TIMES:
        rows[name] = {"agrees": True}
    return result


def test_a_rehearsal_has_no_times():
    page = markdown(rehearsal())
    assert not re.search(r"\d (s|ms|us)\b|GB/s|What the project wants", page)
    assert dict(zip(line_of(page, "| workload"), line_of(page, "| `resnet50`"), strict=True)) == {
        "": "",
        "workload": "`resnet50`",
        **dict.fromkeys(TIMES, "agrees"),
        "copy": "runs",
        "optax": "left out",
    }
    assert "* optax: jax is not installed (`resnet50`)" in page


@pytest.fixture
def draw():
    pytest.importorskip("matplotlib")
    return importlib.import_module("benchmarks.plots").draw


def test_pictures_are_drawn_from_the_json_alone(draw, tmp_path):
    result = result_of("one-25m", TIMES, optax="jax is not installed")
    result["workloads"] |= result_of("resnet50", TIMES)["workloads"] | result_of("one-1000", TIMES)["workloads"]
    result["workloads"]["one-25m"]["scaling"] = {"1": {OURS: row(0.016, 0.016), "copy": row(0.012, 0.016)}}
    files = draw(json.loads(json.dumps(result)), tmp_path)
    assert [file.name for file in files] == ["made-up-ratios.png", "made-up-sizes.png", "made-up-scaling.png"]
    image = importlib.import_module("matplotlib.image").imread(files[0])
    assert image.shape[1] > 1000
    assert math.isclose(image[0, 0].min(), 1)  # white, and opaque if there is an alpha channel


def test_titles_say_what_was_found(draw):
    plots = importlib.import_module("benchmarks.plots")
    workloads = result_of("resnet50", {**TIMES, "torch for-loop": 0.024})["workloads"]
    ratios = {name: plots.rivals_of(workload["results"]) for name, workload in workloads.items()}
    assert plots.ratios_title(workloads, ratios) == (
        "ResNet-50: torch for-loop takes 2.4 times,\ntorch foreach takes 2.6 times as long as rmsprop_gpu"
    )
    alone = {"resnet50": {"torch foreach": ratios["resnet50"]["torch foreach"]}}
    assert plots.ratios_title(workloads, alone) == "ResNet-50: torch foreach takes 2.6 times as long as rmsprop_gpu"
    by_size = {25_000_000: plots.timed(workloads["resnet50"]["results"]), 1000: {}}
    assert plots.sizes_title(by_size) == "One tensor of 25 M: rmsprop_gpu moves 50 GB/s, 100 % of a plain copy"


def test_formats_have_a_picture_of_their_own(draw, tmp_path):
    times = {**TIMES, **{name: 0.01 * moved / 20 for name, (_, _, moved) in FORMATS.items()}}
    files = draw(result_of("bytes-25m", times), tmp_path)
    assert [file.name for file in files] == ["made-up-formats.png"]


def test_formats_are_measured_by_their_own_bytes():
    name = f"{OURS}, uint16"
    seconds = {OURS: [0.01] * 3, name: [0.008] * 3, "copy": [0.01] * 3}
    found = {who: measure.statistics(CONTENDERS["cpu"][who], seconds, WORKLOADS["bytes-25m"]) for who in (OURS, name)}
    assert [row["gigabytes_per_second"] for row in found.values()] == [50, 50]
    assert [row["fraction_of_copy"] for row in found.values()] == [1, 1]


def test_a_rehearsal_has_no_pictures(draw, tmp_path):
    assert draw(rehearsal(), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_large_numbers_have_no_exponent():
    assert [digits(number) for number in (1234.5, 123.4, 99.94, 1.0, 0.01234)] == ["1234", "123", "99.9", "1", "0.0123"]


def test_dots_that_would_touch_get_lanes_of_their_own(draw):
    lanes_of = importlib.import_module("benchmarks.plots").lanes_of
    assert lanes_of([0.0, 1.0, 2.0], 0.5) == [0, 0, 0]
    assert lanes_of([0.0, 0.1, -0.1, 3.0], 0.5) == [0, 1, -1, 0]


def test_every_contender_has_a_colour_and_a_marker_of_its_own(draw):
    styles = importlib.import_module("benchmarks.plots").STYLES
    contenders = importlib.import_module("benchmarks.contenders").CONTENDERS
    for names in contenders.values():
        known = [styles[name] for name in names if not name.startswith(f"{OURS}, ")]  # other configurations of ours
        assert len(set(known)) == len(known)


def test_no_marker_becomes_another_one_with_its_quartile_line(draw):
    markers = {marker for _, marker in importlib.import_module("benchmarks.plots").STYLES.values()}
    assert "+" in markers  # numexpr's, which stays recognisable when a line crosses it
    assert not markers & {"|", "_"}


# How numbers are computed


def test_statistics_are_taken_round_by_round():
    seconds = {OURS: [2.0, 4.0, 3.0], "copy": [1.0, 1.0, 1.5], "numpy": [4.0, 12.0, 6.0]}
    contender, workload = CONTENDERS["cpu"]["numpy"], WORKLOADS["one-1000"]
    found = measure.statistics(contender, seconds, workload)
    assert found["seconds"] == {"median": 6.0, "q1": 5.0, "q3": 9.0, "min": 4.0}
    assert found["ratio_to"] == {
        OURS: {"median": 2.0, "q1": 2.0, "q3": 2.5},
        "copy": {"median": 4.0, "q1": 4.0, "q3": 8.0},
    }
    assert (found["fraction_of_copy"], found["bytes_per_element"], found["rounds"]) == (0.25, 88, 3)
    assert found["gigabytes_per_second"] == pytest.approx(20 * 1000 / 6.0 / 1e9, rel=1e-3)


def test_each_contender_bursts_once_a_round_in_a_changing_order(monkeypatch):
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)
    asked = []

    class Fake:
        def __init__(self, name):
            self.contender = name

        def ask(self, request):
            asked.append(self.contender)
            return {"left_out": "it died"} if self.contender == "c" and len(asked) > 30 else 1.0

    rows = {}
    conditions = worker.Conditions("cpu", 20, 1, False)
    seconds = measure.run_rounds([Fake(name) for name in "abc"], rows, conditions)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 20, "b": 20}
    assert rows == {"c": {"left_out": "it died"}}
    orders = {tuple(asked[i : i + 3]) for i in range(0, 30, 3)}
    assert all(sorted(order) == list("abc") for order in orders)
    assert len(orders) > 2


def test_a_burst_times_all_steps_but_the_first_and_waits_for_the_last(monkeypatch):
    done = []
    running = Running(step=lambda: done.append("step"), sync=lambda: done.append("sync"))
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(worker.time, "perf_counter", lambda: done.append("clock") or next(clock))
    assert worker.burst(running, 3) == 2.0
    assert done == ["step", "sync", "clock", *["step"] * 3, "sync", "clock"]


def running_of(lr=1e-3, alpha=0.9, eps=1e-8, **hyper):
    """RMSProp by the oracle in float64, rounded to float32 in each step, with its own hyperparameters."""
    reference = check.load_reference()
    at = {"param": None, "grad": None, "state": None}

    def build(param, grad):
        at["param"], at["grad"] = param.copy(), grad.copy()
        return Running(step, set_grads, read_params)

    def set_grads(values):
        at["grad"] = np.concatenate(values)

    def read_params():
        return at["param"].copy()

    def step():
        given = {"lr": lr, "alpha": alpha, "one_minus_alpha": 1 - alpha, "eps": eps, **hyper}
        found, at["state"] = reference.rmsprop(at["param"].astype(float), at["grad"], at["state"], **given)
        at["param"] = found.astype(np.float32)

    return build


@pytest.mark.parametrize(
    ("hyper", "agrees"),
    [
        ({}, True),
        ({"lr": 1.0001e-3}, False),
        ({"alpha": 0.9001}, False),
        ({"eps": 2e-8}, False),
        ({"eps_in_sqrt": True}, False),
        ({"momentum": 0.9}, False),
    ],
)
def test_only_who_computes_rmsprop_is_timed(hyper, agrees):
    workload = WORKLOADS["one-1000"]
    param, grad = check.seeded_data(workload.size)
    complaint = check.disagreement(running_of(**hyper)(param, grad), CONTENDERS["cpu"]["numpy"], grad, workload)
    assert (complaint is None) == agrees


def test_a_virtual_device_is_known_by_its_name():
    assert machine.is_virtual("VGPU (PTX on the CPU), compute capability 9.0")
    assert not machine.is_virtual("NVIDIA H100 80GB HBM3, compute capability 9.0")


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("cpu*.json")))
def test_the_pages_are_made_from_the_results(file):
    assert file.with_suffix(".md").read_text() == markdown(json.loads(file.read_text()))


@pytest.mark.parametrize(
    ("device", "rival"), [("cpu", "numpy"), pytest.param("cuda", "cupy fuse", marks=pytest.mark.gpu)]
)
def test_a_rehearsal_checks_and_times_nothing(device, rival):
    chosen = ["--workloads", "one-1000", "switches-25m", "--contenders", OURS, rival, "copy"]
    command = [sys.executable, "-m", "benchmarks", "--device", device, "--rehearse", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"| workload | {OURS} | {rival} | copy |" in done.stdout
    assert "| `one-1000` | agrees | agrees | runs |" in done.stdout
    assert "| `switches-25m` | agrees | " in done.stdout
    assert not re.search(r"\d (s|ms|us)\b", done.stdout)


@pytest.mark.parametrize(
    "file", ["README.md", "benchmarks/README.md", *(f"docs/measured/{name}.md" for name in ("cpu", "torch", "gpu"))]
)
def test_pages_show_the_committed_results(file):
    pytest.importorskip("matplotlib")
    text = (ROOT / file).read_text()
    shown = [(name, lines) for where, name, lines in readme.sections() if where == ROOT / file]
    assert shown
    for name, lines in shown:
        assert readme.replaced(text, name, lines) == text
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / file).parent.joinpath(picture).exists()


def test_a_step_of_torchs_that_is_faster_on_a_card_is_bold():
    def row(who, host, device, how="eager"):
        seconds = {"host_seconds": {"median": host}, "device_seconds": {"median": device}}
        return {"what": "one", "who": who, "how": how, **seconds}

    rows = [row(DROP_IN, 2e-6, 4e-6), row("torch foreach", 1e-6, 8e-6), row(DROP_IN, 3e-6, 4e-6, "graph")]
    part = {"rows": rows, "versions": {"device": "A CARD", "torch": "2"}}
    said = readme.of_the_class_on_a_card({"parts": {"torch": {"result": part}}, "date": "today", "command": "this"})
    assert said[2:4] == [
        "| one, eager | 2 us / 4 us | **0.5** / 2 |  |",
        "| one, replay of a graph | 3 us / 4 us |  |  |",
    ]


# Steps of fewer bytes


def test_the_page_of_step_errors_is_made_from_its_result():
    file = ROOT / "benchmarks" / "results" / "step-error"
    assert step_error.page(json.loads(file.with_suffix(".json").read_text())) == file.with_suffix(".md").read_text()


def test_steps_are_compared_by_length_and_by_relative_error():
    exact = np.array([1, -2, 0, 4], np.float32)
    same, longer = step_error.Compared(), step_error.Compared()
    same.add(exact, exact)
    longer.add(np.array([1.5, -3, 0, 4], np.float32), exact)
    assert same.found() == {"ratio": 1, "rms": 0}
    assert longer.found() == {"ratio": 8.5 / 7, "rms": math.sqrt(0.5 / 3)}


def test_every_format_sees_the_gradients_of_float32(monkeypatch):
    monkeypatch.setattr(step_error, "ALPHAS", (0.9,))
    grads = [[np.full(300, x, np.float32)] for x in (0.5, 0.25, 0.5)]
    found = step_error.step_errors(lambda: iter(grads))["0.9"]
    assert 0 < found["uint16"]["rms"] < 0.002 < found["uint8"]["rms"] < 0.04
    assert found[step_error.NEAREST]["rms"] > 0


def test_a_figure_that_is_wanted_otherwise_is_bold():
    cells = [step_error._step_cell("narrow", 0.9, name, {"ratio": 1.0, "rms": 0.003}) for name in ("uint16", "uint8")]
    assert cells == ["**1.000 (0.003)**", "1.000 (0.003)"]
