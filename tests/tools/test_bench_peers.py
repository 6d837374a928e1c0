"""The benchmark's peers: their arguments, and errors for those that are not installed."""

from __future__ import annotations

import inspect
import sys

import pytest

from attn_dispatch.bench.accuracy import AccuracyJudge
from attn_dispatch.bench.inputs import Inputs
from attn_dispatch.bench.peers import registry
from attn_dispatch.bench.peers.mla import MLA_PEERS
from support.bench_cases import CPU, FEATURES, case
from support.fake_peers import (
    install_flash_attn_2,
    install_flash_attn_3,
    install_flash_attn_4,
    install_flashinfer,
    install_varlen,
    install_vllm,
    install_vllm_triton,
    module,
    varlen_2_11,
    varlen_2_13,
)

#: Each peer as it may be found, and the kinds of case that it then computes.
BF16 = {"dtype": "bfloat16"}
PEER_CASES = {
    "plain": {},
    "prefill": FEATURES["prefill"],
    "no past": {"query_lens": (7, 20), "seq_lens": (7, 20)},
    "no past, no groups": {"query_lens": (7, 20), "seq_lens": (7, 20), "num_kv_heads": 4},
    "big blocks": {"block_size": 256},
    "no groups": {"num_kv_heads": 4},
    "window": FEATURES["window"],
    "soft cap": FEATURES["soft cap"],
    "alibi": FEATURES["alibi"],
    "sinks": {"sinks": True},
    "fp8": {"kv_cache_dtype": "fp8_e4m3"},
    "encoder": FEATURES["encoder"],
    "encoder, window": FEATURES["encoder, window"],
    "cross": FEATURES["cross"],
    "mixed": FEATURES["mixed"],
    "engine's rows": FEATURES["engine's rows"],
    "engine's tuple": {"kv_layout": "flashinfer-tuple"},
    "engine's big blocks": {"kv_layout": "vllm-LBNHC", "block_size": 256},
}
CACHED = {"plain", "prefill", "no past", "no past, no groups", "big blocks", "no groups", "mixed"}
CACHED |= {"engine's rows", "engine's tuple", "engine's big blocks"}
FLASH = {*CACHED, "window", "soft cap", "encoder", "encoder, window", "cross"}
RAGGED = {"no past", "no past, no groups", "encoder"}
PEERS = {
    "vllm 2": (
        registry.FlashAttention2,
        lambda patch: install_vllm(patch, 2),
        {*FLASH, "alibi"},
    ),
    "flash_attn": (
        registry.FlashAttention2,
        install_flash_attn_2,
        {*RAGGED, "big blocks", "engine's big blocks", "encoder, window"},
    ),
    "vllm 3": (registry.FlashAttention3, lambda patch: install_vllm(patch, 3), {*FLASH, "sinks"}),
    "flash_attn_interface": (registry.FlashAttention3, install_flash_attn_3, FLASH),
    "vllm 4": (registry.FlashAttention4, lambda patch: install_vllm(patch, 4), {*FLASH, "sinks"}),
    "flash_attn.cute": (registry.FlashAttention4, install_flash_attn_4, {*FLASH, "sinks"}),
    "flashinfer": (
        registry.FlashInfer,
        install_flashinfer,
        {*FLASH, "alibi", "sinks", "fp8"} - {"encoder, window"},
    ),
    "vllm triton": (
        registry.VllmTriton,
        install_vllm_triton,
        {*CACHED, "window", "soft cap", "alibi", "sinks", "fp8"},
    ),
    "varlen, torch 2.11": (
        registry.TorchVarlen,
        install_varlen(varlen_2_11),
        {"no past, no groups"},
    ),
    "varlen, torch 2.13": (
        registry.TorchVarlen,
        install_varlen(varlen_2_13),
        {*CACHED, "window", "encoder", "encoder, window", "cross"},
    ),
}


#: The peers for dense attention, except PyTorch's.
DENSE = [p for p in registry.PEERS if p not in (*MLA_PEERS, registry.TorchVarlen)]


@pytest.fixture
def no_peers(monkeypatch):
    """None of the peers can be imported, whatever is installed."""
    for name in ("flash_attn", "flash_attn_interface", "flashinfer", "flash_mla", "vllm"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("no_peers")
@pytest.mark.parametrize("name", PEERS)
def test_peer_passes_the_arguments_of_its_function(name, monkeypatch):
    cls, install, computed = PEERS[name]
    for top in ("flash_attn", "vllm"):
        monkeypatch.delitem(sys.modules, top, raising=False)
    if name == "flash_attn.cute":
        module(monkeypatch, "flash_attn", __path__=[])
    install(monkeypatch)
    peer = cls()
    peer.load()
    found = set()
    for label, features in PEER_CASES.items():
        one = case(name=label, **{**features, **BF16})
        if peer.supports(one) is not None:
            continue
        found.add(label)
        inputs = Inputs(one, CPU)
        judge = AccuracyJudge(inputs)
        variants = peer.variants(one)
        assert variants
        for variant in variants:
            output = peer.prepare(inputs, variant)()
            assert judge.error_of(output) <= judge.allowed, (label, variant)
    assert found == computed


@pytest.mark.parametrize("cls", DENSE)
def test_peer_gives_the_reason_for_a_cache_that_it_does_not_read(cls):
    peer = cls()
    peer.provider = "vllm.vllm_flash_attn"
    heads_of_20 = case(head_size=20, kv_layout="vllm-LBNHC", **BF16)
    assert "it reads caches with heads at multiples of 16 bytes" in peer.supports(heads_of_20)
    assert peer.supports(case(head_size=24, kv_layout="vllm-LBNHC", **BF16)) is None


@pytest.mark.usefixtures("no_peers")
@pytest.mark.parametrize("cls", [*DENSE, *MLA_PEERS])
def test_missing_peer_names_the_missing_module(cls):
    with pytest.raises(registry.PeerMissing, match=r"flash_attn|flashinfer|flash_mla|vllm"):
        cls().load()


@pytest.mark.usefixtures("no_peers")
def test_broken_peer_reports_its_error(monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm")
    install_vllm(monkeypatch, 3)
    with pytest.raises(registry.PeerMissing, match="no FA2 here"):
        registry.FlashAttention2().load()
    assert registry.FlashAttention3().load() is None


def test_pytorch_peer_matches_the_installed_function():
    """The one peer that is installed here has the parameters that its fake has."""
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    known = [list(inspect.signature(f).parameters) for f in (varlen_2_11, varlen_2_13)]
    assert names[: len(known[0])] == known[0]
