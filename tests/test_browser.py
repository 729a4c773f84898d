"""docs/browser.html prepares images as the package does, and asks for what an export has.

Node.js runs the part of the page that prepares images, if it is installed. docs/browser.md says how the whole page was
tried in a browser.
"""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlpmixer_flax.data.images import FITS, RESAMPLING, read_square

PAGE = (Path(__file__).parent.parent / "docs" / "browser.html").read_text()
PREPARE = PAGE.partition("// --- from pixels")[2].partition("// --- the page")[0].partition("\n")[2]
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

RUN = """
const fs = require("fs");
const [width, height] = [+process.argv[2], +process.argv[3]];
const data = new Uint8ClampedArray(fs.readFileSync(process.argv[4]));
const results = JSON.parse(fs.readFileSync(process.argv[5])).map(
  ([channels, preprocess]) => Array.from(prepare({ data, width, height }, channels, preprocess)));
fs.writeFileSync(1, JSON.stringify(results));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")
@pytest.mark.parametrize("shape", [(40, 61), (33, 20), (5, 7)], ids=str)
def test_the_page_prepares_images_as_the_package_does(tmp_path, shape):
    # Without black and white: which side Pillow resizes first differs, and matters where bicubic overshoots.
    noise = np.random.default_rng(0).integers(64, 192, (*shape, 4)).astype(np.uint8)
    noise[..., 3] = 255
    image = Image.fromarray(noise)
    keys = ("image_size_px", "crop_fraction", "fit", "interpolation")
    kinds = [
        (channels, dict(zip(keys, values, strict=True)))
        for channels, *values in itertools.product(MODES, (16,), (1.0, 0.875), FITS, RESAMPLING)
    ]
    (tmp_path / "image").write_bytes(noise.tobytes())
    (tmp_path / "kinds").write_text(json.dumps(kinds))
    (tmp_path / "run.js").write_text(PREPARE + RUN)
    height, width = shape
    command = ["node", "run.js", str(width), str(height), "image", "kinds"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (channels, preprocess), found in zip(kinds, json.loads(done.stdout), strict=True):
        size_px = preprocess["image_size_px"]
        others = {key: preprocess[key] for key in keys[1:]}
        expected = read_square(
            image.convert(MODES[channels]), channels=channels, size_px=size_px, **others
        ).astype(int)
        found = np.reshape(found, expected.shape)
        assert np.abs(found - expected).max() <= 1, (channels, preprocess)  # rounding


def test_the_page_asks_for_the_names_of_an_export():
    for name in (
        '"model.onnx"',
        "${file}.json",
        "class_names: classNames",
        "{ images }",
        "{ probabilities }",
    ):
        assert name in PAGE
    assert set(re.findall(r'fit [!=]== "(\w+)"', PAGE)) <= set(FITS)
    assert set(re.findall(r"^  (\w+): \[", PAGE, re.MULTILINE)) == set(RESAMPLING)


def test_the_page_loads_nothing_from_elsewhere():
    assert "//" not in re.sub(r"^\s*//.*|\s// .*", "", PAGE, flags=re.MULTILINE)
