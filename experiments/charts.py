"""Curves and bars as inline SVG: no library, no script, colours from the page's style sheet."""

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 380, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 364, 10, 172  # of the plot in the picture
MOST = 300  # points that are drawn of a curve


def curves(title: str, series: Mapping[str, Points], log: bool = False, noisy: bool = True) -> str:
    """A chart of one or more curves over steps; the empty string where there is nothing to draw.

    A noisy curve of many points is drawn faint, with its moving average on it. `log` is for positive values alone.
    """
    series = {name: finite(points, log) for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    ticks = log_ticks(min(ys), max(ys)) if log else linear_ticks(min(ys), max(ys))
    low, high = min(*ticks, *ys), max(*ticks, *ys)
    x_ticks = linear_ticks(0, max(xs))
    x_low, x_high = 0.0, max(*xs, 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        up = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return LEFT + (x - x_low) / (x_high - x_low) * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

    parts = [grid(y, place(0, y)[1]) for y in ticks]
    parts += [mark(x, place(x, low)[0]) for x in x_ticks if x <= x_high]
    for i, points in enumerate(series.values()):
        thinned = thin(points)
        smooth = average(thinned) if noisy and len(thinned) > 40 else thinned
        if smooth is not thinned:
            parts.append(line([place(*p) for p in thinned], i, "raw"))
        parts.append(line([place(*p) for p in smooth], i, "curve"))
        if len(thinned) <= 12:
            parts += [
                f'<circle class="c{i}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in (place(*p) for p in thinned)
            ]
    names = "".join(f'<span class="key c{i}">{escape(name)}</span>' for i, name in enumerate(series) if len(series) > 1)
    last = " · ".join(number(points[-1][1]) for points in series.values())
    return figure(title, f"last {last}" if len(series) == 1 else "", "".join(parts), names)


def bars(title: str, counts: Mapping[float, float], unit: str) -> str:
    """A histogram: value of a bin -> how many."""
    if not counts:
        return ""
    ticks = linear_ticks(0, max(counts.values()))
    low, high, top = min(counts) - 0.5, max(counts) + 0.5, max(*ticks, *counts.values())
    wide = (RIGHT - LEFT) / (high - low)
    parts = [grid(y, BOTTOM - y / top * (BOTTOM - TOP)) for y in ticks]
    for value, n in counts.items():
        x, tall = LEFT + (value - 0.5 - low) * wide, n / top * (BOTTOM - TOP)
        parts.append(f'<rect class="c0" x="{x + wide * 0.06:.1f}" y="{BOTTOM - tall:.1f}" width="{wide * 0.88:.1f}" '
                     f'height="{tall:.1f}"/>')  # fmt: skip
    parts += [mark(x, LEFT + (x - low) * wide) for x in linear_ticks(low, high) if low <= x <= high]
    return figure(title, unit, "".join(parts), "")


def figure(title: str, note: str, drawing: str, names: str) -> str:
    """A drawing with its title, a note and the names of its curves."""
    caption = f"<figcaption><b>{escape(title)}</b><span>{escape(note)}</span></figcaption>"
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{drawing}</svg>'
    return f'<figure class="chart">{caption}{picture}<div class="keys">{names}</div></figure>'


def line(points: Points, colour: int, kind: str) -> str:
    """A curve through places in the picture."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind} c{colour}" points="{path}"/>'


def grid(value: float, y: float) -> str:
    """A horizontal line with its value."""
    text = f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>'
    return f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>{text}'


def mark(value: float, x: float) -> str:
    """A value below the horizontal axis."""
    return f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{number(value)}</text>'


def number(value: float) -> str:
    """A number in at most six characters: 0.0123, 4.5k, 1e-6."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e15):
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+", "e")
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.3g}" if size < 1000 else f"{value:.0f}"


def linear_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round values around low and high, or about a value that is all there is."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-12):
        spread = abs(high) / 2 or 1.0
        low, high = low - (spread if low else 0), high + spread
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Values 1, 2 and 5 times powers of ten around low and high; powers of ten alone over a wide range."""
    high = max(high, low * 1.2)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    span = math.log10(high / low)
    digits = (
        (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
        if span < 0.4
        else (1, 2, 3, 5)
        if span < 1
        else (1, 3)
        if span < 2.2
        else (1,)
    )
    every = [d * 10.0**p for p in powers for d in digits]
    below, above = max(t for t in every if t <= low * 1.0001), min(t for t in every if t >= high * 0.9999)
    return [t for t in every if below <= t <= above]


def finite(points: Points, positive: bool) -> Points:
    """The points that can be drawn."""
    return [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not positive)]


def thin(points: Points) -> Points:
    """At most `MOST` points: means of neighbours."""
    size = math.ceil(len(points) / MOST)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def average(points: Points) -> Points:
    """Each value with those around it, by a Gaussian window of a sixtieth of the curve: no lag, no jitter."""
    wide = max(1.0, len(points) / 60)
    reach = math.ceil(3 * wide)
    found = []
    for i, (x, _) in enumerate(points):
        around = range(max(0, i - reach), min(len(points), i + reach + 1))
        weights = [math.exp(-0.5 * ((j - i) / wide) ** 2) for j in around]
        found.append((x, sum(w * points[j][1] for w, j in zip(weights, around, strict=True)) / sum(weights)))
    return found
