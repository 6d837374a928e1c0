"""What the tests of selection share: ordinary layers, backends to register, fake packages."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from attn_dispatch.backends.reference.torch_ref import ReferenceBackend
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.capability import ANY, Capabilities, Constraint, Reason
from attn_dispatch.interface.spec import AttentionSpec, MLADims
from attn_dispatch.platforms import libraries
from attn_dispatch.platforms.device import DeviceMatch
from attn_dispatch.selection.overrides import Rule, Source, parse_override
from attn_dispatch.selection.registry import registry
from attn_dispatch.selection.version import changed

DEEPSEEK = MLADims(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def layer(**fields: object) -> AttentionSpec:
    """An ordinary layer, which every dense backend computes, with some fields changed."""
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_size": 64, "block_size": 16}
    return AttentionSpec(**{**sizes, "dtype": torch.bfloat16, **fields})


def mla_layer(**fields: object) -> AttentionSpec:
    """An ordinary layer of multi-head latent attention."""
    return AttentionSpec.for_mla(
        **{"num_heads": 16, "dtype": torch.bfloat16, "block_size": 16, "mla": DEEPSEEK, **fields}
    )


def make_backend(
    name: str,
    *,
    devices: tuple[DeviceMatch, ...] = (DeviceMatch(),),
    requires: tuple[str, ...] = (),
    check: Callable[..., list[Reason]] = lambda cls, spec, device: [],
    **fields: Constraint,
) -> type[AttentionBackend]:
    """A proper backend that accepts everything but what `fields` constrains."""
    everything = {field.name: ANY for field in dataclasses.fields(AttentionSpec)}
    members = {
        "__module__": __name__,
        "capabilities": Capabilities(devices=devices, requires=requires, **everything | fields),
        "get_name": staticmethod(lambda: name),
        "check_combination": classmethod(check),
    }
    return type(name.title().replace("_", "") + "Backend", (ReferenceBackend,), members)


@contextlib.contextmanager
def registered(*backends: type[AttentionBackend]) -> Iterator[None]:
    """The library with these backends registered."""
    for backend in backends:
        registry.register(backend)
    try:
        yield
    finally:
        for backend in backends:
            registry.unregister(backend.get_name())


def rules(text: str, source: Source = Source.ARGUMENT) -> tuple[Rule, ...]:
    """The rules in an override's text."""
    return parse_override(text, source, registry.names())


class Forbidden:
    """Replaces something that must not be used: any use of it fails the test."""

    def __init__(self, what: str) -> None:
        object.__setattr__(self, "_what", what)

    def __getattribute__(self, name: str) -> object:
        raise AssertionError(f"{object.__getattribute__(self, '_what')} was touched: .{name}")

    def __getitem__(self, key: object) -> object:
        raise AssertionError(f"it was read: [{key!r}]")

    __contains__ = __call__ = __iter__ = __getitem__


@contextlib.contextmanager
def fake_site(path: Path) -> Iterator[FakeSite]:
    """A FakeSite in a folder; behind it, what is installed here is looked up again."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield FakeSite(path, monkeypatch)
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(str(path)):
                del sys.modules[name]
    libraries._installed_version.cache_clear()
    changed()


class FakeSite:
    """A folder on sys.path that holds packages as pip would have installed them."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self._monkeypatch = monkeypatch
        monkeypatch.syspath_prepend(str(path))
        monkeypatch.setattr(libraries, "_broken", {})

    def install(
        self,
        module: str,
        code: str = "",
        *,
        distribution: str = "",
        version: str = "",
        entry_points: str = "",
    ) -> None:
        """A module with this code; the record of a package if it has a version."""
        (self.path / f"{module}.py").write_text(code)
        if version:
            record = self.path / f"{distribution or module}-{version}.dist-info"
            record.mkdir()
            (record / "METADATA").write_text(f"Name: {distribution or module}\nVersion: {version}")
            (record / "entry_points.txt").write_text(entry_points)
        self.forget(module)

    def remove(self, module: str) -> None:
        """Make a library that may be installed here absent."""
        self._monkeypatch.setitem(sys.modules, module, None)
        libraries._installed_version.cache_clear()
        changed()

    def forget(self, module: str) -> None:
        """Make the next import and the next look at the installed packages real ones."""
        for name in list(sys.modules):
            if name == module or name.startswith(f"{module}."):
                self._monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        libraries._installed_version.cache_clear()
        changed()
