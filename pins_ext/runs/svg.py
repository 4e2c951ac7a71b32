"""How pictures look, and how one becomes SVG that fits a page in the light and in the dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Blue, orange, teal, plum, olive, grey: told apart by colour-blind readers, and in grey print by their lightness.
COLORS = ("#1d5fd1", "#d9730d", "#0f8b8d", "#8e3b8a", "#7a8b1f", "#6b7280")
INK = "#1f2937"
FAINT = "#9aa3af"
GRID = "#e8ebef"

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    # Labels are text of the user's own: a dollar sign begins no formula.
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": "#4b5563",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}

# A page's style says what these are in the light and in the dark.
_THEMED = {
    INK: "--ink",
    "#4b5563": "--soft",
    FAINT: "--faint",
    GRID: "--grid",
    "#ffffff": "--card",
    **{color: f"--run-{i}" for i, color in enumerate(COLORS)},
}


def svg_of(paint: Callable[[Figure], bool], size: tuple[float, float], salt: str, themed: bool = True) -> str | None:
    """Draw on a figure of this size in inches; None if paint drew nothing.

    Args:
        themed: take font, width and colours of the page; otherwise a file of its own, on white.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": salt}):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0 if themed else 1)
        if not paint(figure):
            return None
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg = buffer.getvalue()
    return _page_fit(svg[svg.index("<svg") :]) if themed else svg


def _page_fit(svg: str) -> str:
    """Metadata and groups' names go, the size becomes the page's, and text takes its font.

    Nothing refers to the names of groups, such as axes_1, which all pictures of a page have.

    Only tags are changed: a `<` in a label is escaped, so that what looks like one is one.
    """
    svg = re.sub(r"(?s)<metadata>.*?</metadata>", "", svg)
    svg = re.sub(r"<svg\b[^<>]*>", lambda tag: re.sub(r' (width|height)="[^"]*"', "", tag[0]), svg, count=1)
    svg = re.sub(r"<g\b[^<>]*>", lambda tag: re.sub(r' id="[^"]*"', "", tag[0]), svg)
    svg = re.sub(r"<text\b[^<>]*>", lambda tag: _inherited_font(tag[0]), svg)
    return re.sub(r"<[a-z]+\b[^<>]*>", lambda tag: _themed(tag[0]), svg)


def _themed(tag: str) -> str:
    """A tag whose colours are the page's."""
    return re.sub(r"#[0-9a-f]{6}\b", lambda c: f"var({_THEMED[c[0]]})" if c[0] in _THEMED else c[0], tag)


def _inherited_font(tag: str) -> str:
    """A text's tag with the font of the page around it; its size stays. Before 3.11 matplotlib writes `font: 9px X`."""
    tag = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px; font-family: inherit", tag)
    return re.sub(r"font-family: [^;\"]+", "font-family: inherit", tag)
