"""An experiment in its quick version."""

import json
from pathlib import Path
from typing import Any

from fastmeta.reproduce import EXPERIMENTS


def run_quickly(name: str, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Settings and figures of every cell, and the table; there is a picture."""
    EXPERIMENTS[name].run(folder, quick=True)
    cells = json.loads((folder / "results.json").read_text())["cells"]
    assert (folder / "figure.png").stat().st_size > 10_000
    return [{**cell["settings"], **cell["measured"]} for cell in cells], (folder / "table.md").read_text()
