"""Loops of kernels: Triton's frontend loses a variable that begins as another one's alias.

It finds what a loop carries by a dry run, in which it compares values before and after. Of

    before = blocks
    for i in range(n):
        ...
        before = blocks
        blocks = load(i)

`before` is the same value before and after the dry run, and so is not carried (Triton 3.6 to 3.9).
Begin with `before = gl.zeros_like(blocks)`.
"""

from __future__ import annotations

import ast
from pathlib import Path

import attn_dispatch.backends

BACKENDS = Path(attn_dispatch.backends.__file__).parent


def assignments(nodes):
    """(line, name, other name or None) of what statements assign, and what they contain."""
    for node in nodes:
        for each in ast.walk(node):
            if isinstance(each, ast.Assign):
                for target in each.targets:
                    yield from pairs(each.lineno, target, each.value)


def pairs(line, target, value):
    if isinstance(target, ast.Name):
        yield line, target.id, value.id if isinstance(value, ast.Name) else None
    elif isinstance(target, ast.Tuple):
        one_by_one = isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
        values = value.elts if one_by_one else [None] * len(target.elts)
        for each, its_value in zip(target.elts, values, strict=True):
            yield from pairs(line, each, its_value)


def lost(source):
    """(function, variable, other name) of every variable that a loop would not carry.

    It begins as an alias, and the loop sets it to that name's value before it sets that name.
    """
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for loop in ast.walk(function):
            if isinstance(loop, (ast.For, ast.While)):
                inside = list(assignments(loop.body))
                lines = {line for line, _, _ in inside}
                before = {
                    (name, other)
                    for line, name, other in assignments(function.body)
                    if other and line not in lines and line < loop.lineno
                }
                for line, name, other in inside:
                    later = any(each == other and at > line for at, each, _ in inside)
                    if (name, other) in before and later:
                        yield function.name, name, other


def test_the_check_finds_it():
    source = """
def kernel(blocks, n):
    before = blocks
    for i in range(n):
        if i:
            before = blocks
        blocks = load(i)
"""
    assert list(lost(source)) == [("kernel", "before", "blocks")]
    assert not list(lost(source.replace("before = blocks\n    for", "before = zeros()\n    for")))


def test_no_kernel_loses_a_variable():
    found = {path.name: list(lost(path.read_text())) for path in BACKENDS.rglob("*.py")}
    assert not {name: names for name, names in found.items() if names}
