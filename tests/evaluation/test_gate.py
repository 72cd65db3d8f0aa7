"""The gate: what passes, what is refused and why, against numbers computed another way."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import torch as safetensors

from hashdist.cli import main
from hashdist.evaluation import gate
from hashdist.ground.bits import hamming
from hashdist.ground.errors import Refused
from hashdist.ground.ids import image_ids
from hashdist.ground.schema import to_vectors, vector_schema
from hashdist.ground.settings import CollectionSettings, GateSettings, IndexSettings, Settings
from hashdist.index import Index, create_index, open_index
from hashdist.index.candidate import Gate
from hashdist.index.manifest import files
from hashdist.index.shards.shard import Rows, write_shard
from hashdist.index.upkeep.retention import rollback
from hashdist.methods import itq
from hashdist.methods.contract import find_method, method_settings
from hashdist.models.model import describe, load_model
from hashdist.stages import collection, encode, index
from hashdist.store import open_store
from hashdist.store.commit import Artefact, digest, write_file, write_table

pytestmark = pytest.mark.cluster

BITS, WIDTH, CLASSES = 32, 48, 6
BACKBONE = {"backbone": "none", "tap": "", "weights_digest": "", "preprocess": {}, "precision": "float32"}


@dataclass
class World:
    """Features of some images in clusters, and what makes models and codes of them."""

    root: str
    n: int = 600
    seed: int = 0
    labelled: bool = True

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.keys = [f"{self.seed}-{i:05d}.png" for i in range(self.n)]
        self.ids = image_ids(self.keys)
        self.labels_N = rng.integers(0, CLASSES, self.n)
        centres = np.random.default_rng(99).standard_normal((CLASSES, 8)) * 1.5
        inner = (centres[self.labels_N] + rng.standard_normal((self.n, 8))) @ np.eye(8, WIDTH)
        # what a trained hash finds: 8 of 48 dimensions matter, the others only disturb
        self.features_ND = (3 * inner + 2 * rng.standard_normal((self.n, WIDTH))).astype(np.float32)
        self.features = self._table("features", "feature", "float32", self.features_ND, {"inputs": {}, **BACKBONE})

    def _table(self, kind: str, name: str, dtype: str, vectors: NDArray[Any], about: dict[str, Any]) -> Artefact:
        made = Artefact(open_store(self.root), kind, digest([kind, self.seed, self.n, vectors.tobytes().hex()]))
        labels = pa.array([[int(x)] if self.labelled else None for x in self.labels_N], pa.list_(pa.int32()))
        columns = [self.ids, self.keys, [f"d{key}" for key in self.keys], labels, ["ok"] * self.n]
        table = pa.table(
            [*columns, pa.nulls(self.n, pa.string()), to_vectors(vectors)],
            schema=vector_schema(name, dtype, vectors.shape[1]),
        )
        parts = [
            write_table(made.store, made.new_name(".parquet"), table.take(rows))
            for rows in np.array_split(np.arange(self.n), 4)
        ]
        made.publish({"rows": self.n, "failed": 0, "files": parts, "dtype": dtype, "width": vectors.shape[1], **about})
        return made

    def model(self, trained: bool = True, seed: int = 0) -> Artefact:
        """A committed DSAH model that codes as ITQ does, or one as training starts."""
        settings = method_settings(find_method("dsah"), "paper")
        head = find_method("dsah").network(settings, WIDTH, BITS, torch.Generator().manual_seed(seed))
        if trained:
            fitted = itq.fit(self.features_ND, BITS, seed)
            with torch.no_grad():
                for parameter in head.parameters():
                    parameter.zero_()
                head.hidden.weight[:BITS] = torch.from_numpy(fitted.directions_DL.T.copy())
                head.hidden.bias[:BITS] = -torch.from_numpy(fitted.mean_D @ fitted.directions_DL)
                head.hash.weight[:, :BITS] = torch.eye(BITS) * 0.01
        return committed(self.root, head.state_dict(), {**BACKBONE, "dtype": "float32", "width": WIDTH}, "frozen")

    def codes(self, model: Artefact, shuffle: bool = False) -> Artefact:
        codes_NW = load_model(model.uri).encode_features(self.features_ND)
        if shuffle:
            codes_NW = codes_NW[np.random.default_rng(1).permutation(self.n)]
        inputs = {"model": {"uri": model.uri, "digest": model.manifest()["model_digest"]}}
        inputs["features"] = {"uri": self.features.uri, "digest": self.features.name}
        about = {"bits": BITS, "model": model.uri, "model_digest": model.manifest()["model_digest"], "inputs": inputs}
        return self._table("codes", "code", "uint8", codes_NW, about)

    def code_rows(self, codes: Artefact) -> NDArray[np.uint8]:
        from hashdist.ground.schema import from_vectors
        from hashdist.store.vectors import read_vectors

        table = read_vectors(codes, ["id", "code"])
        order = np.argsort(np.argsort(self.ids))
        return np.asarray(from_vectors(table["code"], table.schema))[order]


def committed(root: str, state: dict[str, Any], backbone: dict[str, Any], mode: str) -> Artefact:
    data = safetensors.save(state)
    made = Artefact(open_store(root), "models", digest([mode, data.hex(), backbone]))
    described = describe(
        method="dsah",
        options={},
        bits=BITS,
        mode=mode,
        width=backbone["width"],
        classes=0,
        backbone=backbone,
        head=write_file(made.store, made.new_name(".safetensors"), data),
        backbone_weights=None,
    )
    made.publish({"stage": "train", **described})
    return made


def settings_of(root: str, **limits: Any) -> Settings:
    return Settings(
        root=root,
        index=IndexSettings(name="photos"),
        gate=replace(GateSettings(sample=400, queries=100, recall_at=10, constant_bits=1.0), **limits),
    )


def build(world: World, codes: Artefact, wanted: Gate | None = None) -> Index:
    """What the index stage commits, without Ray."""
    uri = settings_of(world.root).index.location(world.root)
    try:
        there = open_index(uri)
    except Exception:
        there = create_index(uri, BITS)
    new = there.versions.new_attempt()
    columns = pa.table(
        {
            "digest": [f"d{key}" for key in world.keys],
            "labels": pa.array([[int(x)] if world.labelled else None for x in world.labels_N], pa.list_(pa.int32())),
        }
    )
    rows = Rows(world.ids, world.code_rows(codes), world.keys, columns)
    manifest = codes.manifest()
    there.publish(
        [write_shard(there.store, lambda suffix: new.new("shards", suffix), rows)],
        bits=BITS,
        salts={},
        model=manifest["model_digest"],
        model_uri=manifest["model"],
        lineage={"inputs": {"codes": {"uri": codes.uri, "digest": codes.name}}, "built_from": codes.name},
        gate=wanted or gate.for_build(settings_of(world.root), codes),
    )
    return there


def checks(report: dict[str, Any]) -> dict[str, Any]:
    return {check["name"]: check for check in report["checks"]}


def failed(report: dict[str, Any]) -> list[str]:
    return sorted(name for name, check in checks(report).items() if not check["passed"])


def test_a_new_model_is_built_passes_and_is_rolled_back(root_uri: str, ray_session: None) -> None:
    world = World(root_uri)
    settings = settings_of(root_uri)
    first = world.codes(world.model())
    done = index.run(settings, first)
    served = open_index(done["snapshot"])
    report = served.manifest["gate"]
    assert report["passed"]
    assert not [check for check in report["checks"] if check.get("skipped")]
    assert checks(report)["probes"]["value"] == 1.0

    untrained = world.codes(world.model(trained=False))
    for again in range(2):  # the second run writes nothing and asks the gate again
        with pytest.raises(Refused, match="quality: map is"):
            index.run(settings, untrained)
        now = open_index(served.uri)
        assert (now.version, now.model) == (done["version"] + 1, served.model)
        assert failed(now.manifest["candidate"]["gate"])[-1] == "quality", again
    np.testing.assert_array_equal(now.codes_of(world.keys), world.code_rows(first))
    waiting = open_index(served.uri, candidate=True)
    np.testing.assert_array_equal(waiting.codes_of(world.keys), world.code_rows(untrained))

    second = world.codes(world.model(seed=5))
    assert index.run(settings, second)["version"] == 4
    now = open_index(served.uri)
    assert now.model == second.manifest()["model_digest"] != served.model
    assert "candidate" not in now.manifest
    assert now.manifest["probes"] == served.manifest["probes"]  # both were measured on the same images
    rollback(now, to=2)
    np.testing.assert_array_equal(open_index(served.uri).codes_of(world.keys), world.code_rows(first))
    assert open_index(served.uri).manifest["quality"] == served.manifest["quality"]


def test_an_index_with_shuffled_ids_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path.as_uri())
    shuffled = world.codes(world.model(), shuffle=True)
    with pytest.raises(Refused, match=r"probes: .* of 600 images encoded again") as error:
        build(world, shuffled)  # also as the first version of all
    assert "quality: map is" in str(error.value)
    there = build(world, world.codes(world.model(seed=3)))
    with pytest.raises(Refused):
        build(world, shuffled)
    there.refresh()
    assert failed(there.manifest["candidate"]["gate"]) == ["probes", "quality"]
    assert not list(there.store.list("none"))


def test_a_promotion_by_force_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path.as_uri())
    there = build(world, world.codes(world.model()))
    with pytest.raises(Refused):
        build(world, world.codes(world.model(trained=False)))
    words = ["--root", world.root, "--index.name", "photos", "--json"]
    limits = ["--gate.sample", "400", "--gate.queries", "100", "--gate.recall_at", "10"]
    assert main(["search", *words, "--candidate", "--key", world.keys[3]]) == 0
    assert json.loads(capsys.readouterr().out)["hits"][0]["distance"] == 0
    assert main(["index", "promote", *words, *limits]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "Refused"
    assert main(["index", "promote", *words, "--force", "--reason", "shown to users"]) == 0
    assert json.loads(capsys.readouterr().out)["forced"] == {"reason": "shown to users", "failed": ["quality"]}
    there.refresh()
    assert there.manifest["forced"] == {"reason": "shown to users", "failed": ["quality"]}
    assert there.model == open_index(there.uri, version=4).model
    assert main(["index", "discard", *words]) == 2  # there is none any more
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "NotFound"


def test_a_candidate_is_promoted_once_the_limits_allow_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path.as_uri())
    build(world, world.codes(world.model()))
    with pytest.raises(Refused):
        build(world, world.codes(world.model(trained=False)))
    words = ["--root", world.root, "--index.name", "photos", "--json"]
    assert main(["index", "promote", *words, "--gate.tolerance", "1", "--gate.constant_bits", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["forced"] is None
    assert "forced" not in open_index(f"{world.root}/indexes/photos").manifest


@pytest.mark.parametrize("labelled", [True, False])
def test_quality_equals_brute_force(tmp_path: Path, labelled: bool) -> None:
    world = World(tmp_path.as_uri(), labelled=labelled)
    codes = world.codes(world.model())
    there = build(world, codes)
    quality = there.manifest["quality"]
    order = np.argsort(world.ids)[:400]
    codes_SW, x_SD = world.code_rows(codes)[order], world.features_ND[order].astype(np.float64)
    assert (quality["queries"], quality["sample"]) == (100, 400)
    values = []
    x_SD -= x_SD.mean(0)
    unit_SD = x_SD / np.linalg.norm(x_SD, axis=1, keepdims=True)
    for q in range(100):
        others = np.delete(np.arange(400), q)
        distances = hamming(codes_SW[q], codes_SW[others])
        if labelled:
            relevant = world.labels_N[order][others] == world.labels_N[order][q]
            rng, aps = np.random.default_rng(q), []
            for _ in range(60):  # ties in any order: the mean of many
                ranked = relevant[np.lexsort((rng.random(399), distances))]
                aps.append((np.cumsum(ranked) / np.arange(1, 400) * ranked).sum() / ranked.sum())
            values.append(np.mean(aps))
        else:
            exact = others[np.argsort(-(unit_SD[others] @ unit_SD[q]), kind="stable")[:10]]
            found = others[np.lexsort((world.ids[order][others], distances))[:10]]
            values.append(len(np.intersect1d(exact, found)) / 10)
    assert quality["measure"] == ("map" if labelled else "recall@10")
    assert quality["value"] == pytest.approx(np.mean(values), abs=2e-3 if labelled else 1e-9)
    named = {entry["path"] for entry in files(there.manifest)}
    assert there.manifest["probes"]["path"] in named
    own = json.dumps({name: there.manifest[name] for name in ("gate", "quality", "probes")})
    assert not [id_ for id_ in world.ids.tolist() if str(id_) in own]  # a record must name no image


def test_without_labels_an_untrained_model_is_refused_too(tmp_path: Path) -> None:
    world = World(tmp_path.as_uri(), labelled=False)
    build(world, world.codes(world.model()))
    with pytest.raises(Refused, match=r"quality: recall@10 is .*\(version 2 has"):
        build(world, world.codes(world.model(trained=False)))


def test_an_increment_passes_the_same_gate(tmp_path: Path) -> None:
    world, more = World(tmp_path.as_uri()), World(tmp_path.as_uri(), n=100, seed=1)
    settings, model = settings_of(world.root), world.model()
    there = build(world, world.codes(model))

    def grow(codes: Artefact | None, removed: list[str]) -> dict[str, Any]:
        now = open_index(there.uri)
        new_NW = more.code_rows(codes) if codes else np.empty((0, BITS // 8), np.uint8)
        columns = pa.table({"digest": [f"d{key}" for key in more.keys]}) if codes else None
        checked = gate.for_growth(settings, now, codes)
        now.apply(new_NW, more.keys if codes else [], columns, removed=removed, gate=checked)
        return dict(now.manifest)

    with pytest.raises(Refused, match="probes: ") as error:
        grow(more.codes(model, shuffle=True), [])
    assert "counts" not in str(error.value)
    grown = grow(more.codes(model), world.keys[:5])
    assert (grown["rows"], failed(grown["gate"])) == (695, [])
    assert "395 of 395 images encoded again" in checks(grown["gate"])["probes"]["text"]  # 100 new, 295 of 2 parts
    assert grown["probes"] == there.manifest["probes"]
    with pytest.raises(Refused, match="counts: 655 rows, 695 are served, and at least 661 are required"):
        grow(None, world.keys[5:45])


def test_what_cannot_be_checked_is_said(tmp_path: Path) -> None:
    world = World(tmp_path.as_uri())
    codes = world.codes(world.model())
    there = build(world, codes, gate.Checks(settings_of(world.root, fewest=10_000).gate, [codes]))
    report = checks(there.manifest["gate"])
    for name in ("bits", "collisions", "quality"):
        assert report[name]["skipped"]
        assert "600 rows, fewer than 10000" in report[name]["text"]
    other = create_index(f"{world.root}/indexes/plain", BITS)
    rng = np.random.default_rng(0)
    random_NW = rng.integers(0, 256, (300, BITS // 8), dtype=np.uint8)
    none = gate.Checks(settings_of(world.root).gate, [])
    other.apply(random_NW, [f"k{i}" for i in range(300)], gate=none)
    report = checks(other.manifest["gate"])
    assert report["probes"]["text"] == "not checked: the index does not name the model that made its codes"
    assert report["quality"]["text"] == "not checked: there are neither labels nor features of the indexed images"
    assert (report["bits"]["value"], report["collisions"]["value"]) == (0.0, 0.0)


def test_codes_that_tell_nothing_apart_are_refused(tmp_path: Path) -> None:
    there = create_index(f"{tmp_path.as_uri()}/photos", BITS)
    none = gate.Checks(GateSettings(), [])
    with pytest.raises(Refused, match=r"equal codes with probability 1\.0000"):
        there.apply(np.full((300, BITS // 8), 7, np.uint8), [f"k{i}" for i in range(300)], gate=none)
    assert failed(there.manifest["candidate"]["gate"]) == ["bits", "collisions"]


def test_a_model_that_reads_images_encodes_images_again(
    tmp_path: Path, ray_session: None, made: Callable[..., Any]
) -> None:
    root = (tmp_path / "root").as_uri()
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "images" / f"{number:03d}.png")
    uri = (tmp_path / "images").as_uri()
    settings = replace(settings_of(root, fewest=10), collection=CollectionSettings(uri=uri, labels=False, part_rows=12))
    listed = Artefact.at(open_store(collection.run(settings)["snapshot"]), "collections", "listed")
    from hashdist.ground.settings import FeatureSettings, PreprocessSettings
    from hashdist.models.backbones import build_backbone

    spec = build_backbone(FeatureSettings(backbone="pixels", preprocess=PreprocessSettings(size=8))).spec
    head = find_method("dsah").network(
        method_settings(find_method("dsah"), "paper"), spec["width"], BITS, torch.Generator().manual_seed(0)
    )
    model = committed(root, {name: value * 10 for name, value in head.state_dict().items()}, spec, "images")
    codes = Artefact.at(open_store(encode.run(settings, model, listed)["snapshot"]), "codes", "made")
    done = index.run(settings, codes)
    report = checks(open_index(done["snapshot"]).manifest["gate"])
    assert "40 of 40 images encoded again" in report["probes"]["text"]
    assert report["quality"]["skipped"]
