"""README.md is run: its Python lines, its curl lines against the real server, its make targets and its links."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from scenes.generator import sample
from tests.service.serving import serving

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def lines_of(language, beginning):
    return [
        line for kind, block in BLOCKS if kind == language for line in block.splitlines() if line.startswith(beginning)
    ]


def test_the_python_lines_run():
    (block,) = (block for kind, block in BLOCKS if kind == "python")
    ran = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "torch.Size([2, 128, 128])" in ran.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("bento"), settings={}) as running:
        yield running


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("line", lines_of("", "curl"), ids=lambda line: line.split()[-1])
def test_the_curl_lines_answer(server, tmp_path, line):
    (tmp_path / "out").mkdir()
    Image.fromarray(sample("test", 9, 128).image).save(tmp_path / "out/scene_9.png")
    command = shlex.split(line.partition("#")[0].replace("http://127.0.0.1:3000", server.url))
    ran = subprocess.run([*command, "--fail-with-body"], cwd=tmp_path, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stdout
    if "-o" in command:
        with Image.open(tmp_path / "map.png") as drawn:
            assert drawn.size == (128, 128)
    else:
        assert b'"predictions"' in ran.stdout


def test_the_export_line_writes_an_entry(tmp_path):
    (line,) = lines_of("", "parchgrad export")
    arguments = shlex.split(line.partition("#")[0])[1:]
    command = [sys.executable, "-m", "parchgrad", *arguments, "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "scenes/1/model.onnx").is_file()
    assert (tmp_path / "scenes/config.pbtxt").is_file()


def test_the_make_targets_exist():
    targets = {line.split()[1] for line in lines_of("", "make")} | {"serve"}
    assert {"demo", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
