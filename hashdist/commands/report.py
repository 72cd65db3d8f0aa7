"""One self-contained HTML page of a run: what was made, how it was trained, what the codes are worth, what is found.

Pictures are embedded, nothing is loaded from outside; the figures are written as PNG and SVG into a folder beside the
page too. Figures are functions of plain arrays (figures.py); `write_page` collects these from the committed snapshots.
"""

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from hashdist.collection.collection import open_collection
from hashdist.collection.decode import BadImage
from hashdist.commands.pictures import Picture, page, side_by_side
from hashdist.evaluation import figures, statistics
from hashdist.ground import bits, schema
from hashdist.ground.errors import InvalidInput
from hashdist.ground.options import ReportOptions
from hashdist.ground.settings import Settings
from hashdist.index import Index, open_index
from hashdist.models.gradcam import grad_cam
from hashdist.models.model import build_head, pixels
from hashdist.models.networks import open_network, spec_settings
from hashdist.stages.cluster.session import observed_session
from hashdist.stages.pipeline import Pipeline, checked
from hashdist.store.commit import Artefact, read_file
from hashdist.store.vectors import read_vectors

_STYLE = """
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:left}
td.number{text-align:right;font-variant-numeric:tabular-nums}img.plot{max-width:100%}
"""

_STATISTICS_ROWS = 30_000  # codes that bit statistics are taken from, drawn at random
_TSNE_ROWS = 1000
_EXPLAINED = 4  # queries with Grad-CAM, each with this many of its results
_OVER_BITS = "map_all_ties"


def write(settings: Settings, options: ReportOptions) -> dict[str, Any]:
    """The command: evaluate what is committed and write the page and its figures."""
    others = [read_evaluation(path) for path in options.evaluations]
    pipeline = Pipeline(checked(settings))
    with observed_session(settings):
        evaluation = pipeline.run("evaluate")
    out = Path(options.out)
    folder = Path(options.figures) if options.figures else None
    path = write_page(pipeline, out, evaluation, queries=options.queries, folder=folder, others=others)
    drawn = (folder or figures_folder(path)).absolute()
    return {"report": str(path), "figures": str(drawn), "text": f"report: {path}\nfigures: {drawn}"}


def figures_folder(page: Path) -> Path:
    """Where the figures of a page go unless a folder is named."""
    return page.with_name(f"{page.stem}-figures")


def read_evaluation(path: str) -> dict[str, Any]:
    """A result that `hashdist evaluate --json` printed. Raises InvalidInput for anything else."""
    try:
        found = json.loads(Path(path).read_text())
        if "bits" in found and "by_method" in found:
            return dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInput(f"{path} must be what `hashdist evaluate --json` printed: {error}") from error
    raise InvalidInput(f"{path} must be what `hashdist evaluate --json` printed, found no `bits` and `by_method` in it")


def write_page(
    pipeline: Pipeline,
    path: Path,
    evaluation: Mapping[str, Any],
    *,
    queries: int = 8,
    folder: Path | None = None,
    others: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the page of a pipeline whose stages are all committed, and its figures; returns the page's absolute path.

    Args:
        pipeline: what the page is about.
        path: of the page.
        evaluation: result of the stage `evaluate`.
        queries: rows of the sheet of retrieved pictures.
        folder: for the figures; None = beside the page.
        others: results of further evaluations, for mAP over bits.
    """
    settings, model = pipeline.settings, pipeline.artefact("train")
    manifest = model.manifest()
    codes = read_vectors(pipeline.artefact("encode"), ["id", "key", "labels", "status", "code"])
    codes = codes.filter(pa.compute.equal(codes["status"], schema.OK))
    codes_NW = schema.from_vectors(codes["code"], codes.schema).astype(np.uint8)
    index = open_index(settings.index.location(settings.root))
    found = _search(pipeline, index, codes, queries)
    path = path.absolute()
    plot = _Plots(folder or figures_folder(path))
    sections = [
        ("What was made", _table(_facts(settings, manifest, index))),
        ("Retrieval", _table(_scores(evaluation), head=["metric", *_methods(evaluation)]) + _curves(plot, evaluation)),
        ("mAP over bits", plot("map_over_bits", over_bits([evaluation, *others]))),
        ("Training", _training(plot, manifest)),
        ("Codes", _table(code_facts(codes_NW)) + plot("codes", _code_figure(codes_NW))),
        ("Codes in the plane (t-SNE)", plot("tsne", tsne_figure(codes_NW, codes["labels"].to_pylist()))),
        ("Retrieved pictures", _sheet(found)),
    ]
    if manifest["mode"] == "images":
        sections.append(("What the codes rest on (Grad-CAM)", _gradcam(plot, model, found)))
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections)
    title = f"hashdist: {manifest['method'].upper()}, {manifest['bits']} bits"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, body, _STYLE))
    return path


class _Plots:
    """Writes figures into a folder, and gives them as images inside the page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, figure: Figure) -> str:
        png, _ = figures.save(figure, self.folder, name)
        data = base64.b64encode(png.read_bytes()).decode()
        return f'<img class="plot" alt="{name}" src="data:image/png;base64,{data}">'


def _facts(settings: Settings, model: Mapping[str, Any], index: Index) -> list[list[str]]:
    backbone = settings.features.backbone
    return [
        ["collection", settings.collection.uri],
        ["features", f"{backbone} (raw pixels, no weights)" if backbone == "pixels" else backbone],
        ["method", f"{model['method'].upper()}, preset {model['preset']}, {model['bits']} bits"],
        ["options", ", ".join(f"{k} = {v}" for k, v in model["options"].items()) or "those of the preset"],
        ["model", model["model_digest"]],
        ["index", f"{index.uri}, version {index.version}, {index.rows} rows"],
    ]


def _methods(evaluation: Mapping[str, Any]) -> list[str]:
    return list(evaluation["by_method"])


def _scores(evaluation: Mapping[str, Any]) -> list[list[str]]:
    by_method = evaluation["by_method"]
    metrics = [name for name, value in next(iter(by_method.values())).items() if isinstance(value, int | float)]
    return [
        [name, *(f"{scores[name]:.4f}" if name in scores else "" for scores in by_method.values())] for name in metrics
    ]


def _curves(plot: _Plots, evaluation: Mapping[str, Any]) -> str:
    """Precision-recall by radius and precision@N of every method; nothing where there are no labels."""
    curves = evaluation.get("curves", {})
    if not curves:
        return ""
    asked = evaluation["queries"]
    radius = {}
    for method, curve in curves.items():
        # a radius at which no query finds anything has no precision
        kept = [i for i, empty in enumerate(curve["empty"]) if empty < asked]
        radius[method] = ([curve["recall"][i] for i in kept], [curve["precision"][i] for i in kept])
    ranks = {
        method: (curve["precision_at"]["n"], curve["precision_at"]["precision"]) for method, curve in curves.items()
    }
    return plot(
        "precision_recall", figures.curves(radius, "recall", "precision", "precision and recall by radius")
    ) + plot("precision_at", figures.curves(ranks, "N", "precision@N", "precision of the first N"))


def over_bits(evaluations: Iterable[Mapping[str, Any]]) -> Figure:
    """mAP of every method over code length, values of one method and length being taken as those of seeds.

    Where there are no labels, the recall of the exact neighbours stands in its place.
    """
    rows: dict[str, dict[int, list[float]]] = {}
    name = _OVER_BITS
    for evaluation in evaluations:
        for method, metrics in evaluation["by_method"].items():
            name = _OVER_BITS if _OVER_BITS in metrics else next(iter(metrics))
            rows.setdefault(method, {}).setdefault(int(evaluation["bits"]), []).append(float(metrics[name]))
    return figures.map_over_bits(rows, ylabel=name)


def _training(plot: _Plots, manifest: Mapping[str, Any]) -> str:
    history, rounds = manifest["history"], manifest["rounds"]
    content = (
        plot("training", figures.training(history, "loss terms over epochs")) if history else "<p>No training.</p>"
    )
    if any(isinstance(entry.get(name), int | float) for entry in rounds for name in ("pairs", "m", "f_w")):
        content += plot("rounds", figures.rounds(rounds, "similarity at the end of each round"))
    return content


def _sample_rows(codes_NW: NDArray[np.uint8], most: int) -> NDArray[np.int64]:
    """Rows of a seeded sample, ascending."""
    rows = np.random.default_rng(0).permutation(len(codes_NW))[:most]
    return np.sort(rows)


def _sharing(codes_NW: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For each distinct code, how many images have it."""
    counts: NDArray[np.int64] = np.unique(codes_NW, axis=0, return_counts=True)[1]
    return counts


def code_facts(codes_NW: NDArray[np.uint8]) -> list[list[str]]:
    """Balance, correlation, entropy and collisions of packed codes, as rows of a table."""
    n, sharing = len(codes_NW), _sharing(codes_NW)
    signs_NL = bits.signs(codes_NW[_sample_rows(codes_NW, _STATISTICS_ROWS)])
    share = (signs_NL > 0).mean(0)
    off = np.abs(statistics.bit_correlation(signs_NL))[~np.eye(len(share), dtype=bool)]
    p = sharing / n
    pairs = float((sharing * (sharing - 1)).sum() / max(1, n * (n - 1)))
    return [
        ["images", f"{n}"],
        ["distinct codes", f"{len(sharing)} ({len(sharing) / n:.2%} of the images)"],
        ["images that share their code", f"{int(sharing[sharing > 1].sum())}, at most {sharing.max()} one code"],
        [
            "collisions: pairs of images with one code",
            f"{pairs:.3g} of all pairs ({0.5 ** len(share):.3g} for random bits)",
        ],
        [
            "entropy of the codes",
            f"{float(-(p * np.log2(p)).sum()):.2f} bits (at most {np.log2(n):.2f} for so many images)",
        ],
        ["entropy of a bit", f"{statistics.bit_entropy(share).mean():.4f} bits on average"],
        [
            "balance: |share of ones - 1/2|",
            f"{np.abs(share - 0.5).mean():.4f} on average, {np.abs(share - 0.5).max():.4f} at most",
        ],
        ["|correlation| of two bits", f"{off.mean():.4f} on average, {off.max():.4f} at most"],
    ]


def _code_figure(codes_NW: NDArray[np.uint8]) -> Figure:
    return figures.codes(bits.signs(codes_NW[_sample_rows(codes_NW, _STATISTICS_ROWS)]), _sharing(codes_NW))


def tsne_figure(codes_NW: NDArray[np.uint8], labels: Sequence[Sequence[int] | None]) -> Figure:
    """t-SNE of a seeded sample of codes, coloured by their first label; Euclidean on signs orders as Hamming does."""
    rows = _sample_rows(codes_NW, _TSNE_ROWS)
    signs_NL = bits.signs(codes_NW[rows]).astype(np.float32)
    title = f"{len(rows)} of {len(codes_NW)} codes"
    if len(rows) < 4:
        return figures.scatter(np.zeros((len(rows), 2)), [None] * len(rows), f"{title}: too few")
    chosen = TSNE(perplexity=min(30.0, (len(rows) - 1) / 3), init="random", random_state=0, n_jobs=1)
    with threadpool_limits(1):
        points_N2 = chosen.fit_transform(signs_NL)
    sets = [labels[row] for row in rows]
    return figures.scatter(points_N2, [min(s) if s else None for s in sets], title)


# Retrieved pictures


@dataclass(frozen=True)
class _Retrieved:
    """Queries and what is found: keys, distances, and whether right (None: not known).

    Attributes:
        keys: of the queries.
        codes_QW: their codes.
        results: per query (key, distance, right), itself left out.
        pictures: encoded images by key.
    """

    keys: list[str]
    codes_QW: NDArray[np.uint8]
    results: list[list[tuple[str, int, bool | None]]]
    pictures: Mapping[str, bytes]


def _search(pipeline: Pipeline, index: Index, codes: pa.Table, queries: int) -> _Retrieved:
    labels = dict(zip(codes["key"].to_pylist(), codes["labels"].to_pylist(), strict=True))
    keys = codes["key"].to_pylist()[:queries]
    codes_QW = index.codes_of(keys)
    hits = index.search(codes_QW, k=11)
    results = [
        [(k, int(d), _right(labels[key], labels.get(k))) for k, d in zip(row, distances, strict=True) if k != key][:10]
        for key, row, distances in zip(keys, hits.keys(), hits.distances, strict=True)
    ]
    wanted = {*keys, *(k for row in results for k, _, _ in row)}
    pictures = open_collection(pipeline.artefact("collection").uri).fetch(sorted(wanted))
    return _Retrieved(keys, codes_QW, results, pictures)


def _right(query: list[int] | None, found: list[int] | None) -> bool | None:
    if not query or not found:
        return None
    return bool(set(query) & set(found))


def _sheet(found: _Retrieved) -> str:
    """A row per query: the query, then what is found, right and wrong marked where there are labels."""
    kinds = {True: "right", False: "wrong", None: ""}
    rows = []
    for key, hits in zip(found.keys, found.results, strict=True):
        query = Picture(found.pictures.get(key), ["query"], "query")
        rows.append(
            side_by_side([query, *(Picture(found.pictures.get(k), [f"{d} bits"], kinds[ok]) for k, d, ok in hits)])
        )
    return "".join(rows)


def _gradcam(plot: _Plots, model: Artefact, found: _Retrieved) -> str:
    try:
        return plot("gradcam", _gradcam_figure(model, found))
    except InvalidInput as error:  # a network without maps
        return f"<p>{html.escape(str(error))}</p>"


def _gradcam_figure(model: Artefact, found: _Retrieved) -> Figure:
    """Grad-CAM of an end-to-end model: what a query's code rests on, and what in its results speaks for that code."""
    manifest = model.manifest()
    state = read_file(model.store, manifest["backbone_weights"])
    network = open_network(spec_settings(manifest["backbone"]), state).eval()
    head = build_head(manifest, read_file(model.store, manifest["head"]), model.uri).eval()
    rows = []
    for key, code_W, results in zip(found.keys, found.codes_QW, found.results, strict=True):
        captions = [(key, "query", None), *((k, f"{d} bits", right) for k, d, right in results[:_EXPLAINED])]
        readable = [
            (_network_input(network.preprocess, found.pictures.get(k)), text, right) for k, text, right in captions
        ]
        shown = [(image, text, right) for image, text, right in readable if image is not None]
        if not shown or readable[0][0] is None:
            continue
        heat = grad_cam(network, head, np.stack([image for image, _, _ in shown]), bits.signs(code_W[None])[0])
        pictures = [figures.Picture(shown[0][0], "query")]
        pictures += [
            figures.Picture(figures.overlay(image, warm), text, right)
            for (image, text, right), warm in zip(shown, heat, strict=True)
        ]
        rows.append(pictures)
        if len(rows) == _EXPLAINED:
            break
    return figures.pictures(rows, "places that speak for the query's code")


def _network_input(preprocess: Any, data: bytes | None) -> NDArray[np.uint8] | None:
    """A picture as the network takes it; None where it cannot be read."""
    try:
        return None if data is None else preprocess(pixels(data))
    except BadImage:
        return None


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    top = f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    return f"<table>{top}{''.join(_cells(row) for row in rows)}</table>"


def _cells(row: Sequence[str]) -> str:
    first, *rest = row
    return f"<tr><td>{html.escape(first)}</td>{''.join(f'<td>{html.escape(cell)}</td>' for cell in rest)}</tr>"
