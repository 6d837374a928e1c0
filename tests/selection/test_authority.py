"""Precedence of overrides, and where they apply: contexts, threads, tasks, environment."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import threading

import pytest
import torch

from attn_dispatch import attention_backend, get_attn_backend, resolve
from attn_dispatch.errors import InvalidInputError, UnknownBackendError
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.known_devices import known_device
from attn_dispatch.selection.overrides import VLLM_NAMES, Source
from attn_dispatch.selection.registry import registry
from attn_dispatch.selection.resolve import explained_device
from support.selection import layer, make_backend, registered

CPU = known_device("cpu")
OURS, VLLM = "ATTN_DISPATCH_BACKEND", "VLLM_ATTENTION_BACKEND"


def pick(**arguments) -> str:
    """The name of what an ordinary layer with a window gets on the CPU now."""
    return resolve(layer(sliding_window=128), CPU, **arguments).name


# --- Precedence -------------------------------------------------------------------------------

#: From the highest authority to the lowest.
LEVELS = [
    "argument",
    "kind and phase",
    "kind",
    "inner context",
    "outer context",
    "environment",
    "vLLM's environment",
]
PAIRS_OF_LEVELS = list(itertools.combinations(LEVELS, 2))
PLATFORM_PICK = "TORCH_SDPA"


def picked_under(demands: dict[str, str], monkeypatch) -> str:
    """The pick for a prefill under demands by level."""
    with contextlib.ExitStack() as contexts:
        for level in reversed(LEVELS):  # contexts that are entered later are further in
            name = demands.get(level)
            if name is None or level == "argument":
                continue
            if level == "environment":
                monkeypatch.setenv(OURS, name)
            elif level == "vLLM's environment":
                monkeypatch.setenv(VLLM, name)
            else:
                scope = {"kind": "sliding_window=", "kind and phase": "sliding_window.prefill="}
                contexts.enter_context(attention_backend(scope.get(level, "") + name))
        return pick(phase=Phase.PREFILL, backend=demands.get("argument"))


@pytest.mark.parametrize(("higher", "lower"), PAIRS_OF_LEVELS)
def test_the_higher_authority_decides(higher, lower, monkeypatch):
    with registered(make_backend("ONE"), make_backend("TWO")):
        assert picked_under({higher: "ONE", lower: "TWO"}, monkeypatch) == "ONE"
        assert picked_under({higher: "TWO", lower: "ONE"}, monkeypatch) == "TWO"


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_outranks_the_platform(level, monkeypatch):
    assert pick(phase=Phase.PREFILL) == PLATFORM_PICK
    assert picked_under({level: "REFERENCE"}, monkeypatch) == "REFERENCE"


@pytest.mark.parametrize(("higher", "lower"), PAIRS_OF_LEVELS)
def test_a_higher_exclusion_outranks_a_lower_demand(higher, lower, monkeypatch):
    with registered(make_backend("ONE")):
        assert picked_under({higher: "-ONE", lower: "ONE"}, monkeypatch) == PLATFORM_PICK
        assert picked_under({higher: "ONE", lower: "-ONE"}, monkeypatch) == "ONE"


def test_a_kind_in_the_environment_outranks_a_context_for_everything(monkeypatch):
    monkeypatch.setenv(OURS, "sliding_window=REFERENCE")
    with attention_backend("TORCH_SDPA"):
        assert pick() == "REFERENCE"
        assert pick(backend="TORCH_SDPA") == "TORCH_SDPA"


def test_the_source_of_a_decision_is_reported(monkeypatch):
    def source(**arguments):
        return resolve(layer(), CPU, **arguments).source

    assert source() is Source.PLATFORM
    monkeypatch.setenv(VLLM, "TORCH_SDPA")
    assert source() is Source.VLLM_ENVIRONMENT
    monkeypatch.setenv(OURS, "TORCH_SDPA")
    assert source() is Source.ENVIRONMENT
    with attention_backend("TORCH_SDPA"):
        assert source() is Source.CONTEXT
        assert source(backend="TORCH_SDPA") is Source.ARGUMENT


# --- Contexts ---------------------------------------------------------------------------------


def test_contexts_nest_and_end():
    with attention_backend("REFERENCE"):
        with attention_backend("TORCH_SDPA"):
            assert pick() == "TORCH_SDPA"
        assert pick() == "REFERENCE"
    assert pick() == PLATFORM_PICK


def test_a_context_ends_with_an_exception():
    with contextlib.suppress(ZeroDivisionError), attention_backend("REFERENCE"):
        raise ZeroDivisionError
    assert pick() == PLATFORM_PICK


def test_an_inner_context_adds_to_the_outer_one():
    with (
        registered(make_backend("MINE")),
        attention_backend("-TORCH_SDPA"),
        attention_backend("-MINE"),
    ):
        assert pick() == "REFERENCE"


@pytest.mark.parametrize("override", ["NO_SUCH_BACKEND", "prefil=REFERENCE", "-"])
def test_an_invalid_override_raises_when_the_context_is_entered(override):
    with (
        pytest.raises((InvalidInputError, UnknownBackendError), match=r"attention_backend\(\)"),
        attention_backend(override),
    ):
        pytest.fail("the context was entered")


def test_a_context_applies_to_get_attn_backend():
    with attention_backend("REFERENCE"):
        cls = get_attn_backend(64, torch.float32, num_heads=8, device="cpu")
    assert cls.get_name() == "REFERENCE"


# --- Threads and tasks ------------------------------------------------------------------------

PAIR = ("REFERENCE", "TORCH_SDPA")


def test_two_threads_do_not_see_each_others_overrides():
    turn = threading.Barrier(2, timeout=20)
    seen = {name: [] for name in PAIR}

    def work(name: str) -> None:
        turn.wait()
        with attention_backend(name):
            for _ in range(20):
                turn.wait()  # both are inside
                seen[name].append(pick())
        turn.wait()
        seen[name].append(pick())

    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in PAIR]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == {name: [name] * 20 + [PLATFORM_PICK] for name in PAIR}
    assert pick() == PLATFORM_PICK


def test_two_tasks_do_not_see_each_others_overrides():
    async def work(name: str, mine: asyncio.Event, other: asyncio.Event) -> list[str]:
        seen = []
        with attention_backend(name):
            for _ in range(5):
                await mine.wait()
                mine.clear()
                seen.append(pick())
                other.set()
        return [*seen, pick()]

    async def interleave() -> list[list[str]]:
        first, second = asyncio.Event(), asyncio.Event()
        first.set()
        works = work(PAIR[0], first, second), work(PAIR[1], second, first)
        return await asyncio.wait_for(asyncio.gather(*works), 20)

    assert asyncio.run(interleave()) == [[name] * 5 + [PLATFORM_PICK] for name in PAIR]


def test_asyncio_to_thread_keeps_the_override():
    async def work() -> tuple[str, str]:
        with attention_backend("REFERENCE"):
            inside = await asyncio.to_thread(pick)
        return inside, await asyncio.to_thread(pick)

    assert asyncio.run(work()) == ("REFERENCE", PLATFORM_PICK)


def test_a_copied_context_keeps_its_override():
    with attention_backend("REFERENCE"):
        copied = contextvars.copy_context()
    assert copied.run(pick) == "REFERENCE"
    assert pick() == PLATFORM_PICK


# --- The environment --------------------------------------------------------------------------


def pick_by_keywords() -> str:
    return get_attn_backend(64, torch.float32, num_heads=8, device="cpu").get_name()


def test_the_environment_is_read_at_every_call(monkeypatch):
    seen = [pick_by_keywords()]
    for value in ("REFERENCE", "TORCH_SDPA", "-TORCH_SDPA", ""):
        monkeypatch.setenv(OURS, value)
        seen.append(pick_by_keywords())
    assert seen == ["TORCH_SDPA", "REFERENCE", "TORCH_SDPA", "REFERENCE", "TORCH_SDPA"]


@pytest.mark.parametrize("value", ["os:system", "attn_dispatch.backends.reference.torch_ref:X"])
def test_the_environment_names_backends_and_never_code(value, monkeypatch):
    monkeypatch.setenv(OURS, value)
    with pytest.raises(InvalidInputError, match=f"{OURS} '{value}' is malformed"):
        pick_by_keywords()


def test_a_mistake_in_the_environment_is_an_error_that_names_the_variable(monkeypatch):
    monkeypatch.setenv(OURS, "REFERENC")
    with pytest.raises(UnknownBackendError, match=f"{OURS} names .* Did you mean REFERENCE"):
        pick_by_keywords()


@pytest.mark.parametrize("name", ["TORCH_SDPA", "CPU_ATTN", "TORCH_SDPA_VLLM_V1", "torch_sdpa"])
def test_vllms_name_is_understood(name, monkeypatch):
    monkeypatch.setenv(VLLM, name)
    selection = resolve(layer(), CPU)
    assert (selection.name, selection.source) == ("TORCH_SDPA", Source.VLLM_ENVIRONMENT)


@pytest.mark.parametrize("name", ["TRITON_ATTN", "TRITON_ATTN_VLLM_V1", "ROCM_ATTN"])
@pytest.mark.parametrize("device", ["H200", "MI300X"])
def test_vllms_names_for_its_triton_kernels_are_understood(name, device, monkeypatch):
    monkeypatch.setenv(VLLM, name)
    selection = resolve(layer(), explained_device(device))
    assert (selection.name, selection.source) == ("TRITON_ATTN", Source.VLLM_ENVIRONMENT)


@pytest.mark.parametrize("name", VLLM_NAMES)
def test_every_translation_is_applied_or_rejected(name, monkeypatch):
    monkeypatch.setenv(VLLM, name)
    if VLLM_NAMES[name] in registry.names():
        # There the platform's order picks none of them.
        device = "MI300X" if VLLM_NAMES[name].startswith("ROCM_") else "H200"
        assert resolve(layer(), explained_device(device)).name == VLLM_NAMES[name]
    else:
        with pytest.raises(UnknownBackendError, match=f"vLLM's name for {VLLM_NAMES[name]}, which"):
            pick_by_keywords()


@pytest.mark.parametrize("name", ["FLASH_ATTN", "FLASHINFER"])
def test_shared_names_need_no_translation(name, monkeypatch):
    monkeypatch.setenv(VLLM, name)
    assert name not in VLLM_NAMES
    selection = resolve(layer(), explained_device("H200"))
    assert (selection.name, selection.source) == (name, Source.VLLM_ENVIRONMENT)


UNKNOWN_HERE = ["XFORMERS", "CUTLASS_MLA", "PALLAS", "ROCM_AITER_UNIFIED_ATTN", "NO_SUCH_BACKEND"]


@pytest.mark.parametrize("name", UNKNOWN_HERE)
def test_vllms_name_without_a_counterpart_is_rejected(name, monkeypatch):
    monkeypatch.setenv(VLLM, name)
    with pytest.raises(UnknownBackendError, match=f"{VLLM} names the backend '{name}'"):
        pick_by_keywords()


@pytest.mark.parametrize("name", ["TORCH_SDPA", "CUTLASS_MLA"])
def test_our_variable_outranks_vllms_even_with_an_unknown_name(name, monkeypatch):
    monkeypatch.setenv(VLLM, name)
    monkeypatch.setenv(OURS, "REFERENCE")
    assert pick_by_keywords() == "REFERENCE"


def test_vllms_variable_counts_if_ours_is_for_another_kind(monkeypatch):
    monkeypatch.setenv(VLLM, "CUTLASS_MLA")
    monkeypatch.setenv(OURS, "mla=REFERENCE_MLA")
    with pytest.raises(UnknownBackendError, match=VLLM):
        pick_by_keywords()
