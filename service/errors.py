"""Every error code a caller can get, its HTTP status, and how a library error becomes one. No messages' logic."""

from parchgrad import errors as library

# The closed list of codes. `GET /docs.json` and docs/service.md are checked against it.
STATUS = {
    "malformed_request": 400,
    "no_image": 400,
    "image_empty": 400,
    "image_truncated": 400,
    "image_corrupt": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "attack_off": 403,
    "not_found": 404,
    "unknown_model": 404,
    "unknown_version": 404,
    "no_class_graph": 404,
    "method_not_allowed": 405,
    "not_acceptable": 406,
    "load_failed": 409,
    "body_too_large": 413,
    "too_many_images": 413,
    "image_too_many_bytes": 413,
    "image_too_many_pixels": 413,
    "image_too_complex": 413,
    "content_type_unsupported": 415,
    "image_unsupported": 415,
    "unknown_field": 422,
    "option_unsupported": 422,
    "option_invalid": 422,
    "unknown_class": 422,
    "target_not_in_table": 422,
    "map_not_finite": 422,
    "prediction_not_finite": 422,
    "queue_full": 429,
    "rate_limited": 429,
    "client_closed_request": 499,  # nobody reads it; the number is nginx's, and the metric counts it
    "internal": 500,
    "not_ready": 503,
    "map_shed": 503,
    "out_of_memory": 503,
    "audit_unavailable": 503,
    "storage_full": 503,
    "deadline_exceeded": 504,
}

# Most specific first: the first class that matches decides.
LIBRARY_CODES: tuple[tuple[type[Exception], str], ...] = (
    (library.UnknownTargetError, "unknown_class"),
    (library.OptionError, "option_invalid"),
    (library.UncoveredTargetError, "target_not_in_table"),
)

RETRY_AFTER_SECONDS = 1


class ServiceError(Exception):
    """What a caller is told: a code of `STATUS` and one sentence."""

    def __init__(self, code: str, message: str, retry_after: int = RETRY_AFTER_SECONDS) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = STATUS[code]
        self.retry_after = retry_after  # seconds, said with 429 and 503

    @property
    def headers(self) -> dict[str, str]:
        if self.code in ("body_too_large", "too_many_images"):
            return {"Connection": "close"}  # else the server would read the rest of the body, however long
        return {"Retry-After": str(self.retry_after)} if self.status in (429, 503) else {}


def from_exception(error: Exception) -> ServiceError:
    """The error a caller sees for `error`; anything unforeseen is 'internal' and tells nothing of our insides."""
    if isinstance(error, ServiceError):
        return error
    for kind, code in LIBRARY_CODES:
        if isinstance(error, kind):
            return ServiceError(code, str(error))
    return ServiceError("internal", "The service failed on this request; its log says why.")
