"""The cases of compile_matrix.py: layers and steps, and the launches of the library for them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch

from attn_dispatch.backends.cuda.hopper.backend import HopperAttnBackend
from attn_dispatch.backends.cuda.hopper.launch import DECODES, DecodeLaunch, DecodeLaunches
from attn_dispatch.backends.cuda.hopper.mla import HopperMLABackend
from attn_dispatch.backends.triton import scratch
from attn_dispatch.backends.triton.backend import TritonAttnBackend
from attn_dispatch.backends.triton.launcher import Launcher
from attn_dispatch.backends.triton.merge import MergeKernels
from attn_dispatch.backends.triton.mla import TritonMLABackend
from attn_dispatch.backends.triton.plan import Launches
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.key_positions import KeyPositions
from attn_dispatch.interface.kv_cache import allocate_kv_cache
from attn_dispatch.interface.quantization import KVScales, kv_cache_torch_dtype, stored_head_size
from attn_dispatch.interface.spec import AttentionSpec, MLADims
from attn_dispatch.interface.types import PlaceholderRange
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES

__all__ = [
    "ADDRESSINGS",
    "AMD",
    "FEATURES",
    "HOPPER",
    "LATENTS",
    "MERGES",
    "NVIDIA",
    "SIZES",
    "Case",
    "Compilation",
    "Launch",
    "covering_set",
    "full_set",
    "launches_of",
    "quick_set",
]

NVIDIA = tuple(name for name, device in KNOWN_DEVICES.items() if device.vendor == "nvidia")
AMD = tuple(name for name, device in KNOWN_DEVICES.items() if device.vendor == "amd")

#: Triton compiles a kernel for AMD by which tensors are under 2 GiB: it reads those by buffer
#: instructions, and others by global ones. All are, all but the KV cache, or none. "mixed" is what
#: runs in serving, and "buffer" with a small cache.
ADDRESSINGS = ("buffer", "mixed", "global")

#: Steps as (query_lens, seq_lens). The first three have requests for the decode kernel, enough for
#: every device, and one whose keys the prefill kernel takes as they come, from pages, or gathered.
_MANY = 320
FRESH = ((1,) * _MANY + (300,), (200,) * _MANY + (300,))
PAGES = ((1,) * _MANY + (100,), (200,) * _MANY + (400,))
GATHERED = ((1,) * _MANY + (300,), (200,) * _MANY + (400,))
VERIFY = ((4,) * _MANY, (200,) * _MANY)
DRAFTS = ((8,) * _MANY, (200,) * _MANY)
FEW = ((1,), (200,))
ONE = ((1,) * _MANY, (200,) * _MANY)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer and a step of it.

    Attributes:
        name: what the table calls it.
        fields: of AttentionSpec, over those of LAYER.
        lens: query_lens and seq_lens.
        archs: where it is compiled, of the covering set; None for one of each vendor, in turns.
        addressings: with which, of the covering set, on one AMD device of each instruction set;
            on the others, "mixed".
        odd_rows: new keys lie where no tensor descriptor can describe them.
        only: of what is launched, kernels with this in their name.
        decode_row: how Hopper's decode kernel is launched, whatever the step.
    """

    name: str
    fields: Mapping[str, Any]
    lens: tuple[tuple[int, ...], tuple[int, ...]] = FRESH
    archs: tuple[str, ...] | None = None
    addressings: tuple[str, ...] = ("mixed",)
    odd_rows: bool = False
    only: str = ""
    decode_row: DecodeLaunch | None = None


class Compilation(NamedTuple):
    """A case, the device that it is compiled for, and one of ADDRESSINGS; "" on NVIDIA."""

    case: Case
    arch: str
    addressing: str


LAYER: dict[str, Any] = {
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_size": 128,
    "block_size": 16,
    "dtype": torch.bfloat16,
}

#: One for each row of the launch tables but the last, which only float32 takes.
SIZES = tuple(
    Case(name=str(size), fields={"head_size": size}, archs=(*NVIDIA, *AMD))
    for size in (64, 128, 256, 512)
)

#: "pages" and "gathered" together launch every kernel that reads or writes the cache.
FEATURES = (
    Case(name="head size 80, float16", fields={"head_size": 80, "dtype": torch.float16}),
    Case(name="head size 192, values 128", fields={"head_size": 192, "head_size_v": 128}),
    Case(name="float32", fields={"dtype": torch.float32}),
    Case(name="float32, head size 512", fields={"dtype": torch.float32, "head_size": 512}),
    Case(name="pages", fields={}, lens=PAGES, archs=("sm100", *AMD), addressings=ADDRESSINGS),
    Case(
        name="gathered",
        fields={},
        lens=GATHERED,
        archs=("sm120", *AMD),
        addressings=ADDRESSINGS,
        only="gather_kv",
    ),
    Case(name="no descriptors", fields={}, odd_rows=True, archs=("sm90", "sm100")),
    Case(name="fp8_e4m3", fields={"kv_cache_dtype": "fp8_e4m3"}, lens=PAGES),
    Case(name="fp8_e4m3 gathered", fields={"kv_cache_dtype": "fp8_e4m3"}, lens=GATHERED),
    Case(
        name="fp8_e5m2 per head",
        fields={"kv_cache_dtype": "fp8_e5m2", "kv_scales": "per_head"},
        lens=PAGES,
    ),
    Case(
        name="fp8_e4m3fnuz",
        fields={"kv_cache_dtype": "fp8_e4m3fnuz"},
        lens=PAGES,
        archs=("sm80", "gfx942"),
    ),
    Case(
        name="fp8_e5m2fnuz",
        fields={"kv_cache_dtype": "fp8_e5m2fnuz"},
        lens=PAGES,
        archs=("sm90", "gfx942"),
    ),
    Case(name="int8_per_token_head", fields={"kv_cache_dtype": "int8_per_token_head"}, lens=PAGES),
    Case(
        name="int8, float16",
        fields={"kv_cache_dtype": "int8_per_token_head", "dtype": torch.float16},
        lens=PAGES,
    ),
    Case(
        name="soft cap, ALiBi, sinks, lse",
        fields={"logits_soft_cap": 30.0, "alibi": True, "sinks": True, "returns_lse": True},
    ),
    Case(name="window", fields={"sliding_window": 128}),
    Case(
        name="window, ranges",
        fields={"sliding_window": 128, "bidirectional_ranges": True},
        lens=PAGES,
    ),
    Case(name="custom mask", fields={"custom_mask": True}, lens=PAGES),
    Case(name="fp8 output", fields={"output_quant": "fp8_e4m3"}),
    Case(name="fp8 output by groups", fields={"output_quant": "fp8_e4m3_group128"}),
    Case(name="batch invariant", fields={"batch_invariant": True}),
    Case(name="GQA 7", fields={"num_heads": 28, "num_kv_heads": 4}),
    Case(name="MQA", fields={"num_kv_heads": 1}),
    Case(name="verify 4 tokens", fields={}, lens=VERIFY),
    Case(name="one request", fields={}, lens=FEW, archs=("sm90", "sm100")),
    Case(
        name="encoder",
        fields={"attn_type": "encoder_only", "block_size": None},
        lens=((300,), (300,)),
    ),
    Case(
        name="upper bounds",
        fields={"lengths": "upper_bound"},
        lens=GATHERED,
        archs=("sm90",),
        only="gather_kv",
    ),
    Case(
        name="window of two sizes",
        fields={"causal": False, "window_size": (127, 31)},
        lens=PAGES,
    ),
    Case(name="chunks", fields={"attention_chunk": 128}, lens=PAGES),
    Case(
        name="ranges, chunks of both directions",
        fields={"attention_chunk": 128, "causal": False, "bidirectional_ranges": True},
        lens=PAGES,
        archs=("sm90",),
    ),
    Case(
        name="key positions, window",
        fields={"key_positions": True, "sliding_window": 128, "returns_lse": True},
        lens=PAGES,
    ),
)

_PREFILLS = tuple(
    Case(name=f"Hopper, {name}", fields=fields, archs=("sm90",), only="hopper_prefill", lens=lens)
    for name, fields, lens in (
        ("128", {}, FRESH),
        ("64, pages", {"head_size": 64, "block_size": 32}, GATHERED),
        ("128, pages", {}, GATHERED),
        (
            "256, pages of 64, window",
            {"head_size": 256, "block_size": 64, "sliding_window": 99},
            GATHERED,
        ),
        ("64, pages of 8", {"head_size": 64, "block_size": 8}, GATHERED),
        ("96", {"head_size": 96}, FRESH),
        ("96, pages", {"head_size": 96, "returns_lse": True}, GATHERED),
        ("192 and 128", {"head_size": 192, "head_size_v": 128}, FRESH),
        ("128, pages of 1", {"block_size": 1}, GATHERED),
        ("128, fp8_e4m3", {"kv_cache_dtype": "fp8_e4m3"}, GATHERED),
        ("96, int8", {"head_size": 96, "kv_cache_dtype": "int8_per_token_head"}, GATHERED),
        ("256, fp8_e5m2", {"head_size": 256, "kv_cache_dtype": "fp8_e5m2"}, GATHERED),
        ("128, upper bounds", {"lengths": "upper_bound"}, FRESH),
        ("256, float16", {"head_size": 256, "dtype": torch.float16}, FRESH),
        ("soft cap, ALiBi", {"logits_soft_cap": 30.0, "alibi": True}, FRESH),
        ("window, sinks, lse", {"sliding_window": 99, "sinks": True, "returns_lse": True}, FRESH),
        ("window both ways", {"causal": False, "sliding_window": 99, "alibi": True}, FRESH),
    )
)

_ALL: dict[str, Any] = {
    "dtype": torch.float16,
    "causal": False,
    "sliding_window": 99,
    "logits_soft_cap": 30.0,
    "alibi": True,
    "sinks": True,
    "returns_lse": True,
}

#: Each launch of the decode kernel: a token of some requests with the fewest rows, drafts of all
#: with the most. What two launches have in common is compiled once.
_DECODES = tuple(
    Case(
        name=f"Hopper, {size}, {' and '.join(which)}{more}",
        fields={"head_size": size, **fields},
        archs=("sm90",),
        only="hopper_decode",
        lens=lens,
        decode_row=row,
    )
    for size, rows in DECODES.items()
    for row in dict.fromkeys(rows)
    for which in [[name for name, other in rows._asdict().items() if other == row]]
    for more, fields, lens in (("", {}, FRESH), (", all features", _ALL, DRAFTS))
)

#: What HOPPER_ATTN adds.
HOPPER = _PREFILLS + _DECODES


_DEEPSEEK = MLADims(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
_SMALL = MLADims(kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)

#: What TRITON_MLA launches, with the fewest and the most rows.
LATENTS = (
    Case(
        name="MLA",
        fields={"mla": _DEEPSEEK, "num_heads": 16},
        lens=ONE,
        archs=("sm80", "sm90", "gfx90a", "gfx1201"),
    ),
    Case(
        name="Hopper, MLA, all features",
        fields={
            "mla": _DEEPSEEK,
            "num_heads": 40,
            "dtype": torch.float16,
            "block_size": 64,
            "sliding_window": 99,
            "logits_soft_cap": 30.0,
            "returns_lse": True,
        },
        lens=VERIFY,
        archs=("sm90",),
        only="hopper_mla",
    ),
    Case(
        name="MLA, many heads, lse",
        fields={"mla": _DEEPSEEK, "num_heads": 128, "returns_lse": True},
        lens=ONE,
        archs=(*NVIDIA, *AMD),
    ),
    Case(
        name="MLA, fp8_e4m3",
        fields={"mla": _DEEPSEEK, "num_heads": 128, "kv_cache_dtype": "fp8_e4m3"},
        lens=ONE,
        archs=("sm90", "gfx942"),
    ),
    Case(
        name="MLA, 256 + 32, soft cap, window",
        fields={"mla": _SMALL, "num_heads": 40, "sliding_window": 99, "logits_soft_cap": 30.0},
        lens=VERIFY,
        archs=("sm80", "sm100", "gfx90a", "gfx1201"),
    ),
    Case(
        name="MLA, float32",
        fields={"mla": _DEEPSEEK, "num_heads": 16, "dtype": torch.float32},
        lens=ONE,
        archs=("sm89", "gfx950"),
    ),
    Case(
        name="MLA, float32 cache",
        fields={"mla": _DEEPSEEK, "num_heads": 128, "kv_cache_dtype": "float32"},
        lens=ONE,
        archs=("sm90", "gfx942"),
    ),
    Case(
        name="MLA, batch invariant",
        fields={"mla": _DEEPSEEK, "num_heads": 128, "batch_invariant": True},
        lens=ONE,
        archs=("sm90", "gfx1100"),
    ),
)

#: Merging parts of 32 heads, and packing them for 2 and 8 ranks: `parts`, `size`, the dtypes.
MERGES = tuple(
    Case(name=f"merge of {name}", fields=fields, archs=(*NVIDIA, *AMD))
    for name, fields in (
        ("2 parts", {"parts": 2, "size": 128, "dtype": torch.bfloat16}),
        ("8 parts, sinks, size 512", {"parts": 8, "size": 512, "dtype": torch.float16,
                                      "sinks": True}),
        ("one into float32", {"parts": 2, "size": 128, "dtype": torch.float32,
                              "rest": torch.bfloat16}),
    )
)  # fmt: skip

#: A device of CDNA, RDNA3 and RDNA4 each.
_INSTRUCTION_SETS = ("gfx942", "gfx1100", "gfx1201")


def covering_set() -> list[Compilation]:
    """What the table has: each case on a device of each vendor at least.

    The table has "mixed". The others are compiled as well where a case says so, which covers
    each kernel with each instruction set of AMD.
    """
    pairs = [(case, arch) for case in SIZES for arch in (*NVIDIA, *AMD)]
    pairs += [(case, "sm90") for case in HOPPER]
    pairs += [(case, arch) for case in (*LATENTS, *MERGES) for arch in case.archs or ()]
    for i, case in enumerate(FEATURES):
        archs = case.archs or (NVIDIA[i % len(NVIDIA)], AMD[i % len(AMD)])
        pairs += [(case, arch) for arch in archs]
    return [
        Compilation(case, arch, addressing)
        for case, arch in pairs
        for addressing in _addressings(case, arch)
    ]


def quick_set() -> list[Compilation]:
    """A part of the table: each case, and each device, with tensors as they usually are.

    Each device has one of the sizes. Features and latents are compiled for one NVIDIA device, in
    turns, and latents for one AMD device too; features that name AMD devices are compiled for one
    of each instruction set. What else AMD devices launch is also compiled by `make emulation`.
    """
    pairs = [
        (SIZES[i % len(SIZES)], arch) for archs in (NVIDIA, AMD) for i, arch in enumerate(archs)
    ]
    pairs += [(case, "sm90") for case in HOPPER]
    pairs += [(case, arch) for case in MERGES for arch in ("sm90", "gfx942")]
    for i, case in enumerate(LATENTS):
        for vendor in (NVIDIA, AMD):
            archs = [arch for arch in vendor if arch in (case.archs or ())]
            pairs += [(case, archs[i % len(archs)])] if archs else []
    for i, case in enumerate(FEATURES):
        archs = case.archs or (NVIDIA[i % len(NVIDIA)],)
        on_nvidia = [arch for arch in archs if arch in NVIDIA]
        pairs += [(case, arch) for arch in (*on_nvidia[:1], *_INSTRUCTION_SETS) if arch in archs]
    return [Compilation(case, arch, "mixed" if arch in AMD else "") for case, arch in pairs]


def _addressings(case: Case, arch: str) -> tuple[str, ...]:
    if arch not in AMD:
        return ("",)
    return case.addressings if arch in _INSTRUCTION_SETS else ("mixed",)


def full_set() -> list[Compilation]:
    """Every case on every device in every addressing."""
    cases = (*SIZES, *FEATURES, *LATENTS, *MERGES)
    return [
        *itertools.starmap(Compilation, itertools.product(cases, NVIDIA, ("",))),
        *itertools.starmap(Compilation, itertools.product(cases, AMD, ADDRESSINGS)),
        *itertools.starmap(Compilation, itertools.product(HOPPER, ("sm90",), ("",))),
    ]


# Recording ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """What a Launcher was made of and called with.

    Attributes:
        programs: of its grid.
        cache: names of the arguments that are the KV cache or a part of it.
    """

    kernel: Any
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    args: tuple[Any, ...]
    programs: int
    cache: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The kernel's name without its last word."""
        return str(self.kernel.__name__).removesuffix("_kernel")

    def is_small(self, name: str, addressing: str) -> bool:
        """Whether a tensor, by its argument's name, is under 2 GiB in one of ADDRESSINGS."""
        return addressing == "buffer" or (addressing == "mixed" and name not in self.cache)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside of this, launches are kept and not run."""
    launches: list[Launch] = []

    def record(launcher: Launcher, grid: tuple[int, int, int], *args: Any) -> None:
        made_of = (launcher.kernel, launcher.constants, launcher.options)
        launches.append(Launch(*made_of, args, math.prod(grid)))

    with mock.patch.object(Launcher, "__call__", record):
        yield launches


def launches_of(case: Case, device: DeviceProfile) -> list[Launch]:
    """What TRITON_ATTN, or HOPPER_ATTN or TRITON_MLA for their cases, launches on a device."""
    if case in MERGES:
        return _launches_of_merge(**case.fields)
    if case in LATENTS:
        return _launches_over_latents(case, device)
    spec = AttentionSpec(**{**LAYER, **case.fields})
    backend = HopperAttnBackend if case in HOPPER else TritonAttnBackend
    impl = backend.make_impl(
        spec,
        scale=spec.head_size**-0.5,
        alibi_slopes=[0.5] * spec.num_heads if spec.alibi else None,
        sinks=torch.zeros(spec.num_heads) if spec.sinks else None,
    )
    builder = backend.make_builder(spec, torch.device("cpu"))
    builder.launches = Launches.of(spec, device)
    batch, num_blocks = _batch(case, spec)
    tokens = batch.num_tokens
    query = torch.zeros(tokens, spec.num_heads, spec.head_size, dtype=spec.dtype)
    key, value = (
        torch.zeros(tokens, spec.num_kv_heads * size + case.odd_rows, dtype=spec.dtype)
        .narrow(1, 0, spec.num_kv_heads * size)
        .unflatten(1, (spec.num_kv_heads, size))
        for size in (spec.head_size, spec.head_size_v)
    )
    scales = KVScales()
    if spec.kv_scales == "per_head":
        ones = torch.ones(spec.num_kv_heads)
        scales.set(ones, ones, (tuple(ones.shape),))
    kv_cache = None
    if spec.block_size is not None:
        size = stored_head_size(spec.kv_cache_dtype, max(spec.head_size, spec.head_size_v))
        shape = TritonAttnBackend.get_kv_cache_shape(
            num_blocks, spec.block_size, spec.num_kv_heads, size
        )
        dtype = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, device.arch)
        kv_cache = allocate_kv_cache(shape, TritonAttnBackend.get_kv_cache_stride_order(), dtype)
    row = case.decode_row
    chosen = {} if row is None else {spec.head_size: DecodeLaunches(row, row, row)}
    # Of HOPPER_ATTN, pages that the kernel copies are the case, not gathered rows.
    limit = 0 if case in HOPPER else scratch.MAX_SCRATCH_BYTES
    copies = mock.patch.object(scratch, "MAX_SCRATCH_BYTES", limit)
    with recorded() as launches, mock.patch.dict(DECODES, chosen), copies:
        impl.forward(
            scales, query, key, value, kv_cache, builder.build(batch), **_output(spec, tokens)
        )
    return [
        dataclasses.replace(launch, cache=_cache_arguments(kv_cache, launch))
        for launch in launches
        if case.only in launch.name
    ]


def _launches_of_merge(
    parts: int,
    size: int,
    dtype: torch.dtype,
    sinks: bool = False,
    rest: torch.dtype | None = None,
) -> list[Launch]:
    """What merges the parts of 256 tokens, and what packs one of them for as many ranks."""
    heads, kernels = 32, MergeKernels()
    first = torch.zeros(256, heads, size, dtype=dtype), torch.zeros(256, heads)
    others = torch.zeros(parts - 1, 256, heads, size, dtype=rest or dtype)
    others_lse = torch.zeros(parts - 1, 256, heads)
    outs = torch.zeros(parts, 256, heads // parts, size, dtype=dtype)
    lses, flags = torch.zeros(outs.shape[:3]), torch.zeros(parts, 16)[:, 0]
    with recorded() as launches:
        kernels.merge(first, (others, others_lse), torch.zeros(heads) if sinks else None, first[0])
        kernels.pack(*first, outs, lses, flags, failed=False)
    return launches


def _launches_over_latents(case: Case, device: DeviceProfile) -> list[Launch]:
    fields = {"block_size": LAYER["block_size"], "dtype": LAYER["dtype"], **case.fields}
    spec = AttentionSpec.for_mla(**fields)
    mla = spec.mla
    assert mla is not None
    expands = spec.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    backend = HopperMLABackend if case.only == "hopper_mla" else TritonMLABackend
    impl = backend.make_impl(
        spec,
        scale=0.1,
        mla=mla,
        kv_b_proj=torch.zeros(expands, mla.kv_lora_rank, dtype=spec.dtype),
    )
    builder = backend.make_builder(spec, torch.device("cpu"))
    builder.launches = Launches.of(spec, device)
    batch, num_blocks = _batch(case, spec)
    size = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    query = torch.zeros(batch.num_tokens, spec.num_heads, size, dtype=spec.dtype)
    entries = torch.zeros(batch.num_tokens, spec.head_size, dtype=spec.dtype)
    new = entries.split([mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1)
    dtype = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, device.arch)
    kv_cache = torch.zeros(num_blocks, spec.block_size or 1, spec.head_size).to(dtype)
    with recorded() as launches, torch.inference_mode():
        impl.forward(KVScales(), query, *new, kv_cache, builder.build(batch))
    return [
        dataclasses.replace(launch, cache=_cache_arguments(kv_cache, launch))
        for launch in launches
        if case.only in launch.name
    ]


def _cache_arguments(kv_cache: torch.Tensor | None, launch: Launch) -> frozenset[str]:
    """The names of a launch's arguments that share the cache's memory."""
    if kv_cache is None:
        return frozenset()
    address = kv_cache.untyped_storage().data_ptr()
    return frozenset(
        name
        for name, value in zip(launch.kernel.arg_names, launch.args, strict=False)
        if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == address
    )


def _batch(case: Case, spec: AttentionSpec) -> tuple[AttentionBatch, int]:
    """The case's batch, and how many blocks it takes."""
    query_lens, seq_lens = case.lens
    more: dict[str, Any] = {}
    num_blocks = 0
    if spec.block_size is not None:  # nothing runs, so requests can share blocks
        num_blocks = math.ceil(max(seq_lens) / spec.block_size)
        table = torch.arange(num_blocks, dtype=torch.int32).repeat(len(seq_lens), 1)
        slots = torch.full((sum(query_lens),), -1, dtype=torch.int64)
        more = {"block_table": table, "block_size": spec.block_size, "slot_mapping": slots}
    if spec.custom_mask:
        size = sum(q * s for q, s in zip(query_lens, seq_lens, strict=True))
        more["custom_mask"] = torch.ones(size, dtype=torch.bool)
    if spec.bidirectional_ranges:
        ranges = [PlaceholderRange(len(seq_lens) - 1, 0, 50)]
        more["multi_modal_placeholder_index_maps"] = {"image": ranges}
    if spec.key_positions:
        lengths = [3 * seq_len for seq_len in seq_lens]
        more["key_positions"] = KeyPositions.create(lengths, offset=1, step=3)
    if spec.lengths == "upper_bound":
        bounds = [2 * seq_len for seq_len in seq_lens]
        more |= {"lengths": "upper_bound", "seq_lens_upper_bound": bounds}
        return AttentionBatch.create(query_lens, torch.tensor(seq_lens), **more), num_blocks
    return AttentionBatch.create(query_lens, seq_lens, **more), num_blocks


def _output(spec: AttentionSpec, tokens: int) -> dict[str, torch.Tensor]:
    """What forward takes for a quantized output."""
    if spec.output_quant is None:
        return {}
    shape = (tokens, spec.num_heads, spec.head_size_v)
    output = torch.empty(shape, dtype=torch.float8_e4m3fn)
    if spec.output_quant == "fp8_e4m3":
        return {"output": output, "output_scale": torch.ones(())}
    groups = spec.num_heads * spec.head_size_v // 128
    return {"output": output, "output_block_scale": torch.ones(tokens, groups)}
