"""Every block of code in the README and the pages runs, in the order of its page."""

import doctest
import importlib
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from pages import PAGES, blocks, code, named
from paths import ROOT

RUNS = {page: code(page) for page in PAGES}
# Without a library, and with each that some block of a page needs.
CASES = [
    pytest.param(page, library, marks=[pytest.mark.gpu] * (library == "cupy"), id=f"{named(page)}-{library or 'alone'}")
    for page, found in RUNS.items()
    for library in sorted({block.needs for block in found}, key=str)
]


# Known parts of their output.
SAYS = {
    "README.md": ["RMSProp(2 tensors, 32,896 parameters of float32", ", 3 steps)"],
    "docs/start/ten_lines.md": ["2 problems, nothing was changed", "(256, 128)"],
    "docs/howto/arrays.md": ["['params.Dense_0.kernel', 'params.Dense_0.bias']"],
    "docs/howto/gradients.md": ["1 nan [", "15.8113"],  # the norm of a thousand halves
    "docs/howto/many_processes.md": ["| 8 | 182 MiB | 360 MiB |", "3 steps, on 1 ranks", "3\n"],
    "docs/howto/profile.md": ["RMSProp over 2 tensors, 4,001,000 elements", "momentum / plain", "1,000,000"],
    "docs/understand/one_pass.md": ["20 bytes per element"],
    "docs/understand/a_step.md": ["update_kernel[float32, momentum]"],
}


@pytest.mark.parametrize(("page", "library"), CASES)
def test_blocks_run(page, library, tmp_path, monkeypatch, capsys):
    if library:
        pytest.importorskip(library, exc_type=ImportError)
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in RUNS[page]:
        if block.needs in (None, library):
            run(block, page, scope)
    pyplot.close("all")
    said = capsys.readouterr().out
    if library == ("mpi4py" if page.stem == "many_processes" else None):
        assert [text for text in SAYS.get(named(page), []) if text not in said] == []
    shown = page.read_text().splitlines()
    assert [line for line in said.splitlines() if line.startswith("| ") and line not in shown] == []  # rows of a table
    if library == "cupy" and page.stem == "cuda_graphs":
        assert int(scope["opt"].state[0]["step"]) == 4  # one eager step, three replays


def run(block, page, scope):
    if block.language == "python":
        with warnings.catch_warnings():
            if block.needs:
                warnings.simplefilter("default")  # warnings of other packages
            exec(compile("\n" * (block.line - 1) + block.text, named(page), "exec"), scope)
        return
    test = doctest.DocTestParser().get_doctest(block.text, scope, named(page), str(page), block.line)
    said = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append, clear_globs=False)
    scope.update(test.globs)
    assert not said, "".join(said)


def test_there_is_code():
    assert sum(map(len, RUNS.values())) > 40
    assert {block.needs for found in RUNS.values() for block in found} >= {None, "cupy", "torch", "mpi4py"}


# Blocks for a shell: the lines to run. Lines that install something, or are for other machines, are left out.
SHELL = {
    "howto/checkpoints.md": "rmsprop-gpu inspect opt.safetensors",
    "howto/threads.md": "rmsprop-gpu info",
    "howto/many_processes.md": "mpiexec",
    "start/install.md": "rmsprop-gpu info",
}
NOT_RUN = re.compile(r"pip install|rmsprop-gpu demo")  # CI runs the README's two commands literally


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "sh"))], ids=named)
def test_shell_blocks_run(page, tmp_path):
    ran = []
    for block in blocks(page, "sh"):
        for line in block.text.splitlines():
            if line.strip() and not NOT_RUN.search(line):
                prepare(page, line, tmp_path)
                run_it = {"shell": True, "capture_output": True, "text": True, "timeout": 120}
                done = subprocess.run(here(line), check=False, cwd=tmp_path, **run_it)
                assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
                ran.append(line)
    assert any(SHELL.get(named(page).removeprefix("docs/"), "") in line for line in ran or [""])


def here(line):
    """The line with this environment's programs."""
    scripts = Path(sys.executable).parent
    line = re.sub(r"\brmsprop-gpu\b", f"{shlex.quote(sys.executable)} -m rmsprop_gpu", line)
    line = re.sub(r"\bmpiexec\b", shlex.quote(str(scripts / "mpiexec")), line)
    return re.sub(r"(?<=\s)python(?=\s)", shlex.quote(sys.executable), line)


def prepare(page, line, folder):
    """Create the files that a line needs: the checkpoint, or the program above it on its page."""
    if "mpiexec" in line:
        pytest.importorskip("mpi4py")
        (folder / "train.py").write_text(next(b.text for b in RUNS[page] if b.needs == "mpi4py"))
    if "inspect" in line:
        np, package = importlib.import_module("numpy"), importlib.import_module("rmsprop_gpu")
        package.RMSProp({"w": np.ones(3)}).save(folder / "opt.safetensors")


def test_commands_of_the_readme_are_word_for_word():
    text = (ROOT / "README.md").read_text()
    assert '\npip install ".[demo]" && rmsprop-gpu demo\n' in text
    assert '\npip install ".[test]" && pytest\n' in text


def test_the_readme_fits_a_few_screens():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    first = " ".join(lines[:25])  # the first screen says what is not known
    assert "It has run on one GPU" in first
    assert "are untested" in first
