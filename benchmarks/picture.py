"""The ratios as a picture: a bar for each row on a logarithmic scale, a mark where it had to reach."""

from __future__ import annotations

import math
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.report import Line

TITLE = "How many times better than QEMU (black mark: the target)"
WIDTH, LABELS, RIGHT = 920, 400, 70
STEP, TOP, BOTTOM = 30, 56, 36
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
REACHED, MISSED, INK, PALE = "#2a6f97", "#c8553d", "#222", "#ddd"


def draw(path: Path, found: dict[str, Line], subtitle: str) -> None:
    """Write the SVG. Rows that are not compared with QEMU are left out."""
    lines = [line for line in found.values() if line.ratio is not None and line.row.with_qemu]
    highest = max([10.0, *(line.ratio or 1 for line in lines), *(line.row.target or 1 for line in lines)])
    bottom = TOP + STEP * len(lines)

    def x(ratio: float) -> float:
        return LABELS + (WIDTH - LABELS - RIGHT) * math.log(max(ratio, 1)) / math.log(highest)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + BOTTOM}" '
        f'font-family="sans-serif" font-size="13" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{bottom + BOTTOM}" fill="white"/>',
        f'<text x="16" y="22" font-size="16" font-weight="bold">{TITLE}</text>',
        f'<text x="16" y="41" fill="#666">{escape(subtitle)}</text>',
    ]
    for tick in TICKS:
        if tick <= highest:
            parts.append(
                f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{bottom}" stroke="{PALE}"/>'
                f'<text x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle" fill="#666">{tick}x</text>'
            )
    for index, line in enumerate(lines):
        assert line.ratio is not None
        y = TOP + STEP * index
        colour = MISSED if line.reached is False else REACHED
        parts.append(
            f'<text x="{LABELS - 10}" y="{y + 20}" text-anchor="end">{escape(line.row.title)}</text>'
            f'<rect x="{LABELS}" y="{y + 7}" width="{max(x(line.ratio) - LABELS, 1):.1f}" height="18" fill="{colour}"/>'
        )
        label = x(line.ratio)
        if line.row.target:
            at = x(line.row.target)
            if abs(at - label) < 40:
                label = max(at, label)  # beside the mark, not over it
            parts.append(
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y + 3}" y2="{y + 29}" stroke="{INK}" stroke-width="2"/>'
            )
        parts.append(f'<text x="{label + 8:.1f}" y="{y + 20}">{line.ratio:.1f}</text>')
    parts.append("</svg>\n")
    path.write_text("\n".join(parts))
