"""Launching a kernel again and again: what Triton derives at each launch is derived once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from packaging.version import Version

__all__ = ["METADATA", "Launcher", "Launchers"]

#: Pointers through which kernels read one number at a time, or that may be absent. Triton does not
#: specialize on their alignment (do_not_specialize_on_alignment), so no launch has to look at it.
METADATA = [
    "lse_ptr", "out_scale_ptr", "part_lse_ptr", "counters_ptr", "requests_ptr", "tiles_ptr",
    "query_start_loc_ptr", "seq_lens_ptr", "key_start_loc_ptr", "block_table_ptr",
    "k_row_scales_ptr", "v_row_scales_ptr", "k_scale_ptr", "v_scale_ptr", "slopes_ptr", "mask_ptr",
    "mask_starts_ptr", "ranges_ptr", "range_starts_ptr", "slots_ptr", "lengths_ptr",
]  # fmt: skip
#: The versions of Triton whose CompiledKernel.run takes the arguments that Launcher gives it.
#: 3.6 was run on GPUs; for 3.7 to 3.9 this is what their sources do.
_DIRECT_FROM, _DIRECT_UNTIL = Version("3.6"), Version("3.10.dev0")

_HAS_GPU = torch.cuda.is_available()
_HIP = torch.version.hip is not None


class Launcher:
    """A kernel with its constants.

    At every launch Triton binds names, derives what to specialize on and looks for the compiled
    kernel, which takes longer than a short kernel runs. Here the compiled kernel is kept for each
    combination of what Triton specializes on, and called directly if this version of Triton was
    tested.

    Args:
        kernel: a @triton.jit function; its constexpr parameters come last.
        constants: the values of all of them, by name.
        options: the compiler's: num_warps, num_stages and so on.
    """

    def __init__(
        self, kernel: Any, constants: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        self.kernel = kernel
        self.constants = dict(constants)
        self.options = dict(options)
        self._compiled: dict[Any, Any] = {}
        names = kernel.arg_names
        self._constants_in_order = [constants[name] for name in names if name in constants]
        unspecialized = {
            *(getattr(kernel, "do_not_specialize", None) or ()),
            *(getattr(kernel, "do_not_specialize_on_alignment", None) or ()),
        }
        self._specialized = [
            i for i, name in enumerate(names) if name not in constants and name not in unspecialized
        ]
        self._is_direct: bool | None = None
        self._tensors: list[int] = []
        self._integers: list[int] = []

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Launch it on the current stream of the current device.

        Args:
            grid: number of programs in each dimension.
            *args: of the kernel, in order, up to its first constexpr. Each always has the same
                type, and each tensor the same dtype: other ones need another launcher.
        """
        if self._is_direct is None:
            specialized = [(i, args[i]) for i in self._specialized]
            self._integers = [i for i, arg in specialized if isinstance(arg, int)]
            self._tensors = [i for i, arg in specialized if isinstance(arg, torch.Tensor)]
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            # Those on the CPU are for an emulated GPU, whose driver Triton asks at each launch.
            self._is_direct = _HAS_GPU and _can_call_directly() and all(map(_is_on_gpu, tensors))
        if not self._is_direct:
            self.kernel[grid](*args, **self.constants, **self.options)
            return
        device = torch.cuda.current_device()
        # All that Triton specializes on, at least. On AMD that includes whether 32-bit offsets
        # reach all of a tensor's memory.
        small = [_is_small(arg) for arg in args if isinstance(arg, torch.Tensor)] if _HIP else ()
        key = (
            device,
            *small,
            *[args[i].data_ptr() & 15 for i in self._tensors],
            *[a if (a := args[i]) < 16 else (a & 15) | 16 | a >> 31 << 5 for i in self._integers],
        )
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self.kernel[grid](*args, **self.constants, **self.options)
        elif _has_launch_hooks():
            compiled[grid](*args, *self._constants_in_order)
        else:
            stream = torch._C._cuda_getCurrentRawStream(device)
            compiled.run(
                *grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
                *args, *self._constants_in_order,
            )  # fmt: skip


class Launchers(dict[Any, Launcher]):
    """The launchers of one layer, by name."""

    def find(
        self,
        name: tuple[Any, ...],
        kernel: Any,
        constants: Callable[[], Mapping[str, Any]],
        options: Mapping[str, Any] | None = None,
    ) -> Launcher:
        """The launcher with this name, made at its first use."""
        found = self.get(name)
        if found is None:
            found = self[name] = Launcher(kernel, constants(), options or {})
        return found


def _is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def _is_small(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() < 1 << 31


@functools.cache
def _can_call_directly() -> bool:
    import triton

    return _DIRECT_FROM <= Version(triton.__version__) < _DIRECT_UNTIL


def _has_launch_hooks() -> bool:
    """Whether a profiler, for example, is called at launches."""
    runtime = _knobs().runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@functools.cache
def _knobs() -> Any:
    from triton import knobs

    return knobs
