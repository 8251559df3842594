"""The running service held to its own /docs.json by schemathesis: right and wrong requests for every operation."""

import base64

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from service.openapi import document
from service.settings import Settings
from tests.service.conftest import picture, png
from tests.service.serving import Server

EXAMPLES = 20  # of each kind, right and wrong, for each operation
OPERATIONS = [
    (operation.method, operation.path, mode)
    for operation in (found.ok() for found in schemathesis.openapi.from_dict(document(Settings())).get_all_operations())
    for mode in GenerationMode
    # Any text is a right path parameter: wrong are queries and bodies.
    if mode is GenerationMode.POSITIVE or operation.body or operation.query
]
PROTOCOLS = ("/v1/", "/v2/models/")
# Right by the schema: a route without a key, a model that is not there, options that exclude each other, late.
ACCEPTED = ["200", "403", "404", "422", "504"]
# By chance, without a key, or of this model, which has no samples and no class graph.
NEVER_RIGHT = (
    *("/infer", "/load", "/unload", "/samples/{file}"),
    *("/class-graph", "/classes/{index}", "/against/{other}", "/{layer}/{channel}"),
)
IMAGES = [png(picture(seed, (12, 10))) for seed in range(3)]


@pytest.fixture(scope="session")
def described(server: Server) -> schemathesis.BaseSchema:
    """/docs.json as it is served, with pictures for its binary parts."""
    images = st.sampled_from(IMAGES)
    schemathesis.openapi.format("binary", images)
    schemathesis.openapi.format("byte", images.map(lambda data: base64.b64encode(data).decode()))
    schemathesis.openapi.media_type("image/*", images)
    served = server.client.get("/docs.json").json()
    assert served["paths"].keys() == {path for _, path, _ in OPERATIONS}
    for path in ("/predict", "/explain"):
        # Where an encoding is given, schemathesis sends the part without a filename: as a field, not a file.
        del served["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]["encoding"]
    schema = schemathesis.openapi.from_dict(served)
    schema.config.update(base_url=server.url)
    checks = schema.config.checks
    # Late is an answer of ours that is documented: `timeout_ms=1` is right.
    checks.not_a_server_error.expected_statuses = ["2xx", "3xx", "4xx", "503", "504"]
    checks.negative_data_rejection.expected_statuses = ["4xx"]
    return schema


@pytest.mark.parametrize(("method", "path", "mode"), OPERATIONS, ids=lambda value: getattr(value, "value", value))
def test_every_answer_is_as_documented(
    described: schemathesis.BaseSchema, method: str, path: str, mode: GenerationMode
) -> None:
    """All of schemathesis' checks: statuses, headers, types and bodies as documented, no 5xx, no wrong data taken."""
    # What a tensor or base64 must hold to be a picture, no schema says.
    described.config.checks.positive_data_acceptance.expected_statuses = ACCEPTED + ["400"] * path.startswith(PROTOCOLS)
    operation, answered = described[path][method], set()
    there = {
        name: text
        for name, text in {"name": "tiny", "version": "1", "path": "main.js"}.items()
        if f"{{{name}}}" in path
    }
    cases = operation.as_strategy(mode)
    if there:
        cases = operation.as_strategy(mode, path_parameters=there) | cases

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )  # fmt: skip
    @given(case=cases)
    def holds(case: schemathesis.Case) -> None:
        response = case.call()
        answered.add(response.status_code)
        case.validate_response(response)

    holds()
    if mode is GenerationMode.POSITIVE and not path.endswith(NEVER_RIGHT):
        assert 200 in answered
