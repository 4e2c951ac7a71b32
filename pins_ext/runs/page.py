"""The frame and the style of a report: one file that loads nothing, in the light and in the dark, down to a phone."""

from __future__ import annotations

import re
from html import escape


def page(title: str, body: str) -> str:
    """A whole HTML document.

    Args:
        title: plain text.
        body: markup.
    """
    return _PAGE.format(title=escape(title), style=_STYLE, body=body)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

# The colours --run-0 to --run-5 are those of charts.COLORS, lighter in the dark.
_STYLE = re.sub(
    r"\s*\n\s*",
    " ",
    """
    :root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1f2937; --soft: #4b5563;
      --quiet: #5f6877; --faint: #9aa3af; --grid: #e8ebef; --edge: #e5e7eb; --run-0: #1d5fd1; --run-1: #d9730d;
      --run-2: #0f8b8d; --run-3: #8e3b8a; --run-4: #7a8b1f; --run-5: #6b7280; }
    @media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1a2028; --ink: #e6e9ee; --soft: #c0c7d1;
      --quiet: #a2abb8; --faint: #7d8794; --grid: #2b333e; --edge: #2f3844; --run-0: #6ea2ff; --run-1: #f29a4a;
      --run-2: #43c0c1; --run-3: #d283ce; --run-4: #b3c653; --run-5: #a2abb8; } }
    body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: break-word;
      font: 15px/1.55 Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
    main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
    h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 4px; font-weight: 650; }
    h2 { font-size: 17px; margin: 36px 0 12px; font-weight: 600; }
    h3 { font-size: 13px; margin: 20px 0 6px; color: var(--soft); font-weight: 600; text-transform: capitalize; }
    header p { margin: 0; color: var(--quiet); }
    header .finding { color: var(--ink); font-size: 18px; margin-top: 16px; }
    .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(190px, 100%), 1fr)); gap: 14px;
      margin-top: 26px; }
    .tiles div, figure, .scroll, details, pre { background: var(--card); border: 1px solid var(--edge);
      border-radius: 10px; }
    .tiles div { padding: 16px 18px; }
    .tiles b { display: block; font-size: 26px; line-height: 1.2; font-weight: 650; letter-spacing: -0.01em;
      font-variant-numeric: tabular-nums; }
    .tiles span { display: block; color: var(--soft); }
    .tiles small { color: var(--quiet); }
    .grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 14px;
      align-items: start; }
    figure { margin: 0 0 14px; padding: 14px 16px 8px; min-width: 0; }
    .grid figure { margin: 0; }
    figcaption b { font-weight: 600; display: block; }
    figcaption span { color: var(--quiet); font-size: 13px; }
    figure svg { display: block; width: 100%; max-width: 560px; height: auto; margin-top: 6px; }
    .scroll { overflow-x: auto; margin-bottom: 12px; }
    table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
    th, td { text-align: right; padding: 8px 16px; white-space: nowrap; font-weight: inherit; }
    th:first-child, td:first-child { text-align: left; }
    thead th { color: var(--quiet); font-weight: 500; font-size: 13px; border-bottom: 1px solid var(--edge); }
    tbody tr + tr > * { border-top: 1px solid var(--grid); }
    ul { color: var(--soft); padding-left: 20px; margin: 12px 0 0; }
    pre { padding: 14px 18px; overflow-x: auto; margin: 0; font-size: 13px; line-height: 1.5; }
    details { margin-top: 14px; padding: 12px 18px; }
    details table { font-size: 13px; }
    details :is(td, th) { white-space: normal; overflow-wrap: anywhere; padding: 5px 14px; }
    details p { color: var(--quiet); font-size: 13px; }
    summary { cursor: pointer; font-weight: 600; }
    :focus-visible { outline: 2px solid var(--run-0); outline-offset: 2px; }
    @media (max-width: 520px) { main { padding: 24px 16px 48px; } h1 { font-size: 23px; }
      th, td { padding: 7px 10px; } details { padding: 10px 12px; } details :is(td, th) { padding: 5px 6px; } }
    @media print { body { background: #fff; } details { break-inside: avoid; } }
    """,
).strip()
