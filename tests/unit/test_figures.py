"""Figures show the numbers they are given, and are written the same every time."""

from pathlib import Path

import numpy as np
import pytest

from hashdist import figures


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
