"""The page of a run: everything inside it, nothing fetched."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from mmdlm.training.report import write_report
from mmdlm.training.run_log import RunLog


def test_a_page_with_curves_and_sheets(tmp_path: Path):
    log = RunLog(tmp_path)
    for step in range(1, 41):
        details = {"image/nats/0-20": 4.0, "image/nats/80-100": 7.0 - step / 20, "image/nats/stickers": 3.0}
        log.write(step, details, loss=8.0 / step + 1, image=6.0 / step, text=2.0 / step, gradient_norm=1.0)
    log.write(40, held_out_image=2.5, held_out_text=float("nan"))
    for step in (10, 20, 30, 40, 50, 60, 70, 80):
        Image.new("RGB", (16, 8), (step, 0, 0)).save(tmp_path / f"drawings-{step}.png")
    (tmp_path / "described.html").write_text("<h2>Captions</h2>")
    page = write_report(tmp_path, title="mine <1>", facts={"rows": 24, "data": "a & b"}).read_text()
    assert "mine &lt;1&gt;" in page and "a &amp; b" in page and "<h2>Captions</h2>" in page
    titles = re.findall(r"<figcaption><b>([^<]+)</b>", page)
    assert titles == ["Loss", "Held-out loss", "Image, by share masked", "By source", "Gradient norm"]
    assert page.count("data:image/png;base64,") == 6 and "step 80" in page and "step 10<" in page
    assert not re.search(r"(src|href)=['\"]?(https?:|//|/)", page)
    for chart in re.findall(r"<polyline points='([^']+)'", page):
        points = [tuple(map(float, point.split(","))) for point in chart.split()]
        assert all(0 <= x <= 460 and 0 <= y <= 220 for x, y in points)
        assert points == sorted(points)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_page_before_the_first_report(tmp_path: Path):
    assert "No reports yet" in write_report(tmp_path, title="t", facts={}).read_text()
