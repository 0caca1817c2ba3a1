"""Figures: drawn with matplotlib, without its global state, and written as PNG and as SVG.

matplotlib comes with `pip install clipkit[plots]`.
"""

from io import BytesIO
from pathlib import Path
from typing import Any

from clipkit.errors import DependencyError
from clipkit.files import atomic_write


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches. Raises: DependencyError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError("figures need matplotlib", hint="pip install 'clipkit[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> list[Path]:
    """Write a figure to `path`, which has no suffix, as `.png` and `.svg`. Returns: the files."""
    from matplotlib import rc_context

    files = []
    for suffix, more in ((".png", {"dpi": 150}), (".svg", {"metadata": {"Date": None}})):
        buffer = BytesIO()
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "clipkit"}):  # letters, and equal bytes
            figure.savefig(buffer, format=suffix[1:], **more)
        files.append(path.with_name(path.name + suffix))
        atomic_write(files[-1], buffer.getvalue())
    return files
