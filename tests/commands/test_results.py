"""Results as a person reads them."""

from typing import Any

from hashdist.commands import results

METRICS = {
    "map_all_ties": 0.7996357284062107,
    "map@5000": 0.7945454765151738,
    "map@5000_all": 0.7945454765151738,
    "map@5000_min": 0.7945454765151738,
    "map@5000_ties": 0.7996357284062107,
    "map@5000_all_ties": 0.7996357284062107,
    "map@5000_min_ties": 0.7996357284062107,
    "precision@100": 0.18999999999999995,
    "precision@100_ties": 0.18999999999999995,
    "recall@10": 0.23833333333333334,
    "recall@10_reranked": 0.5,
}
EVALUATED: dict[str, Any] = {
    "stage": "evaluate",
    "snapshot": "file:///r/codes/1",
    "protocol": "cifar",
    "queries": 60,
    "database": 600,
    "bits": 16,
    "metrics": METRICS,
    "by_method": {"dsah": METRICS, "itq": METRICS},
    "curves": {"dsah": {"precision": [0.1] * 17}},
    "skipped": False,
    "seconds": 12.78956958699996,
}


def test_an_evaluation_is_a_short_table() -> None:
    lines = results.text(EVALUATED).splitlines()
    assert lines[0] == "60 queries, 600 images, 16 bits, protocol cifar"
    assert [line.split() for line in lines[1:-1]] == [
        ["metric", "dsah", "itq"],
        ["map_all_ties", "0.7996", "0.7996"],
        ["map@5000", "0.7945", "0.7945"],
        ["precision@100", "0.1900", "0.1900"],
        ["recall@10", "0.2383", "0.2383"],
        ["recall@10_reranked", "0.5000", "0.5000"],
    ]


def test_a_pipeline_is_a_line_a_stage_and_the_evaluation() -> None:
    stage = {"rows": 600, "failed": 1, "seconds": 1.26, "skipped": True, "snapshot": "file:///r/x/1"}
    stages = {"collection": stage, "index": {**stage, "skipped": False}, "evaluate": EVALUATED}
    lines = results.text({"stage": "pipeline", "stages": stages, "seconds": 3.0}).splitlines()
    assert lines[1].split() == ["collection", "600", "1", "1.3", "found", "file:///r/x/1"]
    assert lines[2].split()[4] == "made"
    assert ["map_all_ties", "0.7996", "0.7996"] in [line.split() for line in lines]
    assert lines[-1] == "search it: hashdist search FILE --index.uri file:///r/x/1"
    assert len(lines) < 20


def test_other_results_are_a_line_a_field() -> None:
    assert results.text({"stage": "train", "loss": 8.829338073730469, "rate": None, "more": [1], "most": {}}) == (
        "stage  train\nloss   8.829\nrate   -\n--json has also more, most"
    )
