"""Charts as inline SVG: heat maps, curves with a band, bars. No library, no script, no resource.

A system is a whole number that stands for its colour (``--p0`` ... of the style sheet) and its
marker everywhere, so that neither has to be told apart by colour alone. Numbers appear as
tooltips; the chart's label says in words what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

__all__ = [
    "Series",
    "channel_map",
    "color_of",
    "column_chart",
    "heat_map",
    "key",
    "line_chart",
    "text_on",
]

PALETTE = 12
_WIDTH = 420
# viridis, in ninths
_SCALE = ((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
          (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37))  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One system's curve.

    Args:
        name: Of the system.
        system: Its number.
        mean: One value per experience.
        sd: Sample deviations over seeds, or nothing for one seed.
        main: Whether it is the one the run is about.
    """

    name: str
    system: int
    mean: Sequence[float]
    sd: Sequence[float] | None
    main: bool = False


def color_of(share: float) -> tuple[int, int, int]:
    """The heat map's colour of a share from 0 to 1; values beyond are drawn as the ends."""
    place = min(max(share, 0.0), 1.0) * (len(_SCALE) - 1)
    low = min(int(place), len(_SCALE) - 2)
    pairs = zip(_SCALE[low], _SCALE[low + 1], strict=True)
    red, green, blue = (round(a + (place - low) * (b - a)) for a, b in pairs)
    return red, green, blue


def text_on(color: tuple[int, int, int]) -> str:
    """Black or white, whichever contrasts more with the colour (4.5 at least, as WCAG asks)."""
    light = luminance(color)
    return "#fff" if 1.05 / (light + 0.05) > (light + 0.05) / 0.05 else "#000"


def luminance(color: tuple[int, int, int]) -> float:
    """Relative luminance of a colour, as WCAG defines it."""
    parts = [c / 255 for c in color]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def key(system: int) -> str:
    """A system's mark, to stand before its name."""
    return (
        f'<svg class="key s{system % PALETTE}" viewBox="0 0 26 12" aria-hidden="true">'
        f'<path class="line" d="M0 6H26"/>{_marker(system, 13, 6, 4.2)}</svg>'
    )


def heat_map(mean: np.ndarray, sd: np.ndarray | None, name: str) -> str:
    """An accuracy matrix; what lies ahead of training is faint.

    Args:
        mean: ``(T, T)``, or triangular with ``nan``, shares of 1.
        sd: Sample deviations over seeds, or nothing for one seed.
        name: Of the system.
    """
    rows, columns = mean.shape
    label = (
        f"Accuracy matrix of {name}: {rows} rows, trained up to experience 1 to {rows}; "
        f"{columns} columns, test experience. Last row: "
        f"{', '.join(f'{100 * x:.1f}' for x in mean[-1])} %."
    )
    return _map(
        mean, sd, label, ("trained up to", "test experience"),
        lambda i, j: f"trained up to {i + 1}, test experience {j + 1}", lambda i, j: j > i,
    )  # fmt: skip


def channel_map(mean: np.ndarray, sd: np.ndarray | None, layers: Sequence[str], name: str) -> str:
    """Share of the channels that each extractor has kept, ``(extractors, layers)``.

    Args:
        mean: Shares of 1.
        sd: Sample deviations over seeds, or nothing for one seed.
        layers: Names of the columns.
        name: Of the system.
    """
    shares = ", ".join(f"{100 * x:.1f}" for x in mean.mean(1))
    label = (
        f"Channels kept by {name}: {len(mean)} rows, extractor 1 to {len(mean)}; "
        f"{len(layers)} columns, layers. Means of the rows: {shares} %."
    )
    return _map(
        mean, sd, label, ("extractor", "layer"),
        lambda i, j: f"extractor {i + 1}, {layers[j]}", lambda i, j: False,
    )  # fmt: skip


def _map(
    mean: np.ndarray, sd: np.ndarray | None, label: str, axes: tuple[str, str],
    told: Callable[[int, int], str], ahead: Callable[[int, int], bool],
) -> str:  # fmt: skip
    rows, columns = mean.shape
    left, top = 44, 6
    width, height = (_WIDTH - left - 4) / columns, min(46.0, max(8.0, 330 / rows))
    shown = width >= 24 and height >= 14
    parts = []
    for i, row in enumerate(mean.tolist()):
        for j, value in enumerate(row):
            if not math.isnan(value):
                box = (left + j * width, top + i * height, width, height)
                spread = None if sd is None else float(sd[i, j])
                text = f"{told(i, j)}: {_percent(value, spread)}"
                parts.append(_cell(box, value, text, shown, ahead(i, j)))
    bottom = top + rows * height
    parts += [
        _text(left + (j + 0.5) * width, bottom + 16, str(j + 1), "middle")
        for j in _thinned(columns, 12)
    ]
    parts += [
        _text(left - 6, top + (i + 0.5) * height + 4, str(i + 1), "end") for i in _thinned(rows, 12)
    ]
    middle = (left + _WIDTH) / 2
    parts.append(_text(middle, bottom + 34, axes[1], "middle", "axis"))
    parts.append(_upright(11, top + rows * height / 2, axes[0]))
    return _svg(bottom + 40, label, parts, "heat")


def line_chart(
    series: Sequence[Series],
    what: str,
    *,
    top: float | None = 1.0,
    number: Callable[[float], str] = lambda x: f"{100 * x:.1f} %",
    tick: Callable[[float], str] = lambda x: f"{100 * x:.0f}",
) -> str:
    """Curves over experiences: the mean, with a band of ± one sample deviation over seeds.

    Args:
        series: One per system, all of one length.
        what: What the numbers are, for the label.
        top: Upper end of the axis, which begins at 0; the largest number by default.
        number: How tooltips print a value.
        tick: How the axis does.
    """
    length = max(len(s.mean) for s in series)
    ticks = _ticks(max(_highest(s) for s in series) if top is None else top)
    high, right, upper, lower = ticks[-1], _WIDTH - 12, 10, 216
    left = max(44.0, 14 + 8.5 * max(len(tick(value)) for value in ticks))

    def x(k: int) -> float:
        return (left + right) / 2 if length == 1 else left + k * (right - left) / (length - 1)

    def y(value: float) -> float:
        return lower - (lower - upper) * min(max(value, 0.0), high) / high

    parts = []
    for value in ticks:
        line = f'<path class="grid" d="M{left:.1f} {y(value):.1f}H{right}"/>'
        parts += [line, _text(left - 8, y(value) + 4, tick(value), "end")]
    parts += [_text(x(k), lower + 18, str(k + 1), "middle") for k in _thinned(length, 12)]
    parts.append(_text((left + right) / 2, lower + 36, "experiences trained", "middle", "axis"))
    for one in sorted(series, key=lambda s: s.main):  # the main system lies on top
        parts.append(_curve(one, x, y, number))
    ends = ", ".join(f"{s.name} {number(s.mean[-1])}" for s in series)
    return _svg(lower + 42, f"{what} over {length} experiences. At the end: {ends}.", parts)


def column_chart(
    mean: Sequence[float | None], sd: Sequence[float | None], system: int, name: str
) -> str:
    """Accuracy per class as columns, with ± one sample deviation where there are few.

    Args:
        mean: Share of 1 per class, ``None`` where no sample was tested.
        sd: Sample deviations over seeds, ``None`` for one seed.
        system: Number of the system.
        name: Its name.
    """
    n, left, upper, lower = len(mean), 34, 18, 140
    right = _WIDTH - 10
    step = (right - left) / n
    wide = step * (0.72 if n <= 40 else 0.92)

    def y(value: float) -> float:
        return lower - (lower - upper) * min(max(value, 0.0), 1.0)

    parts = []
    for value in (0.0, 0.5, 1.0):
        line = f'<path class="grid" d="M{left} {y(value):.1f}H{right}"/>'
        parts += [line, _text(left - 6, y(value) + 4, f"{100 * value:.0f}", "end")]
    for c, (value, spread) in enumerate(zip(mean, sd, strict=True)):
        middle = left + (c + 0.5) * step
        if value is None:
            parts.append(_text(middle, lower - 4, "–", "middle"))
            continue
        told = f"class {c}: {_percent(value, spread)}"
        parts.append(
            f'<g><title>{escape(told)}</title><rect class="bar" x="{middle - wide / 2:.1f}" '
            f'y="{y(value):.1f}" width="{wide:.1f}" height="{lower - y(value):.1f}"/>'
            + (_whisker(middle, y, value, spread) if spread and n <= 25 else "")
            + "</g>"
        )
        if n <= 12:
            above = y(min(value + (spread or 0.0), 1.0)) - 4
            parts.append(_text(middle, above, f"{100 * value:.0f}", "middle"))
    every = math.ceil(n / 10)
    parts += [
        _text(left + (c + 0.5) * step, lower + 16, str(c), "middle") for c in range(0, n, every)
    ]
    parts.append(_text((left + right) / 2, lower + 34, "class", "middle", "axis"))
    known = [m for m in mean if m is not None]
    ends = f", {100 * min(known):.1f} to {100 * max(known):.1f} %" if known else ""
    label = f"Accuracy of {name} per class after the last experience: {n} classes{ends}."
    return _svg(lower + 40, label, parts, f"s{system % PALETTE}")


def _highest(one: Series) -> float:
    spread = one.sd or [0.0] * len(one.mean)
    return max(m + d for m, d in zip(one.mean, spread, strict=True))


def _curve(
    one: Series, x: Callable[[int], float], y: Callable[[float], float],
    number: Callable[[float], str],
) -> str:  # fmt: skip
    points = [(x(k), y(m)) for k, m in enumerate(one.mean)]
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    band = ""
    if one.sd is not None and len(points) > 1:
        spreads = list(enumerate(zip(one.mean, one.sd, strict=True)))
        above = [f"{x(k):.1f} {y(m + d):.1f}" for k, (m, d) in spreads]
        below = [f"{x(k):.1f} {y(m - d):.1f}" for k, (m, d) in spreads]
        band = f'<path class="band" d="M{"L".join(above + below[::-1])}Z"/>'
    dots = []
    for k in _thinned(len(points), 25):
        spread = "" if one.sd is None else f" ± {number(one.sd[k])}"
        told = f"{one.name}, after {k + 1}: {number(one.mean[k])}{spread}"
        a, b = points[k]
        dots.append(
            f'<g><title>{escape(told)}</title><circle class="hit" cx="{a:.1f}" cy="{b:.1f}" '
            f'r="9"/>{_marker(one.system, a, b, 4.6 if one.main else 3.8)}</g>'
        )
    main = " main" if one.main else ""
    return (
        f'<g class="s{one.system % PALETTE}{main}">{band}<path class="line" d="{path}"/>'
        f"{''.join(dots)}</g>"
    )


def _marker(system: int, x: float, y: float, r: float) -> str:
    """Circle, square, triangle, diamond, triangle downwards, hourglass, by the system's number."""
    shapes = (
        None,
        [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        [(0, -1.15), (1.05, 0.75), (-1.05, 0.75)],
        [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        [(0, 1.15), (1.05, -0.75), (-1.05, -0.75)],
        [(-0.95, -0.95), (0.95, -0.95), (-0.95, 0.95), (0.95, 0.95)],
    )
    shape = shapes[system % len(shapes)]
    if shape is None:
        return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'
    corners = "L".join(f"{x + r * a:.1f} {y + r * b:.1f}" for a, b in shape)
    return f'<path class="dot" d="M{corners}Z"/>'


def _cell(
    box: tuple[float, float, float, float], value: float, told: str, shown: bool, ahead: bool
) -> str:
    x, y, width, height = box
    color = color_of(value)
    faint = ' class="ahead"' if ahead else ""
    text = ""
    if shown:
        fill = "" if ahead else f' style="fill:{text_on(color)}"'
        text = (
            f'<text class="number" x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}" '
            f'text-anchor="middle"{fill}>{100 * value:.0f}</text>'
        )
    return (
        f"<g{faint}><title>{escape(told)}</title>"
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height - 1:.1f}" '
        f'fill="rgb{color}"/>{text}</g>'
    )


def _whisker(x: float, y: Callable[[float], float], value: float, spread: float) -> str:
    return f'<path class="whisker" d="M{x:.1f} {y(value - spread):.1f}V{y(value + spread):.1f}"/>'


def _percent(value: float, spread: float | None) -> str:
    return f"{100 * value:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}") + " %"


def _thinned(n: int, most: int) -> list[int]:
    """At most about ``most`` of 0 ... n - 1, evenly, the last one among them."""
    step = math.ceil(n / most)
    return [k for k in range(n) if (n - 1 - k) % step == 0]


def _ticks(top: float) -> list[float]:
    """Round numbers from 0 to at least ``top``, four or five steps."""
    if top <= 0:
        return [0.0, 1.0]
    size = 10 ** math.floor(math.log10(top))
    step = next(s * size for s in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 2.5) if top / (s * size) <= 5)
    return [k * step for k in range(math.ceil(top / step - 1e-9) + 1)]


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _upright(x: float, y: float, text: str) -> str:
    return (
        f'<text class="axis" transform="translate({x:.1f} {y:.1f}) rotate(-90)" '
        f'text-anchor="middle">{escape(text)}</text>'
    )


def _svg(height: float, label: str, parts: Sequence[str], kind: str = "") -> str:
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
