"""The command line, mostly as a user runs it: a process, its exit status, its output."""

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

import rmsprop_gpu
from rmsprop_gpu import cli
from rmsprop_gpu.cli import main
from rmsprop_gpu.demo import train
from rmsprop_gpu.demo.train import Run
from rmsprop_gpu.extras import command
from rmsprop_gpu.kernels import compiling, disk
from rmsprop_gpu.kernels.cpu_drive import SERIAL_BELOW

COMMAND = (sys.executable, "-m", "rmsprop_gpu")


def run(*words, command=COMMAND, **environment):
    return subprocess.run(
        [*command, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.fixture
def no_training(monkeypatch):
    """Refusals come before anything is loaded or trained."""

    def fail(self):
        raise AssertionError("trained")

    monkeypatch.setattr(Run, "load", fail)
    monkeypatch.setattr(Run, "epochs", fail)


def test_demo_prints_an_epoch_a_line_and_writes_its_files(tmp_path):
    done = run(
        "demo",
        "--device",
        "cpu",
        "--epochs",
        3,
        "--seed",
        5,
        "--json",
        tmp_path / "a.json",
        "--plot",
        tmp_path / "a.png",
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "1,437" in lines[0]
    assert "seed 5" in lines[0]
    result = json.loads((tmp_path / "a.json").read_text())
    for line, epoch in zip(lines[1:], result["history"], strict=False):
        assert line.split() == [
            *("epoch", str(epoch["epoch"]), "loss", f"{epoch['loss']:.6f}"),
            *("test", "accuracy", f"{epoch['accuracy']:.2%}"),
        ]
    assert lines[4].split()[:3] == ["test", "accuracy", f"{result['accuracy']:.2%}"]
    assert png_size(tmp_path / "a.png") == (1350, 600)

    want = {"version": rmsprop_gpu.__version__, "optimizer": "RMSProp", "device": "cpu", "seed": 5, "epochs": 3}
    assert {name: result[name] for name in want} == want
    assert result["steps"] == 3 * 45
    assert result["bytes_moved"] == 3 * 45 * 20 * result["parameters"]
    assert result["hyperparameters"]["lr"] == 3e-3
    assert result["accuracy"] == result["history"][-1]["accuracy"] > 0.8
    assert 0 < result["update_seconds"] < result["compile_seconds"] / 2  # a new process has to compile


def test_quiet_prints_the_final_lines_only(capsys):
    assert main(["demo", "--quiet", "--epochs", "1", "--momentum", "0.9"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("test accuracy")
    assert "epoch" not in out
    for text in ("17,226 parameters in 6 tensors", "45 steps of RMSProp", "us for three lines without the switches,"):
        assert text in out
    assert re.search(r"^updates +match the float64 reference to rounding *$", out, re.MULTILINE)
    assert not re.search("oracle|bytes", out)
    assert all(len(line) <= 80 for line in out.splitlines())


def test_verbose_says_the_traffic_and_the_deviation(capsys):
    assert main(["demo", "--quiet", "--epochs", "1", "--momentum", "0.9", "--verbose"]) == 0
    out = capsys.readouterr().out
    for text in ("28 bytes per element", "GB/s", "off the oracle by", "  found in", "is the parameter's rounding"):
        assert text in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_no_check_says_nothing_of_the_oracle(capsys):
    assert main(["demo", "--quiet", "--epochs", "1", "--no-check", "--verbose"]) == 0
    assert not re.search("oracle|reference", capsys.readouterr().out)


def test_updates_that_do_not_match_are_said_to_be_off(monkeypatch, capsys):
    init = Run.__init__

    def other(self, settings):
        init(self, settings)
        self.oracle._hyper["eps"] = 1e-3  # the oracle and the optimizer differ, whichever is wrong

    monkeypatch.setattr(Run, "__init__", other)
    assert main(["demo", "--quiet", "--epochs", "1"]) == 0
    said = r"^updates +off the float64 reference by [\d.]+ of the largest update *$"
    assert re.search(said, capsys.readouterr().out, re.MULTILINE)


def test_the_kernels_are_compiled_once(tmp_path):
    """A new process each time: the first compiles, the second finds the kernels. The third keeps none, and says so."""
    words = ("demo", "--quiet", "--epochs", 1, "--no-check")
    for kept, said in (("1", "compiled, and kept on disk"), ("1", "found on disk"), ("0", "compiled")):
        done = run(*words, RMSPROP_GPU_CACHE=kept, RMSPROP_GPU_CACHE_DIR=str(tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(rf"s of it for the kernels: {said} *$", done.stdout, re.MULTILINE)


def test_results_go_to_standard_output(tmp_path):
    done = run("demo", "--epochs", 1, "--json", "-", "--plot", tmp_path / "a.svg")
    assert done.returncode == 0
    assert json.loads(done.stdout)["epochs"] == 1
    assert "epoch   1 " in done.stderr
    assert "test accuracy  " in done.stderr
    assert not (ROOT / "-").exists()


@pytest.mark.parametrize(("name", "begins"), [("a.svg", b"<?xml"), ("a.PDF", b"%PDF"), ("a", b"\x89PNG")])
def test_a_plot_is_what_its_name_says(name, begins, tmp_path):
    file = tmp_path / name
    assert main(["demo", "--quiet", "--epochs", "1", "--no-check", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(begins)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--nesterov", "--nesterov is without effect, since momentum is 0.0"),
        ("--lr-in-momentum --momentum 0", "--lr-in-momentum is without effect, since momentum is 0.0"),
        ("--decoupled-weight-decay", "--decoupled-weight-decay is without effect, since weight_decay is 0.0"),
        ("--eps-in-sqrt --eps 0", "--eps-in-sqrt is without effect, since eps is 0.0"),
        ("--nesterov --momentum 0.5 --centered --eps-in-sqrt --decoupled-weight-decay --weight-decay 0.1", ""),
    ],
)
def test_a_switch_without_effect_is_named(words, said, capsys):
    assert main(["demo", "--quiet", "--epochs", "1", "--no-check", *words.split()]) == 0
    assert capsys.readouterr().err == (f"rmsprop-gpu: {said}\n" if said else "")


def test_options_reach_the_optimizer(tmp_path):
    numbers = {"lr": 0.01, "alpha": 0.8, "eps": 1e-4, "weight_decay": 0.1, "momentum": 0.5, "clipvalue": 2.0}
    numbers["initial_scale"] = 0.25
    flags = ["centered", "nesterov", "eps_in_sqrt", "lr_in_momentum", "bias_correction", "decoupled_weight_decay"]
    want = {**numbers, **dict.fromkeys(flags, True)}
    words = [f"--{name}={value}" if name in numbers else f"--{name}" for name, value in want.items()]
    words = [word.replace("_", "-") for word in words]
    file = tmp_path / "a.json"
    assert main(["demo", "--quiet", "--epochs", "1", "--batch-size", "500", *words, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert {name: result["hyperparameters"][name] for name in want} == want
    assert result["steps"] == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("nonsense", "invalid choice: 'nonsense'"),
        ("demo --nonsense", "unrecognized arguments: --nonsense"),
        ("demo --lr", "--lr: expected one argument"),
        ("demo --lr fast", "--lr: invalid float value: 'fast'"),
        ("demo --lr -1", "lr is -1.0; wanted a finite number >= 0"),
        ("demo --lr nan", "lr is nan; wanted a finite number >= 0"),
        ("demo --alpha 1", "alpha is 1.0; wanted a number with 0 <= alpha < 1"),
        ("demo --eps 1e-60", "eps is 1e-60, which is 0 in float32"),
        ("demo --momentum 2", "momentum is 2.0; wanted"),
        ("demo --epochs 0", "--epochs: '0' is not a whole number above 0"),
        ("demo --batch-size 1.5", "--batch-size: '1.5' is not a whole number above 0"),
        ("demo --seed -1", "--seed: '-1' is not a whole number from 0 to 4294967295"),
        ("demo --device tpu", "--device: invalid choice: 'tpu'"),
        ("demo --optimizer adam", "--optimizer: invalid choice: 'adam'"),
        ("demo --optimizer adagrad --centered", "--centered is no hyperparameter of adagrad; it has --lr, --eps"),
        ("demo --optimizer adagrad --momentum 0", "--momentum is no hyperparameter of adagrad"),
        ("demo --plot {tmp}/a.docx", "a.docx: Format 'docx' is not supported (supported formats: "),
        ("demo --plot {tmp}/no/a.png", "a.png cannot be written: No such file or directory"),
        ("demo --json {tmp}/no/a.json", "a.json cannot be written: No such file or directory"),
        ("demo --json {tmp}", "cannot be written: Is a directory"),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_bad_use_gets_one_line(words, said, capsys, tmp_path):
    assert main(words.format(tmp=tmp_path).split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.startswith("rmsprop-gpu: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_bad_use_of_the_process():
    done = run("demo", "--lr", "-1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_the_look_at_a_file_changes_nothing(tmp_path, monkeypatch):
    old, new = tmp_path / "old.json", tmp_path / "new.png"
    old.write_text("old")
    monkeypatch.setattr(Run, "load", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["demo", "--json", str(old), "--plot", str(new)]) == 130
    assert old.read_text() == "old"
    assert not new.exists()


@pytest.mark.usefixtures("no_training")
def test_a_device_that_does_not_work(monkeypatch, capsys):
    def no_cuda(device):
        assert device == "cuda"
        raise RuntimeError("no CUDA here, install it")

    monkeypatch.setattr(train, "array_module", no_cuda)
    assert main(["demo", "--device", "cuda"]) == 1
    assert capsys.readouterr() == ("", "rmsprop-gpu: --device cuda: no CUDA here, install it\n")


@pytest.mark.gpu
def test_info_tells_the_device_the_driver_and_the_versions():
    done = run("info", RMSPROP_GPU_CACHE="0")  # a driver may print something about a kept kernel that it rejects
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line[:16].strip(): line[17:] for line in done.stdout.splitlines()}
    free = r"\d+\.\d of"  # free memory, which this process may use
    assert re.split(free, rows["backend cuda"]) == re.split(free, rmsprop_gpu.available_backends()["cuda"])
    assert "compute capability" in rows["backend cuda"]
    assert rows["cuda"].startswith("driver for 1")
    assert "cupy-cuda" in rows["cupy"]
    assert rows["numba-cuda"][0].isdigit()
    assert rows["kernels"] == "are compiled, linked and loaded"
    assert rows["linked by"].startswith(("nvJitLink ", "the driver; "))


@pytest.mark.gpu
def test_the_demo_trains_on_a_device_as_on_the_cpu(tmp_path):
    found = {}
    for device in ("cuda", "cpu"):
        path = tmp_path / f"{device}.json"
        words = ("--epochs", 2, "--batch-size", 128, "--momentum", 0.5, "--json", path)
        done = run("demo", "--device", device, *words, RMSPROP_GPU_CACHE="0")
        assert (done.returncode, done.stderr) == (0, "")
        found[device] = json.loads(path.read_text())
        assert f"on {'a CUDA device' if device == 'cuda' else 'the CPU'}" in done.stdout
    cuda, cpu = found["cuda"], found["cpu"]
    assert (cuda["device"], cpu["device"]) == ("cuda", "cpu")
    # Matrix products sum in different orders. Updates are the same.
    assert cuda["loss"] == pytest.approx(cpu["loss"], rel=1e-4)
    assert cuda["deviation"]["beyond"] < 1e-6


@pytest.mark.parametrize("module", ["sklearn.datasets", "rich.console", "matplotlib.figure"])
def test_a_missing_library_names_the_extra(module, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--plot", str(tmp_path / "a.png")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rmsprop-gpu: ")
    assert err.endswith(f"; it comes with the extra demo: {command('demo')}\n")
    assert err.count("\n") == 1


def test_divergence_is_a_failure(capsys, tmp_path):
    files = {name: tmp_path / f"a.{name}" for name in ("json", "png")}
    words = ["--json", str(files["json"]), "--plot", str(files["png"])]
    assert main(["demo", "--quiet", "--lr", "1e30", *words]) == 1
    assert capsys.readouterr().err == (
        "rmsprop-gpu: the loss is nan after 1 of 60 epochs: the training diverged, a smaller --lr may help\n"
    )
    valid = json.loads(files["json"].read_text(), parse_constant=pytest.fail)
    assert valid["loss"] is None
    png_size(files["png"])


def test_ctrl_c_ends_it_cleanly(tmp_path, answers_ctrl_c):
    file = tmp_path / "a.json"
    words = [*COMMAND, "demo", "--epochs", "1000000", "--json", str(file)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = [next(process.stdout) for _ in range(4)]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert lines[3].startswith("epoch   3 ")
    assert process.returncode == 130
    result = json.loads(file.read_text())
    assert err == f"rmsprop-gpu: interrupted after {result['epochs']} of 1000000 epochs\n"
    assert "test accuracy  " in out
    assert len(result["history"]) == result["epochs"] >= 3


def test_ctrl_c_before_the_first_epoch(monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_compile", interrupted)
    assert main(["demo", "--quiet"]) == 130
    assert capsys.readouterr() == ("", "rmsprop-gpu: interrupted\n")


def test_without_a_compiler_the_commands_say_so_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "_jit_was_off", True)
    monkeypatch.setattr(compiling, "_compiled", {})
    assert main(["demo", "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("rmsprop-gpu: Numba's compiler is off (NUMBA_DISABLE_JIT is set")
    assert main(["info"]) == 0
    assert "do not work: Numba's compiler is off" in capsys.readouterr().out


def test_info_needs_no_extra_and_loads_no_cuda():
    program = """
import sys
from pathlib import Path
for name in ("sklearn", "rich", "matplotlib", "cupy"):
    sys.modules[name] = None
from rmsprop_gpu.cli import main
status = main(["info"])
assert not [name for name in sys.modules if name.startswith(("numba.cuda", "numba_cuda"))]
sys.exit(status)
"""
    done = run("-c", program, command=(sys.executable,), NUMBA_NUM_THREADS="2", NUMBA_THREADING_LAYER="workqueue")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line[:16].strip(): line[17:] for line in done.stdout.splitlines()}
    assert rows["rmsprop-gpu"] == rmsprop_gpu.__version__
    assert rows["python"].startswith(".".join(map(str, sys.version_info[:3])))
    for module in ("numpy", "numba", "llvmlite"):
        assert rows[module] == sys.modules[module].__version__
    assert {"cupy", "numba-cuda"} < rows.keys()
    assert rows["backend cpu"] == rmsprop_gpu.available_backends()["cpu"]
    assert rows["backend cuda"].startswith("not available: CuPy, which holds the arrays, is not installed; install")
    assert (rows["threads"], rows["threading layer"]) == ("2", "workqueue")
    assert rows["kernels on disk"].endswith("of at most 128.0 MiB")


def test_info_survives_threads_that_do_not_start():
    done = run("info", NUMBA_THREADING_LAYER="nonsense")
    assert (done.returncode, done.stderr) == (0, "")
    assert "threads          do not work: The threading layer requested 'nonsense'" in done.stdout


def test_info_takes_a_parallel_step(monkeypatch, capsys):
    sizes = []
    monkeypatch.setattr(cli.RMSProp, "step", lambda self, grads: sizes.append(grads.size))
    assert main(["info"]) == 0
    assert sizes[0] >= SERIAL_BELOW
    assert "threading layer" in capsys.readouterr().out


def test_the_cache_is_shown_and_cleared(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "not yet" / "there"
    monkeypatch.setenv("RMSPROP_GPU_CACHE_DIR", str(folder))
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == f"{folder}: 0 kernels, 0.0 MiB of at most 128.0 MiB\n"
    disk.write("one", bytes(1 << 20))
    disk.write("two", bytes(1 << 19))
    (folder / "theirs.part").touch()
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == f"{folder}: 2 kernels, 1.5 MiB of at most 128.0 MiB\n"
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"2 kernels deleted from {folder}, 1.5 MiB\n"
    assert [path.name for path in folder.iterdir()] == ["theirs.part"]
    monkeypatch.setenv("RMSPROP_GPU_CACHE", "0")
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == "off (RMSPROP_GPU_CACHE=0): nothing to delete\n"


def test_a_cache_that_cannot_be_written_to_is_said(monkeypatch, capsys, tmp_path):
    def said():
        assert main(["cache"]) == 0
        return capsys.readouterr().out

    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("RMSPROP_GPU_CACHE_DIR", str(tmp_path / "kernels"))
    assert not said().endswith("; it cannot be written to\n")
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: False)
        assert said().endswith("; it cannot be written to\n")
    with monkeypatch.context() as patched:  # a parent folder that may not be searched
        patched.setattr(Path, "exists", refused)
        assert said().endswith("; it cannot be written to\n")
    (tmp_path / "kernels").touch()  # not a folder
    assert said().endswith("; it cannot be written to\n")


def test_a_cache_that_cannot_be_cleared_is_an_error(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RMSPROP_GPU_CACHE_DIR", str(tmp_path))
    disk.write("one", b"code")

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "a kernel")

    monkeypatch.setattr(Path, "unlink", refused)
    assert main(["cache", "--clear"]) == 1
    assert capsys.readouterr().err == "rmsprop-gpu: [Errno 13] Permission denied: 'a kernel'\n"


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"rmsprop-gpu {rmsprop_gpu.__version__}\n"
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    out = capsys.readouterr().out
    assert "0.003 for rmsprop, 0.03" in " ".join(out.split())
    assert math.isclose(train.LR["adagrad"], 0.03)


def test_links_and_files_named_twice_are_left_alone(tmp_path, capsys):
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "target.json")
    assert main(["demo", "--json", str(link), "--lr", "-1"]) == 2
    assert main(["demo", "--json", str(tmp_path / "x.png"), "--plot", str(tmp_path / "x.png")]) == 2
    assert "both name" in capsys.readouterr().err
    assert main(["demo", "--json", str(link), "--plot", str(tmp_path / "no folder" / "x.png")]) == 2
    assert link.is_symlink()
    assert not (tmp_path / "x.png").exists()
