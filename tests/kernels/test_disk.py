"""Compiled kernels on disk: found by the next process, never stale, never in the way."""

import ast
import errno
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from processes import PACKAGE, ended, run, start

from rmsprop_gpu.kernels import compiling, cpu, cpu_code, cpu_drive, cpu_prepare, disk, intrinsics, norms, rule, table
from rmsprop_gpu.kernels.rule import Variant

platformdirs = pytest.importorskip("platformdirs")

# Take steps of each of these kinds, and record whether Numba compiled anything.
STEPS = """
import sys
import ml_dtypes, numpy as np
from numba.core import event
from rmsprop_gpu import AdaGrad, RMSProp
HYPER = {
    "plain": {}, "large": {}, "half": {}, "all": dict(momentum=0.9, centered=True, clipnorm=1.0, use_ema=True),
    "scaled": dict(initial_scale=1.0), "adagrad": {},
}
def step(kind, size=1000):
    dtype = ml_dtypes.bfloat16 if kind == "half" else np.float32
    size = 200_000 if kind in ("large", "scaled") else size
    param, grad = np.linspace(0, 1, size).astype(dtype), np.linspace(-3, 2, size).astype(dtype)
    opt = (AdaGrad if kind == "adagrad" else RMSProp)(param, **HYPER[kind])
    for _ in range(3):
        opt.step(grad)
    return opt, param
with event.install_recorder("numba:compile") as recorder:
    bits = [step(kind)[1].tobytes().hex()[:200] for kind in KINDS]
compiled = len(recorder.buffer) > 0
"""
PRINT = "print(compiled, *bits)"
KINDS = ("plain", "large", "half", "all", "scaled", "adagrad")


def program(*kinds, then=PRINT):
    return f"KINDS = {kinds}\n{STEPS}\n{then}"


@pytest.fixture
def kept(tmp_path):
    """A folder of kernels, as environment variables for a program."""
    return {"RMSPROP_GPU_CACHE_DIR": str(tmp_path / "kernels")}


@pytest.fixture(scope="session")
def used():
    """The kernel files that programs need, compiled once per session in the folder of the suite."""
    start = time.time() - 1
    run(program(*KINDS))
    return [path for path in disk.folder().glob("*.kernel") if path.stat().st_mtime > start]


@pytest.fixture
def filled(kept, used):
    """A folder that already holds all kernels that programs need."""
    folder = Path(kept["RMSPROP_GPU_CACHE_DIR"])
    folder.mkdir(mode=0o700)
    for path in used:
        shutil.copy2(path, folder)
    return kept


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder of kernels for this process."""
    monkeypatch.setenv("RMSPROP_GPU_CACHE_DIR", str(tmp_path))
    return tmp_path


def files(kept):
    folder = kept["RMSPROP_GPU_CACHE_DIR"]
    return [os.path.join(folder, name) for name in os.listdir(folder)]


def test_a_second_process_compiles_nothing(kept):
    first, want = run(program(*KINDS), **kept).split(maxsplit=1)
    second, got = run(program(*KINDS), **kept).split(maxsplit=1)
    assert (first, second) == ("True", "False")
    assert got == want
    assert all(name.endswith(".kernel") for name in files(kept))


def test_kernels_of_several_processes_go_together(kept):
    """Each process compiles its first kernel, and Numba names all first kernels alike."""
    want = [run(program(kind), **kept).split()[1] for kind in KINDS]
    compiled, *got = run(program(*KINDS), **kept).split()
    assert (compiled, got) == ("False", want)


def test_off_nothing_is_read_or_written(filled):
    before = {name: os.stat(name).st_mtime_ns for name in files(filled)}
    assert run(program("plain"), RMSPROP_GPU_CACHE="0", **filled).startswith("True")
    assert {name: os.stat(name).st_mtime_ns for name in files(filled)} == before
    assert run(program("plain"), **filled).startswith("False")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("kernels/rule.py", "else fma(-s.lr, step, p)", "else fma(-s.lr, step + step, p)"),
        ("kernels/intrinsics.py", "builder.fma(*args)", "builder.fma(args[0], args[1], args[1])"),
    ],
)
def test_no_stale_kernel_after_an_edit(file, old, new, tmp_path, filled):
    shutil.copytree(PACKAGE, tmp_path / "rmsprop_gpu", ignore=shutil.ignore_patterns("__pycache__"))
    code = """
import numpy as np, rmsprop_gpu
from numba.core import event
param = np.zeros(3, np.float32)
with event.install_recorder("numba:compile") as recorder:
    for _ in range(2):
        rmsprop_gpu.RMSProp(param, lr=1.0, alpha=0.0, eps=1e-20).step(np.ones(3, np.float32))
print(param[0], len(recorder.buffer) > 0)
"""
    assert run(code, tmp_path, **filled) == "-2.0 False"
    edited = tmp_path / "rmsprop_gpu" / file
    text = edited.read_text()
    assert text.count(old) == 1
    edited.write_text(text.replace(old, new))
    changed, compiled = run(code, tmp_path, **filled).split()
    assert (changed != "-2.0", compiled) == (True, "True")
    assert run(code, tmp_path, **filled).split() == [changed, "False"]
    edited.write_text(text)
    assert run(code, tmp_path, **filled) == "-2.0 False"


def compiles(text):
    """Whether a module compiles anything with Numba, judged by the names in it."""
    nodes = list(ast.walk(ast.parse(text)))
    names = {getattr(node, "id", None) or getattr(node, "attr", None) for node in nodes}
    return bool(
        names & {"jit", "njit", "cfunc", "vectorize", "guvectorize", "stencil", "intrinsic", "overload", "inline"}
    )


def test_whatever_compiles_is_in_the_hash():
    assert compiles("@inline\ndef f(x): ...")
    assert compiles("def make():\n    return target.jit(f)")
    assert not compiles('"""A ``@cuda.jit`` function, inline."""')
    found = {path for path in PACKAGE.rglob("*.py") if compiles(path.read_text())}
    assert found <= set(disk.FILES)
    assert PACKAGE / "steps" / "headers.py" in found
    assert PACKAGE / "arrays" / "dtypes.py" in disk.FILES  # consulted when kernels are made


def key(
    make=cpu._make_update_kernel,
    variant=None,
    dtype=np.float32,
    grad_dtype=None,
    maker=rule.make_rule,
    target=("cpu",),
):
    return disk.key_of(target, make, variant or Variant(), dtype, grad_dtype or dtype, maker)


def test_a_key_tells_everything_apart(here):
    keys = [
        key(),
        key(variant=Variant(momentum=True)),
        key(dtype=np.float64),
        key(grad_dtype=np.float16),
        key(make=cpu_drive._make_driver),
        key(target=("cuda",)),
        disk.key_of(("cpu",), cpu_drive._make_driver, True),
        disk.key_of(("cpu",), cpu_drive._make_driver, False),
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


@pytest.mark.parametrize(
    "variable", ["NUMBA_OPT=1", "NUMBA_CPU_NAME=generic", "NUMBA_SLP_VECTORIZE=1", "NUMBA_BOUNDSCHECK=1"]
)
def test_other_flags_are_other_kernels(variable, filled):
    name, value = variable.split("=")
    assert run(program("plain"), **filled, **{name: value}).startswith("True")


def test_the_number_of_threads_changes_no_kernel(filled):
    assert run(program("plain"), **filled, NUMBA_NUM_THREADS="1").startswith("False")


@pytest.mark.parametrize("what", ["numba", "llvmlite", "np"])
def test_other_versions_are_other_kernels(what, monkeypatch):
    before = cpu_code._target()
    monkeypatch.setattr(getattr(cpu_code, what), "__version__", "0.0")
    assert cpu_code._target() != before


def test_another_python_is_another_kernel(monkeypatch):
    before = cpu_code._target()
    monkeypatch.setattr(sys, "version", "4.0")
    assert cpu_code._target() != before


def test_what_is_not_in_the_sources_is_not_kept(here, monkeypatch):
    scope = dict(vars(rule))
    exec("def make_rule(variant, T): ...", scope)
    assert key(maker=scope["make_rule"]) is None
    assert key(maker=lambda variant, T: None) is None
    monkeypatch.setattr(rule, "make_rule", scope["make_rule"])
    assert key() is None  # its default argument is still the old one


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (norms, "SUM", 8),  # a constant
        (cpu_prepare, "LANES", 64),
        (table, "NORM", 3),
        (cpu, "make_factors", lambda *_: None),  # a function that a maker calls
        (rule, "fma", None),
        (intrinsics, "_narrow", lambda *_: None),  # called only indirectly
        (Variant, "prepared", property(lambda self: True)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_whatever_a_maker_reaches_is_in_its_key(module, name, value, here, monkeypatch):
    """Its current value counts: it may have been replaced, reloaded, or read from a stale .pyc."""

    def keys():
        made = [(cpu._make_update_kernel, Variant(), np.float32, np.float32, rule.make_rule)]
        made += [(cpu_prepare.make_partials_kernel, Variant(norm=True), np.float32), (cpu_prepare.make_totals_kernel,)]
        made += [(cpu_prepare.make_prepare_kernel, Variant(norm=True), np.float32)]
        return [disk.key_of(("cpu",), *maker) for maker in made]

    before = keys()
    assert None not in before
    assert keys() == before
    monkeypatch.setattr(module, name, value)
    assert keys() != before


def test_a_kernel_of_a_stale_pyc_does_not_survive_it(tmp_path, filled):
    """Python accepts an old .pyc if size and second match the source. Its kernels must go when it goes."""
    shutil.copytree(PACKAGE, tmp_path / "rmsprop_gpu", ignore=shutil.ignore_patterns("__pycache__"))
    code = """
import numpy as np, rmsprop_gpu
param = np.zeros(3, np.float32)
rmsprop_gpu.RMSProp(param, lr=1.0, alpha=0.0, eps=1e-20).step(np.ones(3, np.float32))
print(param[0])
"""
    writing = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": ""}
    source = tmp_path / "rmsprop_gpu" / "kernels" / "rule.py"
    assert run(code, tmp_path, **filled, **writing) == "-1.0"
    before, text = source.stat(), source.read_text()
    assert text.count("else fma(-s.lr, step, p)") == 1
    source.write_text(text.replace("else fma(-s.lr, step, p)", "else fma(+s.lr, step, p)"))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(code, tmp_path, **filled, **writing) == "-1.0"  # this is Python's doing
    for folder in (tmp_path / "rmsprop_gpu").rglob("__pycache__"):
        shutil.rmtree(folder)
    assert run(code, tmp_path, **filled, **writing) == "1.0"


def test_settings_that_numba_reads_late_are_seen(kept):
    """A program may change the environment between its imports and its first step."""
    late = "import os, rmsprop_gpu\nos.environ['NUMBA_OPT'] = '0'\n"
    run(late + program("plain"), **kept)
    assert run(program("plain"), **kept).startswith("True")
    assert run(late + program("plain"), **kept).startswith("False")


def test_the_processor_is_in_the_key(monkeypatch):
    before = cpu_code._target()
    codegen = cpu_code.cpu_target.target_context.codegen()
    triple, name, features = codegen.magic_tuple()
    for other in ((triple, "generic", features), (triple, name, features + ",-fma")):
        monkeypatch.setattr(type(codegen), "magic_tuple", lambda self, other=other: other)
        assert cpu_code._target() != before


def test_four_processes_at_once(kept):
    programs = [start(program("plain", "large"), **kept) for _ in range(4)]
    printed = {ended(one).split(maxsplit=1)[1] for one in programs}
    assert len(printed) == 1
    assert all(name.endswith(".kernel") for name in files(kept))
    assert run(program("plain", "large"), **kept).startswith("False")


def not_ours(data):
    """A valid file, except for the code that Numba is to load."""
    start = len(disk._MARK) + 32
    length = int.from_bytes(data[start : start + 8], "little")
    return disk._head(data[start + 8 : start + 8 + length].decode(), b"\x80\x04]\x94.")


DAMAGE = {
    "empty": lambda data: b"",
    "short": lambda data: data[:-1],
    "long": lambda data: data + b"x",
    "half": lambda data: data[: len(data) // 2],
    "a bit of the code": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    "a bit of the mark": lambda data: b"s" + data[1:],
    "noise": lambda data: bytes(range(256)) * 20,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_compiled_anew(damage, here):
    disk.write("a key", b"code" * 100)
    (path,) = here.iterdir()
    assert disk.read("a key") == b"code" * 100
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert disk.read("a key") is None
    disk.write("a key", b"other")
    assert disk.read("a key") == b"other"


@pytest.mark.parametrize("damage", [DAMAGE["short"], not_ours])
def test_a_program_survives_damaged_files(damage, filled):
    want = run(program("plain", "large"), **filled)
    assert want.startswith("False")
    for path in map(Path, files(filled)):
        path.write_bytes(damage(path.read_bytes()))
    assert run(program("plain", "large"), **filled) == want.replace("False", "True")
    assert run(program("plain", "large"), **filled) == want


def test_a_file_under_anothers_name_is_not_taken(here):
    disk.write("a key", b"code")
    disk.write("another", b"other")
    os.replace(disk._path(here, "another"), disk._path(here, "a key"))
    assert disk.read("a key") is None


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this platform has no file owners")
def test_only_files_that_nobody_else_may_write_are_loaded(here, monkeypatch):
    disk.write("a key", b"code")
    (path,) = here.iterdir()
    assert path.stat().st_mode & 0o077 == 0
    for mode in (0o620, 0o602, 0o666):
        path.chmod(mode)
        assert disk.read("a key") is None
    path.chmod(0o644)
    assert disk.read("a key") == b"code"
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert disk.read("a key") is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this platform has no named pipes")
def test_what_is_no_file_is_not_opened(here, tmp_path_factory):
    disk.write("a key", b"code")
    (path,) = here.iterdir()
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "file"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert disk.read("a key") is None
    path.unlink()
    os.mkfifo(path)
    assert disk.read("a key") is None  # and does not wait for it
    path.unlink()
    path.mkdir()
    assert disk.read("a key") is None
    disk.write("a key", b"code")


def test_a_folder_that_cannot_be_made_is_none(monkeypatch):
    where = "/dev/null/kernels"
    monkeypatch.setenv("RMSPROP_GPU_CACHE_DIR", where)
    disk.write("a key", b"code")
    assert disk.read("a key") is None
    assert run(program("plain"), RMSPROP_GPU_CACHE_DIR=where).startswith("True")


def test_by_default_it_is_in_the_cache_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("RMSPROP_GPU_CACHE_DIR", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name, appauthor: tmp_path / name)
    assert disk.folder() == tmp_path / "rmsprop_gpu" / "kernels"


@pytest.mark.parametrize("call", ["mkstemp", "replace", "write"])
def test_a_full_disk_is_no_reason_to_fail(call, here, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "write":
        monkeypatch.setattr(disk, "_head", lambda *_: full())
    else:
        monkeypatch.setattr(disk.tempfile if call == "mkstemp" else os, call, full)
    disk.write("a key", b"code")
    assert disk.read("a key") is None
    assert list(here.iterdir()) == []


def test_a_read_only_folder_is_read(here, monkeypatch):
    disk.write("a key", b"code")

    def refused(*args, **kwargs):
        raise PermissionError(errno.EROFS, "Read-only file system")

    for module, name in ((os, "utime"), (disk.tempfile, "mkstemp"), (os, "replace")):
        monkeypatch.setattr(module, name, refused)
    assert disk.read("a key") == b"code"
    disk.write("another", b"code")


def test_what_was_used_longest_ago_is_deleted_first(here, monkeypatch):
    monkeypatch.setattr(disk, "LIMIT", 4000)
    for i, name in enumerate("abc"):
        disk.write(name, bytes(1000))
        os.utime(disk._path(here, name), (1000 + i, 1000 + i))
    assert disk.read("a") is not None  # this counts as use
    disk.write("d", bytes(1000))
    assert [disk.read(name) is not None for name in "abcd"] == [True, False, True, True]
    assert disk.usage().size <= 4000


def test_what_a_killed_process_was_writing_is_deleted(here):
    for name, age in (("rmsprop_gpu-old.part", disk.ABANDONED + 60), ("rmsprop_gpu-new.part", 0)):
        (here / name).write_bytes(b"half")
        then = os.stat(here).st_mtime - age
        os.utime(here / name, (then, then))
    disk.write("a key", b"code")
    assert {path.name for path in here.iterdir() if path.suffix != ".kernel"} == {"rmsprop_gpu-new.part"}
    disk.clear()
    assert list(here.iterdir()) == []
    assert disk.usage() == (0, 0)


def test_files_of_others_are_left_alone(here, monkeypatch):
    """The folder may be set by mistake: files of others are neither counted nor deleted, however large or old."""
    names = {"theirs", "film.mkv.part", "my.kernel", f"{'0' * 63}.kernel", f"{'0' * 64}.kernel.bak", "rmsprop_gpu-.txt"}
    for name in names:
        (here / name).write_bytes(bytes(1000))
        os.utime(here / name, (1, 1))
    monkeypatch.setattr(disk, "LIMIT", 500)
    disk.write("a key", b"code")
    disk.clear()
    assert {path.name for path in here.iterdir()} == names
    assert disk.usage() == (0, 0)


def test_a_file_that_is_too_large_is_not_read(here):
    disk.write("a key", b"code")
    (path,) = here.iterdir()
    os.truncate(path, 1 << 42)
    assert disk.read("a key") is None


def test_what_cannot_be_stored_is_no_reason_to_fail(here, monkeypatch):
    def fail(*_):
        raise TypeError("cannot be pickled")

    monkeypatch.setattr(compiling, "_compiled", {})
    monkeypatch.setattr(cpu_code, "dumps", fail)
    assert cpu_code.address(cpu._make_update_kernel, Variant(), np.float32, np.float32, rule.make_rule)
    assert list(here.iterdir()) == []


def test_there_is_no_cache_without_a_home(monkeypatch):
    monkeypatch.delenv("RMSPROP_GPU_CACHE_DIR", raising=False)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "platformdirs", None)
        assert disk.folder() is None
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: Path("~/.cache/rmsprop_gpu"))
    assert disk.folder() is None
    assert key() is None


def test_kernels_from_disk_can_be_looked_into(filled):
    """Only then are they compiled."""
    look = """
for kind in KINDS:
    for name, kernel in step(kind)[0].kernels().items():
        (llvm,), (asm,) = kernel.inspect_llvm().values(), kernel.inspect_asm().values()
        print(name, "define" in llvm, ".globl" in asm, compiled)
"""
    names = ["partials_kernel", "totals_kernel", "prepare_kernel", "update_kernel"]
    lines = run(program("plain", "all", then=look), **filled).splitlines()
    assert [line.split("[")[0] for line in lines] == ["update_kernel", *names]
    assert all(line.endswith(" True True False") for line in lines)


def test_a_kernel_is_loaded_once_a_process(here, monkeypatch):
    monkeypatch.setattr(compiling, "_compiled", {})
    reads, read = [], disk.read
    monkeypatch.setattr(disk, "read", lambda name: reads.append(name) or read(name))
    for _ in range(2):
        cpu_code.address(cpu._make_update_kernel, Variant(), np.float32, np.float32, rule.make_rule)
    assert len(reads) == 1


@pytest.mark.gpu
@pytest.mark.skipif("os.environ.get('VGPU_LTO') == '1'", reason="this device accepts no cubin")
def test_cubins_are_kept(kept):
    code = """
import sys
import cupy
from rmsprop_gpu import RMSProp
from rmsprop_gpu.kernels import cuda_code
compiled, real = [], cuda_code._compiled
cuda_code._compiled = lambda *args: compiled.append(args) or real(*args)
param, grad = cupy.linspace(0, 1, 1000, dtype="f"), cupy.linspace(-3, 2, 1000, dtype="f")
opt = RMSProp(param, momentum=0.9, centered=True, clipnorm=1.0)
for _ in range(3):
    opt.step(grad)
print(len(compiled), param.get().tobytes().hex()[:200])
for kernel in opt.kernels().values():
    assert all(".entry" in ptx for ptx in kernel.inspect_asm().values())
"""
    count, want = run(code, **kept).split()
    assert (count, run(code, **kept)) == ("3", f"0 {want}")


@pytest.mark.gpu
def test_another_architecture_or_library_is_another_cubin(monkeypatch):
    import numba.cuda

    from rmsprop_gpu.kernels import cuda, cuda_code

    def target(**options):
        kernel = numba.cuda.jit(**options)(cuda.make_update_kernel(Variant(), np.float32))
        return repr(cuda_code._target(kernel))

    before = target()
    assert target() == before
    found = [before, target(fastmath=True), target(max_registers=40)]
    device = SimpleNamespace(compute_capability=(8, 0))
    for module, name, value in (
        (cuda_code.target, "get_current_device", lambda: device),
        (cuda_code, "_library", lambda name: "another"),
        (cuda_code, "_linker", lambda kernel: "another"),
        (cuda_code.numba_cuda, "__version__", "0.0"),
        (cuda_code.cuda.core, "__version__", "0.0"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            found.append(target())
    with monkeypatch.context() as patched:
        patched.setenv("NUMBA_OPT", "1")
        found.append(target())
    assert len(set(found)) == len(found)
    assert target() == before
