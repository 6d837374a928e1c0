"""The documentation is correct: tables are current, links resolve, snippets run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re

import pytest
import typer

import attn_dispatch
from attn_dispatch import environment
from attn_dispatch.cli import app
from attn_dispatch.selection.registry import registry
from support.paths import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*.md")),
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def load(path):
    """A program of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load(ROOT / "docs" / "generate.py")
check_words = load(ROOT / ".ci" / "check_words.py")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def prose(page):
    """A page's text without its code blocks."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def console_lines(page):
    """Shell commands: those in console blocks, and those in inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = [body for language, body in BLOCK.findall(text) if language == "console"]
    return [*"".join(blocks).splitlines(), *re.findall(r"`([^`\n]+)`", prose(page))]


# Generated parts ----------------------------------------------------------------------------------


def test_generated_parts_are_current(capsys):
    assert generate.main(["--check"]) == 0, capsys.readouterr().out


def test_every_generated_part_is_used():
    text = "".join(page.read_text(encoding="utf-8") for page in generate.pages())
    assert set(re.findall(r"<!-- generated: ([\w-]+) -->", text)) == set(generate.PARTS)


def test_check_shows_what_would_change(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text("# Title\n\n<!-- generated: variables -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    assert generate.main(["--check"]) == 1
    shown = capsys.readouterr().out
    assert "-old" in shown
    assert f"`{environment.BACKEND.name}`" in shown
    assert "make docs" in shown
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- generated: nothing -->\n<!-- end -->\n", "'nothing'"),
        ("<!-- generated: variables -->\n", "1 '<!-- generated: NAME -->' and 0"),
        ("<!-- end -->\n", "0 '<!-- generated: NAME -->' and 1"),
    ],
)
def test_bad_markers_are_errors(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate.fill_in(text, "page.md")


def test_a_cell_cannot_break_its_table():
    assert generate.table(["a"], [["int | None\nand more"]]).splitlines()[2] == (
        "| int \\| None and more |"
    )


# Words -------------------------------------------------------------------------------------------


def test_plain_words_are_used():
    assert check_words.findings(ROOT) == []


def test_a_rejected_word_is_reported_with_its_replacement(tmp_path):
    word, replacement = next(iter(check_words.WORDS.items()))
    (tmp_path / "page.md").write_text(f"# Title\n\n{word.title()}, but not {word}x.\n")
    assert check_words.findings(tmp_path) == [f"page.md:3: {word.title()!r}: write {replacement}"]


# What pages name ----------------------------------------------------------------------------------


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page):
    for token in re.findall(r"`([\w./-]+\.(?:py|md|toml|txt|yml|yaml|typed))`", prose(page)):
        found = (ROOT / token).exists() or (page.parent / token).exists()
        assert found, f"{name_of(page)} names {token}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in console_lines(page):
        for target in re.findall(r"\bmake ([a-z][\w-]*)(?![\w=])", line):
            assert target in targets, f"{name_of(page)} names `make {target}`"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_commands_exist(page):
    commands = typer.main.get_command(app).commands
    for line in console_lines(page):
        used = re.match(r"(?:\.venv/bin/)?attn-dispatch (\w+)([^#]*)", line)
        if used is None:
            continue
        assert used[1] in commands, f"{name_of(page)} names `{line}`"
        flags = {"--help", *(opt for param in commands[used[1]].params for opt in param.opts)}
        assert set(re.findall(r"--[\w-]+", used[2])) <= flags, f"{name_of(page)} names `{line}`"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_environment_variables_exist(page):
    of_vllm = {"VLLM_BATCH_INVARIANT", "VLLM_PLUGINS"}
    known = {variable.name for variable in environment.VARIABLES} | of_vllm
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"\b(?:ATTN_DISPATCH|VLLM)_[A-Z_]+\b", text)) <= known


def test_every_page_of_docs_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [
        page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in text
    ] == []


def test_versions_agree():
    version = attn_dispatch.__version__
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.+)"$', pyproject, re.MULTILINE).group(1) == version
    assert version in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version {version}" in (ROOT / "README.md").read_text(encoding="utf-8")


# Snippets -----------------------------------------------------------------------------------------


@pytest.fixture
def unregister_new_backends():
    """Backends that a snippet registers are removed afterwards."""
    before = registry.names()
    yield
    for name in registry.names() - before:
        registry.unregister(name)


def snippets(page):
    """The Python blocks of a page: first line, code, and the output in a text block after it."""
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    for i, block in enumerate(blocks):
        if block[1] != "python":
            continue
        follower = blocks[i + 1] if i + 1 < len(blocks) else None
        expected = None
        if follower and follower[1] == "text" and not text[block.end() : follower.start()].strip():
            expected = follower[2]
        yield text.count("\n", 0, block.start()) + 1, block[2], expected


@pytest.mark.parametrize("page", [p for p in PAGES if list(snippets(p))], ids=name_of)
@pytest.mark.usefixtures("unregister_new_backends")
def test_snippets_print_their_expected_output(page):
    namespace = {"__name__": "snippet"}
    for line, source, expected in snippets(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + source, name_of(page), "exec"), namespace)
        if expected is not None:
            assert shown(printed.getvalue(), expected) == expected, f"{name_of(page)}:{line}"


def shown(printed, expected):
    """What was printed; only the lines that are expected, if one of those is "...": an excerpt."""
    dots = next((line for line in expected.splitlines() if line.strip() == "..."), None)
    if dots is None:
        return printed
    lines = [line for line in printed.splitlines() if line in expected.splitlines()]
    return "\n".join([*lines, dots, ""])


def test_an_excerpt_of_output_allows_more_lines_but_no_other():
    assert shown("a\nb\nc\n", "a\nc\n...\n") == "a\nc\n...\n"
    assert shown("a\nb\n", "a\nc\n...\n") != "a\nc\n...\n"
    assert shown("a\nb\n", "a\n") != "a\n"


def test_the_readme_is_short_and_has_snippets():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    assert len(list(snippets(ROOT / "README.md"))) >= 2
