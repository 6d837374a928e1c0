"""load_engine: an Engine for a model's folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from attn_dispatch.distributed.context_parallel import ContextParallel
from attn_dispatch.errors import InvalidInputError, UnsupportedError, summary_of
from attn_dispatch.platforms.detect import usable_device
from attn_dispatch.serving.engine import Engine
from attn_dispatch.serving.limits import Limits

__all__ = ["load_engine"]


def load_engine(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    limits: Limits | None = None,
    backend: str | None = None,
    kv_cache_dtype: str = "auto",
    use_graphs: bool | None = None,
    random_weights: bool = False,
    tp_plan: str | None = None,
    context_parallel: ContextParallel | None = None,
    compile_layers: bool = False,
    draft_tokens: int = 0,
) -> Engine:
    """An Engine that runs a causal language model of transformers.

    Only transformers' own classes are used, never code that a checkpoint names.

    Args:
        path: a folder with config.json, weights and tokenizer; or a GGUF file.
        dtype: of weights and computation; None for the one the model states, and float32 on CPUs.
        device: None for the accelerator if there is one.
        limits: see Limits.
        backend: an override of the selected backends.
        kv_cache_dtype: see spec.KV_CACHE_DTYPES.
        use_graphs: see Engine.
        random_weights: make the model from its config only, to measure it; no tokenizer is needed.
        tp_plan: "auto" to split the model over the processes that torchrun started.
        context_parallel: splits the keys over processes instead, each of which runs the whole
            model; made with heads="replicated". Steps are not captured then.
        draft_tokens: see Engine.
        compile_layers: see PagedModel. It makes steps faster on a GPU and the start slower.

    Raises:
        InvalidInputError: there is no model at this path, or it cannot be read.
        UnsupportedError: transformers is missing or too old, or the engine cannot run the model.
    """
    _require_transformers()
    from attn_dispatch.integrations.transformers.paged import PagedModel

    path = Path(path)
    where = usable_device(device)
    _check_path(path, random_weights)
    source = _source(path)
    with _as_invalid(path):
        model = _model(source, dtype, where, random_weights, tp_plan)
        tokenizer = _tokenizer(source, required=not random_weights)
    captures = where.type == "cuda" if use_graphs is None else use_graphs
    captures = captures and context_parallel is None
    make = {
        "backend": backend,
        "kv_cache_dtype": kv_cache_dtype,
        "context_parallel": context_parallel,
        "compile_layers": compile_layers,
    }
    try:
        paged = PagedModel(model, cuda_graph=captures, **make)  # type: ignore[arg-type]
    except UnsupportedError:
        if not captures or use_graphs:
            raise
        paged = PagedModel(model, **make)  # type: ignore[arg-type]
    return Engine(
        paged,
        tokenizer,
        eos_ids=_eos_ids(model, tokenizer),
        limits=limits,
        use_graphs=use_graphs,
        draft_tokens=draft_tokens,
    )


def _require_transformers() -> None:
    from importlib.util import find_spec

    if find_spec("transformers") is None:
        raise UnsupportedError(
            "Serving a model needs transformers: pip install 'attn-dispatch[transformers]'."
        )


def _check_path(path: Path, random_weights: bool) -> None:
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InvalidInputError(f"There is no file {path}.")
        return
    if not path.exists():
        hint = ""
        if not path.is_absolute() and len(path.parts) == 2:
            hint = f" If it is a Hub id: hf download {path} --local-dir {path.name}"
        raise InvalidInputError(f"There is no folder {path}.{hint}")
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        raise InvalidInputError(
            f"{path} is no model: there is no config.json in it. Give the folder of a model that "
            "transformers can load, or a GGUF file."
        )
    weights = (*folder.glob("*.safetensors"), *folder.glob("*.bin"))
    if not random_weights and not weights:
        raise InvalidInputError(
            f"{path} has no weights (*.safetensors). To measure the model without them, use "
            "random weights (--random-weights)."
        )


def _source(path: Path) -> dict[str, Any]:
    """The arguments of from_pretrained that say where the model is."""
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    folder = path if path.is_dir() else path.parent
    return {"pretrained_model_name_or_path": str(folder)}


@contextlib.contextmanager
def _as_invalid(path: Path) -> Iterator[None]:
    """Turn what transformers raises about files into one sentence."""
    try:
        yield
    except (UnsupportedError, InvalidInputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # any: transformers reads files that it did not write
        raise InvalidInputError(f"{path} cannot be loaded: {summary_of(error)}") from error


def _model(
    source: dict[str, Any],
    dtype: torch.dtype | None,
    device: torch.device,
    random_weights: bool,
    tp_plan: str | None,
) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    if random_weights:
        config = AutoConfig.from_pretrained(**source)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype)
    where = {"tp_plan": tp_plan} if tp_plan else {}
    model: Any = AutoModelForCausalLM.from_pretrained(**source, **where, dtype=dtype or "auto")
    return model if tp_plan else model.to(device)


def _tokenizer(source: dict[str, Any], *, required: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**source)
    except Exception:  # any: the files may be missing
        if required:
            raise
        return None


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer, as the model and its tokenizer state them."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    ids = stated if isinstance(stated, (list, tuple)) else [stated]
    ids = [*ids, getattr(tokenizer, "eos_token_id", None)]
    return [each for each in dict.fromkeys(ids) if isinstance(each, int)]
