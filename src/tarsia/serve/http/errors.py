"""Refusals as OpenAI's clients understand them: a status, an error object, and when to come again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Self

from starlette.responses import JSONResponse

from tarsia.core.errors import ServeError, TarsiaError

AGAIN: Final = 2
"""Seconds after which it is worth to come again where nothing better is known."""

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
"""Type of the error object by status; all statuses that are ever given."""

_KINDS: Final[Mapping[str, tuple[int, str]]] = {
    "invalid": (400, "invalid_request"),
    "unknown_adapter": (404, "model_not_found"),
    "refused": (400, "adapter_refused"),
    "damaged": (500, "adapter_damaged"),
    "too_long": (400, "context_length_exceeded"),
    "timeout": (504, "timeout"),
    "overloaded": (429, "overloaded"),
    "lost": (503, "worker_lost"),
    "internal": (500, "internal_error"),
}
"""Status and code by what the worker says became of a request."""


class Refusal(Exception):
    """An answer that is an error. ``again``: seconds until it is worth to ask again."""

    def __init__(
        self,
        status: int,
        error: TarsiaError | str,
        *,
        code: str,
        param: str | None = None,
        again: float | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(str(error))
        self.status, self.message, self.code, self.param = status, str(error), code, param
        self.again, self.close = again, close

    @classmethod
    def of(cls, error: ServeError) -> Self:
        """What the worker refused. What it says of itself stays here where the fault is its own."""
        status, code = _KINDS[error.kind]
        told: TarsiaError | str = error
        if error.kind == "unknown_adapter":
            return cls.unknown()
        if error.kind == "internal":
            told = "The server could not answer this request; its log says more under the request's id."
        elif error.kind in ("refused", "damaged"):  # what is given may be a path of this machine
            told = TarsiaError(error.what, do=error.do)
        return cls(status, told, code=code, again=AGAIN if status in (429, 503) else None)

    @classmethod
    def unknown(cls, error: TarsiaError | None = None) -> Self:
        """There is no such model, or it is none of this key's: which one only ``error`` says, to who may see all."""
        do = "GET /v1/models lists what may be used here"
        told = error or TarsiaError("There is no such model, or it is none of this key's.", do=do)
        return cls(404, told, code="model_not_found", param="model")

    @classmethod
    def no_source(cls, path: str) -> Self:
        """There is nothing of the library's to load, or it is none of this key's: which one is not said."""
        do = "tarsia library list, and tarsia library show NAME for its versions"
        error = TarsiaError("The library has no such adapter for this key.", given=shown(path), do=do)
        return cls(404, error, code="model_not_found", param="lora_path")

    @classmethod
    def abstained(cls) -> Self:
        """The router leaves a request to the base, which the key may not use."""
        what = "No adapter of this key's is for these pictures, and the key may not use the base."
        return cls(403, TarsiaError(what, do="ask for one by its name"), code="abstained", param="model")

    @classmethod
    def invalid(cls, what: str, param: str | None = None, **told: Any) -> Self:
        """A request that makes no sense; ``told`` is given, allowed and do."""
        return cls(400, TarsiaError(what, **told), code="invalid_request", param=param)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": _TYPES[self.status], "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to come again, in whole seconds, and whether the connection ends here."""
        found = {} if self.again is None else {"retry-after": str(max(1, math.ceil(self.again)))}
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        if self.close:
            found["connection"] = "close"
        return found

    @property
    def response(self) -> JSONResponse:
        """What is sent."""
        return JSONResponse(self.body, self.status, self.headers)


def shown(text: object, longest: int = 80) -> str:
    """What a client said, as it may be said back: in quotes, on one line, ASCII, not long."""
    said = ascii(text)
    return said if len(said) <= longest else f"{said[:longest]}... ({len(said)} characters)"
