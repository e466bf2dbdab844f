"""LaTeX for the few forms of Python in the lines of an explanation, made from the lines themselves."""

from __future__ import annotations

import ast
import re

_NAMES = {"lr": r"\mathrm{lr}", "every_g": r"\text{every } g"}
_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "{} + {}",
    ast.Sub: "{} - {}",
    ast.Mult: r"{}\,{}",
    ast.Div: r"\frac{{{}}}{{{}}}",
}
_CALLS = {
    "sqrt": r"\sqrt{{{}}}",
    "norm": r"\lVert {} \rVert",
    "maximum": r"\max({},\ {})",
    "minimum": r"\min({},\ {})",
    "clip": r"\mathrm{{clip}}({},\ {},\ {})",
    "where": r"\begin{{cases}} {1} & \text{{if }} {0} \\ {2} & \text{{else}} \end{{cases}}",
}


def latex_line(line: str) -> str:
    """A line ``name = expression  # note`` as a line of an aligned equation."""
    code, _, note = line.partition("#")
    plain = re.sub("[<>]", "", note.strip())  # <lambda> is not HTML
    said = rf" && {_text(plain)}" if note else ""
    if not code.strip():
        return "&" + said
    (assign,) = ast.parse(code.strip()).body
    assert isinstance(assign, ast.Assign)
    return rf"{_latex(assign.targets[0])} &\leftarrow {_latex(assign.value)}{said}"


def _text(words: str) -> str:
    r"""Words in an equation, joined by underscores: inside \text, MathJax would show a backslash too."""
    return r"\_".join(rf"\text{{{part}}}" if part else "" for part in words.split("_"))


def _latex(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return _NAMES.get(node.id, node.id)
    if isinstance(node, ast.Constant):
        mantissa, _, exponent = repr(node.value).partition("e")
        power = f"10^{{{int(exponent)}}}" if exponent else ""
        return power if power and mantissa == "1" else rf"{mantissa} \cdot {power}" if power else mantissa
    if isinstance(node, ast.UnaryOp):
        return f"-{_latex(node.operand)}"
    if isinstance(node, ast.Compare):
        return f"{_latex(node.left)} > {_latex(node.comparators[0])}"
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        return _CALLS[node.func.id].format(*map(_latex, node.args))
    assert isinstance(node, ast.BinOp)
    if isinstance(node.op, ast.Pow):
        return f"{_latex(node.left)}^{{{_latex(node.right)}}}"
    if isinstance(node.op, ast.Mult) and isinstance(node.right, ast.Constant):
        return rf"{_latex(node.left)} \cdot {_latex(node.right)}"
    return _BINARY[type(node.op)].format(_latex(node.left), _latex(node.right))
