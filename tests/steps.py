"""Steps of an engine to test with: what one is as data, how its tensors are made, how it is run.

A `Case` is plain data, so that a failure prints it in one line and hypothesis can shrink it. A
`Step` is a case with tensors: a cache whose unused slots hold NaN, a block table whose unused
entries hold garbage, tensors that lie in memory as an engine's do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import oracle
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_dispatch.backends.reference.torch_sdpa import MathPathWarning
from attn_dispatch.batch import AttentionBatch
from attn_dispatch.context import forward_context
from attn_dispatch.interface import PlaceholderRange
from attn_dispatch.kv_cache import STRIDE_ORDERS
from attn_dispatch.layer import Attention
from attn_dispatch.quantization import kv_cache_torch_dtype
from attn_dispatch.registry import registry
from attn_dispatch.spec import AttentionSpec

#: How queries, keys and values may lie in memory.
MEMORY = ("contiguous", "fused", "transposed", "strided")

#: What an engine may leave in the entries of a block table that no request uses.
GARBAGE_BLOCKS = (-1, 2**31 - 1, 0, -(2**31), 1_000_000)

FP8 = ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz")
INT8 = "int8_per_token_head"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step as data.

    Attributes:
        spec: the layer; block_size None for attention without a cache.
        query_lens: of each request.
        seq_lens: of each request.
        new_lens: rows of key and value of each request, where they are not the query's.
        brings_keys: key and value are given; else the cache holds them all.
        memory: one of MEMORY.
        padding: rows of query, key and value beyond the batch's tokens.
        ranges: (request, start, end) of tokens that see each other.
        seed: of the numbers.
    """

    spec: AttentionSpec
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    new_lens: tuple[int, ...] | None = None
    brings_keys: bool = True
    memory: str = "contiguous"
    padding: int = 0
    ranges: tuple[tuple[int, int, int], ...] = ()
    seed: int = 0

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def __repr__(self):
        shown = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)[1:])
        rest = "".join(f", {name}={value!r}" for name, value, plain in shown if value != plain)
        return f"Case(spec=layer_spec({self.spec}){rest})"


def layer_spec(**fields):
    """A spec with small sizes where none are given."""
    sizes = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 8,
        "dtype": torch.float64,
        "block_size": 4,
    }
    return AttentionSpec(**(sizes | fields))


class Step:
    """A case with tensors.

    Attributes:
        query, key, value: the arguments of a forward.
        kv_cache, batch, slopes, sinks, scale: the layer's and the step's.
        layer: carries the scales.
        queries, keys, values: each request's, float64, as they are meant: what a cache of less
            precision holds is rounded, and scales are applied.
        masks: each request's (query_len, seq_len) bool, or None.
    """

    def __init__(self, case, device="cpu"):
        self.case, self.spec, self.device = case, case.spec, torch.device(device)
        self._random = torch.Generator().manual_seed(case.seed)
        spec = self.spec
        has_cache = spec.block_size is not None
        self.new_lens = case.new_lens or (case.query_lens if has_cache else case.seq_lens)
        self.scale = 0.8 * spec.head_size**-0.5
        self.slopes = [0.7 ** (1 + h) for h in range(spec.num_heads)] if spec.alibi else None
        self.sinks = self._normal(spec.num_heads).float().to(device) if spec.sinks else None
        self._make_scales()

        queries = [self._new(n, spec.num_heads, spec.head_size) for n in case.query_lens]
        keys = [self._new(n, spec.num_kv_heads, spec.head_size) for n in case.seq_lens]
        values = [self._new(n, spec.num_kv_heads, spec.head_size_v) for n in case.seq_lens]
        self.query = self._lay(queries, spec.num_heads, spec.head_size)
        self.key = self.value = None
        if case.brings_keys:
            # A layer that shares another's cache must not use what it is given.
            shown = [torch.randn_like(k) for k in keys] if spec.kv_sharing else keys
            self.key = self._lay(self._last(shown), spec.num_kv_heads, spec.head_size)
            self.value = self._lay(self._last(values), spec.num_kv_heads, spec.head_size_v)
        self.kv_cache = self._table = self._slots = None
        if has_cache:
            self._make_cache(keys, values)
            dtype = self.kv_cache.dtype
            keys = [meant(k, self.layer._k_scale, dtype) for k in keys]
            values = [meant(v, self.layer._v_scale, dtype) for v in values]
        self.queries = [q.double() for q in queries]
        self.keys, self.values = [k.double() for k in keys], [v.double() for v in values]
        self.masks = self._make_masks() if spec.custom_mask else None
        self.batch = self._make_batch()

    def _normal(self, *shape):
        return torch.randn(*shape, generator=self._random, dtype=torch.float64)

    def _new(self, *shape):
        return self._normal(*shape).to(self.spec.dtype)

    def _last(self, tensors):
        """Each request's new rows; zeros where it has none of its own, but pads a graph's batch."""
        return [
            F.pad(tensor, (0, 0, 0, 0, max(0, new - len(tensor)), 0))[max(0, len(tensor) - new) :]
            for tensor, new in zip(tensors, self.new_lens, strict=True)
        ]

    def _lay(self, parts, heads, size):
        """The requests' rows one after another, padding behind them, in the case's memory."""
        rows = torch.cat([*parts, torch.zeros(self.case.padding, heads, size).to(self.spec.dtype)])
        tokens = len(rows)
        shape, view = {
            "contiguous": ((tokens, heads, size), lambda t: t),
            "fused": (
                (tokens, 3 + heads * size),
                lambda t: t[:, 3:].unflatten(1, (heads, size)),
            ),
            "transposed": ((heads, tokens, size), lambda t: t.transpose(0, 1)),
            "strided": ((tokens, heads, 2 * size), lambda t: t[..., ::2]),
        }[self.case.memory]
        laid = view(torch.full(shape, math.nan, dtype=rows.dtype, device=self.device))
        return laid.copy_(rows)

    def _make_scales(self):
        spec = self.spec
        shape = (spec.num_kv_heads,) if spec.kv_scales == "per_head" else ()
        k, v = (0.01 + 0.03 * torch.rand(shape, generator=self._random) for _ in range(2))
        if not spec.kv_cache_dtype.startswith("fp8"):
            k, v = torch.ones(()), torch.ones(())
        self.layer = SimpleNamespace(
            _k_scale=k.to(self.device),
            _v_scale=v.to(self.device),
            _k_scale_float=math.nan if k.dim() else float(k),
            _v_scale_float=math.nan if v.dim() else float(v),
        )

    def _make_cache(self, keys, values):
        spec, case, block_size = self.spec, self.case, self.spec.block_size
        needed = [-(-n // block_size) for n in case.seq_lens]
        num_blocks = sum(needed) + 2
        dtype = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype)
        size = stored_size(spec.kv_cache_dtype, max(spec.head_size, spec.head_size_v))
        shape = (num_blocks, 2, block_size, spec.num_kv_heads, size)
        self.kv_cache = nan_cache(shape, spec.kv_cache_layout or "NHD", dtype, self.device)
        free = torch.randperm(num_blocks, generator=self._random).tolist()
        columns = max(needed, default=0) + 1
        rows, slots = [], []
        for request, (seq_len, new) in enumerate(zip(case.seq_lens, self.new_lens, strict=True)):
            blocks = [free.pop() for _ in range(needed[request])]
            garbage = [GARBAGE_BLOCKS[(request + i) % len(GARBAGE_BLOCKS)] for i in range(columns)]
            rows.append((blocks + garbage)[:columns])
            places = [(blocks[p // block_size], p % block_size) for p in range(seq_len)]
            written_before = seq_len - new if case.brings_keys and not spec.kv_sharing else seq_len
            for position in range(written_before):
                self._store(0, places[position], keys[request][position])
                self._store(1, places[position], values[request][position])
            slots += [-1] * (new - seq_len)  # a request without keys pads a graph's batch
            slots += [b * block_size + offset for b, offset in places[max(0, seq_len - new) :]]
        self._table = torch.tensor(rows, dtype=torch.int32).reshape(len(rows), columns)
        self._slots = torch.tensor(slots + [-1] * case.padding, dtype=torch.int64)

    def _store(self, index, place, row):
        scale = (self.layer._k_scale, self.layer._v_scale)[index]
        block, offset = place
        if self.kv_cache.dtype == torch.int8:
            store_int8(self.kv_cache[block, index, offset], row)
            return
        stored = as_stored(row.to(self.device), scale, self.kv_cache.dtype)
        target = self.kv_cache[block, index, offset, :, : row.shape[-1]]
        if stored.dtype.itemsize == 1:
            target, stored = target.view(torch.uint8), stored.view(torch.uint8)
        target.copy_(stored)

    def _make_masks(self):
        masks = []
        for query_len, seq_len in zip(self.case.query_lens, self.case.seq_lens, strict=True):
            mask = torch.rand(query_len, seq_len, generator=self._random) < 0.6
            mask[1::3] = False  # rows that see nothing
            masks.append(mask)
        return masks

    def _make_batch(self):
        case, spec = self.case, self.spec
        masks = self.masks
        flat = None if masks is None else torch.cat([torch.zeros(0).bool(), *map(_flat, masks)])
        writes = case.brings_keys and not spec.kv_sharing
        return AttentionBatch.create(
            case.query_lens,
            case.seq_lens,
            block_table=self._table,
            slot_mapping=self._slots if writes else None,
            key_lens=None if self.new_lens == case.query_lens else self.new_lens,
            custom_mask=None if flat is None else flat.to(self.device),
            multi_modal_placeholder_index_maps={
                "image": [PlaceholderRange(*r) for r in case.ranges]
            }
            if case.ranges
            else None,
            device=self.device,
        )

    def impl_arguments(self):
        spec = self.spec
        return {
            "num_heads": spec.num_heads,
            "head_size": spec.head_size,
            "scale": self.scale,
            "num_kv_heads": spec.num_kv_heads,
            "alibi_slopes": self.slopes,
            "sliding_window": spec.sliding_window,
            "kv_cache_dtype": spec.kv_cache_dtype,
            "logits_soft_cap": spec.logits_soft_cap,
            "attn_type": spec.attn_type,
            "kv_sharing_target_layer_name": "target" if spec.kv_sharing else None,
            "sinks": self.sinks,
            "head_size_v": spec.head_size_v,
            "causal": spec.causal,
            "returns_lse": spec.returns_lse,
        }

    def run(self, backend, **forward):
        """What the backend's forward returns, over a copy of the cache."""
        cls = registry.candidates()[backend].backend_cls
        impl = cls.get_impl_cls()(**self.impl_arguments())
        metadata = cls.get_builder_cls()(self.spec, self.device).build(self.batch)
        cache = None if self.kv_cache is None else self.kv_cache.clone()
        return impl.forward(
            self.layer, self.query, self.key, self.value, cache, metadata, **forward
        )

    def naive(self):
        """(output, lse) of the batch's tokens in float64, by the independent oracle."""
        spec, outputs, lses = self.spec, [], []
        for request, query in enumerate(self.queries):
            output, lse = oracle.attention_of_request(
                query,
                self.keys[request],
                self.values[request],
                scale=self.scale,
                causal=spec.causal,
                window=spec.sliding_window,
                cap=spec.logits_soft_cap,
                slopes=self.slopes,
                sinks=None if self.sinks is None else self.sinks.tolist(),
                ranges=self.ranges_of(request),
                mask=None if self.masks is None else self.masks[request],
            )
            outputs.append(output)
            lses.append(lse)
        return _joined(outputs, spec, torch.float64), torch.cat(
            [torch.zeros(0, spec.num_heads).double(), *lses]
        )

    def ranges_of(self, request):
        return [(start, end) for r, start, end in self.case.ranges if r == request]

    def expected(self):
        """(output, lse) in float64 by REFERENCE, without a cache: the keys as they are meant."""
        spec = self.spec.replace(
            dtype=torch.float64,
            kv_cache_dtype="auto",
            kv_scales="per_tensor",
            block_size=None,
            kv_cache_layout=None,
            kv_sharing=False,
            returns_lse=True,
        )
        plain = Case(
            spec=spec,
            query_lens=self.case.query_lens,
            seq_lens=self.case.seq_lens,
            ranges=self.case.ranges,
        )
        step = Step(plain)
        step.scale, step.slopes, step.masks = self.scale, self.slopes, self.masks
        step.sinks = None if self.sinks is None else self.sinks.cpu()
        step.query, step.key, step.value = (
            torch.cat([torch.zeros(0, heads, size).double(), *parts])
            for parts, heads, size in (
                (self.queries, spec.num_heads, spec.head_size),
                (self.keys, spec.num_kv_heads, spec.head_size),
                (self.values, spec.num_kv_heads, spec.head_size_v),
            )
        )
        step.batch = step._make_batch()
        return step.run("REFERENCE")

    def pytorch(self):
        """The output by PyTorch's own attention in the layer's dtype, request by request."""
        spec, outputs = self.spec, []
        group = spec.num_heads // spec.num_kv_heads
        for request, query in enumerate(self.queries):
            if not len(query) or not len(self.keys[request]):
                outputs.append(torch.zeros(len(query), spec.num_heads, spec.head_size_v))
                continue
            bias = self._bias(request)
            q, k, v = (
                t.transpose(0, 1)[None].to(self.device, spec.dtype)
                for t in (
                    query,
                    self.keys[request].repeat_interleave(group, 1),
                    self.values[request].repeat_interleave(group, 1),
                )
            )
            result = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias[None].to(self.device, spec.dtype), scale=self.scale
            )
            blind = (bias == -math.inf).all(-1)[..., None]
            outputs.append(result[0].cpu().masked_fill(blind, 0.0).transpose(0, 1))
        return _joined(outputs, spec, spec.dtype)

    def _bias(self, request):
        """(num_heads, query_len, seq_len) float64: what PyTorch takes as a mask."""
        spec, num_queries, num_keys = self.spec, len(self.queries[request]), len(self.keys[request])
        k = torch.arange(num_keys)
        q = torch.arange(num_keys - num_queries, num_keys)[:, None]
        window = spec.sliding_window or num_keys + num_queries
        seen = ((k - q).abs() < window) & ((k <= q) | (not spec.causal))
        for start, end in self.ranges_of(request):
            seen |= (q >= start) & (q < end) & (k >= start) & (k < end)
        if self.masks is not None:
            seen &= self.masks[request]
        slopes = torch.tensor(self.slopes or [0.0] * spec.num_heads).double()
        return (slopes[:, None, None] * (k - q)).masked_fill(~seen, -math.inf)

    def check(self, output, expected=None):
        """Assert that an output is as near to `expected` as the layer's dtype allows.

        float64 and float32: to a few roundings. The 16-bit types: at most twice the error that
        PyTorch's own attention has in that dtype, plus one unit in the last place.
        """
        expected = self.expected()[0] if expected is None else expected
        actual = output[: len(expected)].double().cpu()
        assert actual.shape == expected.shape
        largest = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        dtype = self.spec.dtype
        allowed = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype)
        if allowed is None:
            own = 0.0
            if self.spec.logits_soft_cap is None and not self.spec.sinks:
                own = _distance(self.pytorch().double(), expected)
            allowed = 2 * own + torch.finfo(dtype).eps
        found = _distance(actual, expected)
        assert found <= allowed * largest, f"off by {found:.3g}; {allowed * largest:.3g} is allowed"


def layer_of(step, **more):
    """The layer that a step is for, bound to a copy of its cache."""
    fields = {f.name: getattr(step.spec, f.name) for f in dataclasses.fields(step.spec)}
    for derived in ("alibi", "kv_sharing"):
        del fields[derived]
    fields |= {
        "scale": step.scale,
        "alibi_slopes": step.slopes,
        "sinks": step.sinks,
        "kv_sharing_target_layer_name": "target" if step.spec.kv_sharing else None,
        "device": step.device,
    }
    layer = Attention(**fields, **more)
    layer.kv_cache = None if step.kv_cache is None else step.kv_cache.clone()
    if step.spec.kv_cache_dtype.startswith("fp8"):
        layer.set_kv_scales(step.layer._k_scale, step.layer._v_scale)
    return layer


def call(layer, step, **more):
    with forward_context(step.batch):
        return layer(step.query, step.key, step.value, **more)


@contextlib.contextmanager
def fused_on_cpu(device):
    """On a CPU PyTorch has its fused kernel and no other; elsewhere shapes may need another."""
    if device.type != "cpu":
        yield
        return
    with warnings.catch_warnings(), sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        warnings.simplefilter("error", MathPathWarning)
        yield


def _distance(actual, expected):
    assert not actual.isnan().any(), "there is NaN in the output"
    return (actual - expected).abs().max().item() if expected.numel() else 0.0


def _flat(mask):
    return mask.reshape(-1)


def _joined(outputs, spec, dtype):
    return torch.cat([torch.zeros(0, spec.num_heads, spec.head_size_v, dtype=dtype), *outputs])


def nan_cache(shape, layout, dtype, device="cpu"):
    """A cache in this layout in which every element, or every scale of int8 rows, is NaN."""
    order = STRIDE_ORDERS[layout]
    physical = [shape[dim] for dim in order]
    nan = torch.tensor(math.nan).to(dtype)
    if dtype == torch.int8:  # four bytes of ones are a NaN too
        memory = torch.full(physical, -1, dtype=dtype)
    elif dtype.itemsize == 1:
        memory = torch.full(physical, nan.view(torch.uint8).item(), dtype=torch.uint8).view(dtype)
    else:
        memory = torch.full(physical, math.nan, dtype=dtype)
    return memory.to(device).permute([order.index(dim) for dim in range(5)])


def stored_size(kv_cache_dtype, size):
    """Elements that a head of this size takes in a cache."""
    return 16 * math.ceil(size / 16) + 16 if kv_cache_dtype == INT8 else size


def int8_rows(values):
    """(..., size) integers and (..., 1) scales that an int8 cache holds of (..., size) values."""
    values = values.float()
    scales = values.abs().amax(-1, keepdim=True) / 127
    scales[scales == 0] = 1.0
    return torch.round(values / scales).clamp(-127, 127).to(torch.int8), scales


def store_int8(target, row):
    """Put (heads, size) values into (heads, stored size) of an int8 cache, byte by byte."""
    integers, scales = int8_rows(row.cpu())
    target[:, : row.shape[-1]] = integers.to(target.device)
    target[:, -16:-12] = scales.view(torch.int8).to(target.device)


def as_stored(values, scale, dtype):
    """What a cache of this dtype holds of (..., heads, size) values."""
    if dtype.itemsize > 1:
        return values.to(dtype)
    working = torch.float64 if values.dtype == torch.float64 else torch.float32
    limit = torch.finfo(dtype).max
    scaled = values.to(working) / _per_head(scale).to(working)
    return scaled.clamp(-limit, limit).to(dtype)


def meant(values, scale, dtype):
    """What the values are once they were in a cache of this dtype, float64."""
    if dtype == torch.int8:
        integers, scales = int8_rows(values)
        return integers.double() * scales.double()
    stored = as_stored(values, scale.cpu(), dtype).double()
    return stored * _per_head(scale.cpu()).double() if dtype.itemsize == 1 else stored


def _per_head(scale):
    return scale[:, None] if scale.dim() else scale
