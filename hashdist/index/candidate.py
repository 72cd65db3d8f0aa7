"""The gate before a commit, and the candidate that waits where it refuses (docs/promotion.md)."""

from collections.abc import Callable, Mapping
from typing import Any

from hashdist.ground import telemetry
from hashdist.ground.errors import NotFound, Refused
from hashdist.index.manifest import CONTENT, KEPT, content, successor
from hashdist.index.view import View
from hashdist.store.commit import Version

Gate = Callable[[View, View], dict[str, Any]]
"""(served, proposed) -> report: `passed`, `checks` (name, passed, value, limit, text of each), and, where they were
found, `quality` (joins the content) and `probes` (the entry of the probe set, kept from version to version)."""

ROWS_STAY = ("compact",)
"""Operations that write the same rows into other files."""


def put_to_gate(view: View, record: Mapping[str, Any], gate: Gate) -> dict[str, Any]:
    """Ask the gate: returns the record to commit, `record` with the report, or the served content with a candidate.

    Args:
        view: the served version.
        record: the proposed one (`manifest.successor`), whose files are written.
        gate: called with both.
    """
    report = dict(gate(view, View(view.log, Version(view.number + 1, dict(record)), view)))
    quality, probes = report.pop("quality", None), report.pop("probes", None)
    telemetry.GATES.inc(outcome="passed" if report["passed"] else "refused")
    proposed = {**record, **({"quality": quality} if quality else {})}
    kept = {"probes": probes} if probes else {}
    if report["passed"]:
        return {**{name: value for name, value in proposed.items() if name != "candidate"}, **kept, "gate": report}
    candidate = {**content(proposed), "upon": view.number, "operation": record["operation"], "gate": report}
    candidate["about"] = {name: record[name] for name in record if name not in (*CONTENT, *KEPT, "kind", "operation")}
    return successor(view.version, "candidate", kept={**kept, "candidate": candidate})


def refusal(uri: str, report: Mapping[str, Any]) -> Refused:
    """The error that names every check that failed, one a line, and the ways on."""
    lines = [f"  {check['name']}: {check['text']}" for check in report["checks"] if not check["passed"]]
    return Refused(
        f"{uri}: the gate did not pass; the served content is as before, and what was made waits as a candidate\n"
        + "\n".join(lines)
        + "\n  look at it (`hashdist search --candidate`, open_index(uri, candidate=True)), mend the cause and "
        "run again, `hashdist index promote --force --reason TEXT`, or `hashdist index discard`"
    )


def candidate_of(version: Version, uri: str) -> dict[str, Any]:
    """The candidate that waits in a version. Raises NotFound."""
    found: dict[str, Any] | None = version.manifest.get("candidate")
    if found is None:
        raise NotFound(f"{uri}, version {version.number}: no candidate waits; the gate leaves one when it refuses")
    return found


def as_content(version: Version, uri: str) -> Version:
    """The version as it would be with its candidate in the place of its content, to read. Raises NotFound."""
    candidate = candidate_of(version, uri)
    kept = {name: value for name, value in version.manifest.items() if name not in CONTENT}
    return Version(version.number, {**kept, **content(candidate)})
