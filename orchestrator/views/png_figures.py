"""Figures: an empty sheet and the bytes of a finished one, without a display and without global state.

matplotlib is imported when a picture is drawn. No date and no version is stored: the same drawing gives the same
bytes. Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart.
"""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT = "#222222", "#d9d9d9"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#A6761D")


def blank_figure(width: float, height: float) -> "Figure":
    """A white sheet of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png_bytes(figure: "Figure") -> bytes:
    """The picture as a PNG file."""
    target = io.BytesIO()
    figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()
