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


def trees():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in files()}


def imported(tree):
    """(module, name or None) of everything that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def is_private(name):
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_names(tree):
    """Names of others that begin with an underscore: attributes, imports, and texts that are names.

    Those of a class itself, and those that the file defines at its top, are its own.
    """
    own = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    own |= {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if getattr(node.value, "id", None) not in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = node.value.split(".")
            if all(part.isidentifier() for part in parts):
                found |= {part for part in parts if is_private(part) and part not in own}
    for module, name in imported(tree):
        found |= {part for part in [*module.split("."), name or ""] if is_private(part)}
    return found


def test_private_names_are_found():
    code = "from a._b import c, _d\nimport e._f\nx._g.h\nself._i._j\ngetattr(x, '_k')\n"
    code += "attrgetter('l._m')\ndef _n(): self._o, cls._p, '_ words', '__all__'\nx.__dict__\n"
    assert private_names(ast.parse(code)) == {"_b", "_d", "_f", "_g", "_j", "_k", "_m"}


def test_private_names_of_an_engine_are_in_one_file():
    """And no private name of ours is in any: neither imports nor attributes."""
    found = {
        path.relative_to(FOLDER).as_posix(): private_names(tree) for path, tree in trees().items()
    }
    assert {path: names for path, names in found.items() if names} == {
        "vllm/private.py": {"_k_scale_float", "_v_scale_float", "_seq_lens_cpu"}
    }


def test_the_adapters_are_made_of_what_any_plug_in_can_use():
    """Of this library they import `attn_dispatch.engines` and their own folder, nothing else."""
    from attn_dispatch import engines

    for path, tree in trees().items():
        own = f"attn_dispatch.integrations.{path.parent.name}"
        for module, name in imported(tree):
            if module.split(".")[0] == "attn_dispatch" and not module.startswith(own):
                assert (module, name) == ("attn_dispatch", "engines"), path
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "engines"
        }
        assert used <= {*engines.__all__}, path
