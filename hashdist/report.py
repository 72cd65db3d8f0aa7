"""One self-contained HTML page of a run: what was made, how it was trained, what the codes are worth, what is found.

Pictures are embedded, nothing is loaded from outside. Figures are functions of plain arrays; `write_page` collects
them from the committed snapshots.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hashdist import bits, pipeline, schema
from hashdist.collections import open_collection
from hashdist.commands import picture_tag
from hashdist.searcher import Index, open_index
from hashdist.settings import ReportOptions, Settings
from hashdist.snapshots import read_vectors

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:left}
td.number{text-align:right;font-variant-numeric:tabular-nums}img.plot{max-width:100%}
.row{display:flex;flex-wrap:wrap;gap:6px;align-items:flex-start;margin:.6em 0}
figure{margin:0;text-align:center;font-size:11px;color:#555}figure img{width:64px;height:64px;object-fit:contain;
image-rendering:pixelated;border:3px solid #bbb}figure.right img{border-color:#2a9d4a}
figure.wrong img{border-color:#d1495b}figure.query img{border-color:#1d4e89}
"""


def write(settings: Settings, options: ReportOptions) -> dict[str, Any]:
    """The command: evaluate what is committed and write the page."""
    evaluation = pipeline.run_stage(settings, "evaluate")
    path = write_page(settings, Path(options.out), evaluation, queries=options.queries)
    return {"report": str(path), "text": f"report: {path}"}


def write_page(settings: Settings, path: Path, evaluation: Mapping[str, Any], *, queries: int = 8) -> Path:
    """Write the page of the run that `settings` lead to; returns its absolute path."""
    model = pipeline.snapshot("train", settings).manifest()
    codes = read_vectors(pipeline.snapshot("encode", settings), ["id", "key", "labels", "status", "code"])
    codes = codes.filter(pa.compute.equal(codes["status"], schema.OK))
    index = open_index(settings.index.location(settings.root))
    sections = [
        ("What was made", _table(_facts(settings, model, index))),
        ("Retrieval", _table(_scores(evaluation), head=["metric", *_methods(evaluation)])),
        ("Training", _plot(training_figure(model["history"], model["rounds"]))),
        ("Codes", _plot(code_figure(schema.from_vectors(codes["code"], codes.schema)))),
        ("Retrieved pictures", _sheet(settings, index, codes, queries)),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections)
    title = f"hashdist: {model['method'].upper()}, {model['bits']} bits"
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{page}<h1>{title}</h1>{body}</html>")
    return path


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


def training_figure(history: Sequence[Mapping[str, Any]], rounds: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss terms over epochs, and per round the threshold and the number of positive pairs."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    terms = [k for k, v in (history[0] if history else {}).items() if isinstance(v, float) and k.endswith("loss")]
    for term in terms:
        left.plot([epoch[term] for epoch in history], label=term)
    left.set(xlabel="epoch", ylabel="loss", title="loss over epochs")
    if terms:
        left.legend()
    refreshed = [entry for entry in rounds if isinstance(entry.get("m"), float)]
    numbers = [entry["round"] + 1 for entry in refreshed]
    right.plot(numbers, [entry["pairs"] for entry in refreshed], "o-", color="#2a9d4a")
    right.set(xlabel="after round", ylabel="positive pairs", title="similarity refresh")
    right.set_xticks(numbers)
    twin = right.twinx()
    twin.plot(numbers, [entry["m"] for entry in refreshed], "s--", color="#d1495b")
    twin.set_ylabel("threshold m")
    return figure


def code_figure(codes_NW: NDArray[Any]) -> Figure:
    """Balance of each bit, and correlation between bits, of packed codes uint8 [N, W]."""
    signs_NL = bits.signs(codes_NW.astype(np.uint8))
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(range(signs_NL.shape[1]), (signs_NL > 0).mean(0), color="#1d4e89")
    left.axhline(0.5, color="#d1495b", linewidth=1)
    distinct = len(np.unique(codes_NW, axis=0))
    left.set(xlabel="bit", ylabel="share of ones", ylim=(0, 1), title=f"{distinct} distinct codes of {len(codes_NW)}")
    centred = signs_NL - signs_NL.mean(0)
    spread = np.sqrt((centred**2).mean(0)).clip(1e-9)
    shown = right.imshow((centred.T @ centred) / len(centred) / np.outer(spread, spread), vmin=-1, vmax=1, cmap="RdBu")
    right.set(title="correlation of bits")
    figure.colorbar(shown, ax=right)
    return figure


def _sheet(settings: Settings, index: Index, codes: pa.Table, queries: int) -> str:
    """A row per query: the query, then what is found, right and wrong marked where there are labels."""
    labels = dict(zip(codes["key"].to_pylist(), codes["labels"].to_pylist(), strict=True))
    keys = codes["key"].to_pylist()[:queries]
    hits = index.search(index.codes_of(keys), k=11)
    found = [[(k, int(d)) for k, d in zip(row, distances, strict=True) if k != key][:10]
             for key, row, distances in zip(keys, hits.keys(), hits.distances, strict=True)]  # fmt: skip
    wanted = {*keys, *(k for row in found for k, _ in row)}
    pictures = open_collection(pipeline.snapshot("collection", settings).uri).fetch(sorted(wanted))
    rows = []
    for key, row in zip(keys, found, strict=True):
        figures = [_figure(pictures.get(key), "query", "query")]
        figures += [_figure(pictures.get(k), f"{d} bits", _verdict(labels[key], labels.get(k))) for k, d in row]
        rows.append(f'<div class="row">{"".join(figures)}</div>')
    return "".join(rows)


def _verdict(query: list[int] | None, found: list[int] | None) -> str:
    if not query or not found:
        return ""
    return "right" if set(query) & set(found) else "wrong"


def _figure(data: bytes | None, caption: str, kind: str) -> str:
    return f'<figure class="{kind}">{picture_tag(data)}<figcaption>{caption}</figcaption></figure>'


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    top = f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    return f"<table>{top}{''.join(_cells(row) for row in rows)}</table>"


def _cells(row: Sequence[str]) -> str:
    first, *rest = row
    return f"<tr><td>{html.escape(first)}</td>{''.join(f'<td>{html.escape(cell)}</td>' for cell in rest)}</tr>"


def _plot(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f'<img class="plot" alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
