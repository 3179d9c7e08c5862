"""The report's diagrams as inline SVG, coloured by the page's own variables, so that they follow light and dark."""

import html
from collections.abc import Sequence

import numpy as np

from xception_pl.evaluation.scores import Ints
from xception_pl.evaluation.statistics import Bin

_SIDE, _LEFT, _STRIP = 300, 40, 46  # pixels: the square, the room for its numbers, the strip of counts below it


def reliability_svg(bins: Sequence[Bin]) -> str:
    """Accuracy over confidence, and below it how many images lie where."""
    width, height = _LEFT + _SIDE + 10, _SIDE + _STRIP + 56
    most = max((bin.images for bin in bins), default=0) or 1
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="reliability diagram">',
        f'<rect class="frame" x="{_LEFT}" y="8" width="{_SIDE}" height="{_SIDE}"/>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = _LEFT + share * _SIDE, 8 + (1 - share) * _SIDE
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _SIDE}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share:g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{_SIDE + _STRIP + 30}" text-anchor="middle">{share:g}</text>')
    strip = _SIDE + 14  # its upper edge
    for bin in bins:
        x, wide = _LEFT + bin.low * _SIDE + 1, (bin.high - bin.low) * _SIDE - 2
        if bin.accuracy is None or bin.confidence is None:
            continue
        title = (
            f"<title>confidence {bin.low:.2f} to {bin.high:.2f}: {bin.images:,} images, mean confidence "
            f"{bin.confidence:.3f}, right {bin.accuracy:.3f}</title>"
        )
        parts.append(_bar("accuracy", x, 8 + (1 - bin.accuracy) * _SIDE, wide, bin.accuracy * _SIDE, title))
        low, high = sorted((bin.accuracy, bin.confidence))
        kind = "sure" if bin.confidence > bin.accuracy else "modest"
        parts.append(_bar(kind, x, 8 + (1 - high) * _SIDE, wide, (high - low) * _SIDE, title))
        tall = _STRIP * bin.images / most
        parts.append(_bar("count", x, strip + _STRIP - tall, wide, tall, title))
    parts.append(f'<line class="diagonal" x1="{_LEFT}" y1="{8 + _SIDE}" x2="{_LEFT + _SIDE}" y2="8"/>')
    parts.append(f'<text x="{_LEFT + _SIDE / 2}" y="{height - 4}" text-anchor="middle">confidence</text>')
    return "".join(parts) + "</svg>"


def _bar(kind: str, x: float, y: float, width: float, height: float, title: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{max(height, 0):.1f}">{title}</rect>'
    )


def confusion_svg(matrix: Ints, names: Sequence[str]) -> str:
    """The confusion matrix with names and counts; darker is a larger share of the row."""
    classes = len(matrix)
    cell = max(12, min(34, 420 // classes))
    room = 8 + 6 * min(18, max(map(len, names)))  # for the names, about six pixels a letter
    side = room + classes * cell
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    parts = [
        f'<svg class="chart" viewBox="0 0 {side + 4} {side + 4}" style="max-width:{max(side, 340)}px" role="img" '
        'aria-label="confusion matrix">'
    ]
    for i, name in enumerate(names):
        short = html.escape(name if len(name) <= 18 else name[:17] + "…")
        middle = i * cell + cell / 2 + 4
        parts.append(f'<text x="{room - 6}" y="{middle:.1f}" text-anchor="end">{short}</text>')
        place = f"translate({room + middle - 4:.1f} {classes * cell + 8}) rotate(-90)"
        parts.append(f'<text transform="{place}" text-anchor="end" dominant-baseline="middle">{short}</text>')
    for row in range(classes):
        for column in range(classes):
            count, share = int(matrix[row, column]), float(shares[row, column])
            x, y = room + column * cell, row * cell
            title = html.escape(f"{names[row]} taken for {names[column]}: {count:,} ({share:.1%})")
            kind = "right" if row == column else "wrong"
            parts.append(
                f'<rect class="cell {kind}" x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
                f'style="fill-opacity:{share**0.5:.3f}"><title>{title}</title></rect>'
            )
            if count and cell >= 20:
                kind = "inside strong" if share > 0.3 else "inside"
                parts.append(
                    f'<text class="{kind}" x="{x + cell / 2:.1f}" y="{y + cell / 2 + 3:.1f}" text-anchor="middle">{count}</text>'
                )
    return "".join(parts) + "</svg>"
