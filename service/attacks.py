"""POST /attack: one image before and after a small change: predictions, maps and channels. Off unless a setting says.

The same way as an explanation's in (body, decoder, queue, deadline, the device thread of maps). Its steps are bounded,
and it ends between two of them where the caller has gone or the time is up.
"""

import asyncio
import base64
import math
import threading
import time
from collections.abc import Coroutine
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from parchgrad import render
from parchgrad.attacks.attack import Attack
from parchgrad.errors import AbandonedError, MissingPackageError, UnsupportedModelError
from parchgrad.render import REDUCTION_OF_POLARITY
from service import metrics, tracing
from service.answers import JSON, accepted, binary_map, effective_options, identity, short, software, transform_of
from service.batching import DeadlineError
from service.body import Upload
from service.engine import Array, Engine, Result
from service.errors import ServiceError
from service.native import of_upload, origin
from service.pipeline import Origin, Outcome, Pipeline, Prepared, best, class_index
from service.repository import Served
from service.schemas import (
    DEFAULT_TOP_K,
    AttackAnswer,
    AttackChannel,
    AttackedClass,
    AttackLayer,
    AttackSaid,
    MapMovement,
    Perturbation,
    Prediction,
    parse_options,
    take_attack,
)
from service.settings import PREFIX

if TYPE_CHECKING:
    from parchgrad.attacks.comparison import Attacked, ChannelChange, Comparison, LayerChange, Movement

MOST_FACTOR = 127  # a change of one level is then all the picture can show


async def attack(request: HttpRequest) -> Response:
    arrival = asyncio.get_running_loop().time()
    metrics.asked("explain")
    pipeline: Pipeline = request.app.state.pipeline
    if not pipeline.settings.attacks:
        raise ServiceError("attack_off", f"Attacks are off here; {PREFIX}ATTACKS=true turns them on.")
    if accepted(",".join(request.headers.getlist("accept"))) != JSON:
        raise ServiceError("not_acceptable", f"/attack answers {JSON}.")

    def work(pipeline: Pipeline, served: Served, upload: Upload) -> Coroutine[Any, Any, bytes]:
        return _attacked(pipeline, served, upload, arrival, origin(request))

    content = await of_upload(request, work)
    return Response(content, media_type=JSON)


async def _attacked(pipeline: Pipeline, served: Served, upload: Upload, arrival: float, asker: Origin) -> bytes:
    engine = served.engine
    asking = take_attack(upload.fields)
    if engine.no_network is not None:
        raise ServiceError("option_unsupported", f"/attack has nothing to follow: {engine.no_network}.")
    if len(upload.images) != 1:
        raise ServiceError("too_many_images", f"/attack takes one image; the request carries {len(upload.images)}.")
    goal = None if asking.goal is None else class_index(engine.model, asking.goal, "'goal' is", " or any")
    done = Attack(asking.kind, asking.strength, goal, asking.steps, asking.seed, asking.text)
    asked = parse_options(upload.fields, 1, "attack")
    (request,) = pipeline.check(served, upload.images, asked, explain=True, draw=False, arrival=arrival)
    options, reduction = request.options, REDUCTION_OF_POLARITY[asked[0].polarity]
    assert options is not None  # `explain`
    until = time.monotonic() + request.deadline - asyncio.get_running_loop().time()
    given_up = threading.Event()

    def look(prepared: Prepared) -> "tuple[Result, Attacked]":
        try:
            found = engine.attack(
                prepared.tensor, done, options, reduction, asking.most,
                lambda: not given_up.is_set() and time.monotonic() < until,
            )  # fmt: skip
        except AbandonedError as error:
            raise DeadlineError from error
        except (UnsupportedModelError, MissingPackageError) as error:
            raise ServiceError("option_unsupported", f"/attack cannot do this: {error}") from error
        before = found.comparison.before
        return Result(before.logits.astype(np.float32), before.probabilities.astype(np.float32)), found

    try:
        outcome, found = await pipeline.look(served, request, look, asker)
    finally:
        given_up.set()
    return await asyncio.to_thread(tracing.rendered, _answer, engine, outcome, found, asker.request_id)


def _answer(engine: Engine, outcome: Outcome, found: "Attacked", request_id: str) -> bytes:
    """Raises ServiceError(prediction_not_finite, map_not_finite)."""
    compared, prepared = found.comparison, outcome.prepared
    if not np.isfinite(compared.after.logits).all():
        raise ServiceError("prediction_not_finite", "The model's output overflows float32 for the attacked picture.")
    maps = _maps(compared)
    if not all(np.isfinite(one).all() for one in maps.values()):
        raise ServiceError("map_not_finite", "A map overflows float32 under these options; gamma may be too large.")
    old, new = compared.old, compared.new
    movement_to_new = _movement(_between(maps, "map_before", "map_new"))
    assert outcome.request.options is not None  # it was to be explained
    answer = AttackAnswer(
        model=identity(engine),
        software=software(engine),
        request_id=request_id,
        image_sha256=prepared.sha256,
        attack=_said(engine, found),
        changed=compared.changed,
        old=_class(engine, compared, old),
        new=_class(engine, compared, new),
        predictions=[_class(engine, compared, index) for index in _shown(compared, outcome)],
        picture=_base64_png(found.before),
        attacked=_base64_png(found.after),
        perturbation=_perturbation(found.before, found.after),
        options=effective_options(outcome.request.options),
        # Of uint8 most values of a map would read 0.
        **{name: binary_map(values, "float16") for name, values in maps.items()},
        movement=_movement(compared.movement),
        movement_to_new=movement_to_new,
        layers=[_layer(layer) for layer in compared.layers],
        transform=transform_of(prepared.placement, prepared.orientation),
    )
    return answer.model_dump_json(exclude_none=True).encode()


def _maps(compared: "Comparison") -> dict[str, Array]:
    """By name in the answer, those there are."""
    before, after, old, new = compared.before.maps, compared.after.maps, compared.old, compared.new
    third = after.get(new) if new != old else None
    found = {"map_before": before.get(old), "map_after": after.get(old), "map_new": third}
    return {name: values.astype(np.float32) for name, values in found.items() if values is not None}


def _between(maps: dict[str, Array], first: str, second: str) -> "Movement | None":
    from parchgrad.attacks.comparison import Movement

    return Movement.of(maps[first], maps[second]) if first in maps and second in maps else None


def _shown(compared: "Comparison", outcome: Outcome) -> list[int]:
    """The most probable classes before, then those after, then old and new: each once."""
    k = outcome.request.asked.top_k or min(DEFAULT_TOP_K, len(compared.before.probabilities))
    each = (best(view.probabilities.astype(np.float32), k) for view in (compared.before, compared.after))
    return list(dict.fromkeys([*(index for one in each for index in one), compared.old, compared.new]))


def _class(engine: Engine, compared: "Comparison", index: int) -> AttackedClass:
    before, after = (float(view.probabilities[index]) for view in (compared.before, compared.after))
    return AttackedClass(index=index, label=engine.model.labels[index], before=short(before), after=short(after))


def _said(engine: Engine, found: "Attacked") -> AttackSaid:
    done, after = found.attack, found.comparison.after
    goal = None
    if done.goal is not None:
        probability = float(after.probabilities[done.goal])
        goal = Prediction(index=done.goal, label=engine.model.labels[done.goal], probability=probability)
    return AttackSaid(
        kind=done.kind,
        strength=done.strength,
        goal=goal,
        steps=done.steps if done.kind == "pgd" else None,
        seed=done.seed if done.kind in ("pgd", "noise") else None,
        text=done.text if done.kind == "watermark" else None,
    )


def _perturbation(before: Array, after: Array) -> Perturbation:
    change = after.astype(np.int16) - before
    largest = int(np.abs(change).max())
    factor = max(1, min(MOST_FACTOR, MOST_FACTOR // largest)) if largest else 1
    shown = np.clip(128 + factor * change, 0, 255).astype(np.uint8)
    mean = float(np.abs(change).mean())
    return Perturbation(png=_base64_png(shown), factor=factor, largest=largest, mean=short(mean))


def _base64_png(picture: Array) -> str:
    return base64.b64encode(render.png(picture)).decode()


def _movement(movement: "Movement | None") -> MapMovement | None:
    return None if movement is None else MapMovement(**{name: _figure(one) for name, one in asdict(movement).items()})


def _layer(layer: "LayerChange") -> AttackLayer:
    return AttackLayer(
        name=layer.layer,
        channels=layer.channels,
        size=short(layer.size),
        of_old=_figure(layer.of_old),
        of_new=_figure(layer.of_new),
        of_both=_figure(layer.of_both),
        excited=[_channel(one) for one in layer.excited],
        inhibited=[_channel(one) for one in layer.inhibited],
    )


def _channel(one: "ChannelChange") -> AttackChannel:
    return AttackChannel(
        index=one.channel, before=short(one.before), after=short(one.after), of_old=one.of_old, of_new=one.of_new
    )


def _figure(value: float) -> float | None:
    return None if math.isnan(value) else short(value)  # JSON has no NaN


ROUTES = [Route("/attack", attack, methods=["POST"])]
