"""The registry: valid backend classes, names of classes, plug-ins."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod

import pytest

from attn_dispatch.backends.reference import torch_ref
from attn_dispatch.backends.reference.torch_ref import ReferenceBackend, ReferenceImpl
from attn_dispatch.errors import BackendFailure, InvalidInputError, UnsupportedError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.capability import OneOf, ReasonCode
from attn_dispatch.platforms.known_devices import known_device
from attn_dispatch.selection.priorities import BUILTIN
from attn_dispatch.selection.registry import (
    Registry,
    check_backend_class,
    register_backend,
    registry,
    resolve_full_cls_name,
)
from attn_dispatch.selection.resolve import resolve
from attn_dispatch.selection.selector import select
from support.selection import FakeSite, layer, make_backend, registered, rules

CPU = known_device("cpu")


class Outer:
    class NestedBackend(ReferenceBackend):
        @staticmethod
        def get_name() -> str:
            return "NESTED"


# --- What counts as a backend -----------------------------------------------------------------


class AbstractImpl(ReferenceImpl):
    @abstractmethod
    def forward(self): ...


def _raise(*args):
    raise OSError("libkernels.so: cannot open shared object file")


#: Members that make a valid backend class invalid, and the message.
NOT_BACKENDS = {
    "old version": ({"interface_version": 0}, "interface_version is 0, and this attn-dispatch has"),
    "no capabilities": ({"capabilities": {"sinks": True}}, "capabilities is not a Capabilities"),
    "impl is no class": ({"get_impl_cls": lambda: None}, "get_impl_cls.. is not a subclass of"),
    "impl of another kind": (
        {"get_impl_cls": lambda: torch_ref.ReferenceBackend.builder_cls},
        "get_impl_cls.. is not a subclass of AttentionImpl",
    ),
    "impl still abstract": (
        {"get_impl_cls": lambda: AbstractImpl},
        "AbstractImpl does not implement forward",
    ),
    "impl getter raises": (
        {"get_impl_cls": _raise},
        "get_impl_cls.. raises OSError: libkernels.so: cannot open",
    ),
    "state getter raises": ({"get_state_cls": _raise}, "get_state_cls.. raises OSError"),
    "builder of another kind": (
        {"get_builder_cls": lambda: ReferenceImpl},
        "get_builder_cls.. is not a subclass of AttentionMetadataBuilder",
    ),
    "metadata of another kind": (
        {"get_metadata_cls": lambda: dict},
        "get_metadata_cls.. is not a subclass of AttentionMetadata",
    ),
    "name raises": ({"get_name": _raise}, "get_name.. raises OSError"),
    "name is none": ({"get_name": lambda: None}, "get_name.. is None"),
    "name no override can spell": (
        {"get_name": lambda: "my-backend"},
        "get_name.. is 'my-backend'",
    ),
}


@pytest.mark.parametrize(("members", "message"), NOT_BACKENDS.values(), ids=NOT_BACKENDS)
def test_an_invalid_backend_class_is_rejected_with_the_reason(members, message):
    members = {k: staticmethod(v) if callable(v) else v for k, v in members.items()}
    cls = type("BadBackend", (ReferenceBackend,), members)
    with pytest.raises(InvalidInputError, match=message):
        register_backend(cls)
    assert "BadBackend" not in str(registry.names())


def test_missing_members_are_all_named():
    class Empty(AttentionBackend):
        pass

    (problem,) = check_backend_class(Empty)
    assert problem == "Empty does not implement name, impl_cls"


@pytest.mark.parametrize("what", [None, "REFERENCE", object, ReferenceImpl], ids=str)
def test_an_object_that_is_not_a_backend_class_is_rejected(what):
    (problem,) = check_backend_class(what)
    assert "is not a subclass of attn_dispatch.AttentionBackend" in problem


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_backends_are_valid(name):
    assert check_backend_class(resolve_full_cls_name(BUILTIN[name].target)) == []


# --- Names and classes ------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILTIN)
def test_full_cls_name_resolves_to_the_class(name):
    cls = registry.candidates()[name].backend_cls
    assert cls.get_name() == name
    assert resolve_full_cls_name(cls.full_cls_name()) is cls


@pytest.mark.parametrize("separator", [":", "."])
def test_a_full_class_name_may_be_text(separator):
    text = f"attn_dispatch.backends.reference.torch_ref{separator}ReferenceBackend"
    assert resolve_full_cls_name(text) is ReferenceBackend


def test_a_nested_class_has_a_full_name():
    nested = Outer.NestedBackend
    assert nested.full_cls_name() == (__name__, "Outer.NestedBackend")
    assert resolve_full_cls_name(nested.full_cls_name()) is nested


@pytest.mark.parametrize("name", ["", "ReferenceBackend", ":X", "a:", ("a",), ("a", ""), 5, None])
def test_a_malformed_full_class_name_is_rejected(name):
    with pytest.raises(InvalidInputError, match=r"not of the form 'package\.module:Class'"):
        resolve_full_cls_name(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_anywhere:X", "ModuleNotFoundError"),
        ("attn_dispatch.selection.registry:NoSuchClass", "AttributeError"),
        ("attn_dispatch.selection.registry:Registry", "is not a backend"),
    ],
)
def test_a_full_class_name_that_cannot_be_resolved_is_a_failure(name, message):
    with pytest.raises(BackendFailure, match=message):
        resolve_full_cls_name(name)


# --- Registering ------------------------------------------------------------------------------


def test_register_is_a_decorator_and_can_be_undone():
    cls = make_backend("MINE")
    assert register_backend(cls) is cls
    assert select(layer(), CPU, rules=rules("mine")).backend_cls is cls
    registry.unregister("MINE")
    assert "MINE" not in registry.names()


def test_an_unregistered_name_cannot_be_unregistered():
    with pytest.raises(InvalidInputError, match="'REFERENCE' was not registered"):
        registry.unregister("REFERENCE")


def test_registering_a_name_again_replaces_the_class():
    first, second = make_backend("MINE"), make_backend("MINE")
    with registered(first):
        registry.register(second)
        assert resolve(layer(), "cpu", backend="MINE").backend_cls is second


def test_a_builtin_backend_is_replaced_until_the_replacement_is_unregistered():
    mine = make_backend("TORCH_SDPA")
    with registered(mine):
        assert resolve(layer(), "cpu").backend_cls is mine
    assert resolve(layer(), "cpu").backend_cls is not mine


def test_a_registration_invalidates_cached_decisions():
    spec = layer(sinks=True)
    before = resolve(spec, "cpu").name
    with registered(make_backend("WITH_SINKS")):
        assert resolve(spec, "cpu").name == "WITH_SINKS"
    assert resolve(spec, "cpu").name == before == "REFERENCE"


# --- Plugins ----------------------------------------------------------------------------------

GOOD_PLUGIN = """
from attn_dispatch.backends.reference.torch_ref import ReferenceBackend

class Plugin(ReferenceBackend):
    @staticmethod
    def get_name():
        return "PLUGIN"
"""


def with_plugin(
    site: FakeSite, code: str, name: str = "PLUGIN", module: str = "some_plugin"
) -> Registry:
    """A registry as it would be after `pip install` of a package with this plugin."""
    entry = f"[attn_dispatch.backends]\n{name} = {module}:Plugin\n"
    site.install(module, code, version="1.0", entry_points=entry)
    return Registry(BUILTIN)


def test_a_plugin_is_tried_before_the_last_resort(site):
    candidates = with_plugin(site, GOOD_PLUGIN).candidates()
    assert select(layer(), CPU, candidates=candidates).name == "TORCH_SDPA"
    assert select(layer(sinks=True), CPU, candidates=candidates).name == "PLUGIN"


BROKEN_PLUGINS = {
    "missing import": ("import no_such_module", "ModuleNotFoundError: No module named"),
    "broken library": ("raise OSError('libcuda.so.1: cannot open')", "OSError: libcuda.so.1"),
    "syntax error": ("class Plugin(:", "SyntaxError"),
    "exit": ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
    "panic": ("class Panic(BaseException): pass\nraise Panic('rust')", "Panic: rust"),
    "no class": ("", "AttributeError"),
    "another class": ("class Plugin: pass", "is not a subclass of attn_dispatch.AttentionBackend"),
    "another name": (GOOD_PLUGIN.replace("PLUGIN", "FASTER"), "calls itself 'FASTER'"),
    "another version": (GOOD_PLUGIN + "    interface_version = 99", "interface_version is 99"),
    "wrong declaration": (
        "from attn_dispatch import Capabilities\nCapabilities(devices=(), sinks=True)",
        "InvalidInputError: sinks=True is not a constraint",
    ),
}


@pytest.mark.parametrize(("code", "message"), BROKEN_PLUGINS.values(), ids=BROKEN_PLUGINS)
def test_a_broken_plugin_is_rejected_and_others_work(site, code, message):
    candidates = with_plugin(site, code).candidates()
    selection = select(layer(), CPU, candidates=candidates)
    assert selection.name == "TORCH_SDPA"
    (verdict,) = [v for v in selection.verdicts if v.name == "PLUGIN"]
    (reason,) = verdict.reasons
    assert reason.code is ReasonCode.LOAD
    assert message in str(reason)


def test_a_broken_plugin_that_is_required_is_an_error_with_the_cause(site):
    broken = with_plugin(site, "import no_such_module")
    (rule,) = rules("REFERENCE")
    rule = type(rule)(rule.mode, "PLUGIN", text="PLUGIN")
    with pytest.raises(UnsupportedError, match="No module named 'no_such_module'"):
        select(layer(), CPU, rules=[rule], candidates=broken.candidates())


def test_a_plugin_whose_import_hangs_is_rejected(site, monkeypatch):
    monkeypatch.setattr("attn_dispatch.selection.registry._PLUGIN_SECONDS", 0.2)
    code = "import threading; threading.Event().wait(20)"
    waiting = with_plugin(site, code, module="hanging_plugin")  # its name stays locked
    start = time.perf_counter()
    candidates = waiting.candidates()
    assert time.perf_counter() - start < 10
    assert candidates["PLUGIN"].backend_cls is None
    assert "did not end within 0.2 s" in str(candidates["PLUGIN"].problem)
    assert candidates["REFERENCE"].backend_cls is not None
    assert waiting.candidates() is candidates  # it is not waited for again


def test_an_interrupt_during_the_import_of_a_plugin_is_not_swallowed(site):
    interrupted = with_plugin(site, "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        interrupted.candidates()


def test_a_broken_plugin_is_imported_once(site):
    site.install("plugin_counter", "tries = 0")
    code = "import plugin_counter as c\nc.tries += 1\nraise OSError(f'try {c.tries}')"
    broken = with_plugin(site, code)
    for name in ("ONE", "TWO"):
        broken.register(make_backend(name))
        assert "OSError: try 1" in str(broken.candidates()["PLUGIN"].problem)


def test_an_entry_point_cannot_take_the_name_of_a_builtin_backend(site):
    code = GOOD_PLUGIN.replace("PLUGIN", "TORCH_SDPA")
    candidates = with_plugin(site, code, name="TORCH_SDPA").candidates()
    assert candidates["TORCH_SDPA"].target == BUILTIN["TORCH_SDPA"].target


@pytest.mark.parametrize(
    "check", [_raise, lambda *_: None, lambda *_: 1], ids=["raises", "gives None", "gives a number"]
)
def test_a_plugin_whose_check_raises_is_rejected_and_others_work(check):
    with registered(make_backend("FRAGILE", check=check)):
        selection = select(layer(), CPU)
        (reason,) = next(v.reasons for v in selection.verdicts if v.name == "FRAGILE")
    assert selection.name == "TORCH_SDPA"
    assert reason.code is ReasonCode.LOAD
    assert "its check of the request raises" in str(reason)


def test_unreadable_records_disable_only_plugins(site):
    site.install("garbage", version="1.0", entry_points="[attn_dispatch.backends]\nno equals sign")
    with pytest.warns(UserWarning, match="entry points cannot be read"):
        assert Registry(BUILTIN).names() == set(BUILTIN)


def test_a_plugin_may_register_itself_while_it_is_imported(site):
    code = GOOD_PLUGIN + (
        "from attn_dispatch.selection.registry import register_backend, registry\n"
        "registry.candidates()\n"
        "class Second(Plugin):\n"
        "    capabilities = Plugin.capabilities\n"
        "    get_name = staticmethod(lambda: 'SECOND')\n"
        "register_backend(Second)\n"
    )
    plugins = with_plugin(site, code)
    try:
        assert plugins.candidates()["PLUGIN"].problem is None
        assert "SECOND" in registry.candidates()
    finally:
        registry.unregister("SECOND")


def test_two_threads_that_import_a_plugin_and_select_do_not_wait_for_each_other(site):
    # One holds the module's import lock and registers; the other loads candidates.
    site.install("plugin_gate", "import threading\nimporting = threading.Event()")
    plugins = with_plugin(
        site,
        GOOD_PLUGIN + "import plugin_gate, time\nplugin_gate.importing.set()\ntime.sleep(0.2)\n"
        "plugin_gate.registry.register(type('Late', (Plugin,), {'get_name': lambda: 'LATE'}))",
    )
    import plugin_gate

    plugin_gate.registry = plugins
    importer = threading.Thread(target=lambda: __import__("some_plugin"), daemon=True)
    importer.start()
    plugin_gate.importing.wait(10)
    selecting = threading.Thread(target=plugins.candidates, daemon=True)
    selecting.start()
    for thread in (importer, selecting):
        thread.join(20)
        assert not thread.is_alive()
    assert {"PLUGIN", "LATE"} <= set(plugins.candidates())


def test_other_libraries_that_a_plugin_requires_are_looked_up(site):
    site.install("own_kernels", distribution="own-kernels", version="2.1.post3")
    needy = make_backend("NEEDY", requires=("own-kernels>=2",), sinks=OneOf(True))
    with registered(needy):
        assert resolve(layer(sinks=True), "cpu").name == "NEEDY"
