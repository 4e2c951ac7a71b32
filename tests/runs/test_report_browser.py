"""The report in a real browser: no word from its console, nothing wider than the window, light and dark."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from dataclasses import replace
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from test_report import dense, three

from pins_ext.runs import html as report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")

LONG = "a-label-without-any-place-to-break-" * 4

# A window can't be as narrow as a phone, a frame can. What it measures it writes where --dump-dom shows it.
FRAME = '<iframe style="border:0;width:{width}px;height:3000px" srcdoc="{page}"></iframe>'
FRAMES = """<!doctype html><body style="margin:0">{frames}<pre id="found"></pre><script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const inside = frame.contentDocument, root = inside.documentElement
    const wide = [...inside.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, svg")
      && e.getBoundingClientRect().right > {width} + 0.5)
    const text = getComputedStyle(inside.body)
    return [root.scrollWidth, wide.length, text.color, text.backgroundColor, inside.querySelectorAll("svg").length,
      Math.min(...[...inside.querySelectorAll("svg text")].map(e => e.getBoundingClientRect().height))]
  }})
  document.getElementById("found").textContent = JSON.stringify(found)
}})
</script>"""


def browse(page: Path, *options: str) -> str:
    """What the browser prints about a page, its console included."""
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--v=0",
    ]
    command += ["--virtual-time-budget=2000", f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "CONSOLE" not in found.stderr, found.stderr
    return found.stdout


def measured(folder: Path, pages: list[str], width: int, *options: str) -> list[list[Any]]:
    """Of each page: scroll width, elements beyond the edge, text's and page's colour, pictures, height of the smallest
    text."""
    frames = folder / f"frames-{width}.html"
    inside = "".join(FRAME.format(page=escape(page), width=width) for page in pages)
    frames.write_text(FRAMES.format(frames=inside, width=width))
    found = re.search(r'<pre id="found">(.*?)</pre>', browse(frames, "--dump-dom", *options))
    assert found is not None
    values: list[list[Any]] = json.loads(unescape(found[1]))
    assert len(values) == len(pages)
    return values


def luminance(colour: object) -> float:
    return sum(map(float, re.findall(r"\d+", str(colour))[:3])) / 765


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_window(width: int, tmp_path: Path) -> None:
    records = three()
    records[1] = replace(records[1], label=LONG, notes=(LONG,))
    pages = [report.render(made) for made in (three(), records, [records[1]], [dense()])]
    for scroll, wide, *_, pictures, text in measured(tmp_path, pages, width):
        assert (scroll, wide) == (width, 0)
        assert pictures
        assert text >= 6


def test_it_is_dark_where_the_reader_wants_it_dark(tmp_path: Path) -> None:
    page = report.render(three())
    [[_, _, ink, paper, *_]] = measured(tmp_path, [page], 390)
    assert luminance(ink) < 0.3 < 0.9 < luminance(paper)
    [[_, _, ink, paper, *_]] = measured(tmp_path, [page], 390, "--blink-settings=preferredColorScheme=0")
    assert luminance(paper) < 0.2 < 0.8 < luminance(ink)


@pytest.mark.parametrize("width", [500, 1200])
def test_it_can_be_photographed(width: int, tmp_path: Path) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(report.render(three()))
    browse(page, f"--window-size={width},2400", f"--screenshot={picture}")
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (width, 2400)
    # A blank page of this size has some ten thousand bytes.
    assert len(data) > 50_000
