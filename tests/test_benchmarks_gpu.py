"""How python -m benchmarks.gpu handles its parts, whatever they do. The parts here are small programs without a GPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from paths import ROOT

# An installed package does not include benchmarks/. It comes last, so that the installed package is the one tested.
sys.path.append(str(ROOT))

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import chunks, processes
from benchmarks.gpu.part import Part, read

CARD = "A Card 80GB, compute capability 9.0"


def part(name, code, seconds=30, **more):
    """A part that runs this program. `FOLDER` is where everything ends up, `RESULT` the file for its findings."""

    def words(run):
        at = {"FOLDER": str(run.folder), "RESULT": str(run.work / f"{name}.json")}
        return [sys.executable, "-c", f"import json, os, sys, time\nglobals().update({at!r})\n{code}"]

    given = {"headline": lambda result: f"{result['n']} found", "lines": lambda result: [f"A table of {result['n']}."]}
    return Part(name, f"The {name}", seconds, words, lambda run: read(run.work / f"{name}.json"), **{**given, **more})


def finds(n):
    return f"open(RESULT, 'w').write(json.dumps({{'n': {n}}}))"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run these parts with the command's own main. Keeps the folder's content, the output and the exit status."""
    monkeypatch.setattr(processes, "GRACE", 1)
    monkeypatch.setattr(command, "LEAST", 1)
    monkeypatch.setattr(command, "find_device", lambda: (CARD, ""))
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]

    def run(*parts, words=()):
        monkeypatch.setattr(command, "PARTS", parts)
        run.status = command.main([*words])
        run.said = capsys.readouterr().out
        (run.folder,) = [path.parent for path in (tmp_path / "results").glob("*/summary.json")]
        run.page = (run.folder / "summary.md").read_text()
        run.numbers = json.loads((run.folder / "summary.json").read_text())
        return run.numbers["parts"]

    yield run
    for number, handler in before:
        signal.signal(number, handler)


def line_of(page, name):
    """The cells of a part's row."""
    (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    return [cell.strip() for cell in line.split("|")][1:-1]


# What a part may do


def test_all_that_is_found_is_in_one_folder(run):
    rows = run(part("one", f"print('hello'); {finds(1)}"), part("two", finds(2)))
    assert run.status == 0
    assert run.folder.name == "gpu-a-card-80gb"
    assert [(row["state"], row["result"], row["exit_status"]) for row in rows.values()] == [
        ("done", {"n": 1}, 0),
        ("done", {"n": 2}, 0),
    ]
    assert line_of(run.page, "one")[:3] == ["`one`", "The one", "1 found"]
    assert "## The two\n\nA table of 2.\n" in run.page
    assert f"# First run on a card: {CARD}\n" in run.page
    for text in (run.said, run.page.replace("**", "")):
        assert re.search(r"Ran to its end after \d+ s of at most 540 s: 2 parts with a result, 0 without", text)
    assert (run.folder / "logs" / "one.txt").read_text().splitlines()[-1] == "hello"


@pytest.mark.parametrize(
    ("code", "state", "why"),
    [
        ("print('the driver is gone'); sys.exit(3)", "failed", "exit status 3; it said last: the driver is gone"),
        ("raise MemoryError('no more')", "failed", "exit status 1; it said last: MemoryError: no more"),
        ("os.kill(os.getpid(), 9)", "failed", "ended by SIGKILL"),
        ("os.abort()", "failed", "ended by SIGABRT"),
        ("pass", "failed", "it left no result"),
        ("print('I see nothing')", "failed", "it left no result; it said last: I see nothing"),
        ("open(RESULT, 'w').write('{')", "failed", "it left no result"),
        ("open(RESULT, 'w').write('[]')", "failed", "its result cannot be read: TypeError"),
        ("open(RESULT, 'w').write('{\"m\": 1}')", "failed", "its result cannot be read: KeyError: 'n'"),
        ("print('busy', flush=True); time.sleep(60)", "time limit", "stopped at its limit of 1 s; it said last: "),
    ],
)
def test_a_part_that_has_no_result_says_why_and_stops_no_other(run, code, state, why):
    rows = run(part("bad", code, seconds=0.6), part("good", finds(1)))
    assert (run.status, rows["bad"]["state"], rows["good"]["state"]) == (1, state, "done")
    assert rows["bad"]["why"].startswith(why)
    assert f"**{state}**: {why}" in line_of(run.page, "bad")[2]
    assert "1 not as it should be (bad)" in run.page
    assert f"bad ... {state} in" in run.said


def test_a_command_that_cannot_be_started_is_a_row(run):
    rows = run(replace(part("bad", ""), command=lambda run: [str(ROOT / "no-such-program")]), part("good", finds(1)))
    assert (rows["bad"]["state"], rows["bad"]["exit_status"], rows["good"]["state"]) == ("failed", 127, "done")
    assert "No such file" in rows["bad"]["why"]


def test_what_was_found_before_a_failure_is_kept(run):
    rows = run(
        part("bad", f"{finds(5)}; print('worse'); sys.exit(1)"), part("slow", f"{finds(6)}; time.sleep(60)", 0.6)
    )
    assert (rows["bad"]["result"], rows["slow"]["result"]) == ({"n": 5}, {"n": 6})
    assert line_of(run.page, "bad")[2] == "5 found; **failed**: exit status 1; it said last: worse"
    assert line_of(run.page, "slow")[2].startswith("6 found; **time limit**: stopped at its limit of 1 s")
    assert "A table of 6." in run.page


def test_a_table_that_cannot_be_made_hides_no_other(run):
    run(part("odd", finds(1), lines=lambda result: [1 / 0]), part("good", finds(2)))
    assert "## The odd\n\nNo table: ZeroDivisionError: division by zero\n" in run.page
    assert "A table of 2." in run.page


def alive(pid):
    """Whether it runs. A process that has ended but was not waited for does not."""
    try:
        os.kill(pid, 0)
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


CHILDREN = """
import signal, subprocess
if {stubborn}: signal.signal(signal.SIGINT, signal.SIG_IGN)
code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code])
open(RESULT, 'w').write(json.dumps(dict(n=1, pids=[os.getpid(), child.pid])))
{then}
"""


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("then", ["time.sleep(60)", "sys.exit(0)"])
def test_nothing_is_left_of_a_part(run, stubborn, then):
    """Neither of a part that overruns, nor of one that ends before its children."""
    start = time.monotonic()
    rows = run(part("slow", CHILDREN.format(stubborn=stubborn, then=then), seconds=1))
    assert time.monotonic() - start < 10
    assert rows["slow"]["state"] == ("done" if "exit" in then else "time limit")
    deadline = time.monotonic() + 5
    while any(map(alive, rows["slow"]["result"]["pids"])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, rows["slow"]["result"]["pids"]))


def test_a_part_that_is_stopped_may_write_what_it_has(run):
    code = f"try: time.sleep(60)\nexcept KeyboardInterrupt: {finds(7)}"
    assert run(part("slow", code, seconds=1))["slow"]["result"] == {"n": 7}


def test_a_part_without_its_tool_is_left_out(run):
    rows = run(part("lacks", finds(1), missing=lambda: "ncu is not installed"), part("good", finds(1)))
    assert run.status == 0  # a missing tool is not an error
    assert line_of(run.page, "lacks")[2] == "left out: ncu is not installed"
    assert rows["lacks"]["result"] is None
    assert not (run.folder / "logs" / "lacks.txt").exists()


# Limits


def test_the_limit_of_all_is_kept(run):
    slow = f"{finds(1)}; time.sleep(60)"
    start = time.monotonic()
    rows = run(*(part(name, slow) for name in "abc"), words=["--limit", "5"])
    assert time.monotonic() - start < 7
    assert [row["state"] for row in rows.values()] == ["time limit", "no time", "no time"]
    assert rows["a"]["limit_seconds"] == 4  # one second is kept for its end
    assert re.fullmatch(r"\*\*no time\*\*: \d s were left", line_of(run.page, "b")[2])
    assert run.status == 1


def test_a_part_may_use_what_the_others_have_left_over():
    one, two, three = (part(str(n), "", seconds=n) for n in (10, 20, 30))
    assert command.allowance(one, [two, three], 60) == 10
    assert command.allowance(one, [two, three], 65) == 15
    assert command.allowance(one, [two, three], 540) == 20
    assert command.allowance(two, [three], 35) == 20
    assert command.allowance(three, [], 25) == 25 - processes.GRACE


def test_every_part_has_its_time_whatever_the_others_do():
    assert sum(one.seconds for one in command.PARTS) + processes.GRACE <= command.LIMIT <= 9 * 60
    names = [one.name for one in command.PARTS]
    assert len(set(names)) == len(names)
    files = [file for one in command.PARTS for file in one.files]
    assert len({*files, "summary.md", "summary.json"}) == len(files) + 2


# The summary


def test_the_summary_is_there_after_each_part(run):
    copy = "open(RESULT, 'w').write(json.dumps(dict(n=2, page=open(FOLDER + '/summary.md').read())))"
    page = run(part("one", finds(1)), part("two", copy), part("three", finds(3)))["two"]["result"]["page"]
    assert line_of(page, "one")[2] == "1 found"
    assert "**Not at its end: 1 of 3 parts**" in page
    assert "`two`" not in page


def test_no_folder_of_this_machine_is_told(run, tmp_path):
    xml = '<testsuites><testsuite hostname="box7" tests="1">/home/someone/x/test_a.py</testsuite></testsuites>'
    code = f"""
print("at /home/someone/project/steps.py")
open(FOLDER + "/one.xml", "w").write({xml!r})
open(RESULT, "w").write(json.dumps({{"n": "in /home/someone/x.py", "rows": [{{"failed": "no /opt/a/b.so"}}]}}))
raise RuntimeError("cannot open /home/someone/project/libcuda.so.1")
"""
    folder = tmp_path / "results" / "mine"
    run(part("one", code, files=("one.xml",)), words=["--to", str(folder), "--limit", "99"])
    assert run.folder == folder
    assert "cannot open libcuda.so.1" in line_of(run.page, "one")[2]
    assert "in x.py found" in line_of(run.page, "one")[2]
    assert run.numbers["parts"]["one"]["result"]["rows"] == [{"failed": "no b.so"}]
    assert run.numbers["command"] == "python -m benchmarks.gpu --limit 99"
    texts = {file.name: file.read_text() for file in folder.rglob("*") if file.is_file()}
    assert set(texts) == {"summary.md", "summary.json", "one.txt", "one.xml"}
    for name, text in texts.items():
        assert not re.search(r"/home|someone|/opt|box7", text), name
        assert str(ROOT) not in text
        assert str(tmp_path) not in text


def test_what_an_earlier_run_left_is_not_taken_for_this_one(run):
    first = part("one", "open(FOLDER + '/x.json', 'w').write('{\"n\": 1}')", files=("x.json",))
    first = replace(first, result=lambda run: read(run.folder / "x.json"))
    assert run(first)["one"]["result"] == {"n": 1}
    rows = run(replace(first, command=lambda run: [sys.executable, "-c", "pass"]))
    assert (rows["one"]["result"], rows["one"]["why"]) == (None, "it left no result")


def test_where_there_is_no_device_only_what_needs_none_is_run(run, monkeypatch):
    monkeypatch.setattr(command, "find_device", lambda: (None, "no CUDA device that works: no driver"))
    rows = run(part("one", finds(1), needs_device=False), part("two", finds(2)))
    assert (run.status, run.folder.name) == (1, "gpu-no-device")
    assert [row["state"] for row in rows.values()] == ["done", "no device"]
    assert line_of(run.page, "two")[2] == "**no device**"
    assert "\nThere is no CUDA device that works: no driver.\n" in run.page


def test_why_there_is_no_device_is_the_package_s_own_reason(monkeypatch):
    monkeypatch.setattr(command, "FIND", "raise RuntimeError('there is no NVIDIA driver; install one')")
    assert command.find_device() == (None, "no CUDA device that works: there is no NVIDIA driver; install one")
    monkeypatch.setattr(command, "FIND", "print('warming up'); print('A Card')")
    assert command.find_device() == ("A Card", "")
    monkeypatch.setattr(command, "PATIENCE", 0.5)
    monkeypatch.setattr(command, "FIND", "import time; time.sleep(60)")
    start = time.monotonic()
    assert command.find_device() == (None, "no CUDA device that answers in 0.5 s")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("device", "rehearsal"), [("VGPU (PTX on the CPU), compute capability 9.0", True), (CARD, False)]
)
def test_a_virtual_device_is_only_rehearsed_on(run, monkeypatch, device, rehearsal):
    asked = []
    monkeypatch.setattr(command, "find_device", lambda: (device, ""))
    one = part("one", finds(1))
    run(replace(one, command=lambda run: asked.append(run.rehearse) or one.command(run)))
    assert (asked, "A rehearsal" in run.page) == ([rehearsal], rehearsal)
    assert f"# First run on a card: {device}\n" in run.page


def test_a_part_s_surroundings(run, monkeypatch):
    """The checkout comes first, kernels are kept only for the run, and a part may have its own variables."""
    monkeypatch.delenv("RMSPROP_GPU_CACHE_DIR", raising=False)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    names = ["PYTHONPATH", "RMSPROP_GPU_CACHE_DIR", "HERE"]
    sees = f"json.dumps(dict(n=1, cwd=os.getcwd(), **{{x: os.environ.get(x) for x in {names}}}))"
    seen = {}
    one = part("one", f"open(RESULT, 'w').write({sees})", environment={"HERE": "yes"})
    run(replace(one, result=lambda run: seen.update(one.result(run)) or {"n": 1}))  # before folders are left out
    assert (seen["HERE"], seen["cwd"], seen["PYTHONPATH"]) == ("yes", str(ROOT), f"{ROOT}{os.pathsep}elsewhere")
    assert not Path(seen["RMSPROP_GPU_CACHE_DIR"]).exists()  # not any longer
    assert chunks.PART.environment == {"RMSPROP_GPU_CACHE": "0"}  # a kernel's key ignores threads


def test_ctrl_c_ends_the_part_and_writes_the_summary(tmp_path, answers_ctrl_c):
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
sys.path.append({str(ROOT / "tests" / "helpers")!r})
from test_benchmarks_gpu import CARD, command, finds, part, processes
processes.GRACE = 1
command.find_device = lambda: (CARD, "")
wait = "open(FOLDER + '/pid', 'w').write(str(os.getpid())); time.sleep(60)"
command.PARTS = part("one", finds(1)), part("two", finds(2) + "; " + wait), part("three", finds(3))
sys.exit(command.main(["--to", {str(tmp_path)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    numbers, page = json.loads((tmp_path / "summary.json").read_text()), (tmp_path / "summary.md").read_text()
    assert [row["state"] for row in numbers["parts"].values()] == ["done", "interrupted", "interrupted"]
    assert numbers["parts"]["two"]["result"] == {"n": 2}
    assert "**Interrupted** after" in page
    assert "Interrupted after" in said
    assert not alive(int((tmp_path / "pid").read_text()))


@pytest.mark.gpu
def test_a_few_parts_run_on_a_device(tmp_path):
    names = ["uploads", "chunks"]
    words = ["-m", "benchmarks.gpu", "--rehearse", "--to", str(tmp_path), "--only", *names]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads((tmp_path / "summary.json").read_text())
    assert {name: row["state"] for name, row in numbers["parts"].items()} == dict.fromkeys(names, "done")
    assert all("failed" not in row for part in numbers["parts"].values() for row in part["result"].get("rows", ()))
    assert "2 parts with a result, 0 without" in done.stdout
