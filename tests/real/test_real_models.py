"""The method on real ImageNet models and photographs (method.md, section 5), from import to served map."""

import io
import json

import numpy as np
import pytest

from parchgrad.models import load_model
from parchgrad.tables import load_table
from tests.real.conftest import DATA, run
from tests.service.serving import serving

VALIDATION = DATA / "imagenette" / "val"


def test_the_table_covers_the_ten_classes_of_the_photographs(repository, real_model):
    model = load_model(repository.models / real_model)
    table = load_table(repository.tables / real_model, model)
    assert table.classes == (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
    assert table.images_per_class == (100,) * 10
    assert len(table.labels) == 1000
    assert "10 of the model's 1000" in repository.output


def test_on_mosaics_parchgrad_finds_the_target_and_random_channels_do_not(repository, real_model, tmp_path):
    """Share of the map's mass in the target's quarter, 100 mosaics of four validation photographs, chance 0.25."""
    written = tmp_path / "scores.json"
    options = ["--mosaics", "100", "--images", "8", "--curves", "0", "--checks", "0", "--json", str(written)]
    methods = ["--method", "gradient", "--method", "ParchGrad", "--method", "ParchGrad, random channels"]
    print(run(["evaluate", real_model, "--data", str(VALIDATION), *options, *methods, *repository.arguments]))
    cells = json.loads(written.read_text())["cells"]["mosaic_mass"]
    mass = {name: cell["interval"]["mean"] for name, cell in cells.items()}
    assert 0.31 <= mass["gradient"] <= 0.42
    assert mass["ParchGrad"] >= 0.58
    assert mass["ParchGrad, random channels"] <= mass["gradient"]
    assert cells["ParchGrad"]["distinct"]


@pytest.mark.parametrize("real_model", ["squeezenet1_1"], indirect=True)  # nothing here is of one model
def test_on_boxes_of_photographs_in_one_folder(repository, real_model, tmp_path):
    """ILSVRC's validation photographs lie in no class folders; their boxes say the class, hardly one in the table."""
    data, page, written = DATA / "imagenet_val", tmp_path / "out.html", tmp_path / "out.json"
    methods = ["--method", "random map", "--method", "Grad-CAM", "--method", "ParchGrad, instance-wise"]
    effort = ["--images", "24", "--mosaics", "0", "--curves", "1", "--step", "3136", "--checks", "1"]
    where = ["--data", str(data), "--boxes", str(data / "boxes.csv"), *repository.arguments]
    run(["evaluate", real_model, *where, *effort, *methods, "--report", str(page), "--json", str(written)])
    read = json.loads(written.read_text())
    assert read["settings"]["places"]["with_place"] == 24
    cells = {name: cell["interval"]["mean"] for name, cell in read["cells"]["object_density"].items()}
    assert cells["random map"] == pytest.approx(1, abs=0.02)
    assert cells["Grad-CAM"] > 1.1
    assert "Grad-CAM" in page.read_text(encoding="utf-8")


@pytest.fixture
def server(repository, real_model, tmp_path):
    settings = {"model": real_model, "models_dir": repository.models, "tables_dir": repository.tables}
    with serving(tmp_path / "bento", settings=settings) as running:
        yield running


def test_the_service_explains_real_photographs(server, repository, real_model):
    """Most predictions are right, every map is finite, and the map is the library's own."""
    from parchgrad import Explainer
    from parchgrad.preprocessing import read_image

    model = load_model(repository.models / real_model)
    explainer = Explainer(model, load_table(repository.tables / real_model, model))
    right = 0
    paths = [path for folder in sorted(VALIDATION.iterdir()) for path in sorted(folder.iterdir())[:3]]
    for path in paths:
        truth = path.parent.name
        with path.open("rb") as file:
            answer = server.client.post(
                "/explain", files={"image": file}, data={"target": truth}, headers={"Accept": "application/x-npz"}
            )
        assert answer.status_code == 200, answer.text
        arrays = np.load(io.BytesIO(answer.content), allow_pickle=False)
        right += int(arrays["logits_0"].argmax()) == model.class_index(truth)
        expected = explainer.explain(model.preprocessing.apply(read_image(path))[0][None], model.class_index(truth))
        saliency = expected.saliency()[0].numpy()
        # Another number of threads sums in another order, and a ReLU on the edge then flips one path.
        distance = np.linalg.norm(arrays["saliency_0"] - saliency) / np.linalg.norm(saliency)
        assert distance < 1e-2, path
    assert right >= 0.5 * len(paths)


def test_a_prediction_outside_the_table_is_still_answered(server):
    """ILSVRC's first validation photograph is a snake; the table has ten other classes."""
    with (DATA / "imagenet_val" / "ILSVRC2012_val_00000001.JPEG").open("rb") as file:
        answer = server.client.post("/explain", files={"image": file})
    assert answer.status_code == 200
    result = answer.json()["results"][0]
    assert result["status"] == "ok"
    assert "snake" in result["predictions"][0]["label"] or "python" in result["predictions"][0]["label"]
    assert result["explanation"]["status"] == "error"
    assert result["explanation"]["error"]["code"] == "target_not_in_table"
