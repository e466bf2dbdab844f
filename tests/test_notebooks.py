"""The committed notebooks contain nothing of anyone's last run or machine."""

import json
import re
from copy import deepcopy

import pytest
from paths import ROOT

NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
ABSOLUTE_PATH = re.compile(r"""(?:^|[\s"'`(=])(?:file://|~)?/[\w.-]+/|(?:^|[\s"'`(=])[A-Z]:\\""", re.MULTILINE)

# What a reader may import, too. The second notebook trains like the demo, with every preset.
PUBLIC = {
    f"rmsprop_gpu{name}"
    for name in ("", ".profiling", ".demo.figures", ".demo.train", ".conventions.presets", ".torch")
}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def faults(notebook):
    """What a committed notebook must not contain, or lacks."""
    found, cells, metadata = [], notebook["cells"], notebook["metadata"]
    if cells[0]["cell_type"] != "markdown" or not "".join(cells[0]["source"]).startswith("# "):
        found.append("no heading first")
    if metadata["kernelspec"]["name"] != "python3":
        found.append("kernel")
    if set(metadata) - {"kernelspec", "language_info"} or set(metadata.get("language_info", ())) - {"name"}:
        found.append("metadata")
    for cell in cells:
        if cell["metadata"]:
            found.append("cell metadata")
        if cell.get("outputs"):
            found.append("outputs")
        if cell.get("execution_count") is not None:
            found.append("execution count")
        if ABSOLUTE_PATH.search("".join(cell["source"])):
            found.append("absolute path")
        if cell["cell_type"] == "code":
            found += faults_of_code("".join(cell["source"]))
    return found


def faults_of_code(text):
    """Figures that are not shown by `show` with alternative text, and imports of the package's internals."""
    drawn, shown = "subplots(" in text or ".plot()" in text, re.search(r"\bshow\(\s*[\w.]+,\s", text)
    if "plt.show(" in text or (drawn and not shown):
        yield "figure without a text"
    if set(re.findall(r"(?:from|import) (rmsprop_gpu[\w.]*)", text)) - PUBLIC:
        yield "import of internals"


def test_there_are_notebooks():
    assert {"01_quickstart", "02_why_rmsprop", "04_in_torch", "05_fewer_bytes"} <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    assert faults(read(path)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_compiles_and_cells_have_names_of_their_own(path):
    cells = read(path)["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), cell["id"], "exec")


def code(notebook):
    return next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")


PLANTED = {
    "no heading first": lambda n: n["cells"].pop(0),
    "kernel": lambda n: n["metadata"]["kernelspec"].update(name="my-environment"),
    "metadata": lambda n: n["metadata"]["language_info"].update(version="3.11.7"),
    "cell metadata": lambda n: code(n)["metadata"].update(collapsed=True),
    "outputs": lambda n: code(n)["outputs"].append({"output_type": "stream", "name": "stdout", "text": ["hello"]}),
    "execution count": lambda n: code(n).update(execution_count=1),
    "figure without a text": lambda n: code(n)["source"].append("\nfigure, ax = plt.subplots()"),
    "import of internals": lambda n: code(n)["source"].append("\nfrom rmsprop_gpu.kernels import cuda"),
    "absolute path": lambda n: code(n)["source"].append('\nopen("/data/digits/train.csv")'),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_is_found(fault):
    notebook = deepcopy(read(NOTEBOOKS[0]))
    PLANTED[fault](notebook)
    assert faults(notebook) == [fault]


@pytest.mark.parametrize("text", ["/home/me/x", "see `/opt/a/b`", "path=/a/b", r"C:\data", "file:///a/b", "~/a/b"])
def test_absolute_paths_are_recognised(text):
    assert ABSOLUTE_PATH.search(text)


@pytest.mark.parametrize("text", ["lr / (sqrt(v) + eps)", r"$\eta / \sqrt{t}$", "a/b/c", "https://a.b/c/d", "7 // 2"])
def test_other_slashes_are_left_alone(text):
    assert not ABSOLUTE_PATH.search(text)


@pytest.mark.parametrize("text", ["ax.plot(1)\nplt.show()", "report.plot()", "report.plot()\nshow(figure)"])
def test_every_way_to_show_a_figure_without_a_text_is_found(text):
    assert list(faults_of_code(text)) == ["figure without a text"]


def test_the_first_notebook_shows_its_network():
    text = "".join("".join(cell["source"]) for cell in read(ROOT / "notebooks/01_quickstart.ipynb")["cells"])
    assert "rmsprop_gpu.demo.train" not in text
    assert "def loss_and_grads(" in text


def test_what_to_remember_comes_before_all_code():
    kinds = [
        ("".join(cell["source"]), cell["cell_type"]) for cell in read(ROOT / "notebooks/02_why_rmsprop.ipynb")["cells"]
    ]
    first = next(i for i, (_, kind) in enumerate(kinds) if kind == "code")
    assert [text.startswith("## What to remember") for text, _ in kinds[:first]].count(True) == 1


def test_optimizers_differ_in_hue():
    """AdaGrad is an orange, and no other is."""
    colors = pytest.importorskip("matplotlib.colors")
    style = pytest.importorskip("matplotlib.style").library["tableau-colorblind10"]["axes.prop_cycle"].by_key()["color"]
    text = "".join(code(read(ROOT / "notebooks/02_why_rmsprop.ipynb"))["source"])
    named = re.findall(r'"(\w[\w ]*)": \{"color": "([^"]+)"', text)
    assert len(named) == 4
    rgb = [colors.to_rgb(style[int(color[1])] if color[0] == "C" else color) for _, color in named]
    hues = [hue for hue, saturation, _ in map(colors.rgb_to_hsv, rgb) if saturation > 0.2]
    assert min(abs(a - b) for i, a in enumerate(hues) for b in hues[:i]) > 0.1
