"""Write docs/models.md: what `describe` makes of the default config of every model in transformers.

Run once for a release of transformers, with the extra `transformers` installed; it takes minutes:

    python docs/generate_models.py
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

_PAGE = Path(__file__).resolve().parent / "models.md"

_TITLES = {"described": "Described", "rejected": "Rejected", "unknown": "Not run"}

_HEAD = """# Models

`attn-dispatch explain --config config.json` and
`attn_dispatch.integrations.transformers.describe(config_or_model)` say what attention the
layers of a model have. They need the extra: `pip install 'attn-dispatch[transformers]'`. The
model's class in transformers is built without weights and run once, with an attention function
that records how it is called. No code of a checkpoint is run.

- Softmax layers of hybrid models are described; the others are counted and named.
- Of multimodal models, the language model is described, with a note.
- Layers with attention that an `AttentionSpec` cannot describe are rejected with the reason.
- A dtype that the file does not state is not assumed: give `--dtype`.
- Without transformers, a short table has {table}.

The tables are made by `docs/generate_models.py` from the default config of each model type in
transformers {version}. A default config can lack sizes that published files have; such a model
can work with its own file. {described} types are described and {rejected} are rejected with the
reason. {unknown} do not run without weights on one request of text, an image, a video or audio;
many of these are parts of multimodal models, which are described by their language model.
"""

#: Parts of messages -> what the page says.
_SHORTER = {
    "computes its attention itself": "It does not call the attention function of transformers, "
    "or has no attention.",
    "has no model class": "The config of a part that has no class of its own.",
}


def line(model_type: str) -> tuple[str, str, str]:
    """(the type, "described", "rejected" or "unknown", the kinds of layer or the reason)."""
    import torch
    from transformers import CONFIG_MAPPING

    from attn_dispatch.errors import AttnDispatchError
    from attn_dispatch.integrations.transformers import describe

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception:  # any: some configs have no defaults
        return model_type, "unknown", "It has no default config."
    try:
        found = describe(config, dtype=torch.bfloat16)
    except AttnDispatchError as error:
        text = " ".join(str(error).split())
        state = "unknown" if "cannot be run" in text or "rejects this" in text else "rejected"
        return model_type, state, _reason(text)
    parts = [f"{len(group.layers)} {name}" for name, group in found.groups.items()]
    parts += [f"{len(layers)} {name} (not dispatched)" for name, layers in found.others.items()]
    parts += [f"{len(layers)} rejected: {reason}" for reason, layers in found.rejected.items()]
    return model_type, "described", "; ".join(parts)


def _reason(text: str) -> str:
    """A message about one model as a sentence that can be about several."""
    for part, shorter in _SHORTER.items():
        if part in text:
            return shorter
    if text.startswith(("AttentionSpec cannot", "transformers rejects")):
        text = text.partition(": ")[2]
    if "has no softmax attention" in text:
        text = "no softmax attention"
    text = text.partition("so its attention is not known: ")[2] or text
    text = text.partition(" (")[0] if "does not accept this request" in text else text
    text = text.partition(". Describe")[0].rstrip(".")
    return f"{text[0].upper()}{text[1:]}."


def page(rows: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    """The lines of the page, from what `line` gives for each model type."""
    import transformers

    from attn_dispatch.models.short_table import FAMILIES

    counts = {state: sum(row[1] == state for row in rows) for state in _TITLES}
    table = ", ".join(f"`{name}`" for name in FAMILIES)
    yield _HEAD.format(version=transformers.__version__, table=table, **counts)
    for state, title in _TITLES.items():
        yield f"## {title}\n"
        first = "Layers" if state == "described" else "Reason"
        yield f"| {first} | Types |"
        yield "| --- | --- |"
        types: dict[str, list[str]] = {}
        for model_type, own, text in sorted(rows):
            if own == state:
                types.setdefault(text.replace("|", "\\|"), []).append(f"`{model_type}`")
        for text, names in sorted(types.items(), key=lambda item: (-len(item[1]), item[0])):
            yield f"| {text} | {', '.join(names)} |"
        yield ""


if __name__ == "__main__":
    from transformers import CONFIG_MAPPING

    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(line, list(CONFIG_MAPPING), chunksize=8))
    _PAGE.write_text("\n".join(page(found)).rstrip() + "\n", encoding="utf-8")
