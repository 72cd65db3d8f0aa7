"""Candidates: content that was proposed, did not pass the gate, and waits beside the content that is served.

A gate looks at the served and the proposed version before the commit. Where it passes, the proposed record is
committed with its report in `gate`. Where it does not, what is committed is a version with the served content
unchanged, whose `candidate` holds the proposed content, the report, and the version it was made upon; the caller gets
`Refused`. So one commit either switches everything or nothing, and nothing that was encoded is thrown away. A
candidate leaves by `promote`, by `discard`, or when a later proposal passes (docs/decisions.md, H92).
"""

from collections.abc import Mapping
from typing import Any

from hashdist.ground.errors import Conflict
from hashdist.index.candidate import ROWS_STAY, Gate, as_content, candidate_of, refusal
from hashdist.index.index import Index
from hashdist.index.manifest import content, successor
from hashdist.index.view import View


def promote(index: Index, gate: Gate | None = None, *, force: bool = False, reason: str = "") -> int:
    """Serve the candidate, in one commit.

    Args:
        index: opened as the newest version.
        gate: the candidate is put to it again (its limits may be others now).
        force: serve it whatever the gate says; the reason and the checks that failed go into the version's record.
        reason: why it is forced.

    Returns: the new version.

    Raises:
        NotFound: no candidate waits. Refused: it does not pass, and `force` is not set; nothing is committed.
        Conflict: rows were added, changed or removed since it was made; they would be lost, so not even force helps.
    """

    def propose(view: View, _tried: int) -> dict[str, Any]:
        candidate = candidate_of(view.version, view.uri)
        changed = lost_by(view, candidate)
        if changed is not None:
            raise Conflict(
                f"{view.uri}: the candidate was made upon version {candidate['upon']}, and version {changed} changed "
                "the served rows since; promoting would lose that. Run the job that made it again (`hashdist "
                "index build` or `hashdist reindex`), or `hashdist index discard`"
            )
        new, report = content(candidate), candidate["gate"]
        if gate is not None and not force:
            asked = dict(gate(view, View(view.log, as_content(view.version, view.uri), view)))
            quality, report = asked.pop("quality", None), {k: v for k, v in asked.items() if k != "probes"}
            new |= {"quality": quality} if quality else {}
        if not report["passed"] and not force:
            raise refusal(view.uri, report)
        failed = [check["name"] for check in report["checks"] if not check["passed"]]
        about = {**candidate["about"], "gate": report, "promoted": {"upon": candidate["upon"]}}
        if force:
            about["forced"] = {"reason": reason, "failed": failed}
        return successor(view.version, "promote", new, {"candidate": None}, **about)

    version = index.transact(propose)
    assert version is not None
    return version


def discard(index: Index) -> int:
    """Drop the candidate, in one commit; returns the new version. Raises NotFound where none waits."""

    def propose(view: View, _tried: int) -> dict[str, Any]:
        candidate = candidate_of(view.version, view.uri)
        return successor(view.version, "discard", kept={"candidate": None}, discarded={"upon": candidate["upon"]})

    version = index.transact(propose)
    assert version is not None
    return version


def lost_by(view: View, candidate: Mapping[str, Any]) -> int | None:
    """The first version since the candidate was made that changed the served rows, which promoting it would undo."""
    before = content(view.log.read(candidate["upon"]).manifest)
    for number in range(candidate["upon"] + 1, view.number + 1):
        manifest = view.manifest if number == view.number else view.log.read(number).manifest
        if content(manifest) != before and manifest["operation"] not in ROWS_STAY:
            return number
        before = content(manifest)
    return None
