"""POST /attack: the library's own numbers, its options, off by default, and the end of an attack nobody waits for."""

import asyncio
import base64
import io
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from PIL import Image
from starlette.testclient import TestClient

from parchgrad.attacks.attack import Attack
from parchgrad.attacks.comparison import attacked
from parchgrad.attacks.gradients import Attacker
from parchgrad.errors import MissingPackageError
from service import attacks
from service.app import create_app
from service.errors import ServiceError
from service.pipeline import Origin, Pipeline
from service.settings import Settings
from service.torch_engine import TorchEngine
from tests.oracles.tolerance import assert_close
from tests.service.conftest import Home, files, picture, png
from tests.service.serving import Server

PICTURE = png(picture(3))


def ask(server: Server, **fields: str) -> dict[str, Any]:
    response = server.client.post("/attack", files=files(PICTURE), data=fields)
    assert response.status_code == 200, response.text[:300]
    answer: dict[str, Any] = response.json()
    return answer


def shown(text: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def values(saliency: dict[str, Any]) -> np.ndarray[Any, Any]:
    read = np.frombuffer(base64.b64decode(saliency["data"]), saliency["dtype"]).reshape(saliency["shape"])
    return read.astype(np.float64) * saliency["scale"]


def test_the_answer_is_the_librarys(server: Server, home: Home) -> None:
    said = {"attack": "pgd", "strength": "4", "attack_steps": "3", "attack_seed": "5", "most": "3", "quantile": "0.2"}
    answer = ask(server, **said, goal="thing 3")
    explainer = home.explainer()
    preprocessing = explainer.model.preprocessing  # type: ignore[union-attr]
    tensor, _ = preprocessing.array(picture(3))
    clean = preprocessing.restore(tensor)
    attack = Attack("pgd", 4, goal=3, steps=3, seed=5)
    attacker = Attacker(explainer.network, preprocessing)
    found = attacked(explainer, attacker, preprocessing, clean, attack, options={"quantile": 0.2}, most=3)
    assert np.array_equal(shown(answer["picture"]), clean)
    assert np.array_equal(shown(answer["attacked"]), found.after)
    compared = found.comparison
    assert (answer["old"]["index"], answer["new"]["index"]) == (compared.old, compared.new)
    assert answer["old"]["after"] == pytest.approx(float(compared.after.probabilities[compared.old]), rel=1e-3)
    assert answer["attack"]["goal"]["label"] == "thing 3"
    assert_close(values(answer["map_before"]), compared.before.maps[compared.old], 0.01)
    assert compared.movement is not None
    assert answer["movement"]["agreement"] == pytest.approx(compared.movement.agreement, abs=1e-3)
    for one, layer in zip(answer["layers"], compared.layers, strict=True):
        assert [c["index"] for c in one["excited"]] == [c.channel for c in layer.excited]
        assert [c["of_old"] for c in one["inhibited"]] == [c.of_old for c in layer.inhibited]
    change = answer["perturbation"]
    assert change["largest"] <= 4
    grey = 128 + change["factor"] * (found.after.astype(int) - clean)
    assert np.array_equal(shown(change["png"]), np.clip(grey, 0, 255))


def test_it_is_of_its_schema(server: Server) -> None:
    described = server.client.get("/docs.json").json()
    schema = described["components"]["schemas"]["AttackAnswer"]
    for kind in ("fgsm", "blur", "watermark"):
        answer = ask(server, attack=kind, strength="0")
        Draft202012Validator({**schema, "components": described["components"]}).validate(answer)
        assert answer["picture"] == answer["attacked"]
        assert (answer["changed"], answer["perturbation"]["largest"]) == (False, 0)
    assert server.metric("parchgrad_requests_total", route="/attack", kind="explain", code="ok") >= 1


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"attack": "fog"}, "option_invalid", "allowed: fgsm, pgd, blur, noise, jpeg, watermark."),
        ({"strength": "1.5"}, "option_invalid", "allowed: a whole number of levels in 0..64."),
        ({"attack": "blur", "strength": "2"}, "option_invalid", "allowed: a number in [0, 1]."),
        ({"attack_steps": "41"}, "option_invalid", "allowed: an integer in 1..40."),
        ({"attack": "fgsm", "attack_steps": "4"}, "option_invalid", "Option 'attack_steps' is of pgd only"),
        ({"attack": "jpeg", "goal": "thing 3"}, "option_invalid", "Option 'goal' is of fgsm and pgd only"),
        ({"goal": "thing"}, "unknown_class", "Option 'goal' is 'thing'"),
        ({"attack": "watermark", "text": "a\nb"}, "option_invalid", "Option 'text'"),
        ({"method": "smoothgrad"}, "option_invalid", "guided_backprop, grad_cam."),
        ({"steps": "4"}, "unknown_field", "Field 'steps' is not an option of /attack"),
        ({"timeout_ms": "1"}, "deadline_exceeded", "No answer within 1 ms."),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(server: Server, fields: dict[str, str], code: str, message: str) -> None:
    error = server.client.post("/attack", files=files(PICTURE), data=fields).json()["error"]
    assert error["code"] == code
    assert message in error["message"]


def test_it_takes_one_image_and_answers_json(server: Server) -> None:
    two = server.client.post("/attack", files=files(PICTURE, PICTURE))
    assert (two.status_code, two.json()["error"]["code"]) == (413, "too_many_images")
    assert server.client.post("/attack", files=files(PICTURE), headers={"Accept": "image/png"}).status_code == 406


def test_it_is_off_unless_turned_on() -> None:
    assert not Settings().attacks
    app = create_app()
    app.state.pipeline = SimpleNamespace(settings=Settings())
    response = TestClient(app).post("/attack", files=files(PICTURE))
    assert (response.status_code, response.json()["error"]["code"]) == (403, "attack_off")
    assert "PARCHGRAD_ATTACKS=true" in response.json()["error"]["message"]


# --- in this process -----------------------------------------------------------------------------------------


def run(home: Home, work: Any, **fields: str) -> Any:
    """`work(asking)` on a pipeline of its own; `asking` is the route's part behind the body."""

    async def main() -> Any:
        pipeline = Pipeline(Settings(**{**home.settings, "self_test": False}))  # type: ignore[arg-type]
        await pipeline.start()
        while not pipeline.ready:
            await asyncio.sleep(0.01)
        try:
            with pipeline.repository.use() as served:
                upload = attacks.Upload([io.BytesIO(PICTURE)], {name: [text] for name, text in fields.items()})
                arrival = asyncio.get_running_loop().time()
                asking = attacks._attacked(pipeline, served, upload, arrival, Origin("/attack", "test"))
                return await work(asking)
        finally:
            await pipeline.close()

    return asyncio.run(main())


def test_who_leaves_ends_the_attack_between_two_steps(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, gone, ended, steps = threading.Event(), threading.Event(), threading.Event(), []
    real = TorchEngine.attack

    def watched(engine: TorchEngine, *args: Any) -> Any:
        *rest, wanted = args

        def asked() -> bool:
            begun.set()
            gone.wait()
            steps.append(wanted())
            return bool(steps[-1])

        try:
            return real(engine, *rest, asked)
        finally:
            ended.set()

    monkeypatch.setattr(TorchEngine, "attack", watched)

    async def leave(asking: Any) -> None:
        task = asyncio.ensure_future(asking)
        await asyncio.to_thread(begun.wait)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        gone.set()
        await asyncio.to_thread(ended.wait)

    run(home, leave, attack_steps="40")
    assert steps == [False]


def test_without_captum_it_says_what_to_install(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise MissingPackageError("It needs captum: pip install 'parchgrad[attack]'.")

    monkeypatch.setattr(TorchEngine, "attack", missing)

    async def ask_once(asking: Any) -> None:
        with pytest.raises(ServiceError, match=r"parchgrad\[attack\]") as it:
            await asking
        assert it.value.code == "option_unsupported"

    run(home, ask_once)
