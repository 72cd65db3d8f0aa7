"""docs/decisions.md is in order, and whoever cites an entry of it, or names a document, finds what it names."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import REPOSITORY

DECISIONS = REPOSITORY / "docs" / "decisions.md"
FOLDERS = ("benchmarks", "cluster", "docs", "hashdist", "jobs", "k8s", "tests")
SUFFIXES = (".md", ".py", ".sh", ".yaml", ".yml")

ENTRY = re.compile(r"### ([DSH][1-9]\d*)\. \S.*")
CITED = re.compile(r"\b[DSH][1-9]\d{0,2}\b")
OTHERS = {"H100", "H200"}
"""Things whose name looks like an entry's: GPUs. (The store S3 looks like one too, and entry S3 exists.)"""
BY_PLACE = re.compile(r"\b[Dd]ecisions?\s+\d+")
"""A number without its letter, which says nothing about the document that it counts in."""
DOCUMENT = re.compile(r"\bdocs/[\w./-]+\.md\b")


def entries(text: str) -> dict[str, str]:
    """Number -> subject of every entry; refuses other headings, numbers given twice, entries without subject or why."""
    subject, found, bodies = "", [], re.split(r"^(?=##)", text, flags=re.M)[1:]
    for part in bodies:
        heading, _, body = part.partition("\n")
        if heading.startswith("## "):
            subject = heading.removeprefix("## ")
            assert not body.strip(), f"text below the subject {subject}, outside of its entries"
            continue
        match = ENTRY.fullmatch(heading)
        assert match, f"a heading must read '### H57. Title', found {heading!r}"
        assert subject, f"{heading} stands before the first subject"
        assert re.search(r"^Why: ", body, re.M), f"{heading} must say why"
        found.append((match[1], subject))
    twice = [number for number, times in Counter(number for number, _ in found).items() if times > 1]
    assert not twice, f"numbers given twice: {twice}"
    return dict(found)


def dangling(text: str, known: dict[str, str]) -> list[str]:
    """Citations in a text that lead to no entry."""
    return BY_PLACE.findall(text) + [cited for cited in CITED.findall(text) if cited not in known.keys() | OTHERS]


def texts() -> Iterator[tuple[Path, str]]:
    """Every text of the repository that may cite, this file aside."""
    for path in [*REPOSITORY.glob("*.md"), *(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*"))]:
        if path.suffix in SUFFIXES and path != Path(__file__).resolve():
            yield path.relative_to(REPOSITORY), path.read_text()


def test_every_entry_has_a_subject_and_a_number_of_its_own() -> None:
    known = entries(DECISIONS.read_text())
    assert len(known) > 100
    assert len(set(known.values())) > 10


def test_every_citation_leads_to_an_entry() -> None:
    known = entries(DECISIONS.read_text())
    cited = [number for path, text in texts() if path.suffix == ".py" for number in CITED.findall(text)]
    assert len(set(cited) & known.keys()) > 30
    assert [(str(path), wrong) for path, text in texts() if (wrong := dangling(text, known))] == []


def test_every_document_that_is_named_exists() -> None:
    named = {(str(path), name) for path, text in texts() for name in DOCUMENT.findall(text)}
    assert len(named) > 30
    assert [(path, name) for path, name in sorted(named) if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("text", ["(H999)", "design decision 13", "see D4, S12 and H9.", "decisions 3 and 4"])
def test_a_dangling_citation_is_found(text: str) -> None:
    assert dangling(text, {"D4": "DSAH", "S12": "Commit and stores", "H4": "Training"})


@pytest.mark.parametrize("text", ["(docs/decisions.md, D4)", "on S3, with 4 decisions", "sha256 ad4f", "an H100"])
def test_what_cites_nothing_or_what_there_is_is_not(text: str) -> None:
    assert not dangling(text, {"D4": "DSAH", "S3": "Search"})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("# D\n\n### H1. One\n\nText.\n\nWhy: so.\n", "before the first subject"),
        ("## A\n\n### H1. One\n\nWhy: so.\n\n## B\n\n### H1. Two\n\nWhy: so.\n", "given twice"),
        ("## A\n\n### H1 One\n\nWhy: so.\n", "must read"),
        ("## A\n\n### H1. One\n\nText.\n", "must say why"),
        ("## A\n\n| H1 | one | so |\n", "outside of its entries"),
    ],
)
def test_a_page_out_of_order_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        entries(text)
