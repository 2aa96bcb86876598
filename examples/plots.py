"""Lines that differ in lightness and style: they are read in grey, and by the colour-blind."""

from pathlib import Path

import matplotlib.pyplot as plt

STYLES = ("-", "--", ":", "-.")
MARKERS = "osD^v<>PX*"


def line(i: int, n: int, marker: bool = False) -> dict[str, object]:
    """The look of line i of n, as keyword arguments of ``Axes.plot``."""
    look = {"color": plt.colormaps["cividis"](0.8 * i / max(n - 1, 1)), "ls": STYLES[i % 4]}
    return look | {"marker": MARKERS[i % len(MARKERS)]} if marker else look


def finish(figure: plt.Figure, path: Path) -> None:
    """Write a figure to a file, and close it."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
