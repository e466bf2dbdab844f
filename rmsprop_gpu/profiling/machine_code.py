"""Facts about the machine code of a CUDA kernel, from Numba, ptxas and nvdisasm, without a GPU or a driver."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import Any

from ..extras import command
from ..optimizer.base import Optimizer
from .double import check_optimizer

# The tools, and the packages on PyPI that contain them.
TOOLS = {"ptxas": "nvidia-cuda-nvcc", "nvdisasm": "nvidia-cuda-nvdisasm"}
TOOLKIT = "/usr/local/cuda"  # where it is installed, if no variable says so


@cache
def tool(name: str) -> Path:
    """The path of ptxas or nvdisasm: from the package, or else from the CUDA toolkit."""
    try:
        files = metadata.files(TOOLS[name]) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.stem == name and path.exists():
            return path
    homes = filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), TOOLKIT))
    for place in (None, *(f"{home}/bin" for home in homes)):  # None: the PATH
        if found := which(name, path=place):
            return Path(found)
    raise RuntimeError(f"machine code is read with {name}, which is not installed; {_extras()}")


def _extras() -> str:
    return f"it comes with the extras cuda13 and sass: {command('cuda13', 'sass')}"


@cache
def why_not() -> str | None:
    """Why machine code cannot be read here; None if it can."""
    try:
        from ..kernels import cuda  # noqa: F401
    except ImportError as error:
        return f"kernels are compiled by numba-cuda, which is not installed ({error}); {_extras()}"
    try:
        list(map(tool, TOOLS))
    except RuntimeError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Facts:
    """What `read_machine_code` returns for each kernel: facts about its code for one compute capability.

    Instructions are counted as they stand in the code, whether they are executed or not.

    Attributes
    ----------
    registers : int
        Per thread.
    stack_bytes : int
        The stack frame of a thread.
    spill_bytes : int
        Of spilled registers, per thread: stores and loads together.
    local : int
        Loads and stores of local memory in the machine code.
    float64, ptx_float64 : int
        Instructions of float64 arithmetic, in the machine code and in the PTX.
    calls, fma : int
        Calls, and fused multiply-adds, in the PTX. In the machine code a routine is called that finishes divisions and
        roots of unusual numbers.
    loop : mapping from str to int
        By opcode, the instructions of the loop over 128-bit vectors (64-bit ones if all arrays have narrow elements),
        in which a thread takes several elements at a time. Empty if there is none.
    ptx, sass : str
        The PTX, and the machine code as nvdisasm shows it.

    Examples
    --------
    On an H100 the loop of a plain step over float32 reads three arrays and writes two, 16 bytes at a time:

    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> from rmsprop_gpu.profiling import read_machine_code
    >>> opt = RMSProp(np.ones(3, np.float32))
    >>> try:
    ...     facts = read_machine_code(opt, (9, 0))["update_kernel[float32, plain]"]
    ... except RuntimeError:
    ...     pass  # numba-cuda, ptxas or nvdisasm is not installed; the error says how to install it
    ... else:
    ...     assert facts.accesses == {"LDG.E.128": 3, "STG.E.128": 2}
    ...     assert list(facts.mix)[0] == "float32" and "float64" not in facts.mix
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    local: int
    float64: int
    ptx_float64: int
    calls: int
    fma: int
    loop: Mapping[str, int]
    ptx: str = field(repr=False)
    sass: str = field(repr=False)

    @property
    def accesses(self) -> dict[str, int]:
        """Loads and stores of global memory in the loop, by opcode."""
        return {opcode: n for opcode, n in self.loop.items() if re.match(r"(LDG?|STG?|ATOM\w*|REDG?)\b", opcode)}

    @property
    def mix(self) -> dict[str, int]:
        """Instructions in the loop by purpose, the most frequent first: memory, float32, float64, conversion, ..."""
        return dict(sum((Counter({_kind(opcode): n}) for opcode, n in self.loop.items()), Counter()).most_common())


def _kind(opcode: str) -> str:
    """The purpose of an instruction."""
    kinds = {
        "memory": r"LD|ST|ATOM|REDG?\b",
        "float64": r"D(FMA|MUL|ADD|SETP)|.*64H",
        "conversion": r"[FI]2[FI]|F2FP|PRMT|HADD2",  # HADD2 widens a half
        "float32": r"F(FMA|MUL|ADD|SETP|SEL|CHK|MNMX)|MUFU",
        "branches": r"BRA|BSSY|BSYNC|CALL|RET|EXIT|WARPSYNC|NOP",
    }
    return next((kind for kind, pattern in kinds.items() if re.match(pattern, opcode)), "others")


def mix_of_ptx(ptx: str) -> dict[str, int]:
    """Instructions of a whole kernel by purpose, for when no machine code can be read."""
    kinds = {"ld": "memory", "st": "memory", "cvt": "conversion", "bra": "branches", "ret": "branches"}
    found: Counter[str] = Counter()
    for opcode in _ptx_opcodes(ptx):
        parts = opcode.split(".")
        arithmetic = next((f"float{t[1:]}" for t in ("f32", "f64") if t in parts and parts[0] not in kinds), None)
        found[arithmetic or kinds.get(parts[0], "others")] += 1
    return dict(found.most_common())


def _ptx_opcodes(ptx: str) -> list[str]:
    return re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.]*)[\s;]", ptx, re.MULTILINE)


def read_machine_code(opt: Optimizer, compute_capability: tuple[int, int] = (9, 0)) -> dict[str, Facts]:
    """The machine code of the CUDA kernels for an optimizer's updates, without a GPU: its arrays may be NumPy's.

    Parameters
    ----------
    opt : RMSProp or AdaGrad
        Its hyperparameters and the dtypes of its parameters determine the kernels.
    compute_capability : pair of int
        That of the GPU to compile for: (9, 0) is an H100's.

    Returns
    -------
    dict
        From a name, as in ``opt.kernels()``, to the :class:`~rmsprop_gpu.profiling.machine_code.Facts`.

    Raises
    ------
    TypeError, ValueError
        For anything but an optimizer and a pair of numbers.
    RuntimeError
        If a tool is not installed, with what to install; if one does not support the compute capability.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> opt = RMSProp(np.ones(3, np.float32), momentum=0.9)
    >>> if why_not() is None:
    ...     for name, facts in read_machine_code(opt, (9, 0)).items():
    ...         assert (name, facts.spill_bytes) == ("update_kernel[float32, momentum]", 0)
    """
    check_optimizer(opt)
    pair = tuple(compute_capability) if isinstance(compute_capability, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(n, int) for n in pair):
        raise ValueError(f"compute_capability is {compute_capability!r}; wanted two whole numbers, as (9, 0)")
    if reason := why_not():
        raise RuntimeError(reason)
    from ..kernels import cuda  # it imports numba-cuda

    opt._refuse_capture("compilation")
    batches = {batch.title("update_kernel"): batch for batch in opt._planner.plan().batches}
    kernels = [cuda.update_function(batch.variant, batch.dtype) for batch in batches.values()]
    return dict(zip(batches, read(kernels, (pair[0], pair[1])), strict=True))


def read(kernels: Sequence[Any], cc: tuple[int, int], *options: str) -> list[Facts]:
    """The Facts about kernels, given as Python functions of int64, for a compute capability.

    They describe the code that would be loaded there: linked by nvJitLink if that is installed, as numba-cuda does,
    else made by ptxas, which the driver contains. Further `options` are those of ptxas, in both cases. RuntimeError if
    a tool is absent or fails; `why_not` tells in advance.
    """
    from ..kernels import cuda_fit  # it imports nothing itself

    make = _linked if cuda_fit.nvjitlink() else _assembled
    # All of them at once: starting nvdisasm takes longer than disassembling twenty kernels.
    try:
        texts, log, cubin = make(kernels, cc, options)
    except Exception as error:  # nvJitLink's and Numba's errors have no common base
        raise RuntimeError(f"no machine code for {cc[0]}.{cc[1]}: {type(error).__name__}: {error}") from error
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernels.cubin")
        file.write_bytes(cubin)
        code = _run("nvdisasm", "-c", "-ndf", str(file))
    logs, codes = _sections(r"Compiling entry function '(\w+)'", log), _sections(r"^\.text\.(\w+):", code)
    names = [_found(r"\.entry (\w+)\(", text)[1] for text in texts]
    return [_facts(text, logs[name], codes[name]) for text, name in zip(texts, names, strict=True)]


def _compiled(kernel: Any, cc: tuple[Any, ...], output: str) -> Any:
    """PTX or LTO-IR, as numba-cuda makes it."""
    from ..kernels.cuda_code import signature
    from ..kernels.cuda_target import target

    bounds = getattr(kernel, "launch_bounds", None)
    code, _ = target.compile(
        kernel, signature(kernel), device=False, abi="numba", cc=cc, output=output, launch_bounds=bounds
    )
    return code


def _assembled(kernels: Sequence[Any], cc: tuple[int, int], options: Sequence[str]) -> tuple[list[str], str, bytes]:
    """The PTX of each kernel, what ptxas says, and the machine code of all."""
    texts = [_compiled(kernel, cc, "ptx") for kernel in kernels]
    module = texts[0] + "".join(re.sub(r"(?m)^\.(version|target|address_size) .*$", "", text) for text in texts[1:])
    with TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernels.ptx"), Path(folder, "kernels.cubin")
        ptx.write_text(module)
        log = _run("ptxas", "-v", f"-arch=sm_{cc[0]}{cc[1]}", *options, str(ptx), "-o", str(cubin))
        return texts, log, cubin.read_bytes()


def _linked(kernels: Sequence[Any], cc: tuple[int, int], options: Sequence[str]) -> tuple[list[str], str, bytes]:
    """The PTX of each kernel after link-time optimization, what nvJitLink says, and the machine code of all."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    number = (*cc, "a" if cc >= (9, 0) else "")
    names = [kernel.__qualname__ for kernel in kernels]
    try:
        for i, kernel in enumerate(kernels):
            kernel.__qualname__ += f"_number{i}_"  # to find it again
        inputs = [ObjectCode.from_ltoir(_compiled(kernel, number, "ltoir")) for kernel in kernels]
    finally:
        for kernel, name in zip(kernels, names, strict=True):
            kernel.__qualname__ = name
    common: dict[str, Any] = {"arch": "sm_{}{}{}".format(*number), "link_time_optimization": True}
    linker = Linker(*inputs, options=LinkerOptions(**common, ptxas_options=["-v", *options], verbose=True))
    cubin, log = bytes(linker.link("cubin").code), linker.get_info_log()
    text = bytes(Linker(*inputs, options=LinkerOptions(**common, ptx=True)).link("ptx").code).decode().strip("\0")
    entries = {m[1]: m[0] for m in re.finditer(r"(?ms)^\.visible \.entry (\w+)\(.*?^\}", text)}
    texts = [next(x for name, x in entries.items() if f"_number{i}_" in name) for i in range(len(kernels))]
    return texts, log, cubin


def _run(name: str, *arguments: str) -> str:
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def _sections(head: str, text: str) -> dict[str, str]:
    """The text after each match of `head`, by the group in it."""
    parts = re.split(head, text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _found(pattern: str, text: str) -> re.Match[str]:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the output of a CUDA tool is not understood: {pattern!r} is not in it")
    return match


def _facts(ptx: str, log: str, text: str) -> Facts:
    code, labels = _parse(text)
    opcodes = [opcode for opcode, _ in code]
    ptx_opcodes = _ptx_opcodes(ptx)
    stack, stores, loads = _found(r"(\d+) bytes stack frame, (\d+) .*, (\d+) bytes spill loads", log).groups()
    return Facts(
        registers=int(_found(r"Used (\d+) registers", log)[1]),
        stack_bytes=int(stack),
        spill_bytes=int(stores) + int(loads),
        local=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        float64=sum(bool(re.match(r"D(?!EPBAR)|.*\.F64|.*64H", opcode)) for opcode in opcodes),
        ptx_float64=sum(".f64" in opcode for opcode in ptx_opcodes),
        calls=sum(opcode.startswith("call") for opcode in ptx_opcodes),
        fma=sum(opcode.startswith("fma.") for opcode in ptx_opcodes),
        loop=Counter(opcodes[_hot_loop(code, labels, "update_kernel" in ptx)]),
        ptx=ptx,
        sass=text,
    )


def _parse(text: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """The (opcode, operands) of every instruction, and the position of each label among them."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
            code.append((found[1].removesuffix(".SYS"), found[2]))
    return code, labels


def _hot_loop(code: Sequence[tuple[str, str]], labels: Mapping[str, int], updates: bool) -> slice:
    """The position of the vector loop: the shortest one around all 128-bit stores of the kernel.

    If no stream of an update has that many bits, because all are halves or codes, it is around the 64-bit stores.
    """
    jumps = [
        (i, labels[label])
        for i, (_, operands) in enumerate(code)
        for label in re.findall(r"\.L\w+", operands)
        if label in labels
    ]
    found = (_loops(code, jumps, bits) for bits in (".128", ".64")[: 1 + updates])
    loops = next(filter(None, found), [])
    if not loops:
        return slice(0)
    _, first, last = min(loops)
    while any(i == last + 1 and first < to <= last for i, to in jumps):  # here Turing's threads wait for each other
        last += 1
    apart = _apart(code, labels)
    if any(first < to <= last and not first <= i <= last and i not in apart for i, to in jumps):
        raise RuntimeError("a part of the vector loop stands outside of it: _hot_loop must learn to follow jumps")
    return slice(first, last + 1)


def _loops(code: Sequence[tuple[str, str]], jumps: Sequence[tuple[int, int]], bits: str) -> list[tuple[int, int, int]]:
    """(length, first, last) of every loop around all stores with this many bits."""
    stores = [i for i, (opcode, _) in enumerate(code) if opcode.startswith("ST") and opcode.endswith(bits)]
    return [(i - to, to, i) for i, to in jumps if stores and to <= stores[0] and stores[-1] < i]


def _apart(code: Sequence[tuple[str, str]], labels: Mapping[str, int]) -> set[int]:
    """Code at the end for warps whose threads have diverged when they exchange values, which ours never do.

    BRA.DIV leads there, and the first unconditional jump leads back.
    """
    starts = [labels[label] for opcode, to in code if opcode == "BRA.DIV" for label in re.findall(r"\.L\w+", to)]
    ends = [next(i for i in range(start, len(code)) if code[i][0] == "BRA") for start in starts]
    return {i for start, end in zip(starts, ends, strict=True) for i in range(start, end + 1)}
