"""What README and guides promise: the map names every guide, commands and settings are known, the tree is the tree."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from hashdist import cli
from tests import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
DOCS = REPOSITORY / "docs"
GUIDES = sorted([*DOCS.glob("*.md"), *DOCS.glob("tutorials/*"), *DOCS.glob("results/**/*.md")])
WITH_SETTINGS = [REPOSITORY / "README.md", *DOCS.glob("tutorials/*.md")]


def blocks(text: str, language: str) -> Iterator[str]:
    """The fenced blocks of a language; "" for those without one."""
    for found in re.finditer(r"(?ms)^```(\w*)\n(.*?)^```$", text):
        if found[1] == language:
            yield found[2]


def test_the_readme_is_short_and_begins_with_what_one_gets() -> None:
    lines = README.splitlines()
    assert len(lines) <= 130
    first = "\n".join(lines[:22])
    assert "docs/page.png" in first
    assert "```python\nimport hashdist\n" in first
    assert re.search(r"\d+ ms", first)


def test_the_readme_installs_by_hash_then_tests() -> None:
    commands = dict(re.findall(r"(?s)<!-- (\w+) -->\n```\n(.*?)```", README))
    assert commands.keys() == {"install", "tests"}
    assert commands["install"].rstrip().endswith("&&\n.venv/bin/hashdist quickstart")
    assert "uv pip sync" in commands["install"]
    assert "--require-hashes" in commands["install"]


def test_the_tree_of_the_readme_is_that_of_the_repository() -> None:
    tree = next(block for block in blocks(README, "") if block.startswith("hashdist/"))
    named = {line.split()[0] for line in tree.splitlines() if line.startswith("  ")}
    package = REPOSITORY / "hashdist"
    there = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")} | {"cli.py"}
    assert named == there
    for line in tree.splitlines():
        for name in re.findall(r"(?m)^\S.*?(?=  )", line)[:1]:
            assert all((REPOSITORY / folder).is_dir() for folder in name.split()), line


def test_the_map_leads_to_every_guide() -> None:
    text = (DOCS / "README.md").read_text()
    linked = {(DOCS / link).resolve() for link in re.findall(r"\]\(([^)#:]+)\)", text)}
    assert all(path.exists() for path in linked)
    assert [str(path.relative_to(DOCS)) for path in GUIDES if path not in linked and path.name != "README.md"] == []


@pytest.mark.parametrize("page", WITH_SETTINGS, ids=lambda path: path.stem)
def test_settings_and_commands_are_known(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    Path("pipeline.yaml").write_text("root: ./hashdist\n")
    for number, block in enumerate(blocks(text, "yaml")):
        name = re.match(r"# (\S+)\n", block)
        path = Path(name[1] if name else f"{number}.yaml")
        path.write_text(block)
        cli.parse("pipeline", ["--config", str(path)])
    lines = [line for language in ("", "bash") for block in blocks(text, language) for line in block.splitlines()]
    commands = [line for line in lines if re.match(r"(\.venv/bin/)?hashdist ", line)]
    commands += re.findall(r"(?m)^\| `(hashdist [^`]+)`", text)
    for line in commands:
        command, words = cli._split(shlex.split(line, comments=True)[1:])
        cli.parse(command, words)
