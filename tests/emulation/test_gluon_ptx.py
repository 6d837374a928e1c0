"""The interpreter of Gluon: PTX instructions that kernels use inline, as PyTorch computes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from triton.experimental.gluon import language as gl

from attn_dispatch.emulation import EmulationError
from attn_dispatch.emulation.gluon.ptx import elementwise
from attn_dispatch.emulation.gluon.values import Tensor

RANDOM = torch.Generator().manual_seed(1)
X, Y = (torch.randn(256, generator=RANDOM) * 4 for _ in range(2))


def floats(x):
    return Tensor(x.numpy(), gl.float32)


def ints(x):
    return Tensor(x.to(torch.int32).numpy(), gl.int32)


def run(asm, args, dtype=gl.float32):
    return torch.from_numpy(elementwise(asm, "", args, dtype).data)


@pytest.mark.parametrize(
    ("instruction", "function"),
    [
        ("ex2.approx.ftz.f32 $0, $1;", lambda x, _: x.exp2()),
        ("tanh.approx.f32 $0, $1;", lambda x, _: x.tanh()),
        ("mov.b32 $0, $1;", lambda x, _: x),
        ("mul.f32 $0, $1, $2;", torch.mul),
        ("add.f32 $0, $1, $2;", torch.add),
        ("sub.f32 $0, $1, $2;", torch.sub),
        ("mul.f32 $0, $1, 0f3F000000;", lambda x, _: x / 2),
        ("{ .reg .f32 a; mul.f32 a, $1, $2; add.f32 $0, a, $1; }", lambda x, y: x * y + x),
    ],
)
def test_arithmetic(instruction, function):
    found = run(instruction, [floats(X), floats(Y)])
    torch.testing.assert_close(found, function(X, Y), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(("name", "dtype"), [("bf16x2", torch.bfloat16), ("f16x2", torch.float16)])
def test_two_numbers_are_rounded_into_one_register(name, dtype):
    found = run(f"cvt.rn.{name}.f32 $0, $1, $2;", [floats(X), floats(Y)], gl.int32)
    halves = found.view(dtype).view(-1, 2)
    assert torch.equal(halves, torch.stack([Y, X], 1).to(dtype))  # the first one is the high half


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3x2", torch.float8_e4m3fn), ("e5m2x2", torch.float8_e5m2)]
)
def test_fp8_numbers_become_float16(name, dtype):
    bits = torch.arange(1 << 16)
    asm = f"{{ .reg .b16 a; mov.b32 {{a, _}}, $1; cvt.rn.f16x2.{name} $0, a; }}"
    found = run(asm, [ints(bits)], gl.int32).view(torch.float16)
    expected = bits.to(torch.int32).view(dtype).view(-1, 4)[:, :2].half().flatten()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_halves_of_a_register_become_float32(name, dtype):
    pairs = torch.stack([X, Y], 1).to(dtype)
    for half in (0, 1):
        asm = f"{{ mov.b32 {{a, b}}, $1; cvt.f32.{name} $0, {'ab'[half]}; }}"
        found = run(asm, [Tensor(pairs.view(torch.int32)[:, 0].numpy(), gl.int32)])
        assert torch.equal(found, pairs[:, half].float())


def test_bytes_are_permuted_and_bits_flipped():
    a, b = 0x33221100, 0x77665544
    one = [ints(torch.tensor([a])), ints(torch.tensor([b]))]
    assert run("prmt.b32 $0, $1, $2, 0x6170;", one, gl.int32).item() == 0x66117700
    assert run("xor.b32 $0, $1, $2;", one, gl.int32).item() == a ^ b
    assert run("xor.b32 $0, $1, -1;", one, gl.int32).item() == ~a
    with pytest.raises(EmulationError, match="prmt with signs"):
        run("prmt.b32 $0, $1, $2, 0x8888;", one, gl.int32)


def test_other_instructions_are_rejected():
    with pytest.raises(EmulationError, match=r"instruction sin\.approx\.f32 is not interpreted"):
        run("sin.approx.f32 $0, $1;", [floats(X)])
    with pytest.raises(EmulationError, match="have 32 bits here"):
        run("mov.b32 $0, $1;", [Tensor(np.zeros(1), gl.float64)])
