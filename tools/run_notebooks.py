"""Runs the notebooks from top to bottom and saves them with what they printed and drew.

    pip install -e ".[test]"
    python tools/run_notebooks.py

Each runs in an empty directory of its own. One that fails is left as it was.
"""

import argparse
import base64
import io
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def run(notebook: Path, output: Path) -> None:
    """Writes the notebook with new outputs to a file; raises nbclient's CellExecutionError where a cell fails."""
    content = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            content,
            timeout=None,
            record_timing=False,
            coalesce_streams=True,  # of a progress bar only the last state
            resources={"metadata": {"path": folder}},
        ).execute()
    for cell in content.cells:
        for picture in cell.get("outputs", []):
            if "image/png" in picture.get("data", {}):
                picture.data["image/png"] = shrink(picture.data["image/png"])
    nbformat.write(content, output)


def shrink(png: str) -> str:
    """A PNG in base64 with 256 colours: of half the size or less, and the same to the eye."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize()
    smaller = io.BytesIO()
    image.save(smaller, "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=NOTEBOOKS, help="directory (default: in place)")
    output = parser.parse_args().output
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        run(notebook, output / notebook.name)


if __name__ == "__main__":
    main()
