"""Errors of the HTTP API, in the form of OpenAI's: `{"error": {"message", "type", "param", "code"}}`.

Source: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_MAX_CHARS = 600
_MAX_RETRY_S = 3600.0


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: the HTTP status code.
        code: a short name of the error, for programs.
        param: the field of the request that is to blame.
        retry_after_s: when it makes sense to send the request again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = self.message if len(self.message) <= _MAX_CHARS else self.message[: _MAX_CHARS - 1] + "…"
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds, if it makes sense to repeat the request."""
        if self.retry_after_s is None:
            return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return {"Retry-After": str(max(1, math.ceil(min(self.retry_after_s, _MAX_RETRY_S))))}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers())


def invalid_body(problems: list[Mapping[str, Any]]) -> ApiError:
    """The error for a body that is not what the route takes; `problems` are those of pydantic."""
    first = problems[0]
    if first.get("type") == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be parsed")
        return ApiError(f"the body is not valid JSON: {reason}", code="invalid_json")
    problem = _likeliest(problems)
    param = _path(problem)
    if problem["type"] == "extra_forbidden":
        return ApiError(f"unknown parameter: {param}", code="unknown_parameter", param=param)
    num_others = len({_field(each) for each in problems}) - 1
    more = f" (and {num_others} more wrong)" if num_others else ""
    return ApiError(f"{param or 'the body'}: {problem['msg']}{more}", code="invalid_value", param=param)


def _likeliest(problems: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The deepest problem of the first wrong field: each type that a field may have has problems of its own."""
    of_field = [each for each in problems if _field(each) == _field(problems[0])]
    return max(of_field, key=lambda each: (not each["type"].endswith("_type"), len(each["loc"])))


def _field(problem: Mapping[str, Any]) -> Any:
    return next(iter(problem["loc"][1:]), None)


def _path(problem: Mapping[str, Any]) -> str | None:
    """Where a problem is, without the types that pydantic puts into it."""
    *parts, last = problem["loc"][1:] or (None,)
    parts = [part for part in parts if not _is_type(part)]
    parts += [last] if problem["type"] == "extra_forbidden" or not _is_type(last) else []
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.lstrip(".")[:120] or None


def _is_type(part: Any) -> bool:
    return part is None or (isinstance(part, str) and ("[" in part or part.startswith("constrained-")))
