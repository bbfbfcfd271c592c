"""
Figures of the report page, as SVG: scores with their intervals and chance, and curves with axes.
Colours are classes of the page's style sheet, so that figures follow a dark page.
"""

import html
import math

import numpy as np


def escape(text):
    return html.escape(str(text))


# ---------------------------------------------------------------------------------------------
# Scores


def score_row(label, result, is_control=False):
    """A row: label, n, a dot with its 95 % interval and a dashed line at chance, and the score. A
    score that is not above chance (its interval reaches it) is marked. is_control: a hollow dot."""
    score, interval, chance = result["score"], result["ci95"], result["chance"]
    kind = "dot"
    if chance is not None and (interval or [score])[0] <= chance:
        kind += " low"
    if is_control:
        kind += " control"
    marks = ['<line class="grid" x1="0%" x2="100%" y1="11" y2="11"/>']
    if chance is not None:
        marks.append(f'<line class="chance" x1="{chance:.2%}" x2="{chance:.2%}" y1="2" y2="20"/>')
    if interval:
        low, high = interval
        marks.append(f'<line class="interval" x1="{low:.2%}" x2="{high:.2%}" y1="11" y2="11"/>')
    marks.append(f'<circle cx="{min(max(score, 0), 1):.2%}" cy="11" r="5"/>')
    size = f"<small>n={result['n']:,}</small>" if result["n"] else ""
    words = f"{label}: {score:.2f}" + (f", chance {chance:.2f}" if chance is not None else "")
    return (
        f'<div class="row"><span>{escape(label)} {size}</span>'
        f'<svg class="{kind}" role="img" aria-label="{escape(words)}">{"".join(marks)}</svg>'
        f"<b>{score:.2f}</b></div>"
    )


def score_axis():
    """The numbers below rows of scores."""
    ticks = [
        f'<text x="{share:.0%}" y="12" text-anchor="middle">{share:g}</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    return f'<div class="row"><span></span><svg class="axis">{"".join(ticks)}</svg><b></b></div>'


# ---------------------------------------------------------------------------------------------
# Curves

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 8, 26  # margins


def nice_ticks(low, high, count=4):
    """About so many round numbers between two numbers."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = min(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def smooth(points, parts=40):
    """Points with the mean of each one's neighbours, about a fortieth of them on each side."""
    steps, values = np.array(points, float).T
    reach = len(values) // parts
    if not reach:
        return points
    padded = np.concatenate([[0.0], np.cumsum(values)])
    left = np.maximum(np.arange(len(values)) - reach, 0)
    right = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    means = (padded[right] - padded[left]) / (right - left)
    return list(zip(steps.tolist(), means.tolist()))


def thin(points, most=400):
    """At most so many of the points, so that a page stays small."""
    if len(points) <= most:
        return points
    return [points[i] for i in np.linspace(0, len(points) - 1, most).round().astype(int)]


def chart(series, label, last=None):
    """A figure of curves with axes. series: [(points [(step, value)], class, whether its points are
    drawn too)]; label: for people who cannot see it; last: the last step of the x axis."""
    every = [point for points, *_ in series for point in points if math.isfinite(point[1])]
    if not every:
        return ""
    values = [value for _, value in every]
    low, high = min(values), max(values)
    pad = 0.04 * (high - low) or 0.5
    low, high = low - pad, high + pad
    last = max(last or 0, max(step for step, _ in every), 1)
    x = lambda step: LEFT + (WIDTH - LEFT - RIGHT) * step / last
    y = lambda value: TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)
    marks = []
    for tick in nice_ticks(low, high):
        at = f"{y(tick):.1f}"
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{at}" dy="4" text-anchor="end">{tick:.4g}</text>')
    for tick in nice_ticks(0, last, 3):
        anchor = "end" if tick > 0.93 * last else "middle"
        marks.append(
            f'<text x="{x(tick):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{tick:,.0f}</text>'
        )
    for points, kind, has_dots in series:
        points = [point for point in thin(points) if math.isfinite(point[1])]
        line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        marks.append(f'<polyline class="{kind}" points="{line}"/>')
        for step, value in points if has_dots else ():
            marks.append(f'<circle class="{kind}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>')
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{"".join(marks)}</svg>'
    )
