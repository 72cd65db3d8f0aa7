"""Figures of plain numbers: each function makes one matplotlib Figure and touches nothing else.

No global state of matplotlib is used (no pyplot), so figures may be made anywhere. `save` writes the same bytes for
the same figure, so that figures can be committed and compared.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

COLOURS = ("#1d4e89", "#d1495b", "#2a9d4a", "#e9a23b", "#7b4ea3", "#3aa6b9", "#8c6d46", "#d36ba6", "#6b7280", "#9aae2c")
_MARKERS = "osD^vP*Xhd"


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], xlabel: str, ylabel: str, title: str = ""
) -> Figure:
    """One line per name, through its points (x, y)."""
    figure, axes = _axes(xlabel, ylabel, title)
    for i, (name, (x, y)) in enumerate(lines.items()):
        axes.plot(x, y, label=name, **_style(i), markersize=3, markevery=max(1, len(x) // 20))
    _legend(axes, len(lines))
    return figure


def map_over_bits(
    rows: Mapping[str, Mapping[int, Sequence[float]]],
    paper: Mapping[str, Mapping[int, float]] | None = None,
    *,
    ylabel: str = "mAP",
    title: str = "",
) -> Figure:
    """mAP over code length: per method the mean over seeds, with the standard deviation (n - 1) as error bars.

    Args:
        rows: method -> bits -> values, one per seed.
        paper: method -> bits -> the number that its paper reports; dashed, in the colour of the method of that name.
        ylabel: which mAP it is.
        title: over the figure.
    """
    figure, axes = _axes("bits", ylabel, title)
    order = list(rows) + [name for name in paper or {} if name not in rows]
    for name, by_bits in rows.items():
        bits = sorted(by_bits)
        means = [float(np.mean(by_bits[b])) for b in bits]
        spread = [float(np.std(by_bits[b], ddof=1)) if len(by_bits[b]) > 1 else 0.0 for b in bits]
        axes.errorbar(bits, means, spread, label=name, capsize=3, **_style(order.index(name)), markersize=4)
    for name, reported in (paper or {}).items():
        bits = sorted(reported)
        style = {**_style(order.index(name)), "linestyle": "--", "alpha": 0.6}
        axes.plot(bits, [reported[b] for b in bits], label=f"{name} (paper)", **style, markersize=4)
    ticks = sorted({b for by_bits in [*rows.values(), *(paper or {}).values()] for b in by_bits})
    axes.set_xticks(ticks, [str(b) for b in ticks])
    _legend(axes, len(rows) + len(paper or {}))
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG; the same bytes every time."""
    return _bytes(figure, "png", {"Software": None})


def svg(figure: Figure) -> bytes:
    """The figure as SVG; the same bytes every time, without a date."""
    return _bytes(figure, "svg", {"Date": None, "Creator": None})


def save(figure: Figure, folder: Path | str, name: str) -> list[Path]:
    """Write `name`.png and `name`.svg into the folder, which is made where it is missing; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path, data in zip(paths, (png(figure), svg(figure)), strict=True):
        path.write_bytes(data)
    return paths


def _bytes(figure: Figure, kind: str, metadata: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "hashdist"}):  # ids inside an SVG are random otherwise
        figure.savefig(buffer, format=kind, metadata=dict(metadata), dpi=120)
    return buffer.getvalue()


def _axes(xlabel: str, ylabel: str, title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.25)
    return figure, axes


def _style(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th line; a second turn through the colours has other markers."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": _MARKERS[(i + i // len(COLOURS)) % len(_MARKERS)],
        "linewidth": 1.3,
    }


def _legend(axes: Any, lines: int) -> None:
    if lines > 8:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    elif lines > 1:
        axes.legend(fontsize=8)
