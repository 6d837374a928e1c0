"""docs/models.md against transformers: every type is on it, and a sample is as the page says."""

from __future__ import annotations

import importlib.util
import random
import re

import pytest

from support.paths import ROOT

transformers = pytest.importorskip("transformers", minversion="5.17")

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.skipif(
    f"transformers {transformers.__version__}." not in PAGE,
    reason="docs/models.md is about another release of transformers",
)


def rows() -> dict[str, tuple[str, str]]:
    """Model type -> (the section of the page, the text of its row)."""
    found: dict[str, tuple[str, str]] = {}
    for section in PAGE.split("\n## ")[1:]:
        title = section.partition("\n")[0]
        for text, types in re.findall(r"^\| (.+) \| (`.+`) \|$", section, re.MULTILINE):
            for model_type in re.findall(r"`([^`]+)`", types):
                assert model_type not in found
                found[model_type] = (title, text.replace("\\|", "|"))
    return found


def test_the_page_lists_exactly_the_model_types_of_transformers():
    assert set(rows()) == set(transformers.CONFIG_MAPPING)


@pytest.mark.models
def test_a_sample_of_default_configs_is_described_or_rejected_with_a_reason():
    spec = importlib.util.spec_from_file_location(
        "generate_models", ROOT / "docs" / "generate_models.py"
    )
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    page = rows()
    for model_type in random.Random(seed).sample(sorted(page), 40):
        title, text = page[model_type]
        if "needs the library" in text:  # which may be installed here
            continue
        _, state, found = generate.line(model_type)
        assert (generate._TITLES[state], found) == (title, text), (seed, model_type)
        assert "has no model of type" not in found, (seed, model_type)
