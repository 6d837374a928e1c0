"""What `import attn_dispatch` loads, the public names, and the packages of the wheel."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys

import pytest

import attn_dispatch
from support.paths import ROOT

STUB = ROOT / "dispatch" / "__init__.pyi"

#: Imported only when they are used.
OPTIONAL = [
    "triton",
    "flash_attn",
    "flash_attn_interface",
    "flashinfer",
    "aiter",
    "transformers",
    "typer",
    "rich",
]


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after this code."""
    report = "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_loads_only_its_version():
    loaded = modules_after("import attn_dispatch")
    assert loaded.isdisjoint([*OPTIONAL, "torch"])
    own = {name for name in loaded if name.startswith("attn_dispatch.")}
    assert own == {"attn_dispatch.version"}


def test_resolving_every_public_name_loads_no_optional_library():
    loaded = modules_after("from attn_dispatch import *; assert AttentionSpec and plan_kv_cache")
    assert loaded.isdisjoint(OPTIONAL)


def test_picking_a_backend_and_running_it_loads_no_optional_library():
    code = """
import torch
from attn_dispatch import AttentionSpec, attention, explain, get_attn_backend, resolve
q = torch.randn(5, 8, 64)
attention(q, q, q, causal=True)
attention(q, q, q, sinks=torch.zeros(8))
explain(AttentionSpec(num_heads=8, head_size=64, dtype=torch.float16), "H200")
"""
    # PyTorch itself may load Triton, where it is installed.
    assert modules_after(code).isdisjoint(
        {*OPTIONAL} - modules_after("import torch; torch.compile")
    )


# --- Public names -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", attn_dispatch.__all__)
def test_public_name_exists(name):
    value = getattr(attn_dispatch, name)
    assert name in dir(attn_dispatch)
    assert attn_dispatch.__dict__[name] is value  # kept after the first look-up


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'attn_dispatch' has no attribute 'attenti0n'"):
        attn_dispatch.attenti0n  # noqa: B018


def test_type_checkers_see_the_public_names():
    """`__init__.pyi` imports each name from the module that `__init__.py` names."""
    homes = {("version", "__version__")}
    homes |= {(module, name) for name, module in attn_dispatch._HOME_OF.items()}
    statements = ast.parse(STUB.read_text(encoding="utf-8")).body
    assert homes == {
        (statement.module.removeprefix("attn_dispatch."), alias.asname)
        for statement in statements
        for alias in statement.names
    }


@pytest.mark.parametrize("name", attn_dispatch.__all__)
def test_public_name_is_exported_by_its_module(name):
    home = importlib.import_module(f"attn_dispatch.{attn_dispatch._HOME_OF[name]}")
    assert name in home.__all__


# --- Packages ---------------------------------------------------------------------------------


def packages_on_disk() -> set[str]:
    """Every folder that is a package, by its installed name."""
    found = set()
    for folder, name in (("dispatch", "attn_dispatch"), ("backends", "attn_dispatch.backends")):
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(ROOT / folder).parts]))
    return found


def test_every_package_is_installed():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^packages = (\[.*?\])", text, re.MULTILINE | re.DOTALL)
    assert set(ast.literal_eval(listed)) == packages_on_disk()
