"""Write docs/models.md: what `describe` makes of the default config of every model in transformers.

Run once for a release of transformers, with the extra `transformers` installed; it takes minutes:

    python docs/generate_models.py
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
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

The table is made by `docs/generate_models.py` from the default config of each model type in
transformers {version}. A default config can lack sizes that published files have; such a model
can work with its own file. {described} types are described, {rejected} are rejected with the
reason, and {unknown} cannot be run without weights on one request of text, an image or audio.
"""


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
    except Exception as error:  # any: some configs have no defaults
        return model_type, "unknown", f"has no default config ({type(error).__name__})"
    try:
        found = describe(config, dtype=torch.bfloat16)
    except AttnDispatchError as error:
        text = str(error)
        state = "unknown" if "cannot be run" in text or "rejects this" in text else "rejected"
        text = text.partition(": ")[2] if text.startswith("AttentionSpec cannot") else text
        return model_type, state, " ".join(text.split())
    parts = [f"{len(group.layers)} {name}" for name, group in found.groups.items()]
    parts += [f"{len(layers)} {name} (not attention)" for name, layers in found.others.items()]
    parts += [f"{len(layers)} rejected: {reason}" for reason, layers in found.rejected.items()]
    return model_type, "described", "; ".join(parts)


def page() -> Iterator[str]:
    """The lines of the page."""
    import transformers
    from transformers import CONFIG_MAPPING

    with ProcessPoolExecutor(2) as pool:
        rows = sorted(pool.map(line, list(CONFIG_MAPPING), chunksize=8))
    counts = {state: sum(row[1] == state for row in rows) for state in _TITLES}
    yield _HEAD.format(version=transformers.__version__, **counts)
    for state, title in _TITLES.items():
        yield f"## {title}\n"
        yield "| Type | Layers |" if state == "described" else "| Type | Reason |"
        yield "| --- | --- |"
        for model_type, own, text in rows:
            if own == state:
                cell = text.replace("|", "\\|")
                yield f"| `{model_type}` | {cell} |"
        yield ""


if __name__ == "__main__":
    _PAGE.write_text("\n".join(page()).rstrip() + "\n", encoding="utf-8")
