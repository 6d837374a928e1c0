"""Values of an interpreted Gluon kernel: tensors as NumPy arrays, with a dtype and a layout.

16-bit floating-point numbers are kept as float32 arrays of the numbers that they can hold.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from triton.experimental.gluon import language as gl

from attn_dispatch.emulation.errors import EmulationError

__all__ = [
    "Array",
    "Pointer",
    "Tensor",
    "as_tensor",
    "combine",
    "from_bits",
    "rounded",
    "stored_type",
    "to_bits",
]

Array = NDArray[Any]


@dataclass(frozen=True)
class _Form:
    """How the elements of a dtype are stored in memory, and kept here."""

    stored: type
    kept: type


_FORMS = {
    gl.int1: _Form(np.bool_, np.bool_),
    gl.int8: _Form(np.int8, np.int8),
    gl.uint8: _Form(np.uint8, np.uint8),
    gl.int16: _Form(np.int16, np.int16),
    gl.int32: _Form(np.int32, np.int32),
    gl.uint32: _Form(np.uint32, np.uint32),
    gl.int64: _Form(np.int64, np.int64),
    gl.float16: _Form(np.float16, np.float32),
    gl.bfloat16: _Form(np.uint16, np.float32),
    gl.float32: _Form(np.float32, np.float32),
    gl.float64: _Form(np.float64, np.float64),
}
_BY_NAME = {dtype.name: form for dtype, form in _FORMS.items()}


def _form(dtype: Any) -> _Form:
    try:
        return _BY_NAME[dtype.name]
    except KeyError:
        raise EmulationError(f"The interpreter of Gluon has no elements of {dtype}.") from None


def stored_type(dtype: Any) -> Any:
    """NumPy's dtype of elements in memory."""
    return np.dtype(_form(dtype).stored)


def rounded(data: Array, dtype: Any) -> Array:
    """Numbers as this dtype can hold them."""
    form = _form(dtype)
    if form.kept is not np.float32 or form.stored is np.float32:
        if form.kept is np.bool_:
            data = data != 0
        kept: Array = data.astype(form.kept, copy=False)
        return kept
    if form.stored is np.float16:
        return data.astype(np.float16).astype(np.float32)
    return from_bits(_bfloat16_bits(data.astype(np.float32)), dtype)


def _bfloat16_bits(data: Array) -> Array:
    """To the nearest; ties to even. NaN stays NaN."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FFF, nearest).astype(np.uint16)


def to_bits(data: Array, dtype: Any) -> Array:
    """Elements as memory has them."""
    if dtype == gl.bfloat16:
        return _bfloat16_bits(data)
    return data.astype(_form(dtype).stored)


def from_bits(stored: Array, dtype: Any) -> Array:
    """Elements of memory, as they are kept here."""
    if dtype == gl.bfloat16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(_form(dtype).kept)


class Tensor:
    """A tensor or, with shape (), a scalar. Its data may be pending: see `products.py`."""

    def __init__(self, data: Any, dtype: Any, layout: Any = None) -> None:
        self._data: Array | None = None if data is None else np.asarray(data)
        self.dtype = dtype
        self.layout = layout

    @property
    def data(self) -> Array:
        """The elements.

        Raises:
            EmulationError: they are the result of a product that was not waited for.
        """
        if self._data is None:
            raise EmulationError("The result of an asynchronous product was used before a wait.")
        return self._data

    @property
    def shape(self) -> list[int]:
        """Elements in each dimension."""
        return list(self.data.shape)

    @property
    def type(self) -> Any:
        """What kernels ask for a shape and a layout."""
        return self

    def to(self, dtype: Any) -> Tensor:
        """The same numbers in another dtype."""
        return Tensor(rounded(self.data, dtype), dtype, self.layout)

    def __bool__(self) -> bool:
        if self.data.shape != ():
            raise EmulationError("A condition must be one value.")
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)

    def __getitem__(self, key: Any) -> Tensor:
        return Tensor(self.data[key], self.dtype, getattr(self.layout, "parent", None))

    def __iter__(self) -> Any:
        raise EmulationError("A tensor cannot be iterated over.")

    def __neg__(self) -> Tensor:
        return Tensor(-self.data, self.dtype, self.layout)

    def __invert__(self) -> Tensor:
        return Tensor(~self.data, self.dtype, self.layout)


class Pointer(Tensor):
    """Addresses of elements; `dtype.element_ty` is theirs."""

    def __init__(self, addresses: Any, element: Any, layout: Any = None) -> None:
        super().__init__(np.asarray(addresses, np.int64), gl.pointer_type(element), layout)

    def moved(self, offset: Any) -> Pointer:
        """Addresses some elements further."""
        other = as_tensor(offset)
        size = stored_type(self.dtype.element_ty).itemsize
        addresses = self.data + other.data.astype(np.int64) * size
        layout = other.layout if other.data.ndim >= self.data.ndim else self.layout
        return Pointer(addresses, self.dtype.element_ty, layout or self.layout)

    __add__ = __radd__ = moved

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.data[key], self.dtype.element_ty, getattr(self.layout, "parent", None))


def as_tensor(value: Any) -> Tensor:
    """A number of Python as a scalar."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, bool):
        return Tensor(value, gl.int1)
    if isinstance(value, int):
        fits = -(2**31) <= value < 2**31
        return Tensor(np.int32(value) if fits else np.int64(value), gl.int32 if fits else gl.int64)
    if isinstance(value, float):
        return Tensor(np.float32(value), gl.float32)
    raise EmulationError(f"{value!r} is no value of a kernel.")


def _operands(one: Any, two: Any) -> tuple[Array, Array, Any, Any]:
    """Both with the dtype that Triton promotes them to: (data, data, dtype, layout)."""
    a, b = as_tensor(one), as_tensor(two)
    if a.dtype is b.dtype:
        dtype = a.dtype
    else:
        dtype = _promoted(a, b, isinstance(one, Tensor), isinstance(two, Tensor))
    placed = [x for x in (a, b) if x.layout is not None and x.data.ndim]
    layout = max(placed, key=lambda x: x.data.ndim).layout if placed else None
    kept = _form(dtype).kept
    return a.data.astype(kept, copy=False), b.data.astype(kept, copy=False), dtype, layout


def _promoted(a: Tensor, b: Tensor, a_is_tensor: bool, b_is_tensor: bool) -> Any:
    """Numbers of Python take the type of the tensor, if it is a floating-point one or fits."""
    if a_is_tensor != b_is_tensor:
        tensor, number = (a, b) if a_is_tensor else (b, a)
        is_float = tensor.dtype.is_floating()
        if is_float or (not number.dtype.is_floating() and tensor.dtype != gl.int1):
            return tensor.dtype
        return number.dtype
    floats = [x.dtype for x in (a, b) if x.dtype.is_floating()]
    if len(floats) == 2 and {str(each) for each in floats} == {"fp16", "bf16"}:
        return gl.float32
    return max(floats or [a.dtype, b.dtype], key=lambda dtype: dtype.primitive_bitwidth)


def _quotient(a: Array, b: Array) -> Array:
    """Integers, rounded towards zero, as in C."""
    if np.any(b == 0):
        raise EmulationError("An integer was divided by zero.")
    result: Array = (np.abs(a) // np.abs(b) * (np.sign(a) * np.sign(b))).astype(a.dtype)
    return result


def _remainder(a: Array, b: Array) -> Array:
    result: Array = (a - _quotient(a, b) * b).astype(a.dtype)
    return result


_ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": _quotient,
    "mod": _remainder,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
}
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def combine(function: Callable[[Array, Array], Array], one: Any, two: Any) -> Tensor:
    """An elementwise function of two values, broadcast."""
    a, b, dtype, layout = _operands(one, two)
    return Tensor(rounded(function(a, b), dtype), dtype, layout)


def _install() -> None:
    for name, function in _ARITHMETIC.items():

        def forward(self: Tensor, other: Any, function: Any = function) -> Tensor:
            if isinstance(other, Pointer):
                return other.moved(self)
            return combine(function, self, other)

        def backward(self: Tensor, other: Any, function: Any = function) -> Tensor:
            return combine(function, other, self)

        setattr(Tensor, f"__{name}__", forward)
        setattr(Tensor, f"__r{name}__", backward)
    for name in _COMPARISONS:
        test = getattr(operator, name)

        def compare(self: Tensor, other: Any, test: Any = test) -> Tensor:
            a, b, _, layout = _operands(self, other)
            return Tensor(test(a, b), gl.int1, layout)

        setattr(Tensor, f"__{name}__", compare)


_install()
