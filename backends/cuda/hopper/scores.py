"""What both Hopper kernels do with scores, in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attn_dispatch.backends.cuda.hopper.tma_ring import aggregate

__all__ = ["ANY", "MASKED", "Scale", "no_score", "sees_no_key", "tanh", "where_below"]

MASKED = gl.constexpr(-1.0e30)  # a masked score; −inf would become NaN

#: A limit that no number from 0 on reaches.
ANY = gl.constexpr(-(1 << 31))  # as int32


@aggregate
class Scale:
    """scale * log2(e), soft cap * log2(e), scale / soft cap, and ALiBi's slopes."""

    scale_log2: gl.tensor
    cap_log2: gl.tensor
    scale_over_cap: gl.tensor
    slopes_ptr: gl.tensor


@gluon.jit
def tanh(x):
    """NVIDIA's instruction; its relative error is up to 2 ** -11."""
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def where_below(s, number, limit):
    """Scores where 0 <= number < limit, and MASKED elsewhere.

    The comparison is PTX: LLVM would pack its results into bits, and take them apart again.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.u32 p, $2, $3; selp.f32 $0, $1, 0fF149F2CA, p; }",
        "=f,f,r,r", [s, number, limit], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def no_score(m_i):
    """Whether a running maximum is of no score above −inf."""
    return m_i <= -1.0e29


@gluon.jit
def sees_no_key(q_pos, seq_len, window, CONFIG: gl.constexpr):
    """Which rows see no key, by their positions; no query comes after the last key."""
    last = q_pos * 0 + seq_len - 1
    if CONFIG.CAUSAL:
        last = q_pos
    elif CONFIG.WINDOW:
        last = gl.minimum(last, q_pos + window - 1)
    return last < 0
