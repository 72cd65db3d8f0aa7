"""The graph stage on Ray: equal bytes for any parts and threads, resumption, protocols, and refusals."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest

from hashdist.evaluation.protocols import split
from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import image_ids
from hashdist.ground.settings import GraphSettings, Settings
from hashdist.stages import graph
from hashdist.store.commit import Artefact, read_file, read_table

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]

FILES = ("ids", "features", "neighbours", "w0_indptr", "w0_indices")


def settings(root_uri: str, **chosen: Any) -> Settings:
    return Settings(root=root_uri, graph=GraphSettings(**chosen))


def array(made: Artefact, name: str) -> np.ndarray:
    found: np.ndarray = np.load(BytesIO(read_file(made.store, made.manifest()["files"][name])))
    return found


def checksums(made: Artefact) -> list[str]:
    return [made.manifest()["files"][name]["sha256"] for name in FILES]


def dense_w0(near_NK: np.ndarray, k2: int) -> np.ndarray:
    """DSAH, Eqs 7-9, by dense matrices: W_L and W_H, symmetrised by or, without the diagonal."""
    n, k1 = near_NK.shape
    place = np.full((n, n), k1 + 1)
    for i in range(n):
        place[i, i] = 0
        place[i, near_NK[i]] = np.arange(1, k1 + 1)
    member = place <= k1
    overlap = member.astype(int) @ member.T.astype(int)
    w = np.zeros((n, n), bool)
    for i in range(n):
        order = np.lexsort((np.arange(n), place[i], -overlap[i]))
        w[i, [j for j in order[:k2] if overlap[i, j] and member[i, j]]] = True
    w |= w.T
    np.fill_diagonal(w, False)
    return w


def test_graph_equals_dense_arithmetic_whatever_the_parts(root_uri: str, made: Callable[..., Any]) -> None:
    features = made(root_uri, n=300, failed=3).features
    results = []
    for run, (part_rows, workers, threads) in enumerate([(32_768, 0, 2), (64, 4, 1), (100, 2, 3)]):
        chosen = settings(
            root_uri, neighbours=12, shared=9, train_sample=250, part_rows=part_rows, workers=workers, threads=threads
        )
        chosen = replace(chosen, fresh=str(run))
        result = graph.run(chosen, features)
        assert (result["stage"], result["rows"], result["failed"], result["skipped"]) == ("graph", 250, 0, False)
        assert graph.run(chosen, features)["skipped"] is True
        results.append(graph.snapshot(chosen, features))
    assert len({made.name for made in results}) == 3
    assert len({tuple(checksums(made)) for made in results}) == 1

    (one, *_) = results
    ids = array(one, "ids")
    every = np.sort(image_ids([f"{i:05d}.png" for i in range(300)]))
    np.testing.assert_array_equal(ids, every[3:253])  # the first three have no feature
    unit = array(one, "features").astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    near = array(one, "neighbours")
    np.testing.assert_array_equal(near, np.argsort(-cosine, axis=1, kind="stable")[:, :12])
    indptr, indices = array(one, "w0_indptr"), array(one, "w0_indices")
    w = np.zeros((250, 250), bool)
    w[np.repeat(np.arange(250), np.diff(indptr)), indices] = True
    np.testing.assert_array_equal(w, dense_w0(near, 9))
    assert one.manifest()["edges"] == len(indices) == w.sum()
    assert (near.dtype, indptr.dtype, indices.dtype) == (np.int32, np.int64, np.int32)
    labels = read_table(one.store, one.manifest()["files"]["labels"])
    np.testing.assert_array_equal(labels["id"].to_numpy(), ids)


def test_resources_do_not_name_the_graph_but_its_settings_do(root_uri: str, made: Callable[..., Any]) -> None:
    features = made(root_uri, n=60).features
    name = graph.snapshot(settings(root_uri), features).name
    assert graph.snapshot(settings(root_uri, part_rows=7, workers=3, threads=1), features).name == name
    assert graph.snapshot(settings(root_uri, neighbours=7), features).name != name
    assert graph.snapshot(settings(root_uri, symmetrize="and"), features).name != name


def test_a_second_run_does_only_what_is_missing(root_uri: str, made: Callable[..., Any]) -> None:
    features = made(root_uri, n=200).features
    chosen = settings(root_uri, neighbours=10, part_rows=50)
    whole = replace(chosen, fresh="whole")
    graph.run(whole, features)
    broken = graph.snapshot(chosen, features)
    records = graph.snapshot(whole, features).parts()
    graph.run(chosen, features)
    assert checksums(broken) == checksums(graph.snapshot(whole, features))
    # the same, after a crash that left the sample and two of four parts, and with other parts asked for
    resumed = replace(chosen, fresh="resumed", graph=replace(chosen.graph, part_rows=70))
    left = graph.snapshot(resumed, features)
    graph.create_record(left.store, graph.PLAN, {"part_rows": 50})
    source = graph.snapshot(whole, features).store
    for part in (0, 1, 3):
        for entry in records[part].values():
            if isinstance(entry, dict) and "path" in entry:
                left.store.put(entry["path"], source.get(entry["path"]))
        left.publish_part(part, {k: v for k, v in records[part].items() if k not in ("write_id", "format_version")})
    graph.run(resumed, features)
    assert checksums(left) == checksums(broken)
    kept = left.parts()
    assert kept[1]["neighbours"] == records[1]["neighbours"]
    assert kept[2]["neighbours"]["path"] != records[2]["neighbours"]["path"]
    assert len(kept) == 1 + 4 + 1 + 4 + 1


def test_sample_of_a_protocol(root_uri: str, made: Callable[..., Any]) -> None:
    features = made(root_uri, n=300).features
    chosen = settings(root_uri, protocol="uniform:40:150", protocol_seed=3, neighbours=5)
    assert graph.run(chosen, features)["rows"] == 150
    every = np.sort(image_ids([f"{i:05d}.png" for i in range(300)]))
    expected = every[split("uniform:40:150", every, None, 3).train]
    np.testing.assert_array_equal(array(graph.snapshot(chosen, features), "ids"), expected)


@pytest.mark.parametrize(
    ("n", "failed", "chosen", "message"),
    [
        (30, 0, {"neighbours": 30}, r"between 1 and n - 1 = 29 .* found 30"),
        (30, 10, {"neighbours": 20}, r"n - 1 = 19"),
        (30, 29, {}, r"at least 2 images .* found 1 .*29 rows of it have none"),
        (30, 0, {"shared": -1}, r"graph.shared be at least 1"),
        (30, 0, {"protocol": "digits"}, r"draws 20 queries"),
        (30, 0, {"protocol": "unheard"}, r"a known protocol is required"),
    ],
)
def test_refusals(
    tmp_path: Any, made: Callable[..., Any], n: int, failed: int, chosen: dict[str, Any], message: str
) -> None:
    uri = (tmp_path / "root").as_uri()
    features = made(uri, n=n, failed=failed).features
    asked = settings(uri, **chosen)
    with pytest.raises(InvalidInput, match=message):
        graph.run(asked, features)
    assert not graph.snapshot(asked, features).exists()


def test_default_sizes_and_the_warning_of_starvation(
    tmp_path: Any, made: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    uri = (tmp_path / "root").as_uri()
    features = made(uri, n=400).features
    result = graph.run(settings(uri), features)
    assert (result["k1"], result["k2"]) == (20, 20)
    assert "warning" not in capsys.readouterr().err
    result = graph.run(settings(uri, neighbours=1), features)
    assert result["k1"] == 1
    assert "positive pairs on average, at least 20 are wanted" in capsys.readouterr().err
