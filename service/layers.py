"""POST /layers: one image's way through the network and back, layer by layer, for one class.

The same way as an explanation's in (body, decoder, queue, deadline, the device thread of maps); it is looked at by the
dense engine, whose every layer is computed, and it is no explanation: a map has /explain.
"""

import asyncio
import base64
import gzip
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from parchgrad.errors import UnsupportedModelError
from service import metrics, tracing
from service.answers import JSON, accepted, effective_options, identity, predictions_of, short, software, transform_of
from service.body import Upload
from service.engine import Array, Engine, Result
from service.errors import ServiceError
from service.native import of_upload, origin
from service.pipeline import Origin, Outcome, Pipeline, Prepared
from service.repository import Served
from service.schemas import (
    GradientShares,
    LayerAnswer,
    LayerChannel,
    LayerRule,
    LayersAnswer,
    MapStack,
    Prediction,
    parse_options,
    take_layers,
)

if TYPE_CHECKING:
    from parchgrad.layer_views import ChannelView, LayerView, NetworkView

COMPRESSION = 1  # half the bytes, in a few hundredths of a second and not on the event loop
NOT_FINITE = "The gradient overflows float32 under these options; gamma may be too large."


async def layers(request: HttpRequest) -> Response:
    arrival = asyncio.get_running_loop().time()
    metrics.asked("explain")
    if accepted(",".join(request.headers.getlist("accept"))) != JSON:
        raise ServiceError("not_acceptable", f"/layers answers {JSON}.")

    def work(pipeline: Pipeline, served: Served, upload: Upload) -> Coroutine[Any, Any, bytes]:
        return _looked(pipeline, served, upload, arrival, origin(request))

    content = await of_upload(request, work)
    if "gzip" in request.headers.get("accept-encoding", ""):
        content = await asyncio.to_thread(gzip.compress, content, COMPRESSION)
        return Response(content, headers={"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}, media_type=JSON)
    return Response(content, headers={"Vary": "Accept-Encoding"}, media_type=JSON)


async def _looked(pipeline: Pipeline, served: Served, upload: Upload, arrival: float, asker: Origin) -> bytes:
    engine = served.engine
    channels, order = take_layers(upload.fields)
    if engine.no_network is not None:
        raise ServiceError("option_unsupported", f"/layers has nothing to show: {engine.no_network}.")
    if len(upload.images) != 1:
        raise ServiceError("too_many_images", f"/layers looks at one image; the request carries {len(upload.images)}.")
    asked = parse_options(upload.fields, 1, "layers")
    (request,) = pipeline.check(served, upload.images, asked, explain=True, draw=False, arrival=arrival)
    options = request.options
    assert options is not None  # `explain`

    def look(prepared: Prepared) -> "tuple[Result, NetworkView]":
        try:
            view = engine.layers(prepared.tensor, request.target, options, channels, order)
        except UnsupportedModelError as error:
            raise ServiceError("option_unsupported", f"/layers has nothing to show: {error}") from error
        return Result(view.logits, view.probabilities, view.target, view.ruled, True, view.identity_layers), view

    outcome, view = await pipeline.look(served, request, look, asker)
    return await asyncio.to_thread(tracing.rendered, _answer, engine, outcome, view, asker.request_id)


def _answer(engine: Engine, outcome: Outcome, view: "NetworkView", request_id: str) -> bytes:
    """Raises ServiceError(map_not_finite)."""
    energies = [energy for layer in view.layers for energy in (layer.plain_energy, layer.after_energy)]
    if not np.isfinite([*energies, view.ruled.sum(), view.plain.sum()]).all():
        raise ServiceError("map_not_finite", NOT_FINITE)
    prepared = outcome.prepared
    labels, probabilities = engine.model.labels, view.probabilities
    answer = LayersAnswer(
        model=identity(engine),
        software=software(engine),
        request_id=request_id,
        image_sha256=prepared.sha256,
        predictions=predictions_of(engine, outcome),
        target=Prediction(index=view.target, label=labels[view.target], probability=float(probabilities[view.target])),
        options=effective_options(view.options),
        order=view.order,
        identity_layers=view.identity_layers,
        transform=transform_of(prepared.placement, prepared.orientation),
        maps=stack((view.plain, view.ruled)),
        layers=[_layer(layer) for layer in view.layers],
    )
    return answer.model_dump_json(exclude_none=True).encode()


def _layer(layer: "LayerView") -> LayerAnswer:
    rule = layer.rule
    return LayerAnswer(
        name=layer.name,
        call=layer.call,
        calls=layer.calls,
        kind=layer.kind,
        kernel=list(layer.kernel),
        stride=list(layer.stride),
        groups=layer.groups,
        shape=list(layer.shape),
        active=layer.active,
        selected=list(layer.selected),
        rule=None if rule is None else LayerRule(**{name: _shown(value) for name, value in vars(rule).items()}),
        energy=_shares(layer.plain_energy, layer.before_energy, layer.after_energy),
        selected_share=_shares(layer.selected_plain_share, layer.selected_before_share, layer.selected_after_share),
        sums=stack((layer.sum_selected, layer.sum_unselected, layer.sum_after), signed=True),
        channels=[_channel(one) for one in layer.channels],
        activation=stack([one.activation for one in layer.channels]),
        plain=stack([one.plain for one in layer.channels], signed=True),
        before=stack([one.before for one in layer.channels], signed=True),
    )


def _channel(one: "ChannelView") -> LayerChannel:
    return LayerChannel(
        index=one.index,
        selected=one.selected,
        feature=_shown(one.feature),
        deviations=_shown(one.deviations),
        rank=one.rank,
        log_p=_shown(one.log_p),
        factor=_shown(one.factor),
        share=_shares(one.plain_share, one.before_share, one.after_share),
    )


def _shares(plain: float, before: float, after: float) -> GradientShares:
    return GradientShares(plain=_shown(plain), before=_shown(before), after=_shown(after))


def _shown(value: Any) -> Any:
    return short(value) if isinstance(value, float) else value


def stack(maps: Sequence[Array], *, signed: bool = False) -> MapStack:
    """Maps `(h, w)` in steps of their own largest magnitude over 255, or over 127 on either side of zero."""
    values = np.stack(maps)
    largest = np.abs(values).max(axis=(1, 2)).astype(np.float64)
    scales = np.where(largest > 0, largest, 1.0) / (127 if signed else 255)
    steps = np.rint(values / scales[:, None, None]).astype(np.int8 if signed else np.uint8)
    return MapStack(
        shape=(len(values), values.shape[1], values.shape[2]),
        dtype="int8" if signed else "uint8",
        scales=[_shown(float(scale)) for scale in scales],
        data=base64.b64encode(steps.tobytes()).decode(),
    )


ROUTES = [Route("/layers", layers, methods=["POST"])]
