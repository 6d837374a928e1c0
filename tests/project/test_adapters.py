"""The plug-ins for engines stay thin."""

from __future__ import annotations

import ast
import io
import tokenize

from support.paths import ROOT

FOLDER = ROOT / "dispatch" / "integrations"

#: Of all adapters together.
MOST_LINES = 599

_LAYOUT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}


def files():
    return [*FOLDER.glob("vllm/*.py"), *FOLDER.glob("sglang/*.py")]


def code_lines(text):
    """The number of lines without blank ones, comments and docstrings."""
    lines, at_start = set(), True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _LAYOUT:
            continue
        if token.type == tokenize.NEWLINE:
            at_start = True
        elif not (at_start and token.type == tokenize.STRING):
            lines.update(range(token.start[0], token.end[0] + 1))
            at_start = False
    return len(lines)


def test_lines_of_code_are_counted():
    text = '"""A\ndocstring."""\n\n#: A comment.\nA = """of\ntwo"""\n'
    text += 'def f():\n    "text"\n    return A\n'
    assert code_lines(text) == 4


def test_the_adapters_are_short():
    assert sum(code_lines(path.read_text(encoding="utf-8")) for path in files()) <= MOST_LINES


def test_the_adapters_use_no_private_name_of_ours():
    """Imported names and modules of this library begin with no underscore."""
    private = []
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("attn_dispatch"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                private += [f"{path.name}: {name}" for name in names if name.startswith("_")]
    assert private == []


def test_private_names_of_vllm_are_in_one_file():
    """Outside of it, only attributes of our own classes begin with one underscore."""
    for path in FOLDER.glob("vllm/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        owners = {
            getattr(node.value, "id", "another")
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and node.attr[1] != "_"
        }
        assert owners <= {"self", "cls"}, path.name
        texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        named = {t for t in texts if isinstance(t, str) and t[:1] == "_" and t[1:].isidentifier()}
        assert path.name == "private.py" or named == set()
