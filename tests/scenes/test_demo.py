"""The demonstration from end to end: what `make demo` runs once everything is installed."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

from scenes.demo import MOSAICS, SCENES, questions

ROOT = Path(__file__).resolve().parents[2]


def test_every_mosaic_is_asked_about_two_targets():
    mosaics = [q for q in questions() if q.name.startswith("mosaic")]
    assert len(mosaics) == 2 * len(MOSAICS)
    for first, second in zip(mosaics[::2], mosaics[1::2], strict=True):
        assert (first.image == second.image).all()
        assert first.target != second.target
        assert not (first.mask & second.mask).any()


def test_the_demonstration_writes_an_overlay_a_picture_and_one_contact_sheet(tmp_path):
    command = [sys.executable, "-m", "scenes.demo", "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    names = [q.name for q in questions()]
    assert len(names) == len(SCENES) + 2 * len(MOSAICS)
    assert {p.name for p in tmp_path.iterdir()} == {
        "contact_sheet.png",
        *(f"{name}{kind}" for name in names for kind in (".png", ".overlay.png")),
    }
    for question in questions():
        assert question.name in ran.stdout
        with Image.open(tmp_path / f"{question.name}.overlay.png") as drawn:
            assert drawn.size == question.image.shape[1::-1]
