"""Options that one command takes, beside the settings that all of them read."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SearchOptions:
    """A query, the way it is answered, and how the answer is shown.

    Args:
        version: an older version of the index, by number or tag; 0 = the newest.
        image: image file to search with; needs the model that the index names, or --model.
        key: key of an image in the index to search with.
        code: code to search with, as hexadecimal bytes.
        queries: file of queries, a key or a hexadecimal code a line; the answers are JSON lines; - = standard input.
        model: URI of the model that encodes --image; empty = the one that the index was made with.
        k: number of results.
        radius: all images whose codes differ in at most this many bits, instead of the k nearest; -1 = the k nearest.
        where: only images that match, such as "label in 3,5 and taken >= 2020" (docs/search.md).
        exclude_self: leave the image of --key out of its own results.
        rerank: order the nearest candidates by the cosine of their features; the index must keep them (index.rerank).
        candidates: how many candidates --rerank orders; 0 = 10 k.
        engine: what looks at the codes: scan, or another one of docs/search.md (a wrong name lists them).
        probes: lists of a shard that ivf looks at; 0 = 16.
        flips: bits of each piece of a code that multihash lets differ; -1 = 1.
        recall: also measure the engine's recall@k against the scan, with this many images of the index as queries.
        actors: spread the shards over this many Ray actors; 0 = search in this process.
        html: write the results as a sheet of pictures to this file as well.
        candidate: search the candidate that waits for promotion.
    """

    version: int | str = 0
    image: str = ""
    key: str = ""
    code: str = ""
    queries: str = ""
    model: str = ""
    k: int = 10
    radius: int = -1
    where: str = ""
    exclude_self: bool = False
    rerank: bool = False
    candidates: int = 0
    engine: str = "scan"
    probes: int = 0
    flips: int = -1
    recall: int = 0
    actors: int = 0
    html: str = ""
    candidate: bool = False


@dataclass(frozen=True)
class PromoteOptions:
    """Leave to serve the candidate although the gate did not pass.

    Args:
        force: serve the candidate in any case; the reason and the checks that failed are recorded.
        reason: why it is served by force.
    """

    force: bool = False
    reason: str = ""


@dataclass(frozen=True)
class TagOptions:
    """A name for a version, which no clean-up expires while it has one.

    Args:
        name: the tag; not a number.
        version: the version to name; 0 = the newest.
        delete: remove the tag instead.
    """

    name: str = ""
    version: int = 0
    delete: bool = False


@dataclass(frozen=True)
class RollbackOptions:
    """The version whose content a new version gets.

    Args:
        to: number or tag of the version.
    """

    to: int | str = 0


@dataclass(frozen=True)
class VacuumOptions:
    """The versions and files that a clean-up may delete.

    Args:
        older_than: versions that were superseded, and unfinished uploads that were begun, longer ago than this: a
            number with s, m, h, d or w.
        dry_run: print what would go, change nothing.
        force: allow less than an hour, under which searches and builds that are running lose their files.
        artefacts: also what no kept version was made from (listings, features, graphs, models, codes), and what
            training runs left behind.
        keep: artefacts to keep nevertheless, by URI or name.
    """

    older_than: str = "7d"
    dry_run: bool = False
    force: bool = False
    artefacts: bool = False
    keep: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CompactOptions:
    """The extent of a compaction; the index settings say when it is due, and which shards are small.

    Args:
        all: as few shards as possible, without any deleted row.
        dry_run: print what would be done, change nothing.
    """

    all: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class PurgeOptions:
    """The images that are erased, from all versions of all indexes under the root and from all artefacts.

    Args:
        keys: keys of the images; words after the command are keys too. They stay in your shell's history.
        keys_file: a file with one key a line.
        reason: why; it stays in the log for ever, and must name no image.
    """

    keys: list[str] = field(default_factory=list)
    keys_file: str = ""
    reason: str = ""


@dataclass(frozen=True)
class StorageOptions:
    """The store that is checked.

    Args:
        uri: folder or s3:// URI; empty = the root.
    """

    uri: str = ""


@dataclass(frozen=True)
class ReindexOptions:
    """How an index follows its collection.

    Args:
        plan: print what would be done (counts, bytes, requests, seconds from a measured sample), and change nothing.
        retry_failed: encode images again that could not be encoded before and have not changed since.
        changes: file of changes to follow instead of listing: lines of `put<TAB>key` or `delete<TAB>key`, or parquet
            with the columns key and op; a path or s3://.
        inventory: manifest.json of an S3 Inventory to read instead of listing; a path or s3://.
        in_process: images up to which the difference is encoded in this process; more go to Ray.
    """

    plan: bool = False
    retry_failed: bool = False
    changes: str = ""
    inventory: str = ""
    in_process: int = 5000


@dataclass(frozen=True)
class DedupOptions:
    """Near-duplicates of an index.

    Args:
        radius: images whose codes differ in at most this many bits are near-duplicates; clusters are chains of them.
        out: parquet file of the clusters (cluster, id, key, distance); a path or s3://.
        previous: such a file of an older version of the index, made with the same radius: only what has changed since
            is compared.
        within_shard: only pairs of one shard; a quick look, not all there is.
        block_rows: rows that a task joins with as many others.
    """

    radius: int = 2
    out: str = ""
    previous: str = ""
    within_shard: bool = False
    block_rows: int = 4_000_000


@dataclass(frozen=True)
class QuickstartOptions:
    """The folder that the quickstart works in.

    Args:
        folder: images, artefacts, index and report go below this folder.
        seed: seed of the training.
    """

    folder: str = "hashdist-quickstart"
    seed: int = 0


@dataclass(frozen=True)
class CompareOptions:
    """The methods that are compared; the data are those of the features settings, the split is evaluate.protocol.

    Args:
        methods: `name` or `name:preset`; without a preset it is `frozen` in frozen mode where there is one, else
            `paper`.
        variants: further rows by name: mappings with `method` and any of `preset`, `options` and `graph`.
        bits: code lengths.
        seeds: how many seeds; each draws its own split, initial weights and order.
        first_seed: the first of the seeds.
        drop_labels: classes that count for nothing; images left without a label take no part.
        published: tables of the papers to lay beside (see hashdist/commands/published.yaml).
        watch: measure after every N epochs too; 0 = at the end only.
        svm: fit a support vector machine on the codes too; the protocol must have validation images.
        part: I/N: compute only every N-th missing cell, for several processes at once.
        out: folder for the tables (Markdown, JSON) and figures; empty = none are written.
    """

    methods: list[str] = field(default_factory=list)
    variants: dict[str, Any] = field(default_factory=dict)
    bits: list[int] = field(default_factory=lambda: [16, 32, 64])
    seeds: int = 3
    first_seed: int = 0
    drop_labels: list[int] = field(default_factory=list)
    published: list[str] = field(default_factory=list)
    watch: int = 0
    svm: bool = False
    part: str = ""
    out: str = ""


@dataclass(frozen=True)
class ListFiles:
    """Text files with one image a line: its key, then 0/1 flags or nothing. Commas stand between files of one set.

    Args:
        query: images asked for.
        train: images learned from; none = the database.
        database: images searched.
        validation: images that choose what is not learned; usually none.
    """

    query: str = ""
    train: str = ""
    database: str = ""
    validation: str = ""


@dataclass(frozen=True)
class ProtocolOptions:
    """The source of a protocol file: lists, or a draw among a data set's images or among committed features.

    Args:
        protocol: which protocol draws (see docs/protocols.md); with lists, only the name to write down.
        protocol_seed: seed of the draw.
        layout: of the data set at `source`: cifar10, folder, mirflickr24, mirflickr38, nuswide, nuswide21, flowers17
            or flags.
        source: folder or file of the data set; empty = the committed features that the other settings name.
        lists: the sets themselves, instead of a draw.
        out: protocol file to write; a path or s3://.
    """

    protocol: str = ""
    protocol_seed: int = 0
    layout: str = ""
    source: str = ""
    lists: ListFiles = field(default_factory=ListFiles)
    out: str = ""


@dataclass(frozen=True)
class ProtocolCheckOptions:
    """The protocol file that is checked; with --root or --features.snapshot also against those features.

    Args:
        file: path or URI.
    """

    file: str = ""


@dataclass(frozen=True)
class ConvertOptions:
    """A data set in its own layout, and the collection to make of it.

    Args:
        layout: see docs/protocols.md.
        source: folder or file of the data set.
        images: folder that the keys are relative to; empty = the source.
        seed: which of a data set's own splits, where it has several.
        out: parquet file to write.
    """

    layout: str = ""
    source: str = ""
    images: str = ""
    seed: int = 0
    out: str = ""


@dataclass(frozen=True)
class ReportOptions:
    """The contents of the report, and its place.

    Args:
        out: the HTML file to write.
        queries: rows of the sheet of retrieved pictures.
        figures: folder for the figures as PNG and SVG; empty = NAME-figures beside NAME.html.
        evaluations: files of further evaluations, as `hashdist evaluate --json` prints them; with this run's own they
            make the figure of mAP over bits.
    """

    out: str = "report.html"
    queries: int = 8
    figures: str = ""
    evaluations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CompletionOptions:
    """The shell that completes commands and flags.

    Args:
        shell: bash or zsh.
    """

    shell: str = ""
