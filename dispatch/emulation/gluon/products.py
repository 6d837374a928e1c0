"""Matrix products of warp groups: computed when they are waited for, from what memory has then."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.experimental.gluon import language as gl

from attn_dispatch.emulation.errors import EmulationError
from attn_dispatch.emulation.gluon.scheduler import Task
from attn_dispatch.emulation.gluon.shared_memory import SharedMemory
from attn_dispatch.emulation.gluon.values import Tensor

__all__ = ["Product", "issue", "wait"]


class Product(Tensor):
    """The result of a product that may be under way."""

    def __init__(self, a: Any, b: SharedMemory, acc: Any, use_acc: bool) -> None:
        super().__init__(None, gl.float32, acc.layout)
        self._operands = (a, b, acc if use_acc else None)
        self._shape = [a.shape[0], b.shape[1]]
        if a.shape[1] != b.shape[0]:
            raise EmulationError(f"Shapes {a.shape} and {b.shape} do not fit in a product.")

    @property
    def shape(self) -> list[int]:
        """Known before it is computed."""
        return self._shape

    def check_fenced(self) -> None:
        """See SharedMemory.check_fenced."""
        for operand in self._operands[:2]:
            if isinstance(operand, SharedMemory):
                operand.check_fenced()

    def compute(self) -> None:
        """Read the operands, and multiply."""
        self.check_fenced()  # nor has another task stored to them since
        a, b, acc = self._operands
        left = a.load() if isinstance(a, SharedMemory) else a
        right = b.load()
        if left.dtype != right.dtype or left.dtype.primitive_bitwidth != 16:
            raise EmulationError(f"A product of {left.dtype} and {right.dtype} is not interpreted.")
        result = left.data @ right.data
        self._data = result if acc is None else (acc.data + result).astype(np.float32)


def issue(task: Task, a: Any, b: SharedMemory, acc: Any, *, use_acc: bool, waits: bool) -> Product:
    """Issue a product; with `waits`, wait for it and for all before."""
    product = Product(a, b, acc, use_acc)
    product.check_fenced()
    task.products.append(product)
    if waits:
        wait(task, 0)
    return product


def wait(task: Task, number: int) -> None:
    """Wait until at most `number` products are under way."""
    while len(task.products) > number:
        task.products.pop(0).compute()
