"""The names of SGLang that the plug-in uses, looked up in the released package.

Nothing of SGLang is installed or imported as a whole: the wheel's Python files are read, and some
classes that need only torch are executed from there, to run steps through the plug-in.
"""

from __future__ import annotations

import ast
import contextlib
import enum
import functools
import logging
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attn_dispatch.integrations.sglang import BACKEND_NAME, VERSION, make_backend, register
from support import fake_sglang, sglang_names
from support.sglang_cases import Conversation

pytestmark = pytest.mark.contracts

#: One file of the released package, whichever Python runs the test. It is kept in pytest's cache.
WHEEL = f"sglang=={VERSION}"
BUILD = ("--python-version", "3.11", "--platform", "manylinux_2_34_x86_64")


class Package:
    """The Python files of a wheel, by module."""

    def __init__(self, archive):
        self._archive = archive

    @functools.cache  # noqa: B019 - one object for the whole session
    def text(self, module):
        path = module.replace(".", "/")
        found = set(self._archive.namelist())
        path = f"{path}.py" if f"{path}.py" in found else f"{path}/__init__.py"
        return self._archive.read(path).decode()

    @functools.cache  # noqa: B019
    def tree(self, module):
        return ast.parse(self.text(module))

    def definition(self, module, path):
        """The node of a class or function, by its dotted name in the module."""
        node = self.tree(module)
        for name in path.split("."):
            kinds = (ast.ClassDef, ast.FunctionDef)
            node = next(n for n in node.body if isinstance(n, kinds) and n.name == name)
        return node

    def run(self, module, *paths, **given):
        """Definitions of a module, executed with these names and torch's."""
        nodes = [self.definition(module, path) for path in paths]
        future = ast.parse("from __future__ import annotations").body
        code = compile(ast.Module([*future, *nodes], []), module, "exec")
        space: dict[str, Any] = {"torch": torch, "nn": torch.nn, "Optional": None, **given}
        exec(code, space)
        return SimpleNamespace(**{path: space[path] for path in paths})


@pytest.fixture(scope="session")
def sglang(pytestconfig):
    folder = pytestconfig.cache.mkdir("engine_wheels")
    pattern = f"sglang-{VERSION}-*.whl"
    if not list(folder.glob(pattern)):
        options = ["-q", "--no-deps", "--only-binary=:all:", *BUILD, "--dest", str(folder)]
        pip = [sys.executable, "-m", "pip", "download"]
        subprocess.run([*pip, *options, WHEEL], check=True, timeout=600)
    (wheel,) = folder.glob(pattern)
    with zipfile.ZipFile(wheel) as archive:
        yield Package(archive)


def parameters(function):
    """The names of a function's parameters without self; those that collect the rest starred."""
    arguments = function.args
    found = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
    found += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    found += [each.arg for each in arguments.kwonlyargs]
    found += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return tuple(name for name in found if name != "self")


def defined_names(package, module):
    """What `from module import name` finds, without running it."""
    found = set()
    for node in package.tree(module).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update(each.id for each in targets if isinstance(each, ast.Name))
    return found


def attributes_of(node):
    """The attributes that a class has, or sets on itself in one of its methods."""
    found = set()
    for each in node.body:
        if isinstance(each, ast.FunctionDef):
            found.add(each.name)
        elif isinstance(each, (ast.Assign, ast.AnnAssign)):
            targets = each.targets if isinstance(each, ast.Assign) else [each.target]
            found.update(target.id for target in targets if isinstance(target, ast.Name))
    for each in ast.walk(node):
        is_set = isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
        if is_set and getattr(each.value, "id", None) == "self":
            found.add(each.attr)
    return found


@pytest.mark.parametrize(("name", "module"), sglang_names.IMPORTED.items())
def test_names_that_are_imported(sglang, name, module):
    assert name in defined_names(sglang, module)


@pytest.mark.parametrize(
    ("where", "wanted"), sglang_names.SIGNATURES.items(), ids=lambda each: str(each[-1:])
)
def test_signatures(sglang, where, wanted):
    assert parameters(sglang.definition(*where))[: len(wanted)] == wanted


def test_parameters_after_those_that_are_given_have_defaults(sglang):
    for where, wanted in sglang_names.SIGNATURES.items():
        function = sglang.definition(*where)
        more = len([p for p in parameters(function) if not p.startswith("*")]) - len(wanted)
        assert more <= len(function.args.defaults) + len(function.args.kw_defaults)


@pytest.mark.parametrize(
    ("module", "name", "wanted"),
    [(*where, wanted) for where, wanted in sglang_names.ATTRIBUTES.items()],
    ids=[name for _, name in sglang_names.ATTRIBUTES],
)
def test_attributes(sglang, module, name, wanted):
    assert set(wanted) - attributes_of(sglang.definition(module, name)) == set()


@pytest.mark.parametrize(("module", "text"), sglang_names.TEXTS.values(), ids=sglang_names.TEXTS)
def test_texts(sglang, module, text):
    assert text in sglang.text(module)


def test_the_values_that_the_plug_in_compares(sglang):
    """Defaults of a layer that mean that a feature is off, and the kinds of layers."""
    radix, module = sglang_names.IMPORTED["RadixAttention"], "sglang.srt.layers.radix_attention"
    init = sglang.definition(radix, "RadixAttention.__init__").args
    defaults = {
        each.arg: ast.literal_eval(value)
        for each, value in zip(init.args[-len(init.defaults) :], init.defaults, strict=True)
        if isinstance(value, (ast.Constant, ast.UnaryOp))
    }
    assert defaults["pos_encoding_mode"] == "NONE"
    assert defaults["logit_capping_method"] == "tanh"
    assert defaults["sliding_window_size"] == -1
    assert defaults["logit_cap"] == 0.0
    kinds = sglang.run(module, "AttentionType", Enum=enum.Enum).AttentionType
    assert {each.value for each in kinds} == {"decoder", "decoder_bidirectional", "encoder_only"}


def test_windows_count_the_tokens_before_the_query(sglang):
    """SGLang's own backend for PyTorch shows a query as many keys as the plug-in's window."""
    module = "sglang.srt.layers.attention.torch_native_backend"
    path = "TorchNativeAttnBackend._make_sliding_window_mask"
    node = sglang.definition(module, path)
    node.decorator_list = []
    space: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module([node], []), module, "exec"), space)
    mask = space[node.name](q_len=9, kv_len=9, sliding_window_size=3, device="cpu")
    assert mask.sum(1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("hnd", [False, True], ids=["NHD", "HND"])
def test_the_stand_in_pool_has_the_shapes_of_the_pool(sglang, hnd):
    """What kv_cache_from_sglang reads, and what the other tests allocate."""
    module = "sglang.srt.mem_cache.memory_pool"
    node = sglang.definition(module, "MHATokenToKVPool._kv_buffer_shapes")
    space: dict[str, Any] = {}
    exec(compile(ast.Module([node], []), module, "exec"), space)
    pool = SimpleNamespace(size=160, page_size=16, head_num=2, head_dim=16, v_head_dim=8)
    shapes = space[node.name](SimpleNamespace(**vars(pool), use_hnd=hnd, num_pages=11))
    sizes = (160, 16, 1, 2, 16, 8, torch.float32)
    (pair,) = fake_sglang.MHATokenToKVPool(*sizes, hnd=hnd).buffers
    assert tuple(tuple(each.shape) for each in pair) == shapes


def engine_classes(sglang, in_prefill_graph=False):
    """SGLang's own AttentionBackend, RadixAttention and ForwardMode.

    With in_prefill_graph, the layer acts as between the parts of a breakable graph of a prefill.
    """
    modes = "sglang.srt.model_executor.forward_batch_info"
    mode = sglang.run(modes, "ForwardMode", IntEnum=enum.IntEnum, auto=enum.auto).ForwardMode
    base = sglang.run(
        sglang_names.IMPORTED["AttentionBackend"],
        "AttentionBackend",
        ABC=object,
        is_npu=lambda: False,
        ForwardMode=mode,
        debug_kernel_api=lambda function: function,
    )
    types = sglang.run("sglang.srt.layers.radix_attention", "AttentionType", Enum=enum.Enum)
    used: dict[str, Any] = {}
    slicing = sglang.run(
        "sglang.srt.layers.attention.graph_utils",
        "_zero_padded_tokens",
        "allocate_attention_outputs",
        "attention_input_scope",
        contextmanager=contextlib.contextmanager,
    )
    graphs = {
        "is_in_breakable_cuda_graph": lambda: in_prefill_graph,
        "is_in_full_prefill_graph": lambda: False,
        "is_in_prefill_graph_scope": lambda: in_prefill_graph,
        "get_forward_batch": lambda: used["batch"],
        "get_prefill_raw_num_tokens": lambda: used["batch"].global_num_token_non_padded_cpu,
        "attention_query_tokens": lambda forward_batch, tokens: tokens,
        "attention_output_tokens": lambda forward_batch, tokens: tokens,
        **vars(slicing),
    }
    radix = sglang.run(
        sglang_names.IMPORTED["RadixAttention"],
        "RadixAttention",
        AttentionType=types.AttentionType,
        eager_on_graph=lambda function: function,
        padded_extend_real_tokens=lambda q, forward_batch: None,
        get_attn_backend=lambda: used["backend"],
        **graphs,
    )
    return SimpleNamespace(
        AttentionBackend=base.AttentionBackend,
        RadixAttention=radix.RadixAttention,
        ForwardMode=mode,
        use=used.update,
    )


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("in_prefill_graph", [False, True], ids=["eager", "breakable"])
def test_steps_of_sglangs_own_layer(sglang, monkeypatch, page_size, in_prefill_graph):
    """SGLang's layer calls SGLang's base class, which calls the plug-in."""
    own = engine_classes(sglang, in_prefill_graph)
    fake_sglang.install(
        monkeypatch,
        AttentionBackend=own.AttentionBackend,
        RadixAttention=own.RadixAttention,
    )
    heads, kv_heads, dim = 4, 2, 16
    layers = [
        own.RadixAttention(heads, dim, dim**-0.5, kv_heads, 0),
        own.RadixAttention(heads, dim, dim**-0.5, kv_heads, 1, 3.0, sliding_window_size=5),
    ]
    blocks = [fake_sglang.Block(layer) for layer in layers]
    pool = fake_sglang.MHATokenToKVPool(160, page_size, 2, kv_heads, dim, dim, torch.float32)
    runner = fake_sglang.make_runner(blocks, pool, page_size)
    backend = make_backend(runner)
    assert isinstance(backend, own.AttentionBackend)
    own.use(backend=backend)

    class Through:
        """The layer's forward in the place of the backend's."""

        init_forward_metadata = staticmethod(backend.init_forward_metadata)

        @staticmethod
        def forward(q, k, v, layer, forward_batch):
            if not in_prefill_graph or forward_batch.forward_mode.is_decode():
                return layer(q, k, v, forward_batch)
            rows, padding = len(q), 5  # to the size of a graph
            forward_batch.global_num_token_non_padded_cpu = rows
            forward_batch.positions = forward_batch._attn_output = None
            own.use(batch=forward_batch)
            padded = [torch.cat([t, t.new_ones(padding, *t.shape[1:])]) for t in (q, k, v)]
            result = layer(*padded, forward_batch)
            assert not result[rows:].any()
            return result[:rows]

    talk = Conversation(Through, runner, modes=own.ForwardMode)
    semantics = [{"causal": True}, {"causal": True, "window": 6, "cap": 3.0}]
    assert max(talk.run(semantics)) < 2e-6


def test_the_plug_in_is_found_and_loaded(sglang):
    """By SGLang's own loader, also where SGLANG_PLUGINS names it."""
    group = "sglang.srt.plugins"
    entry = EntryPoint(BACKEND_NAME, "attn_dispatch.integrations.sglang:register", group)
    chosen = {"": True, BACKEND_NAME: True, "another": False}
    for value, is_loaded in chosen.items():
        envs = SimpleNamespace(SGLANG_PLUGINS=SimpleNamespace(get=lambda value=value: value))
        given = {"envs": envs, "logger": logging.getLogger("sglang")}
        own = sglang.run(
            group, "load_plugins_by_group", entry_points=lambda group: [entry], **given
        )
        found = own.load_plugins_by_group(group)
        assert [function for function, _ in found.values()] == [register] * is_loaded


def test_the_option_becomes_a_choice(sglang, monkeypatch):
    """With SGLang's own registry and list of choices."""
    module = sglang_names.IMPORTED["register_attention_backend"]
    registry: dict[str, Any] = {}
    found = sglang.run(module, "register_attention_backend", ATTENTION_BACKENDS=registry)
    choices = next(
        ast.literal_eval(node.value)
        for node in sglang.tree(sglang_names.IMPORTED["ATTENTION_BACKEND_CHOICES"]).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "ATTENTION_BACKEND_CHOICES"
    )
    assert BACKEND_NAME not in choices
    fake_sglang.install(
        monkeypatch,
        register_attention_backend=found.register_attention_backend,
        ATTENTION_BACKEND_CHOICES=choices,
    )
    register()
    assert BACKEND_NAME in choices
    assert registry == {BACKEND_NAME: make_backend}
