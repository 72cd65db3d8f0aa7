"""Every setting of every stage, as one tree of frozen dataclasses: values only, no live objects.

The command line's flags and the YAML file are both made from this tree (hashdist/cli.py). Settings that can
change a stage's output are part of the digest that names its artefact; the ones listed in a class's `RESOURCES`
(how many workers, which thread counts) are not.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal


def _identity(settings: Any) -> dict[str, Any]:
    """The settings that can change the stage's output, as plain values: what its artefact's name is made of."""
    return {name: value for name, value in asdict(settings).items() if name not in settings.RESOURCES}


@dataclass(frozen=True)
class CollectionSettings:
    """The images: where they lie, and how they are read.

    Args:
        uri: a folder, a parquet file or folder, or a tar file or folder of tars; a path, file:// or s3://.
        format: folder, parquet or webdataset, or another one of hashdist/collection/readers; auto looks at the file
            names.
        labels: read labels: the subfolder of a folder tree, or the column `label` or `labels` of parquet, or
            the .cls member of a WebDataset sample.
        id_column: parquet column that holds the key of an image.
        image_column: parquet column that holds the encoded image bytes.
        part_rows: images per part; a part is the unit of work, of retry and of resumption.
        snapshot: URI of a committed listing to use instead of listing again.
    """

    uri: str = ""
    format: str = "auto"
    labels: bool = True
    id_column: str = "id"
    image_column: str = "image"
    part_rows: int = 2048
    snapshot: str = ""

    RESOURCES: ClassVar[frozenset[str]] = frozenset({"snapshot"})
    identity = _identity


@dataclass(frozen=True)
class PreprocessSettings:
    """How pixels become network input; it belongs to the weights, so every field has a "the weights' own" value.

    Args:
        size: side of the square input in pixels; 0 = the weights' own.
        resize: side of the image before the centre crop to `size`; 0 = resize straight to `size` x `size`.
        mean: per channel, on pixels scaled to [0, 1]; empty = the weights' own.
        std: per channel, likewise.
        rotate180: turn the image upside down (weights converted from networks that pad on the other side).
    """

    size: int = 0
    resize: int = 0
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    rotate180: bool = False


@dataclass(frozen=True)
class FeatureSettings:
    """The network that turns an image into a feature vector, and how it runs.

    Args:
        backbone: `pixels` (built in, no weights), `cnnf` (built in, weights from a file or random), a torchvision model
            name, or `module:factory`.
        tap: the layer to read, e.g. `relu7` of vgg19 or `pool` of resnet50; empty = the backbone's default.
        weights: `hub` (torchvision's, downloaded), `random` (for trials only), or a .pth / .safetensors file.
        preprocess: pixels to network input.
        precision: auto takes float16 where the CPU or GPU does it well and a start-up check passes.
        batch: the one batch shape of inference, the last batch padded, so that a code never depends on its
            neighbours; on a CPU it is halved until activations stay small (hashdist/models/backbones.py).
        threads: CPU threads per worker; 0 = 1, so that features are the same on any number of cores.
        workers: feature actors; 0 = one per GPU, or as many as the CPUs allow.
        source: URI of the user's own features (parquet, or npy + parquet in the clip-retrieval layout); when
            set nothing is extracted.
        snapshot: URI of committed features to use as they are.
    """

    backbone: str = "pixels"
    tap: str = ""
    weights: str = "hub"
    preprocess: PreprocessSettings = field(default_factory=PreprocessSettings)
    precision: Literal["auto", "float32", "float16"] = "auto"
    batch: int = 64
    threads: int = 0
    workers: int = 0
    source: str = ""
    snapshot: str = ""

    RESOURCES: ClassVar[frozenset[str]] = frozenset({"snapshot", "workers", "threads"})
    identity = _identity


@dataclass(frozen=True)
class GraphSettings:
    """The images that are trained on, and their neighbour graph.

    Args:
        train_sample: train on the images with this many smallest ids: uniform, and stable under growth.
        protocol: take the training set of this evaluation protocol instead: a name, or file:PATH-or-URI (see
            docs/protocols.md).
        protocol_seed: seed of that protocol's split.
        labelled: leave out images without a label (a method that learns from labels needs one for each).
        rule: how positive pairs come from neighbour lists: `and` (DSAH), `union` (DDH), `none` (no neighbours are
            searched: the sample alone); auto = the rule of train.method.
        neighbours: k1, nearest neighbours per image by cosine; 0 = 5 % of the sample, at most 500, or 15 for `union`.
        shared: k2, images per row with the largest overlap of neighbour lists; 0 = k1, or 6 for `union`.
        symmetrize: make W0 symmetric by or, by and, or not at all.
        part_rows: rows of the graph per part.
        workers: graph tasks at once; 0 = one per two CPUs.
        threads: CPU threads per task.
        snapshot: URI of a committed graph to use as it is.
    """

    train_sample: int = 20_000
    protocol: str = ""
    protocol_seed: int = 0
    labelled: bool = False
    rule: str = "auto"
    neighbours: int = 0
    shared: int = 0
    symmetrize: Literal["or", "and", "none"] = "or"
    part_rows: int = 32_768
    workers: int = 0
    threads: int = 2
    snapshot: str = ""

    RESOURCES: ClassVar[frozenset[str]] = frozenset({"snapshot", "workers", "threads", "part_rows"})
    identity = _identity


@dataclass(frozen=True)
class TrainSettings:
    """The method that is trained, and the values that it is trained with.

    Args:
        method: file name of a method in hashdist/methods.
        preset: the method's named values: `paper` or `release`.
        bits: code length, a multiple of 8.
        seed: seed of initial weights, order and dropout.
        mode: `frozen` trains the hash head on committed features; `images` trains end to end.
        options: single values of the method's settings that differ from the preset.
        workers: Ray Train workers (world size).
        threads: CPU threads per worker.
        gpu: one GPU per worker; auto = when the cluster has one.
        max_failures: restarts of crashed workers before the run fails.
        checkpoint_steps: commit a checkpoint every this many steps as well as after each epoch; 0 = epochs only.
        fresh: any text: a new run beside an older one with the same settings.
        snapshot: URI of a committed model to use as it is.
    """

    method: str = "dsah"
    preset: str = "paper"
    bits: int = 64
    seed: int = 0
    mode: Literal["frozen", "images"] = "frozen"
    options: dict[str, Any] = field(default_factory=dict)
    workers: int = 2
    threads: int = 1
    gpu: Literal["auto", "yes", "no"] = "auto"
    max_failures: int = 3
    checkpoint_steps: int = 0
    fresh: str = ""
    snapshot: str = ""

    RESOURCES: ClassVar[frozenset[str]] = frozenset(
        {"snapshot", "workers", "threads", "gpu", "max_failures", "checkpoint_steps"}
    )
    identity = _identity


@dataclass(frozen=True)
class EncodeSettings:
    """How the whole collection is encoded.

    Args:
        workers: encoding tasks at once; 0 = one per core or GPU, fewer for few rows.
        snapshot: URI of committed codes to use as they are.
    """

    workers: int = 0
    snapshot: str = ""

    RESOURCES: ClassVar[frozenset[str]] = frozenset({"snapshot", "workers"})
    identity = _identity


@dataclass(frozen=True)
class IndexSettings:
    """The index that is built and kept.

    Args:
        name: the index lives at ROOT/indexes/NAME.
        uri: a full URI instead of ROOT/indexes/NAME.
        shard_rows: rows per shard file at most.
        compact_dead_share: compaction is due when more than this share of all rows is deleted or replaced, and writes
            every shard again of which more than this share is.
        compact_small_shards: compaction is due at this many small shards (or files of deletions), and merges them.
        compact_small_share: a shard of fewer rows than this share of shard_rows is small.
        rerank: keep the features beside the codes, for two-stage ranking (2 bytes a value); frozen mode only.
    """

    name: str = "images"
    uri: str = ""
    shard_rows: int = 8_000_000
    compact_dead_share: float = 0.2
    compact_small_shards: int = 16
    compact_small_share: float = 0.25
    rerank: bool = False

    def location(self, root: str) -> str:
        """URI of the index: its own, or ROOT/indexes/NAME."""
        return self.uri or f"{root.rstrip('/')}/indexes/{self.name}"


@dataclass(frozen=True)
class GateSettings:
    """Checks of a new version of the index; one that does not pass waits as a candidate (docs/promotion.md).

    Args:
        probes: images that are encoded again, and whose codes must be the stored ones.
        agreement: share of them whose code must be equal; none may be more than one bit away.
        parts: parts of the features, or of the collection, that are read for this at most, evenly spaced.
        sample: images of the probe set, within which quality is measured; chosen once, then kept.
        queries: how many of them are queries.
        recall_at: k of recall@k by exact cosine neighbours; where images have labels it is mAP instead.
        tolerance: share of what the last version's mAP or recall stands above chance that may be lost.
        floor: share of what random hyperplanes of the same length stand above chance, for a version that has no
            earlier one to be compared with.
        constant_bits: share of the bits that may be equal in 98 % of the images.
        collisions: probability that two images have equal codes, at most.
        lost_rows: share of the served rows that may be gone.
        fewest: rows below which quality, bits and collisions are not judged.
    """

    probes: int = 1000
    agreement: float = 0.999
    parts: int = 32
    sample: int = 10_000
    queries: int = 500
    recall_at: int = 100
    tolerance: float = 0.15
    floor: float = 0.9
    constant_bits: float = 0.25
    collisions: float = 0.5
    lost_rows: float = 0.05
    fewest: int = 200


@dataclass(frozen=True)
class EvaluateSettings:
    """The protocol and the metrics of an evaluation.

    Args:
        protocol: query, training and database split: a name, or file:PATH-or-URI (see docs/protocols.md); empty: all
            images are database and `queries` of them, taken by id, are queries.
        protocol_seed: seed of the split.
        cut: R of mAP@R and of the papers' ranked lists.
        precision_at: N of precision@N.
        queries: queries of the label-free recall, and of an evaluation without protocol.
        recall_at: k of the label-free recall@k against exact cosine neighbours.
        baselines: shallow methods (lsh, itq, ...) fitted on the same features and training images, for comparison.
    """

    protocol: str = ""
    protocol_seed: int = 0
    cut: int = 5000
    precision_at: int = 100
    queries: int = 1000
    recall_at: int = 10
    baselines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ClusterSettings:
    """The Ray cluster that stages run on.

    Args:
        address: address of a running Ray cluster; `auto` joins the one of RAY_ADDRESS and else starts one on this
            machine; `local` always starts one.
        cpus: logical CPUs of a cluster started here; 0 = the machine's, at least 4.
        object_store_mb: object store of a cluster started here, in MiB.
    """

    address: str = "auto"
    cpus: int = 0
    object_store_mb: int = 512


@dataclass(frozen=True)
class MetricsSettings:
    """Places that the driver's metrics go to; workers report through Ray's own endpoint in any case.

    Args:
        port: serve the metrics for Prometheus on this loopback port while the job runs; 0 = no.
        gateway: host:port of a push gateway that gets the metrics when the job ends.
    """

    port: int = 0
    gateway: str = ""


@dataclass(frozen=True)
class ServiceSettings:
    """The search service (docs/operate.md): `hashdist serve`, or the RayService in k8s/.

    Args:
        host: address that `hashdist serve` listens on; other machines reach it only where this is not the loopback.
        port: port of the service.
        replicas: copies of the search, each with all shards mapped (or all actors at hand).
        spread: over how many processes the shards are spread where they do not fit one; 0 = each replica has all.
        cpus: logical CPUs that Ray reserves for a replica, and for each process of `spread`.
        encoders: processes that turn pictures into codes; 0 = only keys and codes are searched with.
        encoder_gpu: whether an encoder takes a GPU; auto = where the cluster has one.
        encode_batch: pictures that an encoder takes at once.
        refresh_s: the store is asked for a newer version this often, in seconds.
        held_versions: older versions that stay open for requests that name them.
        max_k: most results of a request.
        max_body_mb: most MB of a request's body.
        max_pixels: most pixels, width x height, of a picture.
        images_per_s: pictures that a replica lets be decoded a second, for queries and for showing; twice that at once.
        waiting: requests that a replica works on at once; above twice that the service answers 503.
        token_env: environment variable with the bearer token that requests must carry; unset or empty = none is asked.
        pictures: show the collection's pictures, by key.
        uris: say in results where pictures lie.
        drain_s: how long requests that have begun may go on when a replica is stopped.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    spread: int = 0
    cpus: float = 1
    encoders: int = 1
    encoder_gpu: Literal["auto", "yes", "no"] = "auto"
    encode_batch: int = 16
    refresh_s: float = 10.0
    held_versions: int = 2
    max_k: int = 1000
    max_body_mb: float = 20.0
    max_pixels: int = 64_000_000
    images_per_s: float = 50.0
    waiting: int = 100
    token_env: str = "HASHDIST_TOKEN"
    pictures: bool = True
    uris: bool = False
    drain_s: float = 20.0


@dataclass(frozen=True)
class Settings:
    """One run of hashdist: a root on local disk or S3, and the settings of every stage.

    Args:
        root: folder or s3:// URI under which every artefact and index is committed.
        fresh: any text: salts the names of all artefacts, so that nothing committed before is reused.
    """

    root: str = ""
    fresh: str = ""
    collection: CollectionSettings = field(default_factory=CollectionSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    graph: GraphSettings = field(default_factory=GraphSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    encode: EncodeSettings = field(default_factory=EncodeSettings)
    index: IndexSettings = field(default_factory=IndexSettings)
    gate: GateSettings = field(default_factory=GateSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    service: ServiceSettings = field(default_factory=ServiceSettings)
