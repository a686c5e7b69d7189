"""Charts as inline SVG. Colours are those of the page's style, so that they follow dark and light."""

from html import escape

import numpy as np

from segtrain.console import printable

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 360, 190, 52, 24, 8, 10
MOST_POINTS = 400
LEVELS = 12  # of the colour of a heat map
MOST_NAMED, MOST_LETTERS, MARGIN = 40, 14, 6  # classes of a heat map with names, letters of these, cells they take


def short_number(value: float) -> str:
    """A figure in at most five characters or so: 0.0182, 3.1, 1.2e-05."""
    return f"{value:.3g}"


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from low to high."""
    span = high - low
    step = 10.0 ** np.floor(np.log10(span))
    step = next(s for s in (0.2 * step, 0.5 * step, step, 2 * step) if span / s <= 5)
    return [float(i * step) for i in range(int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9)) + 1)]


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: the means of equal numbers of neighbours, and the last point."""
    if len(points) <= MOST_POINTS:
        return points
    parts = np.array_split(np.array(points), MOST_POINTS - 1)
    return [*((float(x), float(y)) for x, y in (part.mean(0) for part in parts)), points[-1]]


def line_chart(title: str, points: list[tuple[float, float]], unit: str = "", dots: bool = False) -> str:
    """A figure with one line over the steps. dots: mark every point. '' without points."""
    if not points:
        return ""
    shown = thinned(points)
    xs, ys = zip(*shown, strict=True)
    low, high = min(*ys, 0.0) if min(ys) >= 0 and min(ys) < 0.5 * max(ys) else min(ys), max(ys)
    low, high = (low, high) if high > low else (low - 0.5 * abs(low) - 1e-9, high + 0.5 * abs(high) + 1e-9)
    left, right = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (x - left) / (right - left)
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

    parts = []
    for tick in ticks(low, high):
        y = place(left, tick)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short_number(tick)}</text>')
    for tick in ticks(left, right):
        x = place(tick, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{tick:g}</text>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in shown))
    parts.append(f'<polyline class="line" points="{path}"/>')
    if dots or len(shown) == 1:
        for point in shown:
            x, y = place(*point)
            text = f"step {point[0]:g}: {short_number(point[1])}{unit}"
            parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{text}</title></circle>')
    ends = [f"{short_number(y)}{unit} at step {x:g}" for x, y in (points[0], points[-1])]
    words = f"{title}: {', '.join(ends)}"
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(words)}">{"".join(parts)}</svg></figure>'
    )


def heat_map(matrix: np.ndarray, names: list[str]) -> str:
    """An SVG of a confusion matrix (C, C + 1), a unit a cell, darker for higher fractions of a row.

    The script of the page names the cell under the pointer, or that the arrow keys choose.
    """
    rows, columns = matrix.shape
    labelled = matrix.sum(1, keepdims=True)
    share = np.divide(matrix, labelled, out=np.zeros(matrix.shape), where=labelled > 0)
    level = np.ceil(np.sqrt(share) * LEVELS).astype(int)  # the root, so that small fractions are seen
    level[share < 0.0005] = 0
    paths = []
    for value in range(1, LEVELS + 1):
        cells = "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(level == value))
        if cells:
            paths.append(f'<path class="heat" fill-opacity="{value / LEVELS:.2f}" d="{cells}"/>')
    back = f'<rect class="back" width="{columns}" height="{rows}"/>'
    empty = "".join(f"M0 {y}h{columns}v1h-{columns}z" for y in np.flatnonzero(labelled[:, 0] == 0))
    paths += [f'<path class="empty" d="{empty}"/>'] if empty else []
    margin, written = (MARGIN, axis_names(names, rows)) if rows <= MOST_NAMED else (0, "")
    words = f"Confusion matrix of {rows} classes; arrow keys move over its cells, which are named below"
    return (
        f'<svg id="heat" tabindex="0" role="application" aria-label="{words}" aria-describedby="cell" '
        f'viewBox="{-margin} 0 {columns + margin} {rows + margin}">{back}{"".join(paths)}{written}'
        '<rect id="cursor" class="cursor" width="1" height="1" visibility="hidden"/></svg>'
    )


def axis_names(names: list[str], rows: int) -> str:
    """The names of the rows, on their left, and of the columns, below them."""
    short = [escape(printable(name, inline=True)[:MOST_LETTERS]) for name in names]
    left = [f'<text x="-0.2" y="{y + 0.7:.1f}" text-anchor="end">{name}</text>' for y, name in enumerate(short[:rows])]
    below = [
        f'<text transform="translate({x + 0.28:.2f} {rows + 0.2}) rotate(90)">{name}</text>'
        for x, name in enumerate(short)
    ]
    return "".join(left + below)


def score_bar(value: float | None, limits: tuple[float, float] | None = None) -> str:
    """A horizontal bar of a fraction, with its interval."""
    if value is None:
        return ""
    whisker = ""
    if limits is not None:
        whisker = f'<path class="whisker" d="M{100 * limits[0]:.2f} 5H{100 * limits[1]:.2f}"/>'
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><rect class="track" '
        f'width="100" height="10"/><rect class="value" width="{100 * value:.2f}" height="10"/>{whisker}</svg>'
    )
