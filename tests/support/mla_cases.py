"""Steps of multi-head latent attention with tensors, and what they must give."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from attn_dispatch import AttentionBatch, AttentionSpec, MLADims
from attn_dispatch.backends.reference.torch_ref_mla import ReferenceMLABackend
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from support import scalar_oracle
from support.cases import as_stored, dequantized

__all__ = ["SMALL_DIMS", "MLAStep"]

SMALL_DIMS = MLADims(kv_lora_rank=6, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=3)
#: Decodes, prompts and a chunk of a prefill, in mixed order.
QUERY_LENS, SEQ_LENS = (1, 5, 0, 3, 1), (9, 5, 4, 7, 3)


class MLAStep:
    """An MLA step with tensors; the cache's unused slots hold NaN, and so do padding rows.

    Args:
        query_lens, seq_lens: of the requests.
        seed: of the random numbers.
        padding: rows after the last request's.
        dims: the layer's sizes.
        heads: query heads.
        backend: its class.
        device: of the tensors.
        **fields: of AttentionSpec.
    """

    def __init__(
        self, query_lens=QUERY_LENS, seq_lens=SEQ_LENS, seed=0, padding=0, *, dims=SMALL_DIMS,
        heads=3, backend=ReferenceMLABackend, device="cpu", **fields,
    ):  # fmt: skip
        fields = {"dtype": torch.float64, "block_size": 4} | fields
        self.spec = AttentionSpec.for_mla(num_heads=heads, mla=dims, **fields)
        self.dims, self.heads, self.backend = dims, heads, backend
        self.device = torch.device(device)
        self.width = dims.kv_lora_rank + dims.qk_rope_head_dim
        self.query_lens, self.seq_lens = query_lens, seq_lens
        random = torch.Generator().manual_seed(seed)
        new = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64).to(
            self.spec.dtype
        )
        # Scores of about 1, whatever the sizes.
        self.scale = 0.5 if dims is SMALL_DIMS else 1.0 / (self.width * dims.qk_nope_head_dim**0.5)
        self.layer = SimpleNamespace(
            _k_scale=torch.tensor(0.02, device=device),
            _v_scale=torch.ones((), device=device),
            _k_scale_float=0.02,
            _v_scale_float=1.0,
        )
        expands = dims.qk_nope_head_dim + dims.v_head_dim
        self.weight = new(heads * expands, dims.kv_lora_rank)
        nan = lambda *shape: torch.full(shape, math.nan, dtype=self.spec.dtype)
        size = dims.qk_nope_head_dim + dims.qk_rope_head_dim
        tokens = sum(query_lens)
        self.query = torch.cat([new(tokens, heads, size), nan(padding, heads, size)])
        stored = [new(seq_len, self.width) for seq_len in seq_lens]
        tails = [s[n - q :] for s, n, q in zip(stored, seq_lens, query_lens, strict=True)]
        tail = torch.cat([*tails, nan(padding, self.width)])
        dtype = kv_cache_torch_dtype(self.spec.kv_cache_dtype, self.spec.dtype)
        self._make_cache(stored, dtype, random)
        self.meant = [dequantized(s[:, None], torch.tensor(0.02), dtype)[:, 0] for s in stored]
        parts = [dims.kv_lora_rank, dims.qk_rope_head_dim]
        self.latents, self.rotated = tail.to(device).split(parts, dim=-1)
        self.query, self.weight = self.query.to(device), self.weight.to(device)

    def _make_cache(self, stored, dtype, random):
        block_size = self.spec.block_size
        needed = [-(-n // block_size) for n in self.seq_lens]
        free = torch.randperm(sum(needed) + 1, generator=random).tolist()
        cache = torch.full((len(free), block_size, self.width), math.nan).to(dtype)
        table = torch.full((len(needed), max(needed, default=0) + 1), 2**31 - 1)
        slots = []
        for request, rows in enumerate(stored):
            values = as_stored(rows, torch.tensor(0.02), dtype).view(torch.uint8)
            for position in range(len(rows)):
                if position % block_size == 0:
                    table[request, position // block_size] = free.pop()
                block, offset = table[request, position // block_size], position % block_size
                if position < len(rows) - self.query_lens[request]:
                    cache.view(torch.uint8)[block, offset] = values[position]
                else:
                    slots.append(int(block) * block_size + offset)
        slots = torch.tensor(slots + [-1] * (len(self.query) - len(slots)), dtype=torch.int64)
        self.cache = cache.to(self.device)
        self.batch = AttentionBatch.create(
            self.query_lens,
            self.seq_lens,
            block_table=table.to(self.device),
            slot_mapping=slots.to(self.device),
            device=self.device,
        )

    def impl(self, **more):
        spec = self.spec
        more = {"kv_b_proj": self.weight} | more
        return self.backend.get_impl_cls()(
            self.heads,
            self.width,
            self.scale,
            1,
            sliding_window=spec.sliding_window,
            kv_cache_dtype=spec.kv_cache_dtype,
            logits_soft_cap=spec.logits_soft_cap,
            kv_sharing_target_layer_name="target" if spec.kv_sharing else None,
            causal=spec.causal,
            returns_lse=spec.returns_lse,
            mla=self.dims,
            **more,
        )

    def builder(self):
        return self.backend.get_builder_cls()(self.spec, self.device)

    def run(self, impl=None, query=None, metadata=None, **more):
        return (impl or self.impl()).forward(
            self.layer,
            self.query if query is None else query,
            self.latents,
            self.rotated,
            self.cache,
            metadata or self.builder().build(self.batch),
            **more,
        )

    def naive(self):
        """(output, lse) by the scalar oracle, for sizes of a few elements."""
        dims = self.dims

        def attend(query, rows):
            keys, values = scalar_oracle.expanded_latents(
                rows[:, : dims.kv_lora_rank], rows[:, dims.kv_lora_rank :], self.weight,
                num_heads=self.heads, nope=dims.qk_nope_head_dim, size_v=dims.v_head_dim,
            )  # fmt: skip
            return scalar_oracle.attention_of_request(
                query, keys, values, scale=self.scale, causal=self.spec.causal,
                window=self.spec.sliding_window, cap=self.spec.logits_soft_cap,
            )  # fmt: skip

        return self._by_request(attend)

    def expected(self):
        """(output, lse) in float64, expanded, by a few lines of PyTorch."""
        dims, spec = self.dims, self.spec
        weight = self.weight.double().view(self.heads, -1, dims.kv_lora_rank)
        up_k, up_v = weight.split([dims.qk_nope_head_dim, dims.v_head_dim], dim=1)

        def attend(query, rows):
            rows = rows.double().to(query.device)
            latents, rotated = rows.split([dims.kv_lora_rank, dims.qk_rope_head_dim], dim=-1)
            keys = torch.einsum("kr,hnr->hkn", latents, up_k)
            keys = torch.cat([keys, rotated.expand(self.heads, -1, -1)], dim=-1)
            values = torch.einsum("kr,hvr->hkv", latents, up_v)
            scores = torch.einsum("qhn,hkn->hqk", query, keys) * self.scale
            if spec.logits_soft_cap:
                scores = (scores / spec.logits_soft_cap).tanh() * spec.logits_soft_cap
            first = len(rows) - len(query)
            ahead = torch.arange(len(rows), device=query.device)
            ahead = ahead - torch.arange(first, len(rows), device=query.device)[:, None]
            window = spec.sliding_window or 2**40
            hidden = ahead > 0 if spec.causal else ahead >= window
            scores.masked_fill_(hidden | (ahead <= -window), -math.inf)
            lse = scores.logsumexp(-1)
            weights = (scores - lse[..., None]).exp().where(lse[..., None] > -math.inf, 0.0)
            return torch.einsum("hqk,hkv->qhv", weights, values), lse.T

        return self._by_request(attend)

    def _by_request(self, attend):
        tokens = sum(self.query_lens)
        queries = self.query[:tokens].double().split(list(self.query_lens))
        pairs = [attend(query, rows) for query, rows in zip(queries, self.meant, strict=True)]
        outputs, lses = zip(*pairs, strict=True) if pairs else ((), ())
        none = torch.zeros(len(self.query) - tokens, self.heads, self.dims.v_head_dim)
        none = none.double().to(self.device)
        return torch.cat([*outputs, none]), torch.cat([*lses, none[..., 0] - math.inf])

    def check(self, output, expected=None):
        """Assert that the output is the expected one, padding rows included."""
        wanted = self.naive()[0] if expected is None else expected
        largest = max(1.0, *wanted.flatten().abs().tolist(), 0)
        eps = {torch.float64: 1e-12, torch.float32: 1e-5}.get(self.spec.dtype)
        allowed = (eps or torch.finfo(self.spec.dtype).eps) * largest
        torch.testing.assert_close(output.double(), wanted, rtol=0, atol=allowed)
