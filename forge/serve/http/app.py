"""The HTTP API: OpenAI's routes, those of other kinds of models, health, metrics and the page at `/`.

It knows the model through a `ModelBackend` only, so the same application runs over replicas of Ray Serve and over a
model in its own process.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from forge.serve.calls import TextDelta, TextOptions, TextsCall
from forge.serve.http.bodies import (
    ChatBody,
    ClassifyBody,
    CompletionBody,
    EmbeddingBody,
    FillMaskBody,
    TranslateBody,
)
from forge.serve.http.errors import ApiError, invalid_body
from forge.serve.http.generation import Usage
from forge.serve.http.guard import Guard
from forge.serve.http.json_body import JsonRoute
from forge.serve.http.serving import Serving
from forge.serve.http.text_routes import answer_chat, answer_completion, unless_gone

_PAGE = files("forge.serve").joinpath("page")
_PAGE_FILES = frozenset(file.name for file in _PAGE.iterdir())
_PAGE_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_DEFAULT_TRANSLATION_TOKENS = 256
_DEFAULT_CANDIDATES = 5


def build_app(serving: Serving) -> Guard:
    """Build the ASGI application of a server."""
    app = FastAPI(title="forge", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.router.route_class = JsonRoute
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_bug)
    _add_operations(app, serving)
    _add_texts(app, serving)
    _add_tasks(app, serving)
    return Guard(app, settings=serving.settings, keys=serving.keys, telemetry=serving.telemetry)


def _add_operations(app: FastAPI, serving: Serving) -> None:
    @app.get("/health")
    @app.head("/health", include_in_schema=False)
    async def health() -> JSONResponse:
        is_draining = serving.admission.is_draining
        return JSONResponse(
            {"status": "draining" if is_draining else "ok"}, status_code=503 if is_draining else 200
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        serving.telemetry.replicas(await serving.backend.stats())
        return Response(serving.telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        info = serving.backend.info
        return JSONResponse(
            {"object": "list", "data": [_model(name, serving) for name in (info.name, *info.adapters)]}
        )

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        serving.require_model(name, kinds=(serving.backend.info.kind,), what="")
        return JSONResponse(_model(name, serving))

    @app.get("/")
    @app.head("/", include_in_schema=False)
    async def page() -> Response:
        return _page_file("index.html")

    @app.get("/page/{name}")
    async def page_file(name: str) -> Response:
        return _page_file(name)


def _add_texts(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        serving.require_model(body.model, kinds=("causal-lm",), what="continues no text")
        return await answer_completion(body, request, serving=serving)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        serving.require_model(body.model, kinds=("causal-lm",), what="does not chat")
        return await answer_chat(body, request, serving=serving)


def _add_tasks(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody, request: Request) -> JSONResponse:
        serving.require_model(body.model, kinds=("embedding",), what="makes no embeddings")
        call = TextsCall(verb="embed", texts=tuple(body.texts))

        def entry(index: int, delta: TextDelta) -> dict[str, Any]:
            return {"object": "embedding", "index": index, "embedding": _vector(delta.value, body=body)}

        return await _answer_texts(serving, request, call, model=body.model, entry=entry)

    @app.post("/v1/classify")
    async def classify(body: ClassifyBody, request: Request) -> JSONResponse:
        serving.require_model(
            body.model, kinds=("classification", "token-classification", "reward"), what="gives no labels"
        )
        given = [body.input] if isinstance(body.input, str) else body.input
        texts = [each if isinstance(each, str) else (each[0], each[1]) for each in given]
        call = TextsCall(verb="classify", texts=tuple(texts))
        return await _answer_texts(serving, request, call, model=body.model, entry=_entry)

    @app.post("/v1/fill-mask")
    async def fill_mask(body: FillMaskBody, request: Request) -> JSONResponse:
        serving.require_model(body.model, kinds=("masked-lm",), what="fills no masks")
        texts = [body.input] if isinstance(body.input, str) else body.input
        top_k = body.top_k or _DEFAULT_CANDIDATES
        call = TextsCall(verb="fill", texts=tuple(texts), num_candidates=top_k)
        return await _answer_texts(serving, request, call, model=body.model, entry=_entry)

    @app.post("/v1/translate")
    async def translate(body: TranslateBody, request: Request) -> JSONResponse:
        serving.require_model(body.model, kinds=("seq2seq",), what="writes no targets")
        texts = [body.input] if isinstance(body.input, str) else body.input
        options = TextOptions(
            max_tokens=body.max_tokens or _DEFAULT_TRANSLATION_TOKENS,
            temperature=0.0,
            num_beams=body.num_beams or 1,
        )
        call = TextsCall(verb="translate", texts=tuple(texts), options=options)

        def entry(index: int, delta: TextDelta) -> dict[str, Any]:
            return {"index": index, "text": delta.text, "finish_reason": delta.finish_reason}

        return await _answer_texts(serving, request, call, model=body.model, entry=entry)


async def _answer_texts(
    serving: Serving, request: Request, call: TextsCall, *, model: str, entry: Callable[[int, TextDelta], Any]
) -> JSONResponse:
    """Answer with the result of each text, within the limits of the server and the key.

    Args:
        entry: makes a text's entry in the answer from its last piece.
    """
    key, usage = serving.key_of(request), Usage()
    pieces = serving.generator.stream(
        serving.backend, [call], key=key, usage=usage, entry=request.state.entry, may_restart=True
    )

    async def last_pieces() -> dict[int, TextDelta]:
        async with contextlib.aclosing(pieces):
            return {delta.index: delta async for delta in pieces if delta.finish_reason is not None}

    found = await unless_gone(request, last_pieces())
    data = [entry(index, found[index]) for index in range(call.num_texts)]
    shown = usage.as_json()
    if call.verb != "translate":
        del shown["completion_tokens"]
    return JSONResponse(
        {"object": "list", "data": data, "model": model, "usage": shown}, headers=serving.limiter.headers(key)
    )


def _entry(index: int, delta: TextDelta) -> dict[str, Any]:
    return {"index": index, **delta.value}


def _vector(vector: tuple[float, ...], *, body: EmbeddingBody) -> list[float] | str:
    """The vector as asked for. Shorter ones are normalised, as OpenAI's API does."""
    values = np.array(vector, dtype=np.float32)
    if body.dimensions is not None:
        if body.dimensions > len(values):
            raise ApiError(f"the vectors have {len(values)} dimensions", code="invalid_value", param="dimensions")
        values = values[: body.dimensions]
        values = values / max(float(np.linalg.norm(values)), 1e-12)
    if body.encoding_format == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode()
    return [float(value) for value in values]


def _model(name: str, serving: Serving) -> dict[str, Any]:
    """An entry of `/v1/models`; the fields that OpenAI's API does not have are for the page at `/`."""
    info = serving.backend.info
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "forge",
        "kind": info.kind,
        "max_model_len": info.max_positions,
        "labels": list(info.labels),
        "chat": info.has_chat_template,
        "start_check": info.start_check,
    }


def _page_file(name: str) -> Response:
    kind = _PAGE_TYPES.get(name.rpartition(".")[2])
    if kind is None or name not in _PAGE_FILES:
        raise ApiError("there is no such page", status=404, code="not_found")
    return Response(
        _PAGE.joinpath(name).read_bytes(),
        media_type=f"{kind}; charset=utf-8",
        headers={"Content-Security-Policy": _PAGE_POLICY},
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return invalid_body(list(error.errors())).response()


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:120]  # request.url needs a valid Host header
    is_near = any(getattr(route, "path", "") == f"/v1{path}" for route in request.app.routes)
    hint = f"; did you mean /v1{path}? The base URL of clients ends with /v1" if is_near else ""
    message = {404: f"there is no route {path}{hint}", 405: f"{request.method} is not for this route"}
    answer = ApiError(message.get(error.status_code, str(error.detail)), status=error.status_code)
    return JSONResponse(answer.body(), status_code=error.status_code, headers=dict(error.headers or {}))


async def _answer_bug(request: Request, error: Exception) -> Response:
    number = request.state.entry["id"]
    return ApiError(f"an error of the server; its log has the details under {number}", status=500).response()
