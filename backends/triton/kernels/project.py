"""Products of each token's heads with one matrix per head, whose bits do not depend on the batch.

A library's batched product picks a kernel by the number of tokens, and with it the order of sums.
"""

import triton
import triton.language as tl

__all__ = ["project_kernel"]


@triton.jit(do_not_specialize=["num_tokens"])
def project_kernel(
    x_ptr, weight_ptr, out_ptr, num_tokens, x_stride_t, x_stride_h, weight_stride_h,
    weight_stride_k, weight_stride_n, out_stride_t, out_stride_h,
    K: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Multiply, with sums in float32 in a fixed order.

    Grid: (ceil(num_tokens / TOKENS), ceil(N / BLOCK_N), num_heads).

    Args:
        x_ptr: (num_tokens, num_heads, K).
        weight_ptr: (num_heads, K, N), with any strides.
        out_ptr: (num_tokens, num_heads, N).
    """
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(2).to(tl.int64)
    ok = (tokens < num_tokens)[:, None]
    in_width = (columns < N)[None, :]
    x = x_ptr + head * x_stride_h + tokens.to(tl.int64)[:, None] * x_stride_t
    weight = weight_ptr + head * weight_stride_h + columns[None, :] * weight_stride_n
    total = tl.zeros([TOKENS, BLOCK_N], tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        a = tl.load(x + k[None, :], mask=ok & (k < K)[None, :], other=0.0)
        b = tl.load(
            weight + k[:, None] * weight_stride_k, mask=(k < K)[:, None] & in_width, other=0.0
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    out = out_ptr + head * out_stride_h + tokens.to(tl.int64)[:, None] * out_stride_t
    tl.store(out + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=ok & in_width)
