"""`attend` for latents: multi-head latent attention in absorbed form (arXiv:2405.04434).

Each token has one latent and one rotated key part, for all heads. A key is both of them, and a
value is the latent: so a tile of latents is loaded once, and multiplied twice. Rows of a tile are
tokens times all query heads, so that the latents of a request are read once for each tile of rows
only, whatever the number of heads.
"""

import triton
import triton.language as tl

from attn_dispatch.backends.triton.kernels.online_softmax import (
    LOWEST,
    dequantize,
    hide,
    soft_capped,
    visibility_mask,
)

__all__ = ["attend_latents"]


@triton.jit
def _pages(keys, t, key_lo, key_hi, F: tl.constexpr):
    """The blocks of a tile of keys, int64: one, or (BLOCK_N, 1); 0 for keys out of range."""
    if F.BLOCK_SIZE % F.BLOCK_N == 0:  # a tile lies in one block
        first = t * F.BLOCK_N
        live = (first + F.BLOCK_N > key_lo) & (first < key_hi)
        return tl.load(keys.block_table + first // F.BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    else:
        k_pos = t * F.BLOCK_N + tl.arange(0, F.BLOCK_N)
        live = (k_pos >= key_lo) & (k_pos < key_hi)
        page = tl.load(keys.block_table + k_pos // F.BLOCK_SIZE, mask=live, other=0)
        return page.to(tl.int64)[:, None]


@triton.jit
def attend_latents(
    state, q_pointers, tile, keys, first_tile, last_tile, key_lo, key_hi, F: tl.constexpr
):  # fmt: skip
    """Fold tiles of latents in pages into a state; see `attend`.

    Args:
        q_pointers: (rows, 1), where the absorbed queries begin: a row is HEAD_SIZE_V elements for
            latents, then those for rotated parts.
        keys: `k` points to latents of HEAD_SIZE_V elements, which are the values too, `v` to
            rotated key parts of HEAD_SIZE − HEAD_SIZE_V. Both sizes are powers of two.
        Others: as for `attend`, with MASKED.

    Returns:
        The new state.
    """
    acc, m_i, l_i = state
    ROTATED: tl.constexpr = F.HEAD_SIZE - F.HEAD_SIZE_V
    n_idx = tl.arange(0, F.BLOCK_N)
    c_idx = tl.arange(0, acc.shape[1])[None, :]
    r_idx = tl.arange(0, ROTATED)[None, :]
    q = tl.load(q_pointers + c_idx, mask=tile.ok[:, None], other=0.0)
    q_rotated = tl.load(q_pointers + F.HEAD_SIZE_V + r_idx, mask=tile.ok[:, None], other=0.0)
    # One tile ahead and outside of the compiler's pipeline, whose stages are then all for latents.
    page = _pages(keys, first_tile, key_lo, key_hi, F)
    for t in tl.range(first_tile, last_tile, num_stages=F.STAGES):
        k_pos = t * F.BLOCK_N + n_idx
        live = (k_pos >= key_lo) & (k_pos < key_hi)
        in_block = (k_pos % F.BLOCK_SIZE)[:, None] * keys.k_stride_t
        offsets = page * keys.k_stride_b + in_block
        page = _pages(keys, t + 1, key_lo, tl.minimum(key_hi, last_tile * F.BLOCK_N), F)
        latents = tl.load(keys.k + offsets + c_idx, mask=live[:, None], other=0)
        rotated = tl.load(keys.v + offsets + r_idx, mask=live[:, None], other=0)
        latents = dequantize(latents, q.dtype, F)
        s = tl.dot(q, latents.T, input_precision="ieee")
        s = tl.dot(q_rotated, dequantize(rotated, q.dtype, F).T, s, input_precision="ieee")
        if F.CAP:
            s = soft_capped(s, tile, F)
        else:
            s = s * tile.scale_log2
        s = hide(s, visibility_mask(tile, k_pos, F), F)
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_use = tl.where(m_new <= LOWEST, 0.0, m_new)
        p = tl.exp2(s - m_use[:, None])
        alpha = tl.exp2(m_i - m_use)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), latents, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new
    return acc, m_i, l_i
