"""The documentation runs: docstrings, the README's example; and says what it must."""

import doctest
import importlib
import inspect
import pkgutil
import re

import numpy as np
import pytest
from paths import ROOT

import rmsprop_gpu
from rmsprop_gpu.conventions.preset import REQUIRED
from rmsprop_gpu.conventions.presets import PRESETS

README = ROOT / "README.md"
MODULES = [
    m.name for m in pkgutil.walk_packages(rmsprop_gpu.__path__, "rmsprop_gpu.") if not m.name.endswith("__main__")
]


NEED_CUDA = {
    "rmsprop_gpu.kernels.cuda",
    "rmsprop_gpu.kernels.cuda_code",
    "rmsprop_gpu.kernels.cuda_copies",
    "rmsprop_gpu.kernels.cuda_target",
    "rmsprop_gpu.steps.device",
    "rmsprop_gpu.profiling.device",
    "rmsprop_gpu.steps.gradients",
    "rmsprop_gpu.steps.on_cupy",
    "rmsprop_gpu.steps.order",
    "rmsprop_gpu.steps.resident",
    "rmsprop_gpu.steps.uploads",
    "rmsprop_gpu.torch.cuda_steps",
}


@pytest.mark.parametrize("module", [pytest.param(m, marks=[pytest.mark.gpu] * (m in NEED_CUDA)) for m in MODULES])
def test_examples_in_docstrings_run(module):
    if module.startswith("rmsprop_gpu.torch"):
        pytest.importorskip("torch")
    assert doctest.testmod(importlib.import_module(module)).failed == 0


@pytest.mark.parametrize("name", rmsprop_gpu.__all__)
def test_public_names_are_documented_with_an_example(name):
    doc = inspect.getdoc(getattr(rmsprop_gpu, name))
    assert "Examples\n--------\n" in doc
    for parameter in inspect.signature(getattr(rmsprop_gpu, name)).parameters:
        assert parameter in doc or name == "adagrad_update"


def example(said):
    """The one example in the README that says this."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if said in code]
    return code


def test_readme_example_runs(capsys):
    code = example("print(opt)")
    assert len(code.strip().splitlines()) <= 12
    scope = {}
    exec(code, scope)
    assert np.isfinite(scope["weights"]["w"]).all()
    assert capsys.readouterr().out.startswith("RMSProp(")


@pytest.mark.gpu
def test_readme_example_of_a_graph_runs():
    scope = {}
    exec(example("begin_capture"), scope)
    assert int(scope["opt"].state[0]["step"]) == 4


def test_readme_example_of_a_profile_runs(capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    exec(example("import profile"), {})
    assert "RMSProp over 2 tensors, 4,001,000 elements" in capsys.readouterr().out
    pyplot.close("all")


def test_readme_example_of_profiles_beside_each_other_runs(capsys):
    exec(example("import Times, compare"), {})
    printed = capsys.readouterr().out
    assert "momentum / plain" in printed
    assert "1,000,000" in printed


def test_readme_example_of_gradients_runs(capsys):
    scope = {}
    exec(example("skipped_steps"), scope)
    opt, weight = scope["opt"], scope["weight"]
    assert (opt.skipped_steps, opt.steps, int(opt.state[0]["step"])) == (1, 3, 2)
    assert np.isfinite(weight).all()
    assert np.isnan(opt.last_grad_norm)  # of the step that was skipped
    assert capsys.readouterr().out.startswith("1 nan [")


def test_readme_example_of_a_file_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(example("opt.save("), scope)
    opt = scope["opt"]
    np.savez("opt.npz", **opt.state_dict(flat=True))
    with np.load("opt.npz", allow_pickle=False) as saved:
        assert opt.load_state_dict(saved) == ([], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["opt.npz", "opt.safetensors"]


def test_readme_has_the_two_commands():
    text = README.read_text()
    assert '\npip install ".[demo]" && rmsprop-gpu demo\n' in text
    assert '\npip install ".[test]" && pytest\n' in text


def test_readme_says_what_explain_says():
    (block,) = re.findall(r"```pycon\n(.*?)```", README.read_text(), re.DOTALL)
    test = doctest.DocTestParser().get_doctest(block, {}, "README", str(README), 0)
    assert doctest.DocTestRunner().run(test).failed == 0
    assert len(test.examples) == 4


def test_readme_lists_every_preset_with_its_defaults():
    rows = dict(re.findall(r"^\| `(\w+)`.*?\| (.*)$", README.read_text(), re.MULTILINE))
    for name, preset in PRESETS.items():
        for key, default in preset.arguments.items():
            if key in ("lr", "learning_rate", "alpha", "rho", "decay", "eps", "epsilon") and key not in preset.own:
                cells = [cell.split() for cell in rows[name].replace(",", "").split(" | ")]
                found = [words[1] for words in cells if words and words[0] == f"`{key}`"]
                want = ["required"] if default is REQUIRED else [] if default is None else [default]
                assert [x if x == "required" else float(x) for x in found] == want, (name, key)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    files = [link for link in links if "://" not in link]
    assert [link for link in files if not (ROOT / page).parent.joinpath(link).exists()] == []
