"""The Open Inference Protocol's gRPC methods, and what holds for every one of them: keys, request ids, metrics, errors.

On the wire a call of one message is a stream that ends after it. Every method is therefore answered as a stream: a
caller is known before its message is read, the message has a time to arrive, and parsing it does not hold the loop.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from starlette.datastructures import Headers
from tritonclient.grpc import service_pb2

from parchgrad import __version__
from service import admin, logs, metrics, tracing
from service.access import Access, bearer
from service.app import request_id
from service.errors import STATUS, ServiceError, from_exception
from service.pipeline import Origin, Pipeline
from service.protocols import grpc_messages, inference, v2
from service.protocols.open_inference import Parameters
from service.repository import READY, Served
from service.settings import Settings

log = logging.getLogger(__name__)

SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
HEALTH = ("ServerLive", "ServerReady")  # a prober has no key
ADMIN = ("RepositoryModelLoad", "RepositoryModelUnload")
MAX_DETAILS = 2000  # characters: the metadata that carry them are bounded, in the client too

CODE_OF_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    406: grpc.StatusCode.INVALID_ARGUMENT,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,  # as gRPC itself has it of a message too large
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclass(frozen=True)
class Call:
    """One call: its message, when it came on the loop's clock, the seconds its caller gave it, and who asked."""

    message: Any
    arrival: float
    seconds: float | None
    origin: Origin


class Calls:
    """All methods of the service; those that are not offered say so."""

    def __init__(self, pipeline: Pipeline, access: Access) -> None:
        self._pipeline, self._access = pipeline, access
        self._offered: dict[str, Callable[[Call], Awaitable[Any]]] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelInfer": self._model_infer,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._repository_model_load,
            "RepositoryModelUnload": self._repository_model_unload,
        }

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server needs to answer for the whole service."""
        methods = {one.name: grpc.stream_unary_rpc_method_handler(partial(self._call, one)) for one in SERVICE.methods}
        return grpc.method_handlers_generic_handler(SERVICE.full_name, methods)

    # --- every call -----------------------------------------------------------------------------------

    async def _call(self, method: Any, messages: AsyncIterator[bytes], context: "grpc.aio.ServicerContext") -> bytes:
        """The answer's bytes; an error becomes its gRPC status, and is counted as its HTTP one."""
        headers = _headers(context.invocation_metadata())
        origin = Origin(f"grpc/{method.name}", request_id(headers.get("x-request-id", "")))
        said: tuple[tuple[str, str], ...] = (("x-request-id", origin.request_id),)
        context.set_trailing_metadata(said)
        logs.request_id.set(origin.request_id)
        with tracing.call(SERVICE.full_name, method.name, headers), metrics.request(origin.route) as told:
            try:
                content = await self._answer(method, messages, context, headers, origin)
                told.status = 200
                return content
            except asyncio.CancelledError:
                told.status = STATUS["client_closed_request"]
                metrics.refused("client_closed_request")
                raise
            except Exception as error:
                answer = from_exception(error)
                told.status = answer.status
                metrics.refused(answer.code)
                if answer.code == "internal":
                    log.exception("Request %s failed for a reason of ours.", origin.request_id)
                said += (("error-code", answer.code),)
                if "Retry-After" in answer.headers:
                    said += (("retry-after", answer.headers["Retry-After"]),)
                await context.abort(CODE_OF_STATUS[answer.status], answer.message[:MAX_DETAILS], said)
                raise  # never reached: abort raises
            finally:
                tracing.answered(told, grpc_status=_number(told.status))
                logs.answered(told, origin.request_id)

    async def _answer(
        self,
        method: Any,
        messages: AsyncIterator[bytes],
        context: "grpc.aio.ServicerContext",
        headers: Headers,
        origin: Origin,
    ) -> bytes:
        arrival, seconds = asyncio.get_running_loop().time(), context.time_remaining()
        if method.name not in HEALTH:
            caller = await self._access.caller_of(bearer(headers), admin=method.name in ADMIN)
            origin = replace(origin, caller=caller)
        answer = self._offered.get(method.name)
        if answer is None:
            there = ", ".join(self._offered)
            raise ServiceError("method_not_allowed", f"{method.name} is not offered here; there is {there}.")
        content = await self._received(messages)
        message = await asyncio.to_thread(_parsed, method, content)
        answered = await answer(Call(message, arrival, seconds, origin))
        serialized: bytes = await asyncio.to_thread(answered.SerializeToString)
        return serialized

    async def _received(self, messages: AsyncIterator[bytes]) -> bytes:
        """The call's one message. Raises ServiceError: deadline_exceeded, malformed_request."""
        limit = self._pipeline.settings.body_timeout_ms
        try:
            async with asyncio.timeout(limit / 1000):
                content = await anext(messages, None)
        except TimeoutError:
            raise ServiceError("deadline_exceeded", f"The message did not arrive within {limit} ms.") from None
        if content is None:
            raise ServiceError("malformed_request", "The call ended without a message.")
        return content

    # --- the server, its models -----------------------------------------------------------------------

    async def _server_live(self, call: Call) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    async def _server_ready(self, call: Call) -> Any:
        return service_pb2.ServerReadyResponse(ready=self._pipeline.ready)

    async def _server_metadata(self, call: Call) -> Any:
        return service_pb2.ServerMetadataResponse(name="parchgrad", version=__version__, extensions=v2.EXTENSIONS)

    async def _model_ready(self, call: Call) -> Any:
        """False while it loads; NOT_FOUND, as everywhere, for a model there is not."""
        try:
            with self._named(call.message.name, call.message.version):
                return service_pb2.ModelReadyResponse(ready=True)
        except ServiceError as error:
            if error.code != "not_ready":
                raise
            return service_pb2.ModelReadyResponse(ready=False)

    async def _model_metadata(self, call: Call) -> Any:
        with self._named(call.message.name, call.message.version) as served:
            versions = self._pipeline.repository.versions(served.name)
            return ParseDict(inference.metadata(served.engine, versions), service_pb2.ModelMetadataResponse())

    async def _model_config(self, call: Call) -> Any:
        with self._named(call.message.name, call.message.version) as served:
            config = inference.config(served.engine, self._pipeline.settings.max_images)
            return ParseDict({"config": config}, service_pb2.ModelConfigResponse())

    async def _model_infer(self, call: Call) -> Any:
        message = call.message
        named = self._named(message.model_name, message.model_version)
        with named as served, self._pipeline.bodies.share() as share:
            share.take(message.ByteSize())
            asked = await asyncio.to_thread(grpc_messages.decode, message)
            asked = replace(asked, parameters=timed(asked.parameters, call.seconds, self._pipeline.settings))
            response = await inference.infer(self._pipeline, served, asked, call.arrival, call.origin)
            return await asyncio.to_thread(tracing.rendered, grpc_messages.encode, response)

    def _named(self, name: str, version: str) -> AbstractContextManager[Served]:
        """Empty: the default model, its newest version. Raises ServiceError when entered."""
        return self._pipeline.repository.use(name or None, version or None)

    # --- the repository -------------------------------------------------------------------------------

    async def _repository_index(self, call: Call) -> Any:
        _check_repository(call.message.repository_name)
        states = [one for one in self._pipeline.repository.states() if one.state == READY or not call.message.ready]
        return service_pb2.RepositoryIndexResponse(
            models=[{"name": s.name, "version": s.version, "state": s.state, "reason": s.reason} for s in states]
        )

    async def _repository_model_load(self, call: Call) -> Any:
        _check_repository(call.message.repository_name)
        admin.check_parameters(call.message.parameters)
        await self._pipeline.change(call.origin, call.message.model_name, served=True)
        return service_pb2.RepositoryModelLoadResponse()

    async def _repository_model_unload(self, call: Call) -> Any:
        _check_repository(call.message.repository_name)
        admin.check_parameters(call.message.parameters)
        await self._pipeline.change(call.origin, call.message.model_name, served=False)
        return service_pb2.RepositoryModelUnloadResponse()


def _number(status: int) -> int:
    """gRPC's code of an HTTP status, as a number."""
    return int(CODE_OF_STATUS[status].value[0]) if status in CODE_OF_STATUS else 0


def timed(parameters: Parameters, seconds: float | None, settings: Settings) -> Parameters:
    """The call's deadline is its images' timeout, where the request names none itself."""
    if seconds is None or parameters.get("timeout") or "timeout_ms" in parameters:
        return parameters
    return {**parameters, "timeout_ms": max(1, min(int(seconds * 1000), settings.max_timeout_ms))}


def _headers(metadata: Iterable[tuple[str, str | bytes]]) -> Headers:
    """A call's metadata as HTTP has it; what is bytes (keys that end in -bin) is none of ours."""
    return Headers({name: value for name, value in metadata if isinstance(value, str)})


def _parsed(method: Any, content: bytes) -> Any:
    """Raises ServiceError(malformed_request)."""
    try:
        return getattr(service_pb2, method.input_type.name).FromString(content)
    except DecodeError:
        raise ServiceError("malformed_request", f"The message is no {method.input_type.name}.") from None


def _check_repository(name: str) -> None:
    if name:
        raise ServiceError("option_unsupported", f"There is one repository, and it has no name; {name[:64]!r} is none.")
