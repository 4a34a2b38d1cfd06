"""Charts as inline SVG. Colours are the page's CSS classes (``s0``, ``s1``, ... of a series), so that they follow its
light or dark scheme; where a page loses its style, as on GitHub, lines are grey.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

__all__ = ["interval_bar", "line_chart", "reliability_chart"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 460, 220, 60, 34, 12
Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], x_label: str, marks: dict[str, float] | None = None) -> Markup:
    """Lines over a common x. ``marks``: labelled vertical lines."""
    series = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    every = [point for points in series.values() for point in points]
    if not every:
        return Markup("")
    xs, ys = _ticks([p[0] for p in every]), _ticks([p[1] for p in every])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0])
        up = (y - ys[0]) / (ys[-1] - ys[0])
        return _LEFT + across * (_WIDTH - _LEFT - 12), _TOP + (1 - up) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for y in ys:
        _, height = at(xs[0], y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in xs:
        parts.append(f'<text x="{at(x, ys[0])[0]:.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>')
    for label, x in (marks or {}).items():
        (left, bottom), (_, top) = at(x, ys[0]), at(x, ys[-1])
        anchor = "end" if left > _WIDTH / 2 else "start"
        parts.append(f'<line class="mark" x1="{left:.1f}" x2="{left:.1f}" y1="{bottom:.1f}" y2="{top:.1f}"/>')
        parts.append(
            f'<text x="{left + (-4 if anchor == "end" else 4):.1f}" y="{bottom - 5:.1f}" text-anchor="{anchor}">'
            f"{escape(label)}</text>"
        )
    for number, points in enumerate(series.values()):
        path = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in points)
        parts.append(f'<polyline class="s{number}" points="{path}"/>')
        if len(points) <= 30:
            parts += ['<circle class="s{}" r="3" cx="{:.1f}" cy="{:.1f}"/>'.format(number, *at(*p)) for p in points]
    return _svg(_WIDTH, _HEIGHT, parts, f"{', '.join(series)} over {x_label}")


def interval_bar(rows: Sequence[tuple[float, Sequence[float]]]) -> Markup:
    """Values in [0, 1] with their intervals, one under the other, on a common axis."""
    width, height = 180, 10 * len(rows) + 6
    parts = [
        f'<line class="grid" x1="{2 + 176 * x:g}" x2="{2 + 176 * x:g}" y1="0" y2="{height}"/>' for x in (0, 0.5, 1)
    ]
    for number, (value, (low, high)) in enumerate(rows):
        y = 8 + 10 * number
        left, middle, right = (2 + 176 * x for x in (low, value, high))
        parts.append(f'<line class="s{number} bar" x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="s{number}" r="3.5" cx="{middle:.1f}" cy="{y}"/>')
    return _svg(width, height, parts, ", ".join(f"{value:.3f} [{a:.3f}, {b:.3f}]" for value, (a, b) in rows))


def reliability_chart(stages: Sequence[Sequence[Mapping[str, Any]]]) -> Markup:
    """Accuracy over confidence, both in [0, 1], of each stage's bins (``confidence``, ``accuracy``, ``interval``), and
    the diagonal on which both are the same.
    """
    side, left, bottom, top = 300, 40, 34, 10

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * (side - left - 10), top + (1 - y) * (side - top - bottom)

    parts = []
    for number in range(6):
        share = number / 5
        (across, down), (start, _), (end, _) = at(share, share), at(0, 0), at(1, 0)
        parts.append(f'<line class="grid" x1="{start:.1f}" x2="{end:.1f}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{down + 4:.1f}" text-anchor="end">{share:g}</text>')
        parts.append(f'<text x="{across:.1f}" y="{side - 18}" text-anchor="middle">{share:g}</text>')
    (x1, y1), (x2, y2) = at(0, 0), at(1, 1)
    parts.append(f'<line class="mark" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    for number, bins in enumerate(stages):
        for own in bins:
            (x, low), (_, high) = (at(own["confidence"], edge) for edge in own["interval"])
            parts.append(f'<line class="s{number} bar" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        places = [at(own["confidence"], own["accuracy"]) for own in bins]
        parts.append(f'<polyline class="s{number}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        parts += [f'<circle class="s{number}" r="3" cx="{x:.1f}" cy="{y:.1f}"/>' for x, y in places]
    parts.append(f'<text x="{(left + side - 10) / 2}" y="{side - 3}" text-anchor="middle">probability</text>')
    return _svg(side, side, parts, "share that is right over probability")


def _svg(width: int, height: int, parts: Sequence[str], label: str) -> Markup:
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" width="{width}">'
    lines = "".join(parts).replace("<line ", '<line stroke="gray" ')
    return Markup(head + lines.replace("<polyline ", '<polyline fill="none" stroke="gray" ') + "</svg>")


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers around all values, three to eight."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    magnitude = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(s * magnitude for s in (1, 2, 5, 10) if s * magnitude * 6 >= high - low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]
