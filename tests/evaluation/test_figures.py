"""Figures show the numbers they are given, and are written the same every time."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from scipy.stats import entropy

from hashdist.evaluation import figures, statistics


def test_map_over_bits_draws_means_and_spread_over_seeds() -> None:
    rows = {"dsah": {16: [0.2, 0.3, 0.4], 32: [0.5]}, "itq": {16: [0.25, 0.25], 32: [0.1, 0.3]}}
    figure = figures.map_over_bits(rows, {"dsah": {16: 0.35, 64: 0.6}}, ylabel="mAP@ALL", title="digits")
    axes = figure.axes[0]
    means = {bar.get_label(): bar.lines[0].get_xydata() for bar in axes.containers}
    np.testing.assert_allclose(means["dsah"], [[16, 0.3], [32, 0.5]])
    np.testing.assert_allclose(means["itq"], [[16, 0.25], [32, 0.2]])
    (bars,) = axes.containers[0].lines[2]
    np.testing.assert_allclose([s[:, 1] for s in bars.get_segments()], [[0.2, 0.4], [0.5, 0.5]])  # s = .1
    (paper,) = [line for line in axes.lines if line.get_label() == "dsah (paper)"]
    np.testing.assert_allclose(paper.get_xydata(), [[16, 0.35], [64, 0.6]])
    assert paper.get_linestyle() == "--"
    assert paper.get_color() == axes.containers[0].lines[0].get_color()
    assert axes.get_xticks().tolist() == [16, 32, 64]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dsah (paper)", "dsah", "itq"]


@pytest.mark.parametrize("count", [0, 1, 3, 23])
def test_curves_pass_through_their_points(count: int) -> None:
    lines = {f"line {i}": ([0.0, 1.0, 2.0], [float(i), 1.0, 0.5]) for i in range(count)}
    figure = figures.curves(lines, "recall", "precision", "digits")
    axes = figure.axes[0]
    drawn = {line.get_label(): line for line in axes.lines}
    for name, (x, y) in lines.items():
        np.testing.assert_array_equal(drawn[name].get_xydata(), np.transpose([x, y]))
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == count  # every line can be told apart
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("recall", "precision", "digits")


def test_files_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        figure = figures.curves({"x": ([0, 1], [1, 0])}, "x", "y")
        paths = figures.save(figure, tmp_path / "deeper" / folder, "curve")
        assert [path.name for path in paths] == ["curve.png", "curve.svg"]
    for name in ("curve.png", "curve.svg"):
        first, second = ((tmp_path / "deeper" / folder / name).read_bytes() for folder in ("a", "b"))
        assert first == second
        assert b"<dc:date>" not in first
    assert first.startswith(b"<?xml")
    figures.save(figure, tmp_path / "deeper" / "a", "curve")  # and a figure may be written twice
    assert (tmp_path / "deeper" / "a" / "curve.svg").read_bytes() == first


def test_training_shows_every_loss_term_over_epochs() -> None:
    history = [
        {"round": 0, "epoch": e, "step": 9, "loss": 1.0 / (e + 1), "pair": 2.0 - e, "seconds": 0.5, "images_per_s": 3.0}
        for e in range(3)
    ]
    figure = figures.training(history)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "pair"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), [[1, 1], [2, 1 / 2], [3, 1 / 3]])
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), [2, 1, 0])
    many = figures.training([{f"term{i}": float(i) for i in range(6)}])
    assert [axes.get_title() for axes in many.axes if axes.axison] == [f"term{i}" for i in range(6)]
    figures.png(figures.training([]))


def test_rounds_show_what_is_a_number() -> None:
    entries = [{"round": 0, "pairs": 40, "m": "inf", "f_w": 0.5}, {"round": 1, "pairs": 60, "m": 0.25}, {"round": 2}]
    figure = figures.rounds(entries)
    drawn = {axes.get_title(): axes.lines[0].get_xydata().tolist() for axes in figure.axes}
    assert drawn == {
        "positive pairs $n_+$": [[1, 40], [2, 60]],
        "threshold $m$": [[2, 0.25]],
        "agreement with labels $F_w$": [[1, 0.5]],
    }
    figures.png(figures.rounds([{"round": 0}]))


def test_statistics_of_bits_are_those_of_numpy_and_scipy() -> None:
    rng = np.random.default_rng(0)
    signs = np.where(rng.random((300, 6)) < [0.5, 0.1, 0.9, 0.3, 0.5, 0.0], 1.0, -1.0)
    signs[:, 4] = -signs[:, 0]
    share = (signs > 0).mean(0)
    np.testing.assert_allclose(statistics.bit_entropy(share), [entropy([p, 1 - p], base=2) for p in share], atol=1e-12)
    found = statistics.bit_correlation(signs)
    np.testing.assert_allclose(found[:5, :5], np.corrcoef(signs[:, :5].T), atol=1e-12)
    assert found[0, 4] == pytest.approx(-1)
    assert not found[5].any()  # a bit that is the same everywhere
    figure = figures.codes(signs, np.array([1, 1, 3, 3, 3, 20]))
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx(share)
    assert figure.axes[3].lines[0].get_xydata().tolist() == [[1, 2], [3, 3], [20, 1]]


def test_points_are_coloured_by_class() -> None:
    points = np.arange(12.0).reshape(6, 2)
    axes = figures.scatter(points, [3, None, 3, 7, None, 7]).axes[0]
    drawn = {group.get_label(): group.get_offsets().tolist() for group in axes.collections}
    assert drawn == {"none": points[[1, 4]].tolist(), "3": points[[0, 2]].tolist(), "7": points[[3, 5]].tolist()}
    assert len({tuple(group.get_facecolor()[0]) for group in axes.collections}) == 3
    wide = figures.scatter(np.zeros((40, 2)), list(range(40))).axes[0]
    assert len({tuple(group.get_facecolor()[0]) for group in wide.collections}) == 40
    figures.png(figures.scatter(np.zeros((0, 2)), []))


def test_heat_over_a_picture_leaves_cold_places_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    heat = np.zeros((4, 5), np.float32)
    heat[1, 2] = 1
    warm = figures.overlay(image, heat)
    changed = (warm != image).any(2)
    assert changed[1, 2]
    assert changed.sum() == 1
    assert (warm.dtype, warm.shape) == (np.uint8, image.shape)


def test_pictures_are_framed_by_whether_they_are_right() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    rows = [
        [
            figures.Picture(image, "query"),
            figures.Picture(image, "1 bits", True),
            figures.Picture(image, "2 bits", False),
        ],
        [figures.Picture(image, "query")],
    ]
    figure = figures.pictures(rows)
    assert [axes.get_title() for axes in figure.axes] == ["query", "1 bits", "2 bits", "query", "", ""]
    frames = [axes.spines["left"].get_edgecolor() if axes.get_frame_on() else None for axes in figure.axes]
    assert frames == [None, to_rgba(figures.COLOURS[2]), to_rgba(figures.COLOURS[1]), None, None, None]
    figures.png(figures.pictures([]))
