"""What the machine code of a kernel holds: Numba, ptxas and nvdisasm tell, with no GPU and no driver."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from rmsprop_gpu.dtypes import compute_dtype
from rmsprop_gpu.rule import Variant

# Of Turing (T4), Ampere (A100, RTX 30), Hopper, and Blackwell (B200, RTX 50).
CAPABILITIES = [(7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)]

# The tools, and the packages on PyPI that hold them.
TOOLS = {"ptxas": "nvidia-cuda-nvcc", "nvdisasm": "nvidia-cuda-nvdisasm"}
INSTALL = 'pip install "rmsprop-gpu[cuda13,sass]"'


@cache
def tool(name):
    """The path of ptxas or nvdisasm."""
    try:
        files = metadata.files(TOOLS[name]) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(file.locate())
        if path.stem == name and path.exists():
            return path
    raise RuntimeError(f"machine code is read with {name}, which is not installed: {INSTALL}")


@cache
def why_not():
    """Why machine code cannot be read here; None if it can."""
    try:
        import rmsprop_gpu.backends.cuda  # noqa: F401
    except ImportError as error:
        return f"kernels are compiled by numba-cuda, which is not installed ({error}): {INSTALL}"
    try:
        list(map(tool, TOOLS))
    except RuntimeError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Facts:
    """A kernel on one architecture."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    local: int  # loads and stores of local memory
    float64: int  # float64 instructions of the machine code
    ptx_float64: int  # ... and of the PTX
    calls: int  # in the PTX; the machine code calls what finishes a division or root of an unusual number
    fma: int  # in the PTX
    loop: int  # instructions of the loop over 128-bit vectors, whether they are executed or not; 0: there is none
    accesses: dict[str, int]  # loads and stores of that loop, by opcode


def read(kernels, cc, *options):
    """The Facts of kernels, Python functions of five int64, on a compute capability; with further options for ptxas."""
    from rmsprop_gpu.backends.cuda import SIGNATURE, target

    texts = [target.compile(k, SIGNATURE, device=False, abi="numba", cc=cc, output="ptx")[0] for k in kernels]
    # One module of all of them: to start nvdisasm takes longer than to disassemble twenty kernels.
    module = texts[0] + "".join(re.sub(r"(?m)^\.(version|target|address_size) .*$", "", text) for text in texts[1:])
    with TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernels.ptx"), Path(folder, "kernels.cubin")
        ptx.write_text(module)
        log = _run("ptxas", "-v", f"-arch=sm_{cc[0]}{cc[1]}", *options, ptx, "-o", cubin)
        code = _run("nvdisasm", "-c", "-ndf", cubin)
    logs, codes = _sections(r"Compiling entry function '(\w+)'", log), _sections(r"^\.text\.(\w+):", code)
    names = [re.search(r"\.entry (\w+)\(", text)[1] for text in texts]
    return [_facts(text, logs[name], codes[name]) for text, name in zip(texts, names, strict=True)]


def _run(name, *arguments):
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def _sections(head, text):
    """What follows each match of `head`, by the group in it."""
    parts = re.split(head, text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _facts(ptx, log, text):
    code, labels = _parse(text)
    opcodes = [opcode for opcode, _ in code]
    loop = opcodes[_hot_loop(code, labels)]
    ptx_opcodes = re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.]*)\s", ptx, re.MULTILINE)
    stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) .*, (\d+) bytes spill loads", log).groups()
    return Facts(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        stack_bytes=int(stack),
        spill_bytes=int(stores) + int(loads),
        local=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        float64=sum(bool(re.match(r"D(?!EPBAR)|.*\.F64|.*64H", opcode)) for opcode in opcodes),
        ptx_float64=sum(".f64" in opcode for opcode in ptx_opcodes),
        calls=sum(opcode.startswith("call") for opcode in ptx_opcodes),
        fma=sum(opcode.startswith("fma.") for opcode in ptx_opcodes),
        loop=len(loop),
        accesses=dict(Counter(opcode for opcode in loop if re.match(r"(LDG?|STG?|ATOM\w*|RED\w*)\b", opcode))),
    )


def _parse(text):
    """The (opcode, operands) of every instruction, and before which of them each label stands."""
    code, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
            code.append((found[1].removesuffix(".SYS"), found[2]))
    return code, labels


def _hot_loop(code, labels):
    """Where the vector loop stands: the shortest one around all 128-bit stores of the kernel."""
    stores = [i for i, (opcode, _) in enumerate(code) if opcode.startswith("ST") and opcode.endswith(".128")]
    jumps = [
        (i, labels[label])
        for i, (_, operands) in enumerate(code)
        for label in re.findall(r"\.L\w+", operands)
        if label in labels
    ]
    loops = [(i - to, to, i) for i, to in jumps if stores and to <= stores[0] and stores[-1] < i]
    if not loops:
        return slice(0)
    _, first, last = min(loops)
    if any(first < to <= last and not first <= i <= last for i, to in jumps):
        raise RuntimeError("a part of the vector loop stands outside of it: _hot_loop must learn to follow jumps")
    return slice(first, last + 1)


def lanes(dtype):
    """Elements that a thread takes at a time: 128 bits of state."""
    return 16 // compute_dtype(np.dtype(dtype)).itemsize


def instructions_per_element(facts, dtype):
    return facts.loop / lanes(dtype)


def bounds(variant, dtype):
    """At most so many registers, and instructions an element in the vector loop."""
    if np.dtype(dtype) == np.float64:
        return 72, 96  # an IEEE division and root in float64 take most of them: more than the 64 and 64 of all others
    return (40, 42) if np.dtype(dtype) == np.float32 and variant == Variant() else (64, 64)


def wanted_accesses(variant, dtype):
    """Loads and stores of the vector loop: each stream once, in 128 bits; four halves are 64."""
    states = 1 + variant.centered + variant.momentum
    if np.dtype(dtype).itemsize == 2:
        return {"LDG.E.64": 2, "STG.E.64": 1, "LDG.E.128": states, "STG.E.128": states}
    return {"LDG.E.128": 2 + states, "STG.E.128": 1 + states}


def flaws(facts, dtype):
    """What no kernel of this dtype may have."""
    if np.dtype(dtype) != np.float64:
        yield from _nothing(facts, "float64", "float64 instructions")
        yield from _nothing(facts, "ptx_float64", "float64 instructions in the PTX")
    yield from _nothing(facts, "spill_bytes", "bytes of spills")
    yield from _nothing(facts, "stack_bytes", "bytes of stack")
    yield from _nothing(facts, "local", "accesses to local memory")
    yield from _nothing(facts, "calls", "calls in the PTX")


def _nothing(facts, field, what):
    if getattr(facts, field):
        yield f"{getattr(facts, field)} {what}"


def flaws_of_update(facts, variant, dtype):
    """What is not as it should be in an update kernel."""
    yield from flaws(facts, dtype)
    wanted = wanted_accesses(variant, dtype)
    if facts.accesses != wanted:
        yield f"the vector loop has {facts.accesses}; wanted {wanted}"
    registers, instructions = bounds(variant, dtype)
    if facts.registers > registers:
        yield f"{facts.registers} registers; wanted at most {registers}"
    if instructions_per_element(facts, dtype) > instructions:
        yield f"{instructions_per_element(facts, dtype):g} instructions an element; wanted at most {instructions}"
