"""Runs the notebooks from top to bottom and saves them with their new outputs.

    pip install -e ".[test]"
    python tools/run_notebooks.py

Each notebook runs in its own empty directory. If a cell fails, the file of its notebook is not changed.
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
    """Runs a notebook and writes it with its new outputs to `output`.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell fails; nothing is written.
    """
    content = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            content,
            timeout=None,
            record_timing=False,
            coalesce_streams=True,  # one output for all lines that a cell prints
            resources={"metadata": {"path": folder}},
        ).execute()
    for cell in content.cells:
        for picture in cell.get("outputs", []):
            if "image/png" in picture.get("data", {}):
                picture.data["image/png"] = shrink(picture.data["image/png"])
    nbformat.write(content, output)


def shrink(png: str) -> str:
    """Returns a PNG in base64 with 256 colors: at most half the size, and it looks the same."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize()
    smaller = io.BytesIO()
    image.save(smaller, "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [file.stem for file in sorted(NOTEBOOKS.glob("*.ipynb"))]
    parser.add_argument(
        "names", nargs="*", metavar="NAME", default=names, help=f"of {', '.join(names)} (default: all)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=NOTEBOOKS,
        help="directory for the results (default: the notebooks are replaced)",
    )
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in names]:
        parser.error(f"no notebook {unknown[0]!r}: choose from {', '.join(names)}")
    for name in options.names:
        run(NOTEBOOKS / f"{name}.ipynb", options.output / f"{name}.ipynb")


if __name__ == "__main__":
    main()
