"""Curves of runs for pages: rows of their logs, small plots, addresses that hold a picture."""

import base64
import io
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl, or [] when there is none."""
    return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []


def plot(curves: dict[str, list[tuple[float, float]]]) -> bytes:
    """A PNG of small plots side by side, one for each title's points (step, value); at least one curve."""
    return plot_lines({title: {"": points} for title, points in curves.items()}, columns=len(curves), size=(3, 2.4))


def plot_lines(
    charts: dict[str, dict[str, list[tuple[float, float]]]],
    logarithmic: Collection[str] = (),
    columns: int = 3,
    size: tuple[float, float] = (4, 2.6),
) -> bytes:
    """A PNG of small plots in rows, one for each title's lines by their labels; at least one chart. `size` is a plot's
    width and height in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = -(-len(charts) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)
    for axis, (title, lines) in zip(axes.flat, charts.items(), strict=False):
        for label, points in lines.items():
            axis.plot(*zip(*points, strict=True), lw=1, label=label, marker="o" if len(points) < 20 else None, ms=3)
        axis.set_title(title, fontsize=9)
        axis.set_yscale("log" if title in logarithmic else "linear")
        axis.tick_params(labelsize=7)
        if len(lines) > 1:
            axis.legend(fontsize=6, ncols=2, framealpha=0.5)
    for axis in axes.flat[len(charts) :]:
        axis.set_visible(False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def png_address(png: bytes) -> str:
    """A PNG as a data: address, so that a page is one file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
