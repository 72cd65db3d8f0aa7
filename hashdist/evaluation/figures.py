"""Figures of plain numbers: each function makes one matplotlib Figure and touches nothing else.

No global state of matplotlib is used (no pyplot), so figures may be made anywhere. `save` writes the same bytes for
the same figure, so that figures can be committed and compared.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from hashdist.evaluation.statistics import bit_correlation, bit_entropy

COLOURS = ("#1d4e89", "#d1495b", "#2a9d4a", "#e9a23b", "#7b4ea3", "#3aa6b9", "#8c6d46", "#d36ba6", "#6b7280", "#9aae2c")
_MARKERS = "osD^vP*Xhd"
_NOT_LOSS = {"seconds", "images_per_s"}
_ROUND_NAMES = {"pairs": "positive pairs $n_+$", "m": "threshold $m$", "f_w": "agreement with labels $F_w$"}


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


def training(history: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Every loss term over epochs, a panel each; `history` has an entry per epoch."""
    first = history[0] if history else {}
    terms = [name for name, value in first.items() if isinstance(value, float) and name not in _NOT_LOSS]
    figure, panels = _panels(len(terms), title)
    for i, (axes, term) in enumerate(zip(panels, terms, strict=True)):
        axes.plot(range(1, len(history) + 1), [epoch.get(term) for epoch in history], color=COLOURS[i % len(COLOURS)])
        axes.set(title=term, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def rounds(entries: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """The similarity at the end of each round: positive pairs n_+, threshold m, agreement F_w.

    Args:
        entries: one per round, each with `round` and any of `pairs`, `m`, `f_w`; a panel for each that is a number
            anywhere.
        title: over the figure.
    """
    found = {}
    for name in _ROUND_NAMES:
        points = [(entry["round"] + 1, entry[name]) for entry in entries if isinstance(entry.get(name), int | float)]
        if points:
            found[name] = points
    figure, panels = _panels(len(found), title)
    for axes, (name, points) in zip(panels, found.items(), strict=True):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", color=COLOURS[list(_ROUND_NAMES).index(name)])
        axes.set(title=_ROUND_NAMES[name], xlabel="round")
        axes.set_xticks(x)
    return figure


def codes(signs_NL: NDArray[np.floating], sharing: NDArray[np.integer]) -> Figure:
    """Statistics of codes: share of ones and entropy of each bit, correlation between bits, collisions.

    Args:
        signs_NL: codes as -1 and 1.
        sharing: for each distinct code, how many images have it.
    """
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    (balance, entropy), (correlation, collisions) = figure.subplots(2, 2)
    share = (signs_NL > 0).mean(0)
    balance.bar(range(len(share)), share, color=COLOURS[0])
    balance.axhline(0.5, color=COLOURS[1], linewidth=1)
    balance.set(xlabel="bit", ylabel="share of ones", ylim=(0, 1), title="balance of bits")
    entropy.bar(range(len(share)), bit_entropy(share), color=COLOURS[2])
    entropy.set(xlabel="bit", ylabel="bits", ylim=(0, 1.05), title="entropy of bits")
    shown = correlation.imshow(bit_correlation(signs_NL), vmin=-1, vmax=1, cmap="RdBu")
    correlation.set(xlabel="bit", ylabel="bit", title="correlation of bits")
    figure.colorbar(shown, ax=correlation)
    images, count = np.unique(sharing, return_counts=True)
    collisions.loglog(images, count, "o", color=COLOURS[4], markersize=3)
    collisions.set(xlabel="images with one code", ylabel="codes", title="collisions")
    return figure


def scatter(points_N2: NDArray[np.floating], classes_N: Sequence[int | None], title: str = "") -> Figure:
    """Points in the plane, coloured by class; grey where there is none (None)."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    known = sorted({c for c in classes_N if c is not None})
    colours = mpl.colormaps["tab10" if len(known) <= 10 else "nipy_spectral"]
    wanted = np.array([-1 if c is None else c for c in classes_N])
    for i, c in enumerate([-1, *known]):
        part = points_N2[wanted == c]
        colour = "#bbbbbb" if c == -1 else colours(i - 1 if len(known) <= 10 else (i - 0.5) / len(known))
        if len(part):
            axes.scatter(part[:, 0], part[:, 1], s=6, color=[colour], label="none" if c == -1 else str(c))
    axes.set(title=title, xticks=[], yticks=[])
    if 1 < len(known) <= 30:
        axes.legend(fontsize=7, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5), title="label")
    return figure


class Picture(NamedTuple):
    """A picture uint8 [H, W, 3], what stands above it, and whether it is right (None: not known)."""

    image: NDArray[np.uint8]
    caption: str
    right: bool | None = None


def pictures(rows: Sequence[Sequence[Picture]], title: str = "") -> Figure:
    """Rows of pictures, framed green where right and red where wrong."""
    columns = max((len(row) for row in rows), default=1)
    figure = Figure(figsize=(1.5 * columns, 1.75 * max(1, len(rows))), layout="constrained")
    grid = figure.subplots(max(1, len(rows)), columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for axes_row, row in zip(grid, rows, strict=False):
        for axes, picture in zip(axes_row, row, strict=False):
            axes.imshow(picture.image)
            axes.set_title(picture.caption, fontsize=7)
            axes.set_frame_on(picture.right is not None)
            for spine in axes.spines.values():
                spine.set(color=COLOURS[2] if picture.right else COLOURS[1], linewidth=2.5)
    figure.suptitle(title)
    return figure


def overlay(image_HW3: NDArray[np.uint8], heat_HW: NDArray[np.floating]) -> NDArray[np.uint8]:
    """A picture uint8 [H, W, 3] with heat in [0, 1] over it: cold places stay as they are."""
    colours = 255 * mpl.colormaps["inferno"](heat_HW)[:, :, :3]
    weight = 0.7 * np.asarray(heat_HW)[:, :, None]
    mixed: NDArray[np.uint8] = np.rint((1 - weight) * image_HW3 + weight * colours).astype(np.uint8)
    return mixed


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


def _panels(count: int, title: str) -> tuple[Figure, list[Any]]:
    """A figure with that many panels, four to a row."""
    down, across = max(1, -(-count // 4)), max(1, min(count, 4))
    figure = Figure(figsize=(3.1 * across, 2.5 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    for axes in grid.flat[:count]:
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    return figure, list(grid.flat[:count])


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
