"""The document at /docs.json: valid, about the routes there are, and true of what they answer."""

import base64
import hashlib
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from jsonschema import Draft202012Validator, ValidationError
from openapi_spec_validator import validate
from starlette.routing import Route

from service import examples
from service.app import BENTOML_ROUTES, create_app
from service.errors import STATUS
from service.openapi import document
from service.protocols import open_inference, v1
from service.protocols import schemas as protocol_types
from service.schemas import OPTIONS, REQUEST_OPTIONS, TIMEOUTS, ImageOptions, options_of, parse_options
from service.settings import Settings
from tests.service.conftest import files, picture, png
from tests.service.serving import Server, serving

Json = dict[str, Any]
DOCUMENT = document(Settings(max_images=4, timeout_ms=1000, max_timeout_ms=5000))
METHODS = ("get", "post")


def operations(described: Json = DOCUMENT) -> Iterator[tuple[str, str, Json]]:
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def contents() -> Iterator[tuple[str, Json]]:
    """Every request and response body described: where, and its media type object."""
    for path, method, operation in operations():
        for media, content in operation.get("requestBody", {}).get("content", {}).items():
            yield f"{method} {path} takes {media}", content
        for status, response in operation["responses"].items():
            for media, content in response.get("content", {}).items():
                yield f"{method} {path} {status} {media}", content


def check(value: object, schema: Json, described: Json = DOCUMENT) -> None:
    Draft202012Validator({**schema, "components": described["components"]}).validate(value)


# --- the document alone -------------------------------------------------------------------------------------


def test_it_is_openapi() -> None:
    validate(DOCUMENT)
    assert DOCUMENT["openapi"] == "3.1.0"


def test_it_describes_the_routes_there_are_and_no_others() -> None:
    real = {
        (route.path.replace(":path}", "}"), method.lower())  # how Starlette writes that a name may have slashes
        for route in create_app().routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }
    real |= {(path, "get") for path in BENTOML_ROUTES}
    assert {(path, method) for path, method, _ in operations()} == real


def test_every_operation_has_a_name_of_its_own_and_a_tag_that_is_described() -> None:
    names = [operation["operationId"] for _, _, operation in operations()]
    assert len(names) == len(set(names))
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    assert {tag for _, _, operation in operations() for tag in operation["tags"]} == tags


def test_every_schema_is_used() -> None:
    text = json.dumps(DOCUMENT)
    for name in DOCUMENT["components"]["schemas"]:
        assert f'"#/components/schemas/{name}"' in text, name


EXAMPLES = [
    pytest.param(example["value"], content["schema"], id=f"{where}: {name}")
    for where, content in contents()
    for name, example in content.get("examples", {}).items()
]


@pytest.mark.parametrize(("value", "schema"), EXAMPLES)
def test_every_example_is_of_its_schema(value: object, schema: Json) -> None:
    check(value, schema)


def test_every_json_body_has_an_example() -> None:
    without = {
        where
        for where, content in contents()
        if where.endswith("application/json") and "$ref" in content["schema"] and not content.get("examples")
    }
    assert without == set()


# Not of any operation: wrong methods, and what nobody is there to read.
ELSEWHERE = {"method_not_allowed", "client_closed_request"}


def codes_of(operation: Json) -> dict[str, set[str]]:
    return {
        status: set(response["description"].removeprefix("Codes: ").removesuffix(".").split(", "))
        for status, response in operation["responses"].items()
        if response["description"].startswith("Codes: ")
    }


def test_every_code_is_somewhere_under_its_status() -> None:
    seen = set()
    for path, _, operation in operations():
        for status, codes in codes_of(operation).items():
            assert {STATUS[code] for code in codes} == {int(status)}, path
            seen |= codes
    # option_unsupported is V2's: parameters of Triton's that ask for what there is not.
    assert seen == STATUS.keys() - ELSEWHERE
    assert examples.MESSAGES.keys() == STATUS.keys()


def test_only_explanations_can_lack_a_map() -> None:
    paths = DOCUMENT["paths"]
    predicted, explained = (set().union(*codes_of(paths[path]["post"]).values()) for path in ("/predict", "/explain"))
    assert explained - predicted == {"unknown_class", "target_not_in_table", "map_not_finite", "map_shed"}
    assert predicted < explained


def test_probes_and_the_page_are_open_and_changes_need_a_key() -> None:
    security = {path: operation["security"] for path, _, operation in operations()}
    assert {path for path, one in security.items() if one == []} == {
        "/livez", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready",
        "/", "/page/{path}", "/page/state.json", "/page/palettes.json",
    }  # fmt: skip
    assert {path for path, one in security.items() if one and {} not in one} == {
        "/v2/repository/models/{name}/load",
        "/v2/repository/models/{name}/unload",
    }


@pytest.mark.parametrize("route", ["predict", "explain"])
def test_every_option_is_a_field_and_a_parameter_with_its_bounds(route: str) -> None:
    operation = DOCUMENT["paths"][f"/{route}"]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    query = {one["name"]: one["schema"] for one in operation["parameters"] if one.get("in") == "query"}
    names = {option.name for option in options_of(route)} | REQUEST_OPTIONS.keys()
    assert query.keys() == names
    assert form["properties"].keys() == names | {"image"}
    assert all(form["properties"][name] == query[name] for name in names)
    for name in names - REQUEST_OPTIONS.keys():
        allowed = "an integer in 1..5000" if name in TIMEOUTS else OPTIONS[name].kind.allowed
        assert f"Allowed: {allowed}." in query[name]["description"]
        assert query[name]["maxItems"] == 4
        assert OPTIONS[name].kind.schema.items() <= query[name]["items"].items()


def test_there_is_one_bound_of_timeouts_the_services() -> None:
    forms = [DOCUMENT["paths"]["/explain"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]]
    v1_body = DOCUMENT["paths"]["/v1/models/{name}:explain"]["post"]["requestBody"]["content"]["application/json"]
    forms.append(v1_body["schema"]["properties"]["instances"]["items"])
    for name in TIMEOUTS:
        for form in forms:
            assert "Allowed: an integer in 1..5000." in form["properties"][name]["description"]
        assert forms[0]["properties"][name]["items"] == {"type": "integer", "minimum": 1, "maximum": 5000}


def test_the_example_of_every_parameter_is_what_the_parser_takes() -> None:
    given = {}
    for parameter in DOCUMENT["paths"]["/explain"]["post"]["parameters"]:
        for value in parameter.get("example", ()):
            given[parameter["name"]] = [str(value)]
            check([value], parameter["schema"])
    assert len(given) > 10
    assert parse_options(given, 1, "explain") == [ImageOptions(explain=given_as_defaults(), top_k=5)]


def given_as_defaults() -> Json:
    return {name: OPTIONS[name].default for name in ("method", "rule", "seed")}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (protocol_types.InferRequest, open_inference._Request),
        (protocol_types.InferInput, open_inference._Input),
        (protocol_types.RequestedOutput, open_inference._Output),
    ],
)
def test_the_types_of_requests_are_what_is_parsed(ours: Any, theirs: Any) -> None:
    described, parsed = ours.model_json_schema(), theirs.model_json_schema()
    assert described["properties"].keys() == parsed["properties"].keys()
    assert described["required"] == parsed["required"]
    assert described["additionalProperties"] is parsed["additionalProperties"] is False


def test_datatypes_and_ranks_are_those_that_are_parsed() -> None:
    properties = DOCUMENT["components"]["schemas"]["InferInput"]["properties"]
    assert tuple(properties["datatype"]["enum"]) == open_inference.DATATYPES
    assert properties["shape"]["maxItems"] == open_inference.MAX_RANK


@pytest.mark.parametrize("route", ["predict", "explain"])
def test_the_body_of_v1_is_what_is_parsed(route: str) -> None:
    body = DOCUMENT["paths"][f"/v1/models/{{name}}:{route}"]["post"]["requestBody"]["content"]["application/json"]
    for example in body["examples"].values():
        images, asked = v1._read(bytearray(json.dumps(example["value"]).encode()), 4, route)
        assert (len(images), len(asked)) == (1, 1)
    with pytest.raises(ValidationError):
        check({"instances": [{"image": {"b64": ""}, "quantil": 1}]}, body["schema"])


def test_an_answer_that_lacks_something_is_not_of_its_schema() -> None:
    """The schemas are not so loose that anything would do."""
    (content,) = (content for where, content in contents() if where == "post /explain 200 application/json")
    for example in content["examples"].values():
        for name in ("model", "software", "results"):
            value = {key: one for key, one in example["value"].items() if key != name}
            with pytest.raises(ValidationError, match=f"'{name}' is a required property"):
                check(value, content["schema"])


def test_answers_hold_no_null_and_always_their_status() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for name in ("ExplainAnswer", "ExplainResult", "ExplanationAnswer", "FailedAnswer", "ModelEntry", "InferResponse"):
        for field, schema in schemas[name]["properties"].items():
            assert {"type": "null"} not in schema.get("anyOf", []), f"{name}.{field}"
    assert schemas["ExplainResult"]["required"] == ["status", "predictions"]
    assert schemas["FailedAnswer"]["required"] == ["status", "error"]


# --- real answers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(server: Server) -> Json:
    described: Json = server.client.get("/docs.json").json()
    return described


def of_its_schema(described: Json, path: str, response: httpx.Response) -> Json:
    """The answer, after holding status, media type and body to the document."""
    operation = described["paths"][path][response.request.method.lower()]
    assert str(response.status_code) in operation["responses"], (path, response.text)
    one = operation["responses"][str(response.status_code)]
    media = response.headers.get("content-type", "").partition(";")[0]
    if "content" not in one:
        assert not response.content, response.text
        return {}
    assert media in one["content"], (path, media)
    if media != "application/json":
        return {}
    check(response.json(), one["content"][media]["schema"], described)
    answer: Json = response.json()
    return answer


def test_the_served_document_is_valid(served: Json) -> None:
    validate(served)


GOOD, BAD = png(picture()), png(picture())[:200]


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"target": "top:3", "saliency": "list"},
        {"saliency": "png", "outline": "1", "overlay": "grayscale"},
        {"saliency": "none", "alpha": "0.05", "gamma": "2.5", "normality_filter": "false"},
        {"method": "integrated_gradients", "steps": "2", "saliency": "float16"},
        {"method": "smoothgrad", "samples": "2", "noise_seed": "3"},
        {"explain_when": "confidence<0.000001"},
        {"method": "grad_cam", "target": "top:2"},
        {"target": "9"},
        {"rule": "false", "polarity": "negative", "target": "thing 9"},
    ],
    ids=str,
)
def test_explanations_are_of_their_schema(server: Server, served: Json, texts: dict[str, str]) -> None:
    response = server.client.post("/explain", files=files(GOOD, BAD), data=texts)
    answer = of_its_schema(served, "/explain", response)
    assert [one["status"] for one in answer["results"]] == ["ok", "error"]
    result = answer["results"][0]
    status = {"explain_when": "skipped", "target": "ok"}
    (explanation, *_) = [result["explanation"]] if "explanation" in result else result["explanations"]
    expected = "error" if texts.get("target") == "9" else status["explain_when"] if "explain_when" in texts else "ok"
    assert explanation["status"] == expected
    assert answer["request_id"] == response.headers["x-request-id"]


def test_predictions_and_other_media_types_are_of_their_schema(server: Server, served: Json) -> None:
    client = server.client
    of_its_schema(served, "/predict", client.post("/predict", files=files(GOOD, BAD), data={"top_k": "2"}))
    for media in ("image/png", "application/x-npz"):
        response = client.post("/explain", files=files(GOOD), headers={"Accept": media})
        assert response.headers["content-type"] == media
        of_its_schema(served, "/explain", response)


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"files": files(BAD)}, 400, "image_truncated"),
        ({"params": {"quantile": "2"}}, 422, "option_invalid"),
        ({"params": {"quantil": "2"}}, 422, "unknown_field"),
        ({"params": {"target": "unicorn"}}, 422, "unknown_class"),
        ({"params": {"model": "none"}}, 404, "unknown_model"),
        ({"params": {"version": "99"}}, 404, "unknown_version"),
        ({"headers": {"Accept": "text/html"}}, 406, "not_acceptable"),
        ({"headers": {"Accept": "image/png"}, "params": {"explain_when": "sample:1"}}, 406, "not_acceptable"),
        ({"headers": {"Accept": "image/png"}, "params": {"target": "9"}}, 422, "target_not_in_table"),
        ({"files": None, "content": b"{}", "headers": {"Content-Type": "text/plain"}}, 415, "content_type_unsupported"),
        ({"params": {"timeout_ms": "1"}}, 504, "deadline_exceeded"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_errors_are_of_their_schema(server: Server, served: Json, changes: Json, status: int, code: str) -> None:
    response = server.client.post("/explain", **{"files": files(GOOD), **changes})
    answer = of_its_schema(served, "/explain", response)
    assert (response.status_code, answer["error"]["code"]) == (status, code)
    assert code in codes_of(served["paths"]["/explain"]["post"])[str(status)]


@pytest.mark.parametrize(
    ("path", "real"),
    [
        ("/models", "/models"), ("/models/{name}", "/models/tiny"), ("/models/{name}", "/models/none"),
        ("/models/{name}", "/models/tiny?version=9"), ("/docs.json", "/docs.json"), ("/metrics", "/metrics"),
        ("/livez", "/livez"), ("/healthz", "/healthz"), ("/readyz", "/readyz"), ("/v2", "/v2"),
        ("/v2/health/live", "/v2/health/live"), ("/v2/health/ready", "/v2/health/ready"),
        ("/v2/models/{name}", "/v2/models/tiny"), ("/v2/models/{name}", "/v2/models/none"),
        ("/v2/models/{name}/ready", "/v2/models/tiny/ready"), ("/v2/models/{name}/ready", "/v2/models/none/ready"),
        ("/v2/models/{name}/config", "/v2/models/tiny/config"),
        ("/v2/models/{name}/versions/{version}", "/v2/models/tiny/versions/1"),
        ("/v2/models/{name}/versions/{version}", "/v2/models/tiny/versions/2"),
        ("/v2/models/{name}/versions/{version}/ready", "/v2/models/tiny/versions/1/ready"),
        ("/v2/models/{name}/versions/{version}/config", "/v2/models/tiny/versions/1/config"),
        ("/v1/models", "/v1/models"), ("/v1/models/{name}", "/v1/models/tiny"),
        ("/v1/models/{name}", "/v1/models/none"), ("/traffic", "/traffic?class=1"), ("/traffic", "/traffic?model=none"),
    ],
)  # fmt: skip
def test_what_is_got_is_of_its_schema(server: Server, served: Json, path: str, real: str) -> None:
    response = server.client.get(real)
    of_its_schema(served, path, response)
    assert response.status_code == (404 if "none" in real or real.endswith(("=9", "/2")) else 200)


ENCODED = base64.b64encode(GOOD).decode()
IMAGE_BYTES = {"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [ENCODED]}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"id": "7", "inputs": [IMAGE_BYTES]}, 200),
        ({"inputs": [IMAGE_BYTES], "outputs": [{"name": "target"}]}, 200),
        ({"inputs": [IMAGE_BYTES], "parameters": {"explain_when": "confidence<0.000001"}}, 200),
        ({"inputs": [IMAGE_BYTES], "parameters": {"priority": 3}}, 422),
        ({"inputs": [{"name": "target", "datatype": "INT64", "shape": [1], "data": [1]}]}, 400),
        ({"inputs": [IMAGE_BYTES], "outputs": [{"name": "nothing"}]}, 400),
    ],
)
def test_inference_is_of_its_schema(server: Server, served: Json, body: Json, status: int) -> None:
    path = "/v2/models/{name}/infer"
    check(body, served["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"], served)
    response = server.client.post("/v2/models/tiny/infer", json=body)
    answer = of_its_schema(served, path, response)
    assert response.status_code == status, answer


def test_binary_inference_is_of_its_media_type(server: Server, served: Json) -> None:
    image = np.zeros((1, 3, 64, 64), "<f4").tobytes()
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "images",
                    "datatype": "FP32",
                    "shape": [1, 3, 64, 64],
                    "parameters": {"binary_data_size": len(image)},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    response = server.client.post(
        "/v2/models/tiny/infer", content=head + image, headers={open_inference.HEADER_LENGTH: str(len(head))}
    )
    of_its_schema(served, "/v2/models/{name}/infer", response)
    length = int(response.headers[open_inference.HEADER_LENGTH])
    schema = {"$ref": "#/components/schemas/InferResponse"}
    check(json.load(io.BytesIO(response.content[:length])), schema, served)


@pytest.mark.parametrize(
    ("route", "options", "status"),
    [
        ("predict", {"top_k": 2}, 200),
        ("explain", {"target": 3, "gamma": "inf"}, 200),
        ("explain", {"target": "top:2", "saliency": "none", "rule": True}, 200),
        ("explain", {"target": "unicorn"}, 422),
        ("explain", {"quantile": 7}, 422),
    ],
)
def test_v1_is_of_its_schema(server: Server, served: Json, route: str, options: Json, status: int) -> None:
    path = f"/v1/models/{{name}}:{route}"
    body = {"instances": [{"image": {"b64": ENCODED}, **options}]}
    check(body, served["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"], served)
    response = server.client.post(f"/v1/models/tiny:{route}", json=body)
    answer = of_its_schema(served, path, response)
    assert response.status_code == status, answer


def test_the_repository_is_of_its_schema(server: Server, served: Json) -> None:
    client, path = server.client, "/v2/repository/index"
    for body in ({}, {"ready": True}, {"redy": True}):
        response = client.post(path, json=body)
        of_its_schema(served, path, response)
        assert response.status_code == (422 if "redy" in body else 200)
    # Without an admin key nobody may change anything.
    for change in ("load", "unload"):
        response = client.post(f"/v2/repository/models/tiny/{change}", json={})
        of_its_schema(served, f"/v2/repository/models/{{name}}/{change}", response)
        assert response.status_code == 403


# --- the bundled model, which the examples are about --------------------------------------------------------

ADMIN = "an admin's key"
PICTURE = base64.b64decode(examples.PICTURE)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service as it is without any setting but a key for changing what serves."""
    key = f"admin:{hashlib.sha256(ADMIN.encode()).hexdigest()}"
    with serving(tmp_path_factory.mktemp("bundled"), settings={"drain_ms": 0, "admin_keys": key}) as running:
        yield running


SENT = [
    pytest.param(method, path, example["value"], id=f"{method} {path}: {name}")
    for path, method, operation in operations()
    for name, example in operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    .get("examples", {}).items()
]  # fmt: skip


def filled(path: str, operation: Json) -> str:
    """The path with its parameters' examples in their places."""
    return path.format(**{one["name"]: one["example"] for one in operation["parameters"] if one.get("in") == "path"})


@pytest.mark.parametrize(("method", "path", "body"), SENT)
def test_every_example_of_a_request_is_answered(bundled: Server, method: str, path: str, body: Json) -> None:
    url = filled(path, DOCUMENT["paths"][path][method])
    headers = {"X-API-Key": ADMIN} if "/repository/" in path else {}
    response = bundled.client.request(method, url, json=body, headers=headers)
    assert response.status_code == 200, response.text
    if path.endswith("/unload"):
        assert bundled.client.post(url.replace("/unload", "/load"), headers=headers).status_code == 200


def test_there_is_an_example_of_every_json_body() -> None:
    assert {path for _, path, _ in (param.values for param in SENT)} == {
        path
        for path, _, operation in operations()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    }


@pytest.mark.parametrize("path", [path for path, method, _ in operations() if method == "get"])
def test_every_get_of_the_examples_names_is_answered(bundled: Server, path: str) -> None:
    assert bundled.client.get(filled(path, DOCUMENT["paths"][path]["get"])).status_code == 200


@pytest.mark.parametrize("path", ["/predict", "/explain"])
def test_the_examples_of_parameters_may_be_sent_alone_and_together(bundled: Server, path: str) -> None:
    parameters = bundled.client.get("/docs.json").json()["paths"][path]["post"]["parameters"]
    given = {
        one["name"]: str(value).lower() if isinstance(value, bool) else str(value)
        for one in parameters
        for value in one.get("example", ())
    }
    for one in (given, *({name: text} for name, text in given.items())):
        response = bundled.client.post(path, params=one, content=PICTURE, headers={"Content-Type": "image/png"})
        assert response.status_code == 200, response.text


def alike(found: Any, expected: Any) -> bool:
    """Equal, numbers as near as another machine computes them; without what is another's: id and software."""
    if isinstance(expected, dict):
        own = expected.keys() - {"request_id", "software"}
        return own == found.keys() - {"request_id", "software"} and all(alike(found[k], expected[k]) for k in own)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(alike, found, expected))
    return bool(found == pytest.approx(expected, rel=1e-3) if isinstance(expected, float) else found == expected)


def answers_of(path: str, method: str = "post") -> list[Json]:
    content = DOCUMENT["paths"][path][method]["responses"]["200"]["content"]["application/json"]
    return [one["value"] for one in content["examples"].values()]


@pytest.mark.parametrize("path", ["/predict", "/explain"])
def test_the_native_answers_of_the_examples_are_real(bundled: Server, path: str) -> None:
    options = {"top_k": "2", "saliency": "none"} if path == "/explain" else {"top_k": "2"}
    found = [
        bundled.client.post(path, files=files(*images), data=options).json()
        for images in ([PICTURE], [PICTURE[:300], PICTURE])
    ]
    one, *others = answers_of(path)
    assert alike(found[0], one), found[0]
    if path == "/explain":
        shed, mixed = others
        assert alike(found[1], mixed), found[1]
        # None is shed here; the rest of it is the first's.
        missing = {"status": "shed", "reason": examples.MESSAGES["map_shed"]}
        assert shed["results"] == [{**one["results"][0], "explanation": missing}]


@pytest.mark.parametrize(
    "path",
    ["/v2/models/{name}/infer", "/v1/models/{name}:predict", "/v1/models/{name}:explain", "/v2/repository/index"],
)
def test_the_protocols_answers_of_the_examples_are_real(bundled: Server, path: str) -> None:
    bodies = [body for _, one, body in (param.values for param in SENT) if one == path]
    found = bundled.client.post(filled(path, DOCUMENT["paths"][path]["post"]), json=bodies[0]).json()
    assert alike(found, answers_of(path)[0]), found


@pytest.mark.parametrize(
    "path",
    ["/models", "/v2", "/v2/health/live", "/v2/models/{name}", "/v2/models/{name}/ready", "/v1/models",
     "/v1/models/{name}"],
)  # fmt: skip
def test_what_the_examples_say_is_got_is_real(bundled: Server, path: str) -> None:
    found = bundled.client.get(filled(path, DOCUMENT["paths"][path]["get"])).json()
    assert alike(found, answers_of(path, "get")[0]), found


def test_the_example_of_a_model_is_real(bundled: Server) -> None:
    found = bundled.client.get("/models/scenes").json()
    found["table"] = {name: found["table"][name] for name in ("classes", "defaults")}
    assert alike(found, answers_of("/models/{name}", "get")[0])


# The picture with another size in its header, and the header's checksum.
_HEADER = b"IHDR" + struct.pack(">II", 60_000, 60_000) + PICTURE[24:29]
HUGE = PICTURE[:12] + _HEADER + struct.pack(">I", zlib.crc32(_HEADER)) + PICTURE[33:]

SAID: list[tuple[str, str, str, Json]] = [
    ("no_image", "POST", "/explain", {"files": {"top_k": (None, "1")}}),
    ("image_empty", "POST", "/explain", {"files": files(b"")}),
    ("image_truncated", "POST", "/explain", {"files": files(PICTURE[:300])}),
    ("image_corrupt", "POST", "/explain", {"files": files(PICTURE[:29] + bytes(4) + PICTURE[33:])}),
    ("image_unsupported", "POST", "/explain", {"files": files(b"<svg/>")}),
    ("image_too_many_bytes", "POST", "/explain", {"files": files(bytes(20_000_001))}),
    ("image_too_many_pixels", "POST", "/explain", {"files": files(HUGE)}),
    ("image_too_complex", "POST", "/explain", {"files": files(b"\xff\xd8" + 400 * b"\xff\xda")}),
    ("too_many_images", "POST", "/explain", {"files": files(*[PICTURE] * 17)}),
    ("content_type_unsupported", "POST", "/explain", {"content": b"a", "headers": {"Content-Type": "text/plain"}}),
    ("not_acceptable", "POST", "/explain", {"files": files(PICTURE, PICTURE), "headers": {"Accept": "image/png"}}),
    ("not_found", "POST", "/explian", {}),
    ("method_not_allowed", "GET", "/explain", {}),
    ("unknown_model", "POST", "/explain", {"files": files(PICTURE), "params": {"model": "resnet"}}),
    ("unknown_version", "POST", "/explain", {"files": files(PICTURE), "params": {"version": "7"}}),
    ("unknown_field", "POST", "/explain", {"files": files(PICTURE), "params": {"quantil": "0.1"}}),
    ("option_invalid", "POST", "/explain", {"files": files(PICTURE), "params": {"quantile": "2"}}),
    ("unknown_class", "POST", "/explain", {"files": files(PICTURE), "params": {"target": "cupp"}}),
    ("unauthorized", "POST", "/v2/repository/models/scenes/load", {}),
    ("option_unsupported", "POST", "/v2/models/scenes/infer",
     {"json": {"inputs": [{"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [examples.PICTURE]}],
               "parameters": {"priority": 3}}}),
]  # fmt: skip


@pytest.mark.parametrize(("code", "method", "path", "sent"), SAID, ids=[one[0] for one in SAID])
def test_the_messages_of_the_examples_are_what_is_said(
    bundled: Server, code: str, method: str, path: str, sent: Json
) -> None:
    response = bundled.client.request(method, path, **sent)
    said = {"error": examples.MESSAGES[code]}
    if not path.startswith("/v2"):
        said = {"error": {"code": code, "message": examples.MESSAGES[code]}}
    assert (response.status_code, response.json()) == (STATUS[code], said)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"target": "CUP"}, "Option 'target' is 'CUP'; allowed: an index in 0..9, a class name or id, predicted or "
                            "top:k. Did you mean 'cup'?"),
        ({"target": "10"}, "Option 'target' is '10'; allowed: an index in 0..9, a class name or id, predicted or "
                           "top:k."),
        ({"explain_when": "class:cup|dog"}, "Option 'explain_when' names 'dog'; allowed: an index in 0..9, a class "
                                            "name or id."),
        ({"explain_when": "class:umbrela"}, "Option 'explain_when' names 'umbrela'; allowed: an index in 0..9, a "
                                            "class name or id. Did you mean 'umbrella'?"),
    ],
    ids=str,
)  # fmt: skip
def test_an_unknown_class_is_told_of_its_option(bundled: Server, option: dict[str, str], said: str) -> None:
    response = bundled.client.post("/explain", files=files(PICTURE), data=option)
    assert response.json() == {"error": {"code": "unknown_class", "message": said}}


@pytest.mark.parametrize(
    ("method", "path", "use"),
    [("POST", "/livez", "GET, HEAD"), ("POST", "/docs.json", "GET, HEAD"), ("PUT", "/predict", "POST")],
)
def test_a_wrong_method_is_told_the_right_ones(bundled: Server, method: str, path: str, use: str) -> None:
    response = bundled.client.request(method, path)
    assert response.status_code == 405
    assert response.json()["error"]["message"] == f"{method} is not allowed at '{path}'; use {use}."
    assert set(response.headers["allow"].split(", ")) == set(use.split(", "))
