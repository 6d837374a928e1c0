"""A backend's view of a batch, and the builder that makes it."""

from __future__ import annotations

import dataclasses
import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.batch import NO_REQUESTS, BatchTotals
from attn_dispatch.interface.types import Phase, PlaceholderRange

if TYPE_CHECKING:
    from attn_dispatch.interface.batch import AttentionBatch
    from attn_dispatch.interface.captured import GraphLimits
    from attn_dispatch.interface.spec import AttentionSpec

__all__ = [
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "BatchMetadata",
    "BatchMetadataBuilder",
]


@dataclass
class AttentionMetadata(ABC):
    """A backend's view of a batch, made once per batch by its builder.

    Attributes:
        num_prefills: requests in the prefill phase. The counts are for the engine and its logs;
            backends plan from the batch.
        num_prefill_tokens: new tokens of these requests.
        num_decode_tokens: new tokens of the requests in the decode phase.
        slot_mapping: (num_tokens,) int64, where each new token's key and value go in the cache:
            block * block_size + offset, or −1 for a token that is padding. None without a cache.
        multi_modal_placeholder_index_maps: modality -> the ranges that its items take, or None.
            Layers with `bidirectional_ranges` let the tokens of a range see each other.
        enable_kv_scales_calculation: the layer derives its fp8 cache's scales from this batch's
            keys and values before it writes them.
    """

    num_prefills: int
    num_prefill_tokens: int
    num_decode_tokens: int
    slot_mapping: torch.Tensor | None
    multi_modal_placeholder_index_maps: Mapping[str, Sequence[PlaceholderRange]] | None
    enable_kv_scales_calculation: bool

    @property
    @abstractmethod
    def prefill_metadata(self) -> AttentionMetadata | None:
        """The metadata of the requests in the prefill phase, or None if there are none."""

    @property
    @abstractmethod
    def decode_metadata(self) -> AttentionMetadata | None:
        """The metadata of the requests in the decode phase, or None if there are none."""

    def asdict_zerocopy(self, skip_fields: set[str] | None = None) -> dict[str, Any]:
        """The fields by name, tensors shared and not copied (`dataclasses.asdict` copies them)."""
        skip = skip_fields or set()
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in skip
        }


T = TypeVar("T", bound=AttentionMetadata)


class AttentionMetadataBuilder(ABC, Generic[T]):
    """Turns an engine's batch into a backend's metadata, once for all layers of the same spec.

    Args:
        spec: the layers that the metadata is for.
        device: where the metadata's tensors go.

    Raises:
        UnsupportedError: the backend does not declare these layers.
    """

    #: Set by the definition of the backend.
    backend_cls: ClassVar[Any] = None

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        if self.backend_cls is not None:
            self.backend_cls.check_declared(spec, device)
        self.spec = spec
        self.device = device

    @abstractmethod
    def build(self, batch: AttentionBatch) -> T:
        """The backend's metadata for this batch.

        Raises:
            InvalidInputError: the batch lacks what the layers need, e.g. a block table.
        """

    def build_for_graph(self, batch: AttentionBatch, limits: GraphLimits) -> T:
        """The metadata that a CUDA graph captures, for all steps within its limits.

        `build` is called, and only for requests of one token. A backend that overrides this can
        capture every kind of step that it does not reject. What the layers derive from the lengths
        must be derived on the device, or by `update_for_graph`; they must also set the rows of
        output after the step's tokens to 0.

        Args:
            batch: over static tensors. Its copies on the host are those of an example.
            limits: of the steps.

        Raises:
            UnsupportedError: the backend cannot capture such steps.
        """
        is_plain = batch.custom_mask is None and not self.spec.bidirectional_ranges
        if limits.has_one_token_requests and is_plain:
            return self.build(batch)
        raise UnsupportedError(
            f"{self._backend_name} captures CUDA graphs of one new token per request, and this "
            f"step has {limits.kind}. Run it eagerly, or require another backend for these layers."
        )

    @property
    def _backend_name(self) -> str:
        """The backend's name, for messages."""
        known = self.backend_cls is not None
        return self.backend_cls.get_name() if known else type(self).__name__

    def update_for_graph(self, metadata: T, batch: AttentionBatch) -> None:
        """Before a replay, put what follows from a step's lengths into the captured metadata.

        The tensors of the batch itself have been copied already. Nothing here may wait for the
        device, change the address of a tensor, or raise for a step within the limits.

        Args:
            metadata: from `build_for_graph`.
            batch: the step's, without padding.
        """


#: The fields that metadata reads from its batch.
_OF_BATCH = frozenset(field.name for field in dataclasses.fields(AttentionMetadata))


def _of_batch(name: str) -> Any:
    """A field that is read from the batch. Assigning it rebuilds the metadata."""

    def put(metadata: BatchMetadata, value: Any) -> None:
        if not metadata._is_given(name, value):
            metadata._rebuild(name, value)

    return property(operator.attrgetter(f"batch.{name}"), put)


def _counted(name: str, count: Callable[[AttentionBatch], int]) -> Any:
    """A field that is counted in the batch, and cannot be assigned."""

    def get(metadata: BatchMetadata) -> int:
        return count(metadata.batch)

    def put(metadata: BatchMetadata, value: Any) -> None:
        if not metadata._is_given(name, value):
            raise AttributeError(
                f"{name} is counted in the batch and cannot be assigned. Build the metadata from "
                "another batch."
            )

    return property(get, put)


def _prompts(batch: AttentionBatch) -> BatchTotals:
    return batch.totals_by_phase.get(Phase.PREFILL, NO_REQUESTS)


@functools.cache
def _factories(cls: type[BatchMetadata]) -> tuple[tuple[str, Callable[[], Any]], ...]:
    """The default factories of a subclass's fields."""
    made = ((field.name, field.default_factory) for field in dataclasses.fields(cls))
    return tuple((name, make) for name, make in made if make is not dataclasses.MISSING)


@dataclass
class BatchMetadata(AttentionMetadata):
    """Metadata that keeps its batch; a subclass adds a backend's plan as further fields.

    The fields of AttentionMetadata are read from the batch. Assigning `slot_mapping`,
    `multi_modal_placeholder_index_maps` or `enable_kv_scales_calculation` rebuilds the metadata
    from a batch with the new value. Assigning a count raises AttributeError.

    Raises:
        InvalidInputError: an assigned value does not fit the batch, and the metadata is unchanged;
            or the constructor's arguments contradict the batch.
    """

    batch: AttentionBatch
    builder: AttentionMetadataBuilder[Any]

    num_prefills = _counted("num_prefills", lambda batch: _prompts(batch).requests)
    num_prefill_tokens = _counted("num_prefill_tokens", lambda batch: _prompts(batch).tokens)
    num_decode_tokens = _counted(
        "num_decode_tokens", lambda batch: batch.num_tokens - _prompts(batch).tokens
    )
    slot_mapping = _of_batch("slot_mapping")
    multi_modal_placeholder_index_maps = _of_batch("multi_modal_placeholder_index_maps")
    enable_kv_scales_calculation = _of_batch("enable_kv_scales_calculation")

    @classmethod
    def of(cls, batch: AttentionBatch, builder: AttentionMetadataBuilder[Any], **more: Any) -> Any:
        """The metadata of a batch; `more` are a subclass's further fields.

        Raises:
            InvalidInputError: the batch is inconsistent, or it has a mask or upper bounds and the
                spec does not state them, or only one of the two has key positions.
        """
        batch.check()
        if batch.custom_mask is not None and not builder.spec.custom_mask:
            raise InvalidInputError(
                "The batch has a custom_mask, and the layer's spec has none, so it would be "
                "ignored. Make the layer with custom_mask=True."
            )
        if batch.lengths != "exact" and builder.spec.lengths == "exact":
            raise InvalidInputError(
                "The batch has only upper bounds of its key counts on the host, and the layer's "
                "backend may need the counts. Make the layer with lengths='upper_bound'; it takes "
                "batches of both kinds."
            )
        if (batch.key_positions is not None) != builder.spec.key_positions:
            has, lacks = ("The batch has", "the layer's spec has none, so they would be ignored")
            if batch.key_positions is None:
                has, lacks = ("The layer has", "the batch states none")
            raise InvalidInputError(
                f"{has} key_positions, and {lacks}. Make the layer with key_positions=True, and "
                "each of its batches with key_positions=KeyPositions.create(...)."
            )
        metadata = cls.__new__(cls)  # the constructor takes the batch's fields too
        metadata.batch, metadata.builder = batch, builder
        for name, make in _factories(cls):
            if name not in more:
                setattr(metadata, name, make())
        for name, value in more.items():
            setattr(metadata, name, value)
        metadata.__post_init__()
        return metadata

    def __post_init__(self) -> None:
        given = self.__dict__.pop("_given", None)
        if given is None:
            return
        # These two are read at each call; a builder may plan by the others.
        read = {name: given.pop(name) for name in ("slot_mapping", "enable_kv_scales_calculation")}
        if any(value is not getattr(self, name) for name, value in read.items()):
            self.batch = dataclasses.replace(self.batch, **read)
        wrong = [name for name, value in given.items() if value != getattr(self, name)]
        if wrong:
            raise InvalidInputError(
                f"{', '.join(wrong)} of the metadata differ from those of its batch. Make it by "
                "builder.build(batch)."
            )

    def _is_given(self, name: str, value: Any) -> bool:
        """Keep a value that the generated constructor sets; False for any later assignment."""
        if "builder" in self.__dict__:
            return False
        self.__dict__.setdefault("_given", {})[name] = value
        return True

    def _rebuild(self, name: str, value: Any) -> None:
        """Become the metadata of a batch in which this attribute has another value."""
        if name == "slot_mapping" and not (value is None or isinstance(value, torch.Tensor)):
            raise InvalidInputError(
                f"slot_mapping is a {type(value).__name__}; it must be a tensor, or None."
            )
        fresh = self.builder.build(dataclasses.replace(self.batch, **{name: value}))
        own = [f.name for f in dataclasses.fields(self) if f.name not in _OF_BATCH]
        for cached in self.__dict__.keys() - set(own):
            del self.__dict__[cached]
        for field in own:
            setattr(self, field, getattr(fresh, field))

    def ranges_of(self, request: int) -> list[tuple[int, int]]:
        """The ranges [start, end) whose tokens see each other, if the layers have ranges."""
        if not self.builder.spec.bidirectional_ranges:
            return []
        maps = self.multi_modal_placeholder_index_maps or {}
        return [(r.start, r.end) for each in maps.values() for r in each if r.request == request]

    @functools.cached_property
    def _by_phase(self) -> dict[Phase, Any]:
        if len(self.batch.parts) == 1:
            return dict.fromkeys(self.batch.parts, self)
        return {phase: self.builder.build(part.batch) for phase, part in self.batch.parts.items()}

    @property
    def prefill_metadata(self) -> AttentionMetadata | None:
        """The metadata of the requests in the prefill phase, or None."""
        return self._by_phase.get(Phase.PREFILL)

    @property
    def decode_metadata(self) -> AttentionMetadata | None:
        """The metadata of the requests in the decode phase, or None."""
        return self._by_phase.get(Phase.DECODE)


class BatchMetadataBuilder(AttentionMetadataBuilder[BatchMetadata]):
    """Wraps the batch: the builder of backends that plan nothing."""

    def build(self, batch: AttentionBatch) -> BatchMetadata:
        """The batch's metadata, of the backend's `metadata_cls`."""
        metadata: BatchMetadata = self.backend_cls.get_metadata_cls().of(batch, self)
        return metadata
