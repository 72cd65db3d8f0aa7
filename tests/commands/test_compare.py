"""compare without its cells: what is asked, what is refused, and how tables are laid out."""

from pathlib import Path

import pytest

from hashdist import cli
from hashdist.commands.compare import _check, _part, published, read_entries, table
from hashdist.ground.errors import InvalidInput
from hashdist.ground.options import CompareOptions
from hashdist.methods.contract import known_methods
from tests import REPOSITORY


def test_methods_take_their_frozen_preset_in_frozen_mode_and_variants_their_own() -> None:
    variants = {
        "AND0": {"method": "dsah", "options": {"gamma": "inf"}},
        "wide": {"method": "ddh", "graph": {"shared": 9}},
    }
    asked = CompareOptions(methods=["itq", "ddh", "ddh:release"], variants=variants)
    found = {entry.name: entry for entry in read_entries(asked)}
    assert list(found) == ["itq", "ddh", "ddh:release", "AND0", "wide"]
    assert (found["ddh"].preset, found["ddh:release"].preset) == ("frozen", "release")
    assert found["AND0"].settings().gamma == float("inf")
    assert found["wide"].graph == {"shared": 9}
    assert not found["itq"].deep
    assert {entry.name: entry.preset for entry in read_entries(asked, "images")}["ddh"] == "paper"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CompareOptions(), "methods or variants"),
        (CompareOptions(methods=["itq", "itq"]), "different names"),
        (CompareOptions(methods=["itk"]), "no method is called 'itk'"),
        (CompareOptions(methods=["ddh:papre"]), "no preset 'papre'"),
        (CompareOptions(variants={"a": {"methods": "dsah"}}), "variant a must be a mapping"),
        (CompareOptions(variants={"a": {"method": "dsah", "options": {"tua": 1}}}), "no option 'tua'"),
    ],
)
def test_what_cannot_be_compared_is_named(options: CompareOptions, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_entries(options)


def test_parts_cover_all_cells_once() -> None:
    cells = list(range(17))
    shares = [cells[first::step] for first, step in map(_part, ("1/3", "2/3", "3/3"))]
    assert sorted(cell for share in shares for cell in share) == cells
    for wrong in ("0/3", "4/3", "a", "1/"):
        with pytest.raises(InvalidInput, match="I/N"):
            _part(wrong)


def test_a_table_has_mean_and_spread_and_the_papers_numbers() -> None:
    rows = [
        {"name": name, "bits": bits, "metrics": {"map@5000": value}}
        for name, bits, value in (("itq", 16, 0.2), ("itq", 16, 0.3), ("itq", 32, 0.4), ("dsah:release", 16, 0.5))
    ]
    text = table(rows, "map@5000", {"itq": {16: 0.269}, "dsah": {16: 0.596}})
    assert text.splitlines() == [
        "| method | 16 bits | 32 bits | paper 16 |",
        "| --- | --- | --- | --- |",
        "| itq | 0.2500 ± 0.0707 | 0.4000 | 0.269 |",
        "| dsah:release | 0.5000 |  | 0.596 |",
    ]


def test_published_tables_are_whole() -> None:
    ours = set(known_methods())
    for name, given in published().items():
        assert given["metric"].startswith(("map", "precision", "svm")), name
        for method, values in given["methods"].items():
            assert len(values) == len(given["bits"]), (name, method)
            assert all(value is None or 0 < value < 1 for value in values), (name, method)
    assert {"dsah", "ddh", "sadh", "itq", "lsh"} <= ours & {m for t in published().values() for m in t["methods"]}
    assert published()["dsah-table1-cifar10"]["methods"]["dsah"] == [0.596, 0.617, 0.622, 0.635]


EXPERIMENTS = sorted((REPOSITORY / "benchmarks/experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_can_be_asked_for(path: Path) -> None:
    settings, options = cli.parse("compare", ["--config", str(path), "--root", "x"])
    _check(settings, options, read_entries(options, settings.train.mode))
