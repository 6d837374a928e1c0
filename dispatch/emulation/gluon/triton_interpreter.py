"""Triton's interpreter for kernels that were defined to be compiled.

`@triton.jit` decides by TRITON_INTERPRET, once, whether a kernel is compiled or interpreted. A
process with a GPU compiles; to run a kernel on CPU tensors there, its Python function is handed to
the interpreter at the launch instead.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import triton.language as tl
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

__all__ = ["triton_interpreted"]


@functools.cache
def _interpreted(function: Callable[..., Any]) -> Any:
    """A kernel's function for the interpreter; the hash of the kernel itself takes a compiler."""
    return InterpretedFunction(function)


def _run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
    return _interpreted(kernel.fn).run(*args, grid=grid, warmup=warmup, **named)


def _call(kernel: JITFunction[Any], *args: Any, **named: Any) -> Any:
    """A call of one kernel by another."""
    return _interpreted(kernel.fn)(*args, **named)


@contextlib.contextmanager
def triton_interpreted() -> Iterator[None]:
    """Inside of this, Triton interprets every kernel, those of its own library too."""
    if knobs.runtime.interpret and not isinstance(tl.sum, JITFunction):
        yield
        return
    with _language_kept(), knobs.runtime.scope():
        knobs.runtime.interpret = True
        with mock.patch.multiple(JITFunction, run=_run, __call__=_call):
            yield


@contextlib.contextmanager
def _language_kept() -> Iterator[None]:
    """Undo what the interpreter changes in Triton's language, which the compiler needs as it was.

    Triton does so at the end of a launch, but not for what kernels change that others call.
    """
    owners: tuple[Any, ...] = (
        tl, tl.core, tl.math, tl.standard, tl.tensor, tl.core.tensor_descriptor_base
    )  # fmt: skip
    before = [dict(vars(owner)) for owner in owners]
    try:
        yield
    finally:
        for owner, kept in zip(owners, before, strict=True):
            for name, value in list(vars(owner).items()):
                if name not in kept:
                    delattr(owner, name)
                elif value is not kept[name]:
                    setattr(owner, name, kept[name])
