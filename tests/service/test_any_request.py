"""Whole requests drawn by hypothesis: every answer is a documented one, and no image or option touches another's."""

import io
import math
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from service.errors import STATUS
from service.openapi import document
from service.schemas import OF_RULE, ErrorAnswer, ExplainAnswer, PredictAnswer, options_of
from service.settings import Settings
from tests.service.conftest import picture, png
from tests.service.serving import Server
from tests.service.test_server import distance, saliency

REQUESTS = 60
MAX_IMAGES = 5
ACCEPT = ("application/json", "application/json", "application/json", "application/x-npz", "image/png")

_PICTURES = [png(picture(seed, (70 + 9 * seed, 90))) for seed in range(4)]
GOOD = {f"picture {i}": data for i, data in enumerate(_PICTURES)}
BAD = {  # each by the code it is refused with
    "image_empty": b"",
    "image_unsupported": b"<svg/>",
    "image_truncated": _PICTURES[0][:300],
    "image_corrupt": _PICTURES[1][:29] + bytes(4) + _PICTURES[1][33:],  # the header's checksum
}
FILES = GOOD | BAD
RIGHT = {
    "target": ("predicted", "0", "thing 5", "9", "top:2"),
    "method": ("gradient", "input_x_gradient"),
    "rule": ("true", "false"),
    "quantile": ("0.1", "1", "0.33"),
    "gamma": ("inf", "2", "0"),
    "selection": ("class", "instance"),
    "conserve": ("independent", "exact", "none"),
    "layers": ("*", "features.0, features.9*"),
    "seed": ("logit", "probability_weighted_logit", "evidence"),
    "saliency": ("none", "uint8", "float32", "list"),
    "polarity": ("both", "positive", "negative"),
    "explain_when": ("always", "confidence<0.5", "class:0|thing 1;sample:0.5"),
    "top_k": ("1", "10"),
    "timeout_ms": ("60000",),
    "outline": ("true", "false"),
    "opacity": ("0", "0.5", "1"),
}
WRONG = (
    ("quantile", "0"), ("quantile", "nan"), ("gamma", "-1"), ("gamma", "1e999"), ("target", "nobody"),
    ("target", "10"), ("target", "top:11"), ("target", ""), ("top_k", "0"), ("top_k", "11"), ("layers", "nothing.*"),
    ("saliency", "jpeg"), ("timeout_ms", "0"), ("explain_when", "confidence<2"), ("explain_when", "class:nobody"),
    ("no_option", "1"), ("steps", "1000000"), ("seed", "\x00"), ("outline", "yes"), ("rule", "TRUE"),
)  # fmt: skip
DOCUMENT = document(Settings())
ROUTES = {"predict": PredictAnswer, "explain": ExplainAnswer}


@dataclass(frozen=True)
class Asked:
    """`images` are names of FILES. `options`: name -> one value, or one an image; those in `query` are sent there."""

    route: str
    accept: str
    images: tuple[str, ...]
    options: dict[str, tuple[str, ...]]
    query: frozenset[str]
    wrong: bool

    def send(self, server: Server) -> httpx.Response:
        return server.client.post(
            f"/{self.route}",
            headers={"Accept": self.accept},
            files=[("image", (image, FILES[image], "application/octet-stream")) for image in self.images],
            data={name: list(texts) for name, texts in self.options.items() if name not in self.query},
            params={name: list(texts) for name, texts in self.options.items() if name in self.query},
        )

    def alone(self, i: int) -> "Asked":
        """The request of its i-th image, asked the same."""
        options = {name: (texts[i % len(texts)],) for name, texts in self.options.items()}
        return Asked(self.route, self.accept, (self.images[i],), options, self.query, self.wrong)


@st.composite
def requests(draw: st.DrawFn) -> Asked:
    route = draw(st.sampled_from(list(ROUTES)))
    images = tuple(
        draw(st.lists(st.sampled_from(list(GOOD)) | st.sampled_from(list(BAD)), min_size=1, max_size=MAX_IMAGES))
    )
    known = [option.name for option in options_of(route) if option.name in RIGHT]
    options = {}
    for name in draw(st.lists(st.sampled_from(known), unique=True, max_size=5)):
        many = draw(st.sampled_from((1, len(images))))
        options[name] = tuple(draw(st.sampled_from(RIGHT[name])) for _ in range(many))
    if "false" in options.get("rule", ()):  # beside which the rule's own options would be refused
        options = {name: texts for name, texts in options.items() if name not in OF_RULE}
    wrong = draw(st.sampled_from((False, False, False, True)))
    if wrong:
        name, text = draw(st.sampled_from(WRONG))
        options[name] = (text,)
    query = draw(st.frozensets(st.sampled_from([*options]))) if options else frozenset()
    return Asked(route, draw(st.sampled_from(ACCEPT)), images, options, query, wrong)


@settings(
    max_examples=REQUESTS, deadline=None, derandomize=True, database=None, phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(asked=requests())
def test_any_request_is_answered_as_documented(server: Server, asked: Asked) -> None:
    response = asked.send(server)
    documented = DOCUMENT["paths"][f"/{asked.route}"]["post"]["responses"]
    assert str(response.status_code) in documented
    assert response.status_code < 500
    if response.status_code != 200:
        code = ErrorAnswer.model_validate_json(response.text).error.code
        assert STATUS[code] == response.status_code
        assert code in _expected_codes(asked)
        return
    assert not asked.wrong
    assert response.headers["content-type"] == asked.accept
    assert asked.accept in documented["200"]["content"]
    if asked.accept == "application/json":
        ROUTES[asked.route].model_validate_json(response.text)
        _same_as_alone(server, asked, response.json())
    elif asked.accept == "application/x-npz":
        with np.load(io.BytesIO(response.content), allow_pickle=False) as arrays:
            assert {f"logits_{i}" in arrays for i, one in enumerate(asked.images) if one in GOOD} <= {True}
            assert {f"error_{i}" in arrays for i, one in enumerate(asked.images) if one in BAD} <= {True}


def _expected_codes(asked: Asked) -> set[str]:
    """What a request may be refused with: its wrong option, a picture that there is not, or its only image."""
    if asked.wrong:
        codes = {"option_invalid", "unknown_field", "unknown_class"}
    elif asked.accept != "image/png" and len(asked.images) == 1:
        codes = {asked.images[0]}
    else:
        codes = set()
    if asked.accept == "image/png":
        # No picture of several images, of /predict, of a map that was not made; or of an image that is none.
        codes |= {"not_acceptable", "target_not_in_table", *BAD}
    return codes


def _same_as_alone(server: Server, asked: Asked, answer: dict[str, Any]) -> None:
    assert len(answer["results"]) == len(asked.images)
    for i, (image, result) in enumerate(zip(asked.images, answer["results"], strict=True)):
        if image in BAD:
            assert result["error"]["code"] == image
        elif len(asked.images) > 1:
            alone = asked.alone(i).send(server)
            assert alone.status_code == 200
            (other,) = alone.json()["results"]
            _same(result, other)


def _same(one: Any, other: Any) -> None:
    """Equal in everything; numbers as near as a batch of another size computes them."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        if one.get("encoding") == "base64":
            assert (one["shape"], one["dtype"]) == (other["shape"], other["dtype"])
            maps = [saliency({"explanation": {"saliency": each}}) for each in (one, other)]
            # Values of uint8 may fall on either side of a step.
            assert not maps[1].any() or distance(*maps) < (0.02 if one["dtype"] == "uint8" else 1e-3)
            return
        for name in one:
            _same(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for each, its in zip(one, other, strict=True):
            _same(each, its)
    elif isinstance(one, float) and isinstance(other, float):
        assert math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-6)
    else:
        assert one == other
