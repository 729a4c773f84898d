"""What all figures share: titles, text that fits, the file, and what it takes to draw."""

import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len

from mlpmixer_flax import UserError
from mlpmixer_flax.inference.drawing import new_figure, percent, remove_blank_strips, save, short
from mlpmixer_flax.inference.figures import confusion, curves, mistakes


def test_a_title_has_a_line_per_part_and_a_long_one_is_wrapped():
    assert new_figure(1, "run", "", "second").get_suptitle() == "run\nsecond"
    words = " ".join(f"run{i}" for i in range(100))
    *lines, last = new_figure(1, words, "second").get_suptitle().split("\n")
    assert last == "second" and len(lines) == 2 and max(map(len, lines)) <= 88
    assert lines[0].startswith("run0 run1 ") and lines[1].endswith(" run98 run99") and "…" in lines[1]


@pytest.mark.parametrize(
    "text", ["IMG_2024-06-13_at_the_beach_of_Étretat.jpg", "猫とても長い名前のクラス 10", "a  b\n" * 20]
)
def test_a_text_that_is_too_long_keeps_its_start_and_its_end(text):
    whole = " ".join(text.split())
    assert short(text, 100) == whole
    for columns in range(8, 30):
        found = short(text, columns)
        if cell_len(whole) <= columns:
            assert found == whole
            continue
        start, end = found.split("…")
        assert columns - 3 <= cell_len(found) <= columns
        assert whole.startswith(start) and whole.endswith(end) and len(start) >= len(end) > 0


def test_a_text_of_a_million_characters_is_shortened_at_once():
    started = time.process_time()
    assert short("猫" * 10**6 + "z", 12) == "猫猫猫猫…猫z" and time.process_time() - started < 2


def test_bytes_of_a_file_name_that_are_not_text_are_shown_as_escapes(tmp_path):
    assert short("caf\udce9.jpg", 20) == "caf\\udce9.jpg"
    save(new_figure(1, "caf\udce9.jpg"), tmp_path / "figure.png")


def test_shares_are_written_in_percent():
    assert [percent(share, 0) for share in (0, 0.125, 1)] == ["0 %", "12.5 %", "100 %"]


def test_a_figure_becomes_as_low_as_its_image_needs():
    figure = new_figure(9, "title")
    axes = figure.add_subplot()
    axes.imshow(np.zeros((2, 8)))
    remove_blank_strips(figure)
    figure.draw_without_rendering()
    height, image = figure.get_figheight(), axes.get_position()
    assert image.width * 8 / (image.height * height) == pytest.approx(4, rel=0.01)
    assert 1.5 < image.height * height < height < image.height * height + 1


ODD_NAMES = ["猫", "ابن آوى", "कुत्ता", "🐈", "$\\frac{$", "$", "a\nb\t\x07", "_^{}\\", "", "x" * 300]


def test_names_in_any_script_are_drawn_without_a_warning(tmp_path, capsys):
    n, dark = len(ODD_NAMES), np.zeros((8, 8, 3), np.uint8)
    wrong = [{"file": name, "is": name, "said": name[::-1], "confidence": 0.5} for name in ODD_NAMES]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for i, figure in enumerate((
            confusion([(i, i, 1) for i in range(n)], ODD_NAMES, title="猫"),
            mistakes([dark] * n, [{"image": i, **row} for i, row in enumerate(wrong)], title="猫"),
            curves([{"step": 1, "test/loss": 1.0}], title=" ".join(ODD_NAMES[:5])),
        )):  # fmt: skip
            save(figure, tmp_path / f"{i}.png")
            with Image.open(tmp_path / f"{i}.png") as image:
                assert image.width == 1200
    # No font, whichever are installed, has a private character.
    capsys.readouterr()
    for name, note in [("naïve кот", ""), ("\ue123", "curves.png shows some characters as boxes")]:
        save(curves([{"step": 1, "test/loss": 1.0}], title=name), tmp_path / "curves.png")
        out = capsys.readouterr().out
        assert out.startswith(note) and bool(out) == bool(note)


def test_save_writes_a_complete_file_with_its_title_or_leaves_the_old_one(tmp_path):
    file = tmp_path / "figure.png"
    file.write_text("old")
    figure = new_figure(1, "猫: 98 %", "second")
    save(figure, file)
    with Image.open(file) as image:
        assert (image.format, image.width) == ("PNG", 1200) and image.text["Title"] == "猫: 98 %\nsecond"
    written = file.read_bytes()
    with pytest.raises(UserError, match="nowhere.*No such file or directory"):
        save(figure, tmp_path / "nowhere" / "figure.png")
    figure.set_figheight(1e5)
    with pytest.raises(ValueError, match="too large"):
        save(figure, file)
    assert file.read_bytes() == written and list(tmp_path.iterdir()) == [file]


def test_drawing_does_not_import_pyplot(tmp_path):
    code = """
import pathlib, sys
from mlpmixer_flax.inference.drawing import save
from mlpmixer_flax.inference.figures import curves
assert "matplotlib" not in sys.modules
save(curves([{"step": 1, "test/loss": 1.0}], title="run"), pathlib.Path(sys.argv[1]))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "curves.png")], check=True)
