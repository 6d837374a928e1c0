"""The peers: other packages' attention over the same tensors, each in a small class.

A peer is imported only when it is asked for. It refuses what it does not compute with a reason, and
what it raises is shown in its place. Whether its numbers are right is measured, not believed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.inputs import Inputs

__all__ = ["PEERS", "Peer", "PeerMissing"]

Call = Callable[[], torch.Tensor]

#: Variants of a prefill without a past: keys are read from their pages, or as they came.
_PAGES, _NEW_KEYS = "pages", "new keys"

#: What vLLM's engine gives its Triton kernel to split long requests: segments, and how many
#: programs it takes without splitting.
_VLLM_SEGMENTS, _VLLM_PROGRAMS = 16, 128

#: What FlashInfer's documentation recommends for the workspace, twice.
_FLASHINFER_WORKSPACE_BYTES = 256 << 20


class PeerMissing(Exception):
    """The peer cannot be imported here; the message says what is missing."""


class Peer(ABC):
    """Another package's attention.

    Attributes:
        name: how it is listed.
        provider: the module that it was found in, once loaded.
        version: of its package, once loaded.
    """

    name: str
    kind = "peer"

    def __init__(self) -> None:
        self.provider = self.version = ""

    @abstractmethod
    def load(self) -> None:
        """Import it.

        Raises:
            PeerMissing: it is not there, or broken.
        """

    @abstractmethod
    def supports(self, case: Case) -> str | None:
        """Why it does not compute the case, or None if it says that it does."""

    def variants(self, case: Case) -> Sequence[str]:
        """Ways to compute the case, of which the fastest is shown; "" where there is one."""
        return ("",)

    @abstractmethod
    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """Do what an engine does once per batch; the call then returns the output."""

    def _find(self, *names: str) -> Any:
        """The first of some "module:attribute" that can be imported; sets provider and version."""
        problems = []
        for name in names:
            module_name, _, attribute = name.partition(":")
            try:
                found = getattr(importlib.import_module(module_name), attribute)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a broken package raises anything at all
                text = (str(error).splitlines() or [""])[0]
                problems.append(f"{module_name}: {type(error).__name__}: {text}")
                continue
            self.provider = module_name
            self.version = _version_of(module_name)
            return found
        raise PeerMissing("; ".join(problems))


def _version_of(module_name: str) -> str:
    top = module_name.split(".", maxsplit=1)[0]
    try:
        distributions = importlib.metadata.packages_distributions().get(top, [top])
        return importlib.metadata.version(distributions[0])
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(top), "__version__", "unknown"))


def _refusal(case: Case, *computes: str) -> str | None:
    """The first feature of the case that is not among those that a peer computes."""
    asked = {
        "alibi": case.alibi,
        "sinks": case.sinks,
        "logits_soft_cap": case.logits_soft_cap is not None,
        "sliding_window": case.sliding_window is not None,
        "a cache of eight bits": case.is_quantized,
        "no causality over a cache": case.has_kv_cache and not case.causal,
        "float32": case.dtype == "float32",
    }
    missing = [name for name, is_asked in asked.items() if is_asked and name not in computes]
    return f"it does not compute {missing[0]}" if missing else None


def _window(case: Case) -> tuple[int, int]:
    """(left, right): how many keys a query sees beside its own, −1 for all."""
    left = -1 if case.sliding_window is None else case.sliding_window - 1
    return left, 0 if case.causal and left >= 0 else left


def _only_known(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function takes: releases differ in those that do not change numbers."""
    known = inspect.signature(function).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in known}


def _first(result: Any) -> torch.Tensor:
    """The output of a function that returns it alone or with its log-sum-exp."""
    output: torch.Tensor = result[0] if isinstance(result, (tuple, list)) else result
    return output


def _lengths(inputs: Inputs) -> dict[str, Any]:
    """What FlashAttention calls the batch's lengths."""
    return {
        "cu_seqlens_q": inputs.query_start_loc,
        "max_seqlen_q": max(inputs.case.query_lens),
        "max_seqlen_k": max(inputs.case.seq_lens),
    }


class _FlashAttention(Peer):
    """What the versions of FlashAttention share."""

    #: Where the version is found: its own package, and vLLM's build of it.
    own: str
    vllm_version: int
    computes: tuple[str, ...] = ("logits_soft_cap", "sliding_window", "no causality over a cache")

    def load(self) -> None:
        """See Peer."""
        self._function = self._find(self.own, "vllm.vllm_flash_attn:flash_attn_varlen_func")
        if self._is_vllm:
            reason = getattr(
                importlib.import_module(self.provider), "fa_version_unsupported_reason", None
            )
            problem = None if reason is None else reason(self.vllm_version)
            if problem:
                own = self.own.partition(":")[0]
                raise PeerMissing(f"{own} is not installed; {self.provider}: {problem}")

    @property
    def _is_vllm(self) -> bool:
        return self.provider == "vllm.vllm_flash_attn"

    def supports(self, case: Case) -> str | None:
        """See Peer."""
        refusal = _refusal(case, *self.computes)
        if refusal is None and case.alibi and not case.causal:
            return "its ALiBi falls with the distance on either side"
        if refusal is None and case.sinks and case.dtype != "bfloat16":
            return "its sinks are bfloat16"
        return refusal

    def variants(self, case: Case) -> Sequence[str]:
        """See Peer."""
        return (_PAGES, _NEW_KEYS) if case.brings_keys and not case.has_past else ("",)

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """See Peer."""
        paged = inputs.kv_cache is not None and variant != _NEW_KEYS
        return (self._prepare_vllm if self._is_vllm else self._prepare_own)(inputs, paged)

    def _prepare_own(self, inputs: Inputs, paged: bool) -> Call:
        raise NotImplementedError

    def _prepare_vllm(self, inputs: Inputs, paged: bool) -> Call:
        case, output = inputs.case, inputs.empty_output()
        arguments = {
            "q": inputs.query,
            **_lengths(inputs),
            "softmax_scale": case.scale,
            "causal": case.causal,
            "window_size": list(_window(case)),
            "softcap": case.logits_soft_cap or 0.0,
            "alibi_slopes": inputs.slopes,
            "s_aux": None if inputs.sinks is None else inputs.sinks.bfloat16(),
            "out": output,
            "fa_version": self.vllm_version,
        }
        if not paged:
            arguments |= {
                "k": inputs.key,
                "v": inputs.value,
                "cu_seqlens_k": inputs.key_start_loc(),
            }
        else:
            assert inputs.kv_cache is not None
            key, value = inputs.kv_cache.unbind(1)
            arguments |= {
                "k": key,
                "v": value,
                "seqused_k": inputs.seq_lens,
                "block_table": inputs.block_table,
            }
        function = self._function
        return lambda: _first(function(**arguments))


class FlashAttention2(_FlashAttention):
    """flash_attn, or vLLM's build of it; ragged where the cache's blocks are too small for it."""

    name = "FlashAttention 2"
    own = "flash_attn:flash_attn_varlen_func"
    vllm_version = 2
    computes = (*_FlashAttention.computes, "alibi")

    def supports(self, case: Case) -> str | None:
        """See Peer."""
        refusal = super().supports(case)
        if refusal or self._is_vllm or not self._needs_pages(case):
            return refusal
        if case.block_size % 256:
            return f"its paged cache takes blocks of 256 tokens, and these have {case.block_size}"
        return None

    @staticmethod
    def _needs_pages(case: Case) -> bool:
        """Whether contiguous keys would be another task; they are given where there is no past."""
        return case.has_kv_cache and (case.has_past or case.block_size % 256 == 0)

    def variants(self, case: Case) -> Sequence[str]:
        """See Peer."""
        ragged = case.has_kv_cache and not self._is_vllm and not self._needs_pages(case)
        return (_NEW_KEYS,) if ragged else super().variants(case)

    def _prepare_own(self, inputs: Inputs, paged: bool) -> Call:
        case, function = inputs.case, self._function
        paged = paged and self._needs_pages(case)
        if paged:
            assert inputs.kv_cache is not None
            key, value = inputs.kv_cache.unbind(1)
        else:
            key, value = inputs.ragged_keys_and_values()
        arguments = {
            "q": inputs.query,
            "k": key,
            "v": value,
            **_lengths(inputs),
            "cu_seqlens_k": inputs.key_start_loc(),
            "softmax_scale": case.scale,
            "causal": case.causal,
            "window_size": _window(case),
            "softcap": case.logits_soft_cap or 0.0,
            "alibi_slopes": inputs.slopes,
            "block_table": inputs.block_table if paged else None,
        }
        return lambda: _first(function(**arguments))


class FlashAttention3(_FlashAttention):
    """flash_attn_interface, or vLLM's build of it, which has sinks too."""

    name = "FlashAttention 3"
    own = "flash_attn_interface:flash_attn_varlen_func"
    vllm_version = 3

    def supports(self, case: Case) -> str | None:
        """See Peer."""
        if self._is_vllm and case.sinks and case.dtype == "bfloat16":
            return _refusal(case, *self.computes, "sinks")
        return super().supports(case)

    def _prepare_own(self, inputs: Inputs, paged: bool) -> Call:
        case, function = inputs.case, self._function
        arguments = {
            "q": inputs.query,
            "softmax_scale": case.scale,
            "causal": case.causal,
            "window_size": _window(case),
            "softcap": case.logits_soft_cap or 0.0,
        }
        if not paged:
            arguments |= {
                "k": inputs.key,
                "v": inputs.value,
                **_lengths(inputs),
                "cu_seqlens_k": inputs.key_start_loc(),
            }
        else:
            function = importlib.import_module(self.provider).flash_attn_with_kvcache
            assert inputs.kv_cache is not None
            key, value = inputs.kv_cache.unbind(1)
            arguments |= {
                "k_cache": key,
                "v_cache": value,
                "cache_seqlens": inputs.seq_lens,
                "page_table": inputs.block_table,
                "cu_seqlens_q": inputs.query_start_loc,
                "max_seqlen_q": max(case.query_lens),
            }
        return lambda: _first(function(**arguments))


class FlashAttention4(_FlashAttention):
    """flash_attn.cute, or vLLM's copy of it."""

    name = "FlashAttention 4"
    own = "flash_attn.cute:flash_attn_varlen_func"
    vllm_version = 4
    computes = (*_FlashAttention.computes, "sinks")

    def load(self) -> None:
        """See Peer."""
        super().load()
        if self._is_vllm:  # which imports its kernels no sooner than they are called
            self._find("vllm.vllm_flash_attn.cute.interface:_flash_attn_fwd")
            self.provider = "vllm.vllm_flash_attn"

    def _prepare_own(self, inputs: Inputs, paged: bool) -> Call:
        case, function = inputs.case, self._function
        left, right = _window(case)
        arguments = {
            "q": inputs.query,
            **_lengths(inputs),
            "softmax_scale": case.scale,
            "causal": case.causal,
            "softcap": case.logits_soft_cap or 0.0,
        }
        if case.sliding_window is not None:
            arguments["window_size"] = (left, right)
        if inputs.sinks is not None:
            arguments["learnable_sink"] = inputs.sinks.bfloat16()
        if not paged:
            arguments |= {
                "k": inputs.key,
                "v": inputs.value,
                "cu_seqlens_k": inputs.key_start_loc(),
            }
        else:
            assert inputs.kv_cache is not None
            key, value = inputs.kv_cache.unbind(1)
            arguments |= {
                "k": key,
                "v": value,
                "seqused_k": inputs.seq_lens,
                "page_table": inputs.block_table,
            }
        spare = {name: arguments.pop(name) for name in ("max_seqlen_q", "max_seqlen_k")}
        arguments |= _only_known(function, spare)
        return lambda: _first(function(**arguments))


class FlashInfer(Peer):
    """FlashInfer's wrappers; planning, as an engine does once per batch, is not timed."""

    name = "FlashInfer"

    def load(self) -> None:
        """See Peer."""
        self._find("flashinfer:BatchPrefillWithPagedKVCacheWrapper")
        self._module = importlib.import_module("flashinfer")
        self._workspace: torch.Tensor | None = None

    def supports(self, case: Case) -> str | None:
        """See Peer."""
        computes = ["sliding_window", "logits_soft_cap", "sinks", "no causality over a cache"]
        if case.num_heads & (case.num_heads - 1) == 0:
            computes.append("alibi")  # it has the slopes of the paper, and takes no others
        if case.stored_dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            computes.append("a cache of eight bits")
        if not case.causal and case.sliding_window is not None:
            return "its window has no right side"
        if case.sinks and (
            not case.has_kv_cache or case.alibi or case.logits_soft_cap or case.is_quantized
        ):
            return "its sinks go with paged keys, and with no other feature"
        return _refusal(case, *computes)

    def variants(self, case: Case) -> Sequence[str]:
        """See Peer."""
        found = ["fa2"]
        if not (case.alibi or case.is_quantized):
            found.append("fa3")
        if case.has_kv_cache and max(case.query_lens) == 1 and not case.sinks:
            found.append("decode, tensor cores")
            if case.num_heads == case.num_kv_heads:
                found.append("decode")
        return found

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """See Peer."""
        if self._workspace is None or self._workspace.device != inputs.device:
            self._workspace = torch.zeros(
                _FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.device
            )
        if inputs.kv_cache is None:
            return self._prepare_ragged(inputs, variant)
        if inputs.sinks is not None:
            return self._prepare_sinks(inputs, variant)
        if variant.startswith("decode"):
            return self._prepare_decode(inputs, "tensor cores" in variant)
        wrapper = self._module.BatchPrefillWithPagedKVCacheWrapper(
            self._workspace, "NHD", backend=variant
        )
        self._plan_paged(wrapper, inputs)
        return self._run_paged(wrapper, inputs)

    @staticmethod
    def _features(inputs: Inputs) -> dict[str, Any]:
        case = inputs.case
        return {
            "pos_encoding_mode": "ALIBI" if case.alibi else "NONE",
            "sm_scale": case.scale,
            "window_left": _window(case)[0],
            "logits_soft_cap": case.logits_soft_cap,
            "q_data_type": case.torch_dtype,
            "kv_data_type": inputs.query.dtype
            if inputs.kv_cache is None
            else inputs.kv_cache.dtype,
        }

    @staticmethod
    def _pages(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where each request's pages start, the pages, and the tokens in each last one, int32."""
        case, table = inputs.case, inputs.block_table
        assert table is not None
        counts = [-(-n // case.block_size) for n in case.seq_lens]
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        pages = torch.cat([table[request, :count] for request, count in enumerate(counts)])
        last = [(n - 1) % case.block_size + 1 for n in case.seq_lens]
        return (
            torch.tensor(starts, dtype=torch.int32, device=inputs.device),
            pages,
            torch.tensor(last, dtype=torch.int32, device=inputs.device),
        )

    def _plan_paged(self, wrapper: Any, inputs: Inputs) -> None:
        case = inputs.case
        starts, pages, last = self._pages(inputs)
        wrapper.plan(
            inputs.query_start_loc,
            starts,
            pages,
            last,
            case.num_heads,
            case.num_kv_heads,
            case.head_size,
            case.block_size,
            causal=case.causal,
            **self._features(inputs),
        )

    @staticmethod
    def _run_paged(wrapper: Any, inputs: Inputs) -> Call:
        output = inputs.empty_output()
        scales = {}
        if inputs.case.is_quantized:
            scales = {
                "k_scale": inputs.layer._k_scale_float,
                "v_scale": inputs.layer._v_scale_float,
            }
        return lambda: _first(wrapper.run(inputs.query, inputs.kv_cache, out=output, **scales))

    def _prepare_decode(self, inputs: Inputs, tensor_cores: bool) -> Call:
        case = inputs.case
        wrapper = self._module.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "NHD", use_tensor_cores=tensor_cores
        )
        wrapper.plan(
            *self._pages(inputs),
            case.num_heads,
            case.num_kv_heads,
            case.head_size,
            case.block_size,
            **self._features(inputs),
        )
        return self._run_paged(wrapper, inputs)

    def _prepare_sinks(self, inputs: Inputs, variant: str) -> Call:
        case, output = inputs.case, inputs.empty_output()
        wrapper = self._module.BatchAttentionWithAttentionSinkWrapper(
            self._workspace,
            "NHD",
            backend=variant,
            q_data_type=case.torch_dtype,
            kv_data_type=case.stored_dtype,
            head_dim_qk=case.head_size,
            head_dim_vo=case.head_size,
            window_left=_window(case)[0],
        )
        self._plan_paged(wrapper, inputs)
        return lambda: _first(
            wrapper.run(inputs.query, inputs.kv_cache, inputs.sinks, case.scale, out=output)
        )

    def _prepare_ragged(self, inputs: Inputs, variant: str) -> Call:
        case, output = inputs.case, inputs.empty_output()
        wrapper = self._module.BatchPrefillWithRaggedKVCacheWrapper(
            self._workspace, "NHD", backend=variant
        )
        wrapper.plan(
            inputs.query_start_loc,
            inputs.key_start_loc(),
            case.num_heads,
            case.num_kv_heads,
            case.head_size,
            causal=case.causal,
            **self._features(inputs),
        )
        return lambda: _first(wrapper.run(inputs.query, inputs.key, inputs.value, out=output))


class VllmTriton(Peer):
    """vLLM's unified Triton kernel, with the buffers that its engine gives it."""

    name = "vLLM Triton"

    def load(self) -> None:
        """See Peer."""
        self._function = self._find(
            "vllm.v1.attention.ops.triton_unified_attention:unified_attention",
            "vllm.attention.ops.triton_unified_attention:unified_attention",
        )

    def supports(self, case: Case) -> str | None:
        """See Peer."""
        if not case.has_kv_cache or not case.causal:
            return "it is for causal attention over a paged cache"
        computes = ["alibi", "sinks", "logits_soft_cap", "sliding_window"]
        if case.stored_dtype == torch.float8_e4m3fn:
            computes.append("a cache of eight bits")
        return _refusal(case, *computes)

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """See Peer."""
        case, function, output = inputs.case, self._function, inputs.empty_output()
        assert inputs.kv_cache is not None
        key, value = inputs.kv_cache.unbind(1)
        padded = 1 << (case.head_size - 1).bit_length()
        segments = (case.num_tokens, case.num_heads, _VLLM_SEGMENTS)
        buffer: dict[str, Any] = {"dtype": torch.float32, "device": inputs.device}
        arguments: dict[str, Any] = {
            "q": inputs.query,
            "k": key,
            "v": value,
            "out": output,
            **_lengths(inputs),
            "seqused_k": inputs.seq_lens,
            "softmax_scale": case.scale,
            "causal": True,
            "window_size": _window(case),
            "block_table": inputs.block_table,
            "softcap": case.logits_soft_cap or 0.0,
            "q_descale": None,
            "k_descale": None,
            "v_descale": None,
            "alibi_slopes": inputs.slopes,
            "sinks": inputs.sinks,
        }
        if max(case.query_lens) == 1:
            arguments |= {
                "seq_threshold_3D": _VLLM_PROGRAMS // case.num_kv_heads,
                "num_par_softmax_segments": _VLLM_SEGMENTS,
                "softmax_segm_output": torch.empty(*segments, padded, **buffer),
                "softmax_segm_max": torch.empty(*segments, **buffer),
                "softmax_segm_expsum": torch.empty(*segments, **buffer),
            }
        if case.is_quantized:
            arguments["k_descale"] = inputs.layer._k_scale.reshape(1)
            arguments["v_descale"] = inputs.layer._v_scale.reshape(1)
            if "kv_quant_mode" in inspect.signature(function).parameters:
                modes = importlib.import_module("vllm.v1.kv_cache_interface").KVQuantMode
                arguments["kv_quant_mode"] = modes.FP8_PER_TENSOR

        def call() -> torch.Tensor:
            function(**arguments)
            return output

        return call


class TorchVarlen(Peer):
    """torch.nn.attention.varlen; before torch 2.13 it has no paged cache and no shared heads."""

    name = "PyTorch varlen"

    def load(self) -> None:
        """See Peer."""
        self._function = self._find("torch.nn.attention.varlen:varlen_attn")
        self._known = inspect.signature(self._function).parameters

    def supports(self, case: Case) -> str | None:
        """See Peer."""
        computes = ["no causality over a cache"]
        if "window_size" in self._known:
            computes.append("sliding_window")
        if case.num_heads != case.num_kv_heads and "enable_gqa" not in self._known:
            return f"that of torch {self.version} has no KV heads that are shared"
        if case.has_kv_cache and case.has_past and "block_table" not in self._known:
            return f"that of torch {self.version} has no paged cache"
        return _refusal(case, *computes)

    def variants(self, case: Case) -> Sequence[str]:
        """See Peer."""
        ragged = case.has_kv_cache and "block_table" not in self._known
        return ("contiguous keys",) if ragged else ("",)

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """See Peer."""
        case, function = inputs.case, self._function
        options: dict[str, Any] = {"scale": case.scale}
        if "window_size" in self._known:
            left, right = _window(case)
            options["window_size"] = (left, 0 if case.causal else right)
        else:
            options["is_causal"] = case.causal
        if case.num_heads != case.num_kv_heads:
            options["enable_gqa"] = True
        key_starts: torch.Tensor | None = None
        if inputs.kv_cache is not None and "block_table" in self._known:
            key, value = inputs.kv_cache.unbind(1)
            options |= {"seqused_k": inputs.seq_lens, "block_table": inputs.block_table}
        else:
            key, value = inputs.ragged_keys_and_values()
            key_starts = inputs.key_start_loc()
        longest = (max(case.query_lens), max(case.seq_lens))
        starts = (inputs.query_start_loc, key_starts)
        return lambda: _first(function(inputs.query, key, value, *starts, *longest, **options))


#: In the order in which they are listed.
PEERS: tuple[type[Peer], ...] = (
    FlashAttention2,
    FlashAttention3,
    FlashAttention4,
    FlashInfer,
    VllmTriton,
    TorchVarlen,
)
