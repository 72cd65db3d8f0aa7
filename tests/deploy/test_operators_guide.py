"""docs/operate.md and docs/security.md name only what there is: commands, settings, files, alerts, tests."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from hashdist.cli import COMMANDS, _split, parse
from hashdist.ground import telemetry
from hashdist.ground.settings import ServiceSettings
from tests import REPOSITORY

GUIDES = {name: (REPOSITORY / "docs" / name).read_text() for name in ("operate.md", "security.md")}
ALL = "\n".join(GUIDES.values())
FENCED = [line for block in re.findall(r"```[a-z]*\n(.*?)```", ALL, re.S) for line in block.splitlines() if line]
COMMAND_LINES = [line for line in FENCED if line.startswith("hashdist ")]
ALERT = re.compile(r"^### (Hashdist\w+)$", re.M)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_can_be_given(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pipeline.yaml").write_text("root: s3://bucket/photos\n")
    monkeypatch.chdir(tmp_path)
    name, words = _split(shlex.split(line)[1:])
    parse(name, words)


def test_commands_in_sentences_exist() -> None:
    """`hashdist index verify`, with or without options, anywhere in the text."""
    named = re.findall(r"`hashdist ([a-z]+(?: [a-z]+)?)", ALL)
    assert len(named) > 20
    assert [one for one in named if one not in COMMANDS and one.split()[0] not in COMMANDS] == []


def test_every_alert_has_its_heading_and_no_other() -> None:
    rules = yaml.safe_load((REPOSITORY / "k8s/monitoring/rules.yaml").read_text())
    alerts = [rule for group in rules["spec"]["groups"] for rule in group["rules"]]
    assert sorted(ALERT.findall(GUIDES["operate.md"])) == sorted(alert["alert"] for alert in alerts)
    for alert in alerts:
        assert alert["annotations"]["runbook"] == f"docs/operate.md#{alert['alert'].lower()}"
    assert set(re.findall(r"\bHashdist[A-Z]\w+", ALL)) <= {alert["alert"] for alert in alerts}


def test_every_alert_says_where_to_look_and_what_to_do() -> None:
    sections = ALERT.split(GUIDES["operate.md"])
    for name, text in zip(sections[1::2], sections[2::2], strict=True):
        assert "**Do**" in text, name


def test_files_and_links_exist() -> None:
    for name, text in GUIDES.items():
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert (REPOSITORY / "docs" / link).exists(), f"{name}: {link}"
    named = set(re.findall(r"\b(?:k8s|cluster|docs|tests|benchmarks)/[\w./-]*\w", ALL))
    assert len(named) > 15
    assert [path for path in sorted(named) if not (REPOSITORY / path).exists()] == []


def test_code_that_bounds_what_comes_in_is_there() -> None:
    """The column `where` of the table of inputs: a file below hashdist/, and a name in it."""
    places = re.findall(r"`((?:[a-z]+/)*[a-z]+\.py)`(?: (\w+))?", GUIDES["security.md"])
    assert len(places) > 20
    for path, name in places:
        if not path.startswith("tests/"):
            source = (REPOSITORY / "hashdist" / path).read_text()
            assert not name or re.search(rf"\b{name}\b", source), (path, name)


def test_metrics_and_settings_exist() -> None:
    metrics = set(re.findall(r"`(hashdist_\w+)", ALL))
    assert len(metrics) > 5
    assert metrics <= set(telemetry.DECLARED)
    settings = set(re.findall(r"`service\.(\w+)", ALL))
    assert len(settings) > 8
    assert settings <= set(vars(ServiceSettings()))
