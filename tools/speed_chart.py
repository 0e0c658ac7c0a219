"""Draw the chart of the README from the figures of tools/speed.json: npllama's rate over llama.cpp's, as bars.

    python tools/speed_chart.py            write tools/speed.svg

bench_peers.py draws it too when it writes the README. There is no background, and every colour is of a middle
lightness: so it is legible on a light page and on a dark one, whether or not the page tells an image its theme.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

TOOLS = Path(__file__).resolve().parent
CHART = TOOLS / "speed.svg"
PEER = "llama.cpp"

LABEL_WIDTH, BAR_WIDTH, RIGHT = 90, 480, 50
ROW, BAR, GAP, TOP, BOTTOM = 36, 9, 8, 58, 24
COLORS = ("#4c8bf5", "#1a9e77", "#d9730d")

STYLE = """
    text { font: 12px system-ui, sans-serif; fill: #747b84 }
    .title { font-size: 14px; font-weight: 600 }
    .value { font-size: 11px }
    .axis { stroke: #747b84; stroke-width: 1 }
    .one { stroke: #747b84; stroke-width: 1.5; stroke-dasharray: 4 3 }
"""
VALUE_WIDTH = 30
"""Room for a ratio in digits."""


def test_of(one: dict[str, Any]) -> str:
    """What one entry of the results measured."""
    name = f"prompt of {one['n_prompt']}" if one["n_prompt"] else f"generate {one['n_gen']}"
    return name + (f" after {one['n_depth']}" if one["n_depth"] else "")


def chart(report: dict[str, Any]) -> str:
    """An SVG of the ratios to llama.cpp: a group of bars for each shape and format, a colour for each test."""
    rows: dict[str, dict[str, float]] = {}
    for one in report["results"]:
        if PEER in one["ratio"]:
            rows.setdefault(f"{one['shape']} {one['format']}", {})[test_of(one)] = one["ratio"][PEER]
    tests = list(dict.fromkeys(test for ratios in rows.values() for test in ratios))
    most = max(ratio for ratios in rows.values() for ratio in ratios.values())
    scale = BAR_WIDTH / most
    height = TOP + len(rows) * (ROW + GAP) + BOTTOM
    width = LABEL_WIDTH + BAR_WIDTH + RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="npllama\'s tokens per second over llama.cpp\'s, per shape and format">',
        f"<style>{STYLE}</style>",
        '<text class="title" x="8" y="20">npllama\'s tokens per second, llama.cpp\'s = 1</text>',
        *legend(tests),
    ]
    for i, (row, ratios) in enumerate(rows.items()):
        top = TOP + i * (ROW + GAP)
        parts.append(f'<text x="{LABEL_WIDTH - 8}" y="{top + 18}" text-anchor="end">{escape(row)}</text>')
        parts += [bar(tests.index(test), ratio, top, scale) for test, ratio in ratios.items()]
    parts += axis(scale, most, height)
    return "\n".join([*parts, "</svg>", ""])


def legend(tests: list[str]) -> list[str]:
    """The colour of each test, on one line."""
    parts = []
    for i, test in enumerate(tests):
        x = LABEL_WIDTH + 160 * i
        parts.append(f'<rect x="{x}" y="34" width="10" height="10" fill="{COLORS[i % len(COLORS)]}"/>')
        parts.append(f'<text x="{x + 16}" y="43">{escape(test)}</text>')
    return parts


def bar(i: int, ratio: float, top: int, scale: float) -> str:
    """The bar of the i-th test, and its ratio behind it: never across the line at 1."""
    y, end, one = top + i * (BAR + 3), LABEL_WIDTH + ratio * scale, LABEL_WIDTH + scale
    x = one if end <= one < end + VALUE_WIDTH else end
    return (
        f'<rect x="{LABEL_WIDTH}" y="{y}" width="{ratio * scale:.1f}" height="{BAR}" '
        f'fill="{COLORS[i % len(COLORS)]}"/><text class="value" x="{x + 5:.1f}" y="{y + 8}">{ratio:.2f}</text>'
    )


def axis(scale: float, most: float, height: int) -> list[str]:
    """The line at 1, where both are as fast, and marks at whole ratios."""
    parts = [f'<line class="axis" x1="{LABEL_WIDTH}" y1="{TOP - 6}" x2="{LABEL_WIDTH}" y2="{height - BOTTOM}"/>']
    for ratio in range(1, int(most) + 1):
        x = LABEL_WIDTH + ratio * scale
        kind = "one" if ratio == 1 else "axis"
        y = TOP - 6 if ratio == 1 else height - BOTTOM - 4
        parts.append(f'<line class="{kind}" x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{ratio}</text>')
    return parts


if __name__ == "__main__":
    CHART.write_text(chart(json.loads((TOOLS / "speed.json").read_text(encoding="utf-8"))), encoding="utf-8")
