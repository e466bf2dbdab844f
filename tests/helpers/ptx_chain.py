"""How many loads a kernel has to make one after the other before its first element, counted in its PTX."""

import re

INSTRUCTION = re.compile(r"^\s*(?:@(!?%p\d+)\s+)?([a-z][\w.]*)\s+([^;]*);", re.MULTILINE)
REGISTER = re.compile(r"%[a-z]+\d+")
NOTHING_WRITTEN = ("st.", "bra", "ret", "bar", "call")


def chain(ptx, element=r"ld\.global\.v\d"):
    """The longest chain of dependent loads before the first access that matches `element`.

    A load depends on the loads that its address is computed from, and on those that decide the branches before it.
    Within a block, the assembler may reorder loads, so other loads do not count.
    """
    depth, decided = {}, 0
    for predicate, opcode, operands in INSTRUCTION.findall(ptx):
        head, rest = operands.split("}", 1) if operands.lstrip().startswith("{") else operands.partition(",")[::2]
        nothing = opcode.startswith(NOTHING_WRITTEN)
        read = REGISTER.findall(f"{operands if nothing else rest} {predicate}")
        waited = max([decided, *(depth.get(register, 0) for register in read)])
        if re.match(element, opcode):
            return waited
        if opcode.startswith("bra") and predicate:
            decided = waited
        for register in [] if nothing else REGISTER.findall(head):
            depth[register] = waited + opcode.startswith("ld.global")
    raise AssertionError(f"no access matches {element}")
