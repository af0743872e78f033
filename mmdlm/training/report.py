"""A run on one page: `report.html` in its directory, with curves and sheets inside the file, nothing fetched.

Curves are SVG made here, so that the page can be mailed, opened without a network, and read in ten years.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmdlm.picture_files import write_whole
from mmdlm.training.run_log import read_metrics

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460, 220, 52, 24, 8  # of a chart, in pixels
SHEETS = 6  # at most so many sheets, evenly over the run
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")

# Title, what it is, and which metrics (regular expressions); a chart without any is left out.
CHARTS: tuple[tuple[str, str, Sequence[str]], ...] = (
    ("Loss", "what is minimised: image nats a masked token, text weighted by 1/t", ("loss", "image", "text")),
    ("Held-out loss", "the moving average of the weights on fixed rows with fixed noise", ("held_out_\\w+",)),
    ("Text, by share masked", "nats a masked token; 0-20 is percent masked", ("text/nats/\\d.*",)),
    ("Image, by share masked", "nats a masked token; 0-20 is percent masked", ("image/nats/\\d.*",)),
    ("Likelihood bound", "nats a token, at most: the mean with the schedule's weights", ("(image|text)/bound",)),
    ("Bound, text, by share masked", "nats a token within the bucket", ("text/bound/\\d.*",)),
    ("Bound, image, by share masked", "nats a token within the bucket", ("image/bound/\\d.*",)),
    ("By source", "nats a masked token", ("(image|text)/nats/[^\\d].*",)),
    ("Gradient norm", "before it is clipped", ("gradient_norm",)),
    ("Learning rate", "share of its peak", ("learning_share",)),
    ("Tokens per second", "of all processes", ("tokens_per_second",)),
    ("Peak memory", "GB, of the largest process so far", ("peak_memory_gb",)),
)


def write_report(run: Path, *, title: str, facts: Mapping[str, object], samples: str = "drawings") -> Path:
    """Writes `run/report.html` from its metrics.jsonl, `<samples>-<step>.png` and `described-<step>.html`; its path.

    facts: what stands in the table at the top, in order.
    """
    rows = read_metrics(run)
    charts = "".join(_chart_of(rows, *chart) for chart in CHARTS)
    table = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>" for name, value in facts.items()
    )
    body = (
        f"<h1>{html.escape(title)}</h1><table>{table}</table>"
        f"<h2>Curves</h2><div class=charts>{charts or '<p>No reports yet.</p>'}</div>{_sheets(run, samples)}"
    )
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>{_STYLE}{body}</html>"
    target = run / "report.html"
    write_whole(target, page.encode())
    return target


def _sheets(run: Path, samples: str) -> str:
    """The sample sheets, the newest first."""
    found = []
    for path in run.glob(f"{samples}-*.png"):
        if number := re.fullmatch(rf"{samples}-(\d+)", path.stem):
            found.append((int(number.group(1)), path))
    found.sort(reverse=True)
    if len(found) > SHEETS:
        found = [found[round(n * (len(found) - 1) / (SHEETS - 1))] for n in range(SHEETS)]
    shown = []
    for step, path in found:
        data = base64.b64encode(path.read_bytes()).decode()
        shown.append(
            f"<figure><img src='data:image/png;base64,{data}' alt=''><figcaption>step {step}</figcaption></figure>"
        )
    described = run / "described.html"
    words = described.read_text(encoding="utf-8") if described.is_file() else ""
    return (f"<h2>Samples</h2><div class=sheets>{''.join(shown)}</div>" if shown else "") + words


def _chart_of(rows: Sequence[Mapping[str, float]], title: str, about: str, patterns: Sequence[str]) -> str:
    names = sorted({name for row in rows for name in row if any(re.fullmatch(p, name) for p in patterns)})
    names.sort(key=lambda name: (name.count("/"), _first_number(name)))
    lines = {}
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
        if points:
            lines[name] = points
    return _chart(title, about, lines) if lines else ""


def _first_number(name: str) -> int:
    number = re.search(r"\d+", name)
    return int(number.group()) if number else -1


def _chart(title: str, about: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """One chart: axes with round numbers, a line for each name, the last values in the legend."""
    steps = [x for points in lines.values() for x, _ in points]
    values = sorted(y for points in lines.values() for _, y in points)
    first, last = min(steps), max(max(steps), min(steps) + 1)
    # A first step's loss is many times the rest: the axis ends where nearly all values do.
    top = min(values[-1], 1.25 * values[min(int(len(values) * 0.97), len(values) - 1)] or values[-1])
    low = values[0] if 0.5 * top <= values[0] < top else min(values[0], 0.0)
    ticks = _ticks(low, top)
    low, top = min(low, ticks[0]), max(top, ticks[-1])
    if top <= low:
        top = low + 1

    def across(x: float) -> float:
        return LEFT + (x - first) / (last - first) * (WIDTH - LEFT - 10)

    def up(y: float) -> float:
        return TOP + (1 - (min(y, top) - low) / (top - low)) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks:
        y = up(tick)
        parts.append(f"<line class=grid x1={LEFT} x2={WIDTH - 10} y1={y:.1f} y2={y:.1f} />")
        parts.append(f"<text x={LEFT - 6} y={y + 4:.1f} text-anchor=end>{tick:g}</text>")
    for x, anchor in ((first, "start"), (last, "end")):
        parts.append(f"<text x={across(x):.1f} y={HEIGHT - 6} text-anchor={anchor}>{x:g}</text>")
    legend = []
    for colour, (name, points) in zip(_COLOURS * (len(lines) // len(_COLOURS) + 1), lines.items(), strict=False):
        drawn = points[:: max(len(points) // 600, 1)]
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in drawn)
        if len(drawn) == 1:
            parts.append(f"<circle cx={across(drawn[0][0]):.1f} cy={up(drawn[0][1]):.1f} r=3 fill='{colour}' />")
        parts.append(f"<polyline points='{path}' stroke='{colour}' />")
        legend.append(f"<span><i style='background:{colour}'></i>{html.escape(name)} <b>{points[-1][1]:.4g}</b></span>")
    return (
        f"<figure class=chart><figcaption><b>{html.escape(title)}</b><br>{html.escape(about)}</figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{html.escape(title, quote=True)}'>{''.join(parts)}"
        f"</svg><div class=legend>{''.join(legend)}</div></figure>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that cover low to high."""
    span = (high - low) or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / 4))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if span / (size * factor) <= 5)
    start, end = math.floor(low / step), math.ceil(high / step)
    return [round(n * step, 12) for n in range(start, end + 1)]


_STYLE = """<style>
:root{color-scheme:light dark;--line:#8884;--soft:#777}
body{font:15px/1.45 system-ui,sans-serif;max-width:1500px;margin:2rem auto;padding:0 1.2rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse}th{text-align:left;font-weight:500;color:var(--soft);padding:.1rem 1.2rem .1rem 0}
th,td{vertical-align:top;overflow-wrap:anywhere}
.charts,.sheets{display:grid;grid-template-columns:repeat(auto-fill,minmax(400px,1fr));gap:1.2rem}
.sheets{grid-template-columns:repeat(auto-fill,minmax(min(100%,560px),1fr))}
figure{margin:0}figcaption{font-size:.85rem;color:var(--soft)}figcaption b{color:CanvasText;font-size:.95rem}
svg{width:100%;height:auto}svg text{font-size:11px;fill:var(--soft)}.grid{stroke:var(--line);stroke-width:1}
polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}
.legend{font-size:.8rem;display:flex;flex-wrap:wrap;gap:.2rem .9rem}
.legend i{display:inline-block;width:.7rem;height:.7rem;
border-radius:2px;margin-right:.3rem}.sheets img{width:100%;image-rendering:pixelated;border:1px solid var(--line)}
.words td,.words th{padding:.2rem 1rem .2rem 0}.words img{height:64px;image-rendering:pixelated}
</style>"""
