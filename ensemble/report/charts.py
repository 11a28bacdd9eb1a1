"""Lay out line charts, which a page template draws as inline SVG, without a library.

All positions are in SVG units. The template writes all text, so that Jinja2 escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 250  # the width of a phone's screen, so that axis labels are legible there
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 42  # margins
TICKS = 5


@dataclass(frozen=True)
class Series:
    """Named series of a chart: ascending x, and y in data units."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    figure: float  # shown beside the name; lines are sorted by it, largest first
    mark: int | None = None  # index of the point with a ring


@dataclass(frozen=True)
class Line:
    """Series in SVG units: polyline points, and the point with a ring."""

    name: str
    figure: float
    points: str
    mark: tuple[float, float] | None


@dataclass(frozen=True)
class Chart:
    """Data that the template needs to draw a line chart."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    x_ticks: list[tuple[str, float]]  # labels and their positions
    y_ticks: list[tuple[str, float]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def round_steps(low: float, high: float) -> list[float]:
    """Return about :data:`TICKS` round numbers that cover ``low`` to ``high``."""
    spread = high - low or 1.0
    rough = spread / (TICKS - 1)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    x_ticks: Sequence[float] | None = None,
    log_x: bool = False,
) -> Chart:
    """Lay out a line chart; lines are in descending order of their figures.

    Args:
        title: title of the chart, also for screen readers.
        series: one or more series, each with one or more points.
        x_label, y_label: labels of the axes.
        x_ticks: positions of the x labels; None chooses round numbers.
        log_x: use a logarithmic x axis; all x and ``x_ticks`` must be positive. Set ``x_ticks``,
            because round numbers can include 0.
    """
    xs = [x for one in series for x in one.x]
    ys = [y for one in series for y in one.y]
    y_steps = round_steps(min(ys), max(ys))
    x_steps = list(x_ticks) if x_ticks is not None else round_steps(min(xs), max(xs))
    low_x, high_x = min(*xs, *x_steps), max(*xs, *x_steps)
    low_y, high_y = y_steps[0], y_steps[-1]

    def place_x(x: float) -> float:
        a, b, c = (math.log(v) if log_x else v for v in (low_x, high_x, x))
        share = (c - a) / (b - a) if b > a else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def place_y(y: float) -> float:
        share = (y - low_y) / (high_y - low_y) if high_y > low_y else 0.5
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for one in sorted(series, key=lambda one: -one.figure):
        points = [(place_x(x), place_y(y)) for x, y in zip(one.x, one.y, strict=True)]
        text = " ".join(f"{x:g},{y:g}" for x, y in points)
        mark = None if one.mark is None else points[one.mark]
        lines.append(Line(one.name, one.figure, text, mark))
    return Chart(
        title,
        x_label,
        y_label,
        lines,
        [(f"{x:g}", place_x(x)) for x in x_steps],
        [(f"{y:g}", place_y(y)) for y in y_steps],
    )
