"""Docstrings: their examples run, public names have one, and the table of presets is correct."""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
import sys
from typing import get_args

import pytest
from paths import ROOT

import rmsprop_gpu
from rmsprop_gpu import profiling
from rmsprop_gpu import reference as mathematics
from rmsprop_gpu.conventions.preset import REQUIRED
from rmsprop_gpu.conventions.presets import PRESETS

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


PUBLIC = ("rmsprop_gpu", "rmsprop_gpu.profiling", "rmsprop_gpu.distributed", "rmsprop_gpu.torch")


def without_example(cls):
    """The methods of a class that are ours and have no example. For optimizers, properties too."""
    for name, x, function in methods(cls):
        exempt = isinstance(x, property) and "profiling" in cls.__module__
        if not exempt and ">>> " not in (inspect.getdoc(function) or ""):
            yield name


# Classes whose reference shows no constructor and only these methods.
SHOWN = dict(re.findall(r'"(\w+)": "(\w*)"', (ROOT / "docs/_templates/autosummary/class.rst").read_text()))


def methods(cls):
    """The package's public methods and properties of a class: name, member, function."""
    for name, x in inspect.getmembers_static(cls):
        function = inspect.unwrap(x.fget if isinstance(x, property) else getattr(x, "__func__", x))
        ours = inspect.isfunction(function) and function.__module__.startswith("rmsprop_gpu")
        if ours and not name.startswith("_") and name in (SHOWN.get(cls.__name__) or name):
            yield name, x, function


@pytest.mark.parametrize("module", PUBLIC)
def test_public_classes_and_their_methods_have_an_example(module):
    if module.endswith((".torch", ".distributed")):
        pytest.importorskip({"torch": "torch", "distributed": "mpi4py"}[module.split(".")[1]])
    found = importlib.import_module(module)
    public = {name: getattr(found, name) for name in found.__all__}
    assert [name for name, x in public.items() if ">>> " not in inspect.getdoc(x)] == []
    assert {
        name: lacking for name, x in public.items() if inspect.isclass(x) and (lacking := list(without_example(x)))
    } == {}


def referenced():
    """The full names on the reference page."""
    text = (ROOT / "docs/reference/index.md").read_text()
    for part in text.split("currentmodule:: ")[1:]:
        module, *lines = part.partition("```")[0].splitlines()
        yield from (f"{module}.{line.strip()}" for line in lines if line.strip() and ":" not in line)


@pytest.mark.parametrize("module", PUBLIC)
def test_reference_lists_every_public_name(module):
    if module.endswith((".torch", ".distributed")):
        pytest.importorskip({"torch": "torch", "distributed": "mpi4py"}[module.split(".")[1]])
    names = {f"{module}.{name}" for name in importlib.import_module(module).__all__}
    assert names - set(referenced()) == set()


RETURNED = [name for name in referenced() if name.rpartition(".")[0] not in (*PUBLIC, "rmsprop_gpu.reference")]


@pytest.mark.parametrize("name", RETURNED)
def test_what_is_returned_and_raised_has_an_example(name):
    module, _, name = name.rpartition(".")
    if module.startswith("rmsprop_gpu.distributed"):
        pytest.importorskip("mpi4py")
    cls = getattr(importlib.import_module(module), name)
    assert ">>> " in inspect.getdoc(cls)
    assert list(without_example(cls)) == []


def of_annotations(*annotations, scope):
    """The package's classes in these annotations, also those behind an alias."""
    for word in re.findall(r"\w+", " ".join(map(str, annotations))):
        for x in (scope.get(word), *get_args(scope.get(word))):
            if inspect.isclass(x) and x.__module__.startswith("rmsprop_gpu"):
                yield x


def received(public):
    """The package's classes among these functions and classes, what they return and their fields, and so on."""
    found, left = set(), list(public)
    while left:
        x = left.pop()
        functions = [function for *_, function in methods(x)] if inspect.isclass(x) else [inspect.unwrap(x)]
        for function in functions:
            left += of_annotations(function.__annotations__.get("return", ""), scope=function.__globals__)
        for base in inspect.getmro(x) if inspect.isclass(x) else ():
            fields = [text for name, text in inspect.get_annotations(base).items() if name[0] != "_"]
            left += of_annotations(*fields, scope=vars(sys.modules[base.__module__]))
        found |= {x} if inspect.isclass(x) else set()
        left = [x for x in left if x not in found]
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_reference_lists_every_class_that_a_user_receives(module):
    if module.endswith((".torch", ".distributed")):
        pytest.importorskip({"torch": "torch", "distributed": "mpi4py"}[module.split(".")[1]])
    found = importlib.import_module(module)
    listed = {tuple(name.rsplit(".", 1)) for name in referenced()}
    missing = {
        cls
        for cls in received(getattr(found, name) for name in found.__all__)
        if not any(name == cls.__name__ and cls.__module__.startswith(where) for where, name in listed)
    }
    assert missing == set()


def test_reference_lists_the_mathematics():
    functions = {name: x for name, x in inspect.getmembers(mathematics, inspect.isfunction) if name[0] != "_"}
    assert {name for name, x in functions.items() if ">>> " not in inspect.getdoc(x)} == set()
    listed = {name.rpartition(".")[2] for name in referenced() if name.startswith("rmsprop_gpu.reference.")}
    assert listed == set(functions)


def test_fields_are_documented():
    classes = received(getattr(profiling, name) for name in profiling.__all__)
    fields = {
        cls: [field.name for field in dataclasses.fields(cls)] for cls in classes if dataclasses.is_dataclass(cls)
    }
    assert {profiling.Report, profiling.Launch} <= set(fields)
    for cls, names in fields.items():
        said = inspect.getdoc(cls).partition("Attributes\n----------\n")[2].partition("Examples\n-")[0]
        assert re.findall(r"\w+", " ".join(re.findall(r"^(\w.*?) : ", said, re.MULTILINE))) == names, cls


def test_the_reference_has_what_methods_return_and_raise():
    wanted = {"ParamGroup", "State", "Averages", "OwnState", "Explanation", "LoadReport", "Facts", "Code"}
    assert {name.rpartition(".")[2] for name in RETURNED} == wanted | {"CheckpointError", "MissingExtraError"}


def test_page_lists_every_preset_with_its_defaults():
    rows = dict(re.findall(r"^\| `(\w+)`.*?\| (.*)$", (ROOT / "docs/understand/eps.md").read_text(), re.MULTILINE))
    for name, preset in PRESETS.items():
        for key, default in preset.arguments.items():
            if key in ("lr", "learning_rate", "alpha", "rho", "decay", "eps", "epsilon") and key not in preset.own:
                cells = [cell.split() for cell in rows[name].replace(",", "").split(" | ")]
                found = [words[1] for words in cells if words and words[0] == f"`{key}`"]
                want = ["required"] if default is REQUIRED else [] if default is None else [default]
                assert [x if x == "required" else float(x) for x in found] == want, (name, key)


@pytest.mark.parametrize("name", PRESETS)
def test_page_cites_the_source_of_every_preset(name):
    page = (ROOT / "docs/understand/eps.md").read_text()
    cited = [word.strip("(),.:;") for word in PRESETS[name].source.split() if re.search(r"\d|/|\.py", word)]
    assert cited
    assert [text for text in cited if text not in page] == []
