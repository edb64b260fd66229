"""Read the JSON of a request strictly: what JSON does not have, or what parsers read differently, is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from forge.errors import printable
from forge.serve.http.errors import ApiError
from forge.strict_json import refuse_constant, unique_keys


class JsonRoute(APIRoute):
    """A route whose body is JSON; `invalid_body` makes the answer to any other."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI's, for requests that parse strictly."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            _require_json(request)
            return await handle(_JsonRequest(request.scope, request.receive))

        return handled


class _JsonRequest(Request):
    async def json(self) -> Any:
        """Raises: JSONDecodeError, which FastAPI makes a validation error of."""
        body = await self.body()
        try:
            return json.loads(body, parse_constant=refuse_constant, object_pairs_hook=unique_keys)
        except json.JSONDecodeError:
            raise
        except RecursionError:
            reason = "it is nested too deeply"
        except UnicodeDecodeError:
            reason = "it is not UTF-8"
        except ValueError as error:  # as a number of more than 4,300 digits
            reason = str(error).partition(";")[0]
        raise json.JSONDecodeError(reason, "", 0)


def _require_json(request: Request) -> None:
    """Raises: ApiError if a request with a body does not say that it is JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method == "POST" and not (kind == "application/json" or kind.endswith("+json")):
        given = f"not {printable(kind, limit=60)}" if kind else "which is missing"
        raise ApiError(
            f"the body must be JSON with the header Content-Type: application/json, {given}",
            status=415,
            code="no_json",
        )
