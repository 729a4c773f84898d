"""The pictures that evaluate writes show the dataset's own images, and say what was scored."""

import numpy as np
import pytest
from PIL import Image

from mlpmixer_flax.evaluate import main

RED, GREEN = (255, 0, 0), (0, 255, 0)

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def test_mistakes_show_whole_photos_in_color_and_all_titles_say_run_and_split(digits_run, tmp_path):
    photo = np.zeros((50, 150, 3), np.uint8)
    photo[:, :75], photo[:, 75:] = RED, GREEN
    for name in ("3", "4", "5"):  # at most one of them is right
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        Image.fromarray(photo).save(tmp_path / "photos" / "train" / name / f"photo_{name}.png")
    data = f"folder:{tmp_path / 'photos'}"
    arguments = [
        f"--workdir={digits_run}",
        f"--dataset={data}",
        "--split=train",
        f"--output={tmp_path / 'out'}",
    ]
    assert main(arguments) == 0

    for name in ("confusion", "mistakes", "calibration"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            title = picture.text["Title"].replace("\n", " ")
            assert picture.width == 1200
            assert str(digits_run) in title and f"on {data}, split train" in title
            pixels = np.asarray(picture.convert("RGB"))
    assert name == "calibration"
    with Image.open(tmp_path / "out" / "mistakes.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    red, green = (abs(pixels - color).max(axis=-1) < 40 for color in (RED, GREEN))
    rows = np.flatnonzero(red.any(axis=1))
    middle = rows[len(rows) // 2]
    starts = np.flatnonzero(np.diff(red[middle].astype(int)) == 1)
    assert len(starts) in (2, 3)  # photos in one row
    for start in starts:
        red_px, green_px = (np.argmin(color[middle, start + 5 :]) for color in (red, red | green))
        assert green_px == pytest.approx(2 * red_px, rel=0.1)
        assert green_px / len(rows) == pytest.approx(3, rel=0.1)
