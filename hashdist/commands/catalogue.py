"""Every command: what it does, which settings it reads, what people type.

`hashdist --help`, the completion of a shell and the command line itself are made from this table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hashdist.ground.options import (
    CompactOptions,
    CompareOptions,
    CompletionOptions,
    ConvertOptions,
    DedupOptions,
    PromoteOptions,
    ProtocolCheckOptions,
    ProtocolOptions,
    PurgeOptions,
    QuickstartOptions,
    ReindexOptions,
    ReportOptions,
    RollbackOptions,
    SearchOptions,
    StorageOptions,
    TagOptions,
    VacuumOptions,
)
from hashdist.ground.settings import Settings

CONFIG = "config"
"""The flag that names a YAML file of settings."""

SWITCHES = {"json": "print exactly one JSON object on stdout", "print_config": "print the settings as YAML, and end"}
"""Flags of every command that take no value, and what they do."""


@dataclass(frozen=True)
class Command:
    """A command: what it does, and the `module:function` that does it, imported only when it is called.

    The function takes the settings, then `fixed`, then the command's own options if it has any.

    Args:
        help: what it does: one sentence without its full stop.
        target: `module:function`.
        reads: settings that it reads, by full name or section; every command reads `metrics` besides.
        examples: lines that people type, without the first word.
        shown: settings that it reads and that people change, by full name.
        fixed: arguments of the function before the options.
        options: class of the command's own options.
        short: section whose settings may be given without its name: `--method` for `--train.method`.
        first: option or setting that words without dashes stand for; or what says which, given such a word.
        word: such a word, as the help names it.
        rooted: whether it works below a root, which is then ./hashdist where none is given.
    """

    help: str
    target: str
    reads: tuple[str, ...]
    examples: tuple[str, ...]
    shown: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    options: type | None = None
    short: str = ""
    first: str | Callable[[str], str] = ""
    word: str = ""
    rooted: bool = True

    @property
    def own(self) -> dict[str, Any]:
        """Types of the command's own options, by name."""
        return dict(flags(self.options)) if self.options else {}

    @property
    def settings(self) -> dict[str, Any]:
        """Types of the settings that the command reads, by full name."""
        reads = {*self.reads, "metrics"}
        return {name: hint for name, hint in flags(Settings) if name in reads or reads & _above(name)}


def _above(name: str) -> set[str]:
    """The sections that a setting is in: features and features.preprocess for features.preprocess.size."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def flags(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and type of every setting of a class of settings, with those of the classes inside it."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        hint = hints[field.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from flags(hint, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hint


def _named(section: str) -> tuple[str, ...]:
    """The settings of a stage that its artefact is named by: other stages find it by them, or by its snapshot."""
    kind = get_type_hints(Settings)[section]
    names = [field.name for field in fields(kind) if field.name not in kind.RESOURCES]
    return tuple(f"{section}.{name}" for name in (*names, "snapshot"))


# what is read to find the artefacts up to these
_LISTING = ("root", "fresh", "cluster", "collection")
_FEATURES = (*_LISTING, *_named("features"))
_GRAPH = (*_FEATURES, *_named("graph"), "train.method")
_MODEL = (*_GRAPH, *_named("train"))
_CODES = (*_MODEL, *_named("encode"))

_KEYED = ("root", "fresh", "collection", *_named("features"))

_INDEX = ("root", "index.name", "index.uri")
_BUILT = ("index.name", "index.uri", "index.shard_rows", "index.rerank", "gate")
_COMPACTED = ("index.shard_rows", "index.compact_dead_share", "index.compact_small_shards", "index.compact_small_share")
_ALL = (*_LISTING, "features", "graph", "train", "encode", *_BUILT, "evaluate")


def _stage(stage: str, text: str, reads: tuple[str, ...], shown: tuple[str, ...], short: str = "") -> Command:
    """A stage of the pipeline, which finds by the settings what the stages before it have committed."""
    name = "index build" if stage == "index" else stage
    return Command(
        text,
        "hashdist.stages.pipeline:run_stage",
        reads,
        (f"{name} photos/", f"{name} --config pipeline.yaml"),
        ("root", "collection.uri", *shown, "cluster.address"),
        fixed=(stage,),
        short=short,
        first="collection.uri",
        word="FOLDER",
    )


def _image_or_key(word: str) -> str:
    """What a word after `search` is: the path of a file is an image, any other word a key."""
    return "image" if Path(word).is_file() else "key"


GROUPS: dict[str, dict[str, Command]] = {
    "make an index": {
        "quickstart": Command(
            "digits through every stage, a search, an evaluation, a growth step and a report",
            "hashdist.commands.quickstart:run",
            _ALL,
            ("quickstart", "quickstart demo/"),
            ("cluster.cpus", "cluster.object_store_mb"),
            options=QuickstartOptions,
            first="folder",
            word="FOLDER",
            rooted=False,
        ),
        "pipeline": Command(
            "every stage in order, skipping what is committed",
            "hashdist.stages.pipeline:run_all",
            _ALL,
            ("pipeline photos/", "pipeline photos/ --train.bits 32", "pipeline --config pipeline.yaml"),
            (
                *("root", "collection.uri", "features.backbone", "features.weights", "train.method", "train.preset"),
                *("train.bits", "train.workers", "index.name", "evaluate.protocol", "evaluate.baselines"),
                "cluster.address",
            ),
            first="collection.uri",
            word="FOLDER",
        ),
        "collection": _stage(
            "collection",
            "list the images and commit the listing",
            _LISTING,
            ("collection.format", "collection.labels"),
        ),
        "features": _stage(
            "features",
            "one feature vector per image, or the user's own features",
            (*_LISTING, "features"),
            ("features.backbone", "features.tap", "features.weights", "features.source", "features.workers"),
        ),
        "graph": _stage(
            "graph",
            "exact kNN graph of the training sample",
            (*_FEATURES, "graph", "train.method"),
            ("graph.train_sample", "graph.protocol", "graph.neighbours", "graph.rule"),
        ),
        "train": _stage(
            "train",
            "train a hash function",
            (*_GRAPH, "train"),
            (
                *("train.method", "train.preset", "train.bits", "train.mode", "train.seed", "train.workers"),
                "train.options",
            ),
            short="train",
        ),
        "encode": _stage("encode", "codes of the whole collection", (*_MODEL, "encode"), ("encode.workers",)),
        "index build": _stage(
            "index",
            "build the sharded index from the codes",
            (*_CODES, *_BUILT),
            ("index.name", "index.shard_rows", "index.rerank"),
        ),
    },
    "ask it": {
        "search": Command(
            "the images nearest to an image, a key or a code",
            "hashdist.commands.search:run",
            (*_INDEX, "cluster"),
            (
                "search photo.jpg",
                "search --key 3/0003.png -k 5",
                'search photo.jpg --where "label in 3,5" --html hits.html',
            ),
            _INDEX,
            options=SearchOptions,
            first=_image_or_key,
            word="FILE|KEY",
        ),
        "dedup": Command(
            "clusters of near-duplicates",
            "hashdist.commands.dedup:dedup",
            (*_INDEX, "cluster"),
            ("dedup --out duplicates.parquet", "dedup --radius 4 --out duplicates.parquet"),
            (*_INDEX, "cluster.address"),
            options=DedupOptions,
        ),
    },
    "keep it fresh": {
        "reindex": Command(
            "index what was added, changed or removed since: what a cron runs",
            "hashdist.reindex.run:reindex",
            (*_LISTING, "features", "encode.workers", "index", "gate"),
            ("reindex photos/", "reindex --config pipeline.yaml --plan"),
            (*_INDEX, "collection.uri", "gate.tolerance"),
            options=ReindexOptions,
            first="collection.uri",
            word="FOLDER",
        ),
        "index promote": Command(
            "serve the candidate that waits",
            "hashdist.commands.index:index_promote",
            (*_INDEX, "gate"),
            ("index promote", 'index promote --force --reason "seen by eye"'),
            (*_INDEX, "gate.tolerance", "gate.floor"),
            options=PromoteOptions,
        ),
        "index discard": Command(
            "drop the candidate that waits",
            "hashdist.commands.index:index_discard",
            _INDEX,
            ("index discard", "index discard --index.name photos"),
            _INDEX,
        ),
    },
    "look after it": {
        "index log": Command(
            "the versions of an index",
            "hashdist.commands.index:index_log",
            _INDEX,
            ("index log", "index log --root s3://bucket/run --index.name photos"),
            _INDEX,
        ),
        "index tag": Command(
            "name a version, which then stays",
            "hashdist.commands.index:index_tag",
            _INDEX,
            ("index tag shown", "index tag shown --version 3", "index tag shown --delete"),
            _INDEX,
            options=TagOptions,
            first="name",
            word="NAME",
        ),
        "index rollback": Command(
            "a new version with the content of an older one",
            "hashdist.commands.index:index_rollback",
            _INDEX,
            ("index rollback 3", "index rollback --to shown"),
            _INDEX,
            options=RollbackOptions,
            first="to",
            word="VERSION|TAG",
        ),
        "index verify": Command(
            "read and check every byte of every kept version",
            "hashdist.commands.index:index_verify",
            _INDEX,
            ("index verify", "index verify --root s3://bucket/run --json"),
            _INDEX,
        ),
        "index compact": Command(
            "merge small shards and drop deleted rows",
            "hashdist.commands.index:index_compact",
            (*_INDEX, *_COMPACTED),
            ("index compact --dry-run", "index compact --all"),
            (*_INDEX, *_COMPACTED),
            options=CompactOptions,
        ),
        "index vacuum": Command(
            "expire old versions, and delete what nothing needs",
            "hashdist.commands.index:index_vacuum",
            _INDEX,
            ("index vacuum --dry-run", "index vacuum --older-than 30d", "index vacuum --artefacts --dry-run"),
            _INDEX,
            options=VacuumOptions,
        ),
        "index purge": Command(
            "erase images from all versions and artefacts",
            "hashdist.commands.purge:index_purge",
            ("root", "index.uri"),
            ('index purge 3/0003.png --reason "asked for"', "index purge --keys-file keys.txt"),
            ("root", "index.uri"),
            options=PurgeOptions,
            first="keys",
            word="KEY...",
        ),
        "storage check": Command(
            "prove what a store must do to be written to",
            "hashdist.commands.storage:storage_check",
            ("root",),
            ("storage check s3://bucket/run", "storage check /mnt/share/run --json"),
            ("root",),
            options=StorageOptions,
            first="uri",
            word="URI",
            rooted=False,
        ),
    },
    "compare methods": {
        "evaluate": _stage(
            "evaluate",
            "mAP, precision and recall by a protocol",
            (*_CODES, "evaluate", "index.rerank"),
            ("evaluate.protocol", "evaluate.cut", "evaluate.queries", "evaluate.recall_at", "evaluate.baselines"),
        ),
        "compare": Command(
            "methods x code lengths x seeds on one protocol: tables and figures",
            "hashdist.commands.compare:run",
            (
                *(*_FEATURES, "graph", "encode"),
                *("train.mode", "train.workers", "train.threads", "train.gpu", "train.max_failures"),
                *("train.checkpoint_steps", "evaluate.protocol", "evaluate.cut", "evaluate.precision_at"),
                "evaluate.recall_at",
            ),
            (
                "compare dsah itq lsh --evaluate.protocol uniform:1000:4000",
                "compare --config compare.yaml --out results/",
            ),
            (
                *("root", "collection.uri", "features.backbone", "features.source", "evaluate.protocol"),
                *("evaluate.cut", "train.mode", "train.workers", "graph.train_sample"),
            ),
            options=CompareOptions,
            first="methods",
            word="METHOD...",
        ),
        "report": Command(
            "one HTML page of a run",
            "hashdist.commands.report:write",
            (*_CODES, *_INDEX, "index.rerank", "evaluate"),
            ("report --config pipeline.yaml", "report --config pipeline.yaml --out run.html --queries 4"),
            ("root", "collection.uri", "train.method", "train.bits", "index.name", "evaluate.protocol"),
            options=ReportOptions,
        ),
        "protocol make": Command(
            "write the query, training and database sets of a protocol to a file",
            "hashdist.commands.protocol:protocol_make",
            _KEYED,
            (
                "protocol make --protocol uniform:100:1000 --root run/ --out own.json",
                "protocol make --lists.query q.txt --lists.database d.txt --out p.json",
            ),
            ("root", "collection.uri", "features.snapshot"),
            options=ProtocolOptions,
            rooted=False,
        ),
        "protocol check": Command(
            "check a protocol file, and that a collection has its images",
            "hashdist.commands.protocol:protocol_check",
            _KEYED,
            ("protocol check cifar.json", "protocol check cifar.json --config pipeline.yaml"),
            ("root", "collection.uri", "features.snapshot"),
            options=ProtocolCheckOptions,
            first="file",
            word="FILE",
            rooted=False,
        ),
        "dataset convert": Command(
            "write a data set in its own layout as a parquet collection with labels",
            "hashdist.commands.protocol:dataset_convert",
            (),
            ("dataset convert --layout cifar10 --source cifar/ --out cifar.parquet",),
            options=ConvertOptions,
            rooted=False,
        ),
    },
    "run it": {
        "serve": Command(
            "the search service, with a page: until it is stopped",
            "hashdist.service.app:serve",
            (*_INDEX, "service", "cluster"),
            ("serve", "serve --root s3://bucket/run --service.port 8080 --service.replicas 2"),
            (
                *_INDEX,
                *("service.host", "service.port", "service.replicas", "service.spread", "service.encoders"),
                *("service.token_env", "service.pictures", "cluster.address"),
            ),
        ),
        "completion": Command(
            "a script that completes commands and flags in a shell",
            "hashdist.commands.completion:write",
            (),
            (
                "completion bash > ~/.hashdist.bash",
                "completion zsh > ~/.zfunc/_hashdist",
            ),
            options=CompletionOptions,
            first="shell",
            word="bash|zsh",
            rooted=False,
        ),
    },
}
"""The commands below what people want."""

COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
"""Every command by name."""


def families() -> dict[str, list[str]]:
    """The commands of two words, by the first of them."""
    found: dict[str, list[str]] = {}
    for name in COMMANDS:
        first, _, second = name.partition(" ")
        if second:
            found.setdefault(first, []).append(name)
    return found
