"""The mask function: what a mask means, without a value for each pair of query and key."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import masking_utils

from attn_dispatch.integrations.transformers.visibility import Visibility, read_visibility

__all__ = ["MaskMeaning", "make_mask", "mask_with", "meaning_of"]

#: The attribute of a mask that has its meaning.
_MEANING = "attn_dispatch_meaning"


@dataclass(frozen=True)
class MaskMeaning:
    """What a mask of one forward pass means.

    Attributes:
        visibility: what a query sees, if no token is padding.
        batch_size, query_len, key_len: sizes of the mask.
        query_offset, key_offset: positions of the first query and of the first key.
        valid: `(batch_size, num_positions)` bool, which positions hold tokens; None for all.
        segments: `(batch_size, key_len)`, the sequence that each token of a row belongs to, counted
            from 0, where several sequences share a row; None if each row is one sequence.
        forms: the ragged forms of this mask, by device and batch size. Layers share them.
    """

    visibility: Visibility
    batch_size: int
    query_len: int
    key_len: int
    query_offset: int = 0
    key_offset: int = 0
    valid: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    forms: dict[Any, Any] = field(default_factory=dict, compare=False)


def mask_with(meaning: MaskMeaning) -> torch.Tensor:
    """A mask `(batch_size, 1, query_len, key_len)` without values, and with this meaning.

    transformers passes masks of four dimensions on to the layers as they are. This one is on the
    meta device: it takes no memory, and a model that reads its values gets an error.
    """
    shape = (meaning.batch_size, 1, meaning.query_len, meaning.key_len)
    with torch.inference_mode(False):  # else a view of it would not know its base
        mask = torch.empty(shape, dtype=torch.bool, device="meta")
    setattr(mask, _MEANING, meaning)
    return mask


def meaning_of(mask: Any) -> MaskMeaning | None:
    """The meaning of a mask or of a view of all of it; None if it is made or changed elsewhere."""
    if not isinstance(mask, torch.Tensor) or mask.is_inference() or mask._version:
        return None
    base = mask if mask._base is None else mask._base
    if base.shape != mask.shape or base.stride() != mask.stride():
        return None
    found: MaskMeaning | None = getattr(base, _MEANING, None)
    return found


def make_mask(
    batch_size: int,
    q_length: Any,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **_: Any,
) -> torch.Tensor:
    """The mask function for `AttentionMaskInterface`.

    It raises nothing: a mask that cannot be described is rejected by the layer that uses it.

    Args:
        batch_size, q_length, kv_length: sizes of the mask.
        q_offset, kv_offset: positions of the first query and key; a number or a tensor of one.
        mask_function: `f(batch, head, query, key) -> bool` of positions.
        attention_mask: `(batch_size, num_positions)` bool, False for padding; or None.
        local_size: window or chunk; the mask function has it too.
    """
    query_offset, key_offset = int(q_offset), int(kv_offset)
    found = _read(mask_function, local_size)
    valid = attention_mask
    visibility = found.visibility
    if valid is not None and valid.dim() != 2:
        visibility = _problem(f"its padding mask has {valid.dim()} dimensions instead of 2")
        valid = None
    meaning = MaskMeaning(
        visibility=visibility,
        batch_size=batch_size,
        query_len=int(q_length),
        key_len=int(kv_length),
        query_offset=query_offset,
        key_offset=key_offset,
        valid=valid,
        segments=found.segments,
    )
    if found.is_custom and visibility.problem is None:
        meaning = _checked(meaning, mask_function)
    return mask_with(meaning)


@dataclass(frozen=True)
class _Found:
    visibility: Visibility
    segments: torch.Tensor | None = None
    is_custom: bool = False


def _problem(why: str) -> Visibility:
    return Visibility(causal=False, problem=why)


def _no_function(*_: Any) -> bool:
    return True


def _code_of(name: str, *arguments: Any) -> types.CodeType | None:
    """The code of what a function of masking_utils returns; None if this version lacks it."""
    make = getattr(masking_utils, name, None)
    return None if make is None else _code(make(*arguments))


def _code(function: Any) -> types.CodeType | None:
    return getattr(function, "__code__", None)


#: The functions of transformers that combine others or hold tensors of the batch, by their code.
_NOTHING = torch.empty(0, dtype=torch.long, device="cpu")
_AND = _code_of("and_masks", _no_function)
_OR = _code_of("or_masks", _no_function)
_CHUNK = _code_of("chunked_overlay", 1, _NOTHING)
_SEGMENTS = _code_of("packed_sequence_mask_function", _NOTHING)
_POSITIONS = _code_of("remap_positions_for_packed_sequence", _no_function, _NOTHING)
_BLOCKS = _code_of("blockwise_overlay", _NOTHING)


def _is(function: Any, code: types.CodeType | None) -> bool:
    return code is not None and _code(function) is code


def _read(mask_function: Callable[..., Any], local_size: int | None) -> _Found:
    """What a mask function shows, apart from padding."""
    parts = list(_conjuncts(mask_function))
    segments = None
    packed = [part for part in parts if _is(part, _SEGMENTS)]
    if packed:
        rest = [part for part in parts if not _is(part, _SEGMENTS)]
        if len(rest) == 1 and _is(rest[0], _POSITIONS):  # positions in each sequence: distances
            rest = list(_conjuncts(_held(rest[0])["mask_function"]))  # are the same as in the row
        if len(packed) != 1:
            return _Found(_problem("its mask combines packed sequences with something else"))
        segments, parts = _held(packed[0])["packed_sequence_mask"], rest
    chunks = [part for part in parts if _is(part, _CHUNK)]
    others = [part for part in parts if not _is(part, _CHUNK)]
    try:
        key = tuple(_fingerprint(part) for part in others)
    except _HasTensorError:
        if any(_is(part, _OR) and _holds(part, _BLOCKS) for part in others):
            return _Found(
                _problem("its mask lets the tokens of an image or another block see each other")
            )
        return _Found(_problem("its mask depends on the values of the batch"))
    visibility = _visibility_of(key, tuple(others), local_size)
    if chunks and visibility.problem is None:
        visibility = _with_chunk(visibility, chunks, segments)
    is_custom = not all(_is_own(part) for part in others)
    return _Found(visibility, segments, is_custom)


def _with_chunk(
    visibility: Visibility, chunks: list[Any], segments: torch.Tensor | None
) -> Visibility:
    # Chunks start at the first token of a row that is no padding: so do requests without padding.
    sizes = {_held(part)["chunk_size"] for part in chunks}
    plain = visibility == Visibility(causal=True, left=None, right=0)
    if not plain or len(sizes) != 1 or segments is not None:
        return _problem("its mask combines chunks with something else")
    return replace(visibility, chunk=sizes.pop())


def _conjuncts(mask_function: Any) -> Iterator[Any]:
    """The functions of which a mask function is the intersection."""
    if _is(mask_function, _AND):
        for part in _held(mask_function)["mask_functions"]:
            yield from _conjuncts(part)
    else:
        yield mask_function


def _held(function: Any) -> dict[str, Any]:
    """The values that a closure holds, by name."""
    cells = function.__closure__ or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True)
    }


def _holds(function: Any, code: types.CodeType | None) -> bool:
    """Whether a union of mask functions contains one with this code."""
    return any(_is(part, code) for part in _held(function)["mask_functions"])


def _is_own(function: Any) -> bool:
    """Whether a mask function and all that it holds are of transformers' masking_utils."""
    if isinstance(function, tuple):
        return all(_is_own(each) for each in function)
    code = _code(function)
    if code is None:
        return not callable(function)
    own = code.co_filename == masking_utils.__file__
    return own and all(_is_own(value) for value in _held(function).values())


class _HasTensorError(Exception):
    """A mask function holds a value that may differ between batches."""


def _fingerprint(value: Any) -> Any:
    """Equal for mask functions that show the same.

    Raises:
        _HasTensorError: it holds a tensor or another object whose values are not known.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return tuple(_fingerprint(each) for each in value)
    if isinstance(value, functools.partial):
        keywords = tuple((name, _fingerprint(each)) for name, each in value.keywords.items())
        return _fingerprint(value.func), _fingerprint(value.args), keywords
    if not isinstance(value, types.FunctionType):
        raise _HasTensorError
    defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    held = tuple((name, _fingerprint(each)) for name, each in _held(value).items())
    return value.__code__, id(value.__globals__), _fingerprint(defaults), held


#: Visibilities by fingerprint: reading one takes milliseconds. Few exist; custom ones are bounded.
_visibilities: dict[Any, Visibility] = {}
_MAX_VISIBILITIES = 256


def _visibility_of(key: Any, functions: tuple[Any, ...], local_size: int | None) -> Visibility:
    found = _visibilities.get(key)
    if found is None:
        with torch.device("cpu"):
            found = read_visibility(masking_utils.and_masks(*functions), local_size, None)
        if len(_visibilities) >= _MAX_VISIBILITIES:
            _visibilities.clear()
        _visibilities[key] = found
    return found


def _checked(meaning: MaskMeaning, mask_function: Callable[..., Any]) -> MaskMeaning:
    """The meaning, or a problem if a mask function that a model defines shows something else.

    A mask function is read at two positions. That is enough for those of transformers; for others
    every value of this mask is compared.
    """
    seen, query_offset, key_offset = meaning.visibility, meaning.query_offset, meaning.key_offset
    queries = torch.arange(query_offset, query_offset + meaning.query_len)[:, None]
    keys = torch.arange(key_offset, key_offset + meaning.key_len)[None]
    rows, head = torch.arange(meaning.batch_size)[:, None, None], torch.zeros((), dtype=torch.long)
    expected = torch.ones(meaning.query_len, meaning.key_len, dtype=torch.bool)
    if seen.left is not None:
        expected &= keys >= queries - seen.left
    if seen.right is not None:
        expected &= keys <= queries + seen.right
    if seen.chunk is not None:
        expected &= keys // seen.chunk == queries // seen.chunk
    try:
        actual = torch.as_tensor(mask_function(rows, head, queries, keys))
        actual = actual.cpu().expand(meaning.batch_size, *expected.shape)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return replace(meaning, visibility=_problem("its mask function cannot be evaluated"))
    if not bool((actual == expected).all()):
        return replace(
            meaning, visibility=_problem("what its mask shows depends on the position of the query")
        )
    return meaning
