"""A model of transformers without weights, and one run of it.

Only classes that transformers itself contains are used, never code that a checkpoint names.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.integrations.transformers.failures import first_line, why_not_run
from attn_dispatch.integrations.transformers.inputs import input_sets
from attn_dispatch.integrations.transformers.recording import RECORDER, Call, recording

__all__ = [
    "ALIASES",
    "MAX_LAYERS",
    "config_object",
    "other_mixer",
    "run_model",
    "text_part",
]

#: More layers than any model has; building more only takes long.
MAX_LAYERS = 1_000

#: Names that published files use for architectures that transformers has under another name.
ALIASES = {"kimi_k2": "deepseek_v3"}
#: Keys of a config that name code or formats, not the architecture.
_FOREIGN = ("auto_map", "quantization_config", "transformers_version", "_name_or_path")

#: Modules that mix no tokens, or do it without softmax attention: they are not run.
_FEED_FORWARD = re.compile(r"(MLP|MoE|Moe|MOE|Experts|FeedForward|FFN|SparseMoeBlock)")
_FEED_FORWARD_NAMES = frozenset(
    ("mlp", "block_sparse_moe", "feed_forward", "moe", "ffn", "shared_mlp")
)
_OTHER_MIXERS = re.compile(
    r"(Mamba|GatedDelta|DeltaAttention|DeltaNet|ShortConv|LinearAttention|LightningAttention|"
    r"Recurrent|RgLru|SSM|mLSTM|Rwkv)"
)


def config_object(content: Mapping[str, Any]) -> Any:
    """transformers' config object of the content of a config.json.

    Raises:
        UnsupportedError: transformers has no model of this type.
        InvalidInputError: a value is invalid.
    """
    from transformers import CONFIG_MAPPING

    model_type = content["model_type"]
    name = ALIASES.get(model_type, model_type)
    if name not in CONFIG_MAPPING:
        raise UnsupportedError(f"transformers has no model of type {model_type!r}.")
    own = {key: value for key, value in content.items() if key not in _FOREIGN}
    own["model_type"] = name
    for key in ("text_config", "llm_config"):
        nested = own.get(key)
        if isinstance(nested, Mapping):
            inner = nested.get("model_type")
            inner = ALIASES.get(inner, inner) if isinstance(inner, str) else inner
            own[key] = {k: v for k, v in nested.items() if k not in _FOREIGN}
            if inner is not None:
                own[key]["model_type"] = inner
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return CONFIG_MAPPING[name].from_dict(own)
    except Exception as error:  # any: the values come from a file, and transformers checks few
        raise InvalidInputError(
            f"transformers rejects this config of type {model_type!r}: {first_line(error)}"
        ) from error


def text_part(config: Any) -> Any:
    """The config of the language model in a multimodal one; otherwise the config itself.

    Raises:
        UnsupportedError: the model has several.
        InvalidInputError: a part is not a config.
    """
    from transformers import PreTrainedConfig

    if getattr(config, "is_encoder_decoder", False):
        return config
    try:
        text = config.get_text_config()
    except ValueError as error:
        raise UnsupportedError(
            f"A model of type {config.model_type!r} has several language models. Give the config "
            "of one of them."
        ) from error
    if not isinstance(text, PreTrainedConfig):
        raise InvalidInputError(
            f"This config has a nested one, such as text_config, which models of type "
            f"{config.model_type!r} do not have."
        )
    return text


def run_model(config: Any) -> tuple[torch.nn.Module, list[Call]]:
    """The model of a config on the meta device, and its attention calls in one forward pass.

    Raises:
        UnsupportedError: transformers' class cannot be built or run without weights.
    """
    cls = _model_class(config)
    problem: Exception | None = None
    model: torch.nn.Module | None = None
    for skip in (_one, _pair, None):
        try:
            with _quiet(), recording(None):
                model = _build(cls, config)
                if skip is not None:
                    _skip_modules(model, skip)
                requests = list(input_sets(model, config))
        except Exception as error:  # any: foreign code that builds a model of a foreign config
            problem = error
            break
        first: Exception | None = None
        for inputs, answer in itertools.product(requests, (False, True)):
            if answer and not _needs_values(first):
                continue
            calls, raised = _run(model, inputs, config, answer)
            if raised is None:
                return model, calls
            first = first or raised
        problem = first
    assert problem is not None
    raise UnsupportedError(why_not_run(cls, model, problem)) from problem


def _run(
    model: torch.nn.Module, inputs: Mapping[str, Any], config: Any, answer: bool
) -> tuple[list[Call], Exception | None]:
    """The attention calls of one forward pass, or what it raised."""
    chunk = getattr(config, "attention_chunk_size", None)
    answers = _AnswerConditions() if answer else contextlib.nullcontext()
    try:
        with (
            _quiet(),
            recording(chunk if isinstance(chunk, int) else None) as record,
            torch.no_grad(),
            answers,
        ):
            model(**inputs)
    except Exception as error:  # any: foreign code runs on tensors without values
        return [], error
    return record.calls, None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks about kernels that are not installed."""
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _needs_values(problem: Exception | None) -> bool:
    """Whether the model asked for the value of a tensor that has none."""
    return isinstance(problem, (RuntimeError, NotImplementedError)) and "meta" in str(problem)


class _AnswerConditions(TorchDispatchMode):
    """Conditions on tensors without values are true: the request is neither padded nor packed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            condition = args[0]
            if condition.is_meta and condition.dtype is torch.bool:
                return True
        return func(*args, **(kwargs or {}))


def _model_class(config: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    for auto in (AutoModel, AutoModelForCausalLM):
        mapping = auto._model_mapping
        try:
            found = mapping.get(type(config), None)
        except ValueError:  # the table names a class that is not there
            found = None
        if found is not None:
            return found[0] if isinstance(found, (tuple, list)) else found
    found = _class_of_part(config)
    if found is None:
        raise UnsupportedError(
            f"transformers has no model class for the config {config.model_type!r}."
        )
    return found


def _class_of_part(config: Any) -> Any:
    """The class of a part of a model, such as a text encoder, which no Auto class finds."""
    import importlib

    from transformers import PreTrainedModel

    folder, _, file = type(config).__module__.rpartition(".")
    if not folder.startswith("transformers.models.") or not file.startswith("configuration_"):
        return None
    try:
        module = importlib.import_module(f"{folder}.modeling_{file.removeprefix('configuration_')}")
    except ImportError:
        return None
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, PreTrainedModel)
            and value.__dict__.get("config_class") is type(config)
            and not value.__name__.endswith("PreTrainedModel")
        ):
            return value
    return next(
        (
            value
            for name, value in vars(module).items()
            if isinstance(value, type)
            and issubclass(value, PreTrainedModel)
            and name == type(config).__name__.removesuffix("Config") + "Model"
        ),
        None,
    )


def _build(cls: Any, config: Any) -> torch.nn.Module:
    import copy

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model: torch.nn.Module = cls._from_config(
            copy.deepcopy(config), attn_implementation=RECORDER, dtype=torch.bfloat16
        )
    return model.eval()


def _one(x: torch.Tensor) -> Any:
    return x


def _pair(x: torch.Tensor) -> Any:
    return x, None


def _skip_modules(model: torch.nn.Module, result: Callable[[torch.Tensor], Any]) -> None:
    """Let the modules that are not attention return their input."""
    for module, is_mixer in _skipped(model, ""):
        returns = _one if is_mixer else result
        module.forward = _returning_input(returns)


def _returning_input(returns: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kw: Any) -> Any:
        tensors = [x for x in (*args, *kw.values()) if isinstance(x, torch.Tensor)]
        return returns(tensors[0])

    return forward


def _skipped(module: torch.nn.Module, name: str) -> Iterator[tuple[torch.nn.Module, bool]]:
    """The topmost modules to skip, and whether each mixes tokens."""
    kind = type(module).__name__
    if _OTHER_MIXERS.search(kind) and not re.search(r"(Layer|Block|Model)$", kind):
        yield module, True
        return
    is_container = isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential))
    named = name in _FEED_FORWARD_NAMES or _FEED_FORWARD.search(kind) is not None
    if named and not is_container and not re.search(r"(Layer|Model|Attention)$", kind):
        yield module, False
        return
    for child_name, child in module.named_children():
        yield from _skipped(child, child_name)


def other_mixer(layer: torch.nn.Module) -> str | None:
    """The class in a layer that mixes tokens without softmax attention, or None."""
    kinds = (type(module).__name__ for module in layer.modules() if module is not layer)
    return next((kind for kind in kinds if _OTHER_MIXERS.search(kind)), None)
