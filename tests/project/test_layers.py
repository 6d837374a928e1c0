"""Imports point downwards, no modules import each other, and files stay short.

Every import counts: at the top of a file, inside a function, and under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from support.paths import ROOT

#: Lowest first. Layers in one row may not import each other.
LAYERS = [
    ["version", "errors", "emulation"],
    ["environment", "arguments", "files", "locks", "log"],
    ["platforms"],
    ["interface"],
    ["backends", "selection", "models"],
    ["runtime"],
    ["distributed", "engines"],
    ["conformance", "integrations"],
    ["serving"],
    ["bench"],
    ["tuning"],
    ["cli"],
]
PACKAGE = "attn_dispatch"


def modules() -> dict[str, Path]:
    """Every module of the package, by its name."""
    found = {}
    for folder, name in (("dispatch", PACKAGE), ("backends", f"{PACKAGE}.backends")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join([name, *parts])] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, in any scope."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {each for each in found if each.split(".")[0] == PACKAGE}


IMPORTS = {name: imports(name) for name in MODULES}


def layer(name: str) -> int:
    """The index of a module's row in LAYERS; the root package is above all rows."""
    part = name.split(".")[1] if "." in name else ""
    rows = [index for index, row in enumerate(LAYERS) if part in row]
    if part and not rows:
        pytest.fail(f"{name} belongs to no layer; add it to LAYERS.")
    return rows[0] if rows else len(LAYERS)


@pytest.mark.parametrize("name", MODULES)
def test_no_import_goes_upwards(name):
    own = name.split(".")[:2]
    wrong = [
        each
        for each in sorted(IMPORTS[name])
        if layer(each) > layer(name) or (layer(each) == layer(name) and each.split(".")[:2] != own)
    ]
    assert wrong == []


def test_the_emulator_imports_nothing_else_of_the_package():
    own = [name for name in MODULES if name.split(".")[1:2] == ["emulation"]]
    imported = {each for name in own for each in IMPORTS[name]}
    assert own
    assert [each for each in sorted(imported) if not each.startswith(f"{PACKAGE}.emulation.")] == []


def test_only_the_triton_part_of_the_emulator_imports_triton_and_torch():
    """And the interpreter of Gluon, whose kernels are Triton's."""
    found = set()
    for name, path in MODULES.items():
        if name.split(".")[1:2] != ["emulation"] or name.split(".")[2:3] == ["gluon"]:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {module.split(".")[0] for module in modules} & {"torch", "triton"}:
                found.add(name)
    assert found == {f"{PACKAGE}.emulation.{name}" for name in ("emulate", "triton_driver")}


def test_no_modules_import_each_other():
    """Remove modules that import none of the remaining ones, until no module can be removed."""
    left = {name: found & MODULES.keys() - {name} for name, found in IMPORTS.items()}
    while free := [name for name, found in left.items() if not found & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


def test_files_are_short():
    """At most one file outside the kernels has more than 450 lines."""
    kernels = {f"{PACKAGE}.backends.cuda.hopper.{name}" for name in ("prefill", "decode")}
    lengths = {
        name: len(path.read_text(encoding="utf-8").splitlines())
        for name, path in MODULES.items()
        if name not in kernels and ".triton.kernels." not in name
    }
    too_long = {name: length for name, length in lengths.items() if length > 450}
    assert len(too_long) <= 1, too_long


def test_the_root_folder_has_few_modules():
    assert len(list((ROOT / "dispatch").glob("*.py"))) <= 8
