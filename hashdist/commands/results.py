"""Results as a person reads them: tables with rounded numbers. `--json` prints the same results whole and exact."""

from collections.abc import Mapping
from typing import Any

from hashdist.ground.tables import cell, table

_VARIANTS = ("_ties", "_all", "_min")
_MAIN = "map_all_ties"


def text(result: Mapping[str, Any]) -> str:
    """The text of a result that brings none of its own."""
    if "stages" in result:
        return pipeline(result)
    if "by_method" in result:
        return evaluation(result)
    return fields(result)


def pipeline(result: Mapping[str, Any]) -> str:
    """A line a stage, how good the codes are, and how to search them."""
    stages = result["stages"]
    rows = [
        (
            name,
            stage.get("rows"),
            stage.get("failed"),
            f"{stage['seconds']:.1f}",
            "found" if stage["skipped"] else "made",
            stage["snapshot"],
        )
        for name, stage in stages.items()
        if name != "evaluate"
    ]
    parts = [table(["stage", "rows", "failed", "seconds", "state", "where"], rows)]
    if "evaluate" in stages:
        parts.append(evaluation(stages["evaluate"]))
    if "index" in stages:
        parts.append(f"search it: hashdist search FILE --index.uri {stages['index']['snapshot']}")
    return "\n\n".join(parts)


def evaluation(result: Mapping[str, Any]) -> str:
    """The metrics, a column a method; of the several mAPs of one cut only the first."""
    methods = result["by_method"]
    names = [name for name in next(iter(methods.values())) if name == _MAIN or not name.endswith(_VARIANTS)]
    about = f"{result['queries']} queries, {result['database']} images, {result['bits']} bits"
    protocol = f", protocol {result['protocol']}" if result["protocol"] else ""
    rows = [(name, *(f"{metrics[name]:.4f}" for metrics in methods.values())) for name in names]
    rest = "docs/command_line.md explains these; --json has all metrics, and the curves"
    return "\n".join([about + protocol, table(["metric", *methods], rows), rest])


def fields(result: Mapping[str, Any]) -> str:
    """Every field that is one value, a line each; the names of the others."""
    single = {name: value for name, value in result.items() if not isinstance(value, dict | list)}
    width = max(map(len, single), default=0)
    lines = [f"{name:<{width}}  {cell(value)}" for name, value in single.items()]
    more = [name for name in result if name not in single]
    return "\n".join([*lines, *([f"--json has also {', '.join(more)}"] if more else [])])
