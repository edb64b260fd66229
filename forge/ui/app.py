"""The pages of `forge ui`, their streams of changes, and the request that stops a run."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import re
import secrets
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Callable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from forge.errors import ForgeError, harmless
from forge.report.alert_rows import ALERT_COLUMNS
from forge.report.alerts_text import alert_facts
from forge.report.page import STATUS_COLORS, page_environment, plotly_code
from forge.report.run_report import BUCKET_COLORS
from forge.report.run_rows import COLUMNS
from forge.report.text import plan_facts, search_facts
from forge.report.trial_rows import columns
from forge.runs.annotations import read_annotations
from forge.runs.reader import search_folder
from forge.ui.access import LOGIN, Access, AccessGuard
from forge.ui.live import State, changed, clipped, message
from forge.ui.remote_runs import RemoteRuns, RunLog, stop_run
from forge.ui.run_list import RunList
from forge.ui.run_view import RunView

_HERE = Path(__file__).parent / "page"
_TYPES = {"css": "text/css", "js": "text/javascript"}
_EVERY_S = 1.0
_BEAT_S = 15.0
_FIRST_ROWS = 100
"""That a list shows at once; more are laid out as the page is scrolled."""
_MAX_STREAMS = 256
_MAX_VIEWS = 16
_MAX_EVENTS = 500_000
"""Of all runs whose pages were shown last; they are kept in memory."""
_MAX_FACTS = 200
_MAX_BODY_BYTES = 4096
_STATIC = ("page.css", "ui.css", "sort.js", "ui.js", "colors.css", "plotly.js")


class Pages:
    """What the routes share."""

    def __init__(self, runs: RunList, *, access: Access, remote: RemoteRuns) -> None:
        self.runs, self.access, self.remote = runs, access, remote
        self.num_streams = 0
        self._environment = page_environment(_HERE)
        self._views: OrderedDict[Path, RunView] = OrderedDict()
        self._opening: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()
        self._refreshed_at = 0.0

    def render(self, template: str, **values: Any) -> Response:
        """Render a page with its policy: it runs and loads only what this server has."""
        nonce = secrets.token_urlsafe(16)
        versions = {name: static_version(name) for name in _STATIC}
        html = self._environment.get_template(template).render(
            nonce=nonce, versions=versions, csrf=self.access.csrf, has_token=self.access.token_digest is not None,
            **values,
        )  # fmt: skip
        policy = (
            f"default-src 'none'; script-src 'self'; style-src 'self' 'nonce-{nonce}'; img-src 'self' data: blob:; "
            "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
        )
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store"}
        return HTMLResponse(html, headers=headers)

    def refresh_runs(self) -> None:
        """Look for changes of the list, at most once a second for all browsers."""
        if time.monotonic() - self._refreshed_at >= _EVERY_S * 0.9:
            self._refreshed_at = time.monotonic()
            self.runs.refresh()
            self.remote.follow_running(self.runs)

    def folder_of(self, request: Request) -> Path:
        """Raises: HTTPException if the address names no run of the list."""
        folder = self.runs.folder_of(request.path_params["key"], trial=request.path_params.get("trial"))
        if folder is None:
            raise HTTPException(404, "There is no such run in this folder now.")
        return folder

    def view_of(self, folder: Path) -> RunView:
        """Return the view of a run, kept for a while after its page was left.

        Raises: HTTPException if the run cannot be read.
        """
        with self._lock:
            opening = self._opening[folder]
        try:
            with opening:  # a stream waits for the page of the same run, instead of reading it too
                view = self._views.get(folder) or RunView(folder)
            view.refresh()
        except ForgeError as error:
            with self._lock:
                self._views.pop(folder, None)
            raise HTTPException(404, str(error)) from None
        with self._lock:
            view = self._views.setdefault(folder, view)
            self._views.move_to_end(folder)
            while len(self._views) > 1 and self._is_full():
                self._opening.pop(self._views.popitem(last=False)[0], None)
        return view

    def _is_full(self) -> bool:
        num_events = sum(view.num_events for view in self._views.values())
        return len(self._views) > _MAX_VIEWS or num_events > _MAX_EVENTS


def build_app(runs: RunList, *, access: Access, remote: RemoteRuns | None = None) -> AccessGuard:
    """Build the ASGI application."""
    pages = Pages(runs, access=access, remote=remote or RemoteRuns())

    def route(path: str, answer: Callable[[Pages, Request], Any], *, method: str = "GET") -> Route:
        async def endpoint(request: Request) -> Response:
            found: Response = await answer(pages, request)
            return found

        return Route(path, endpoint, methods=[method])

    routes = [
        route("/", _list_page),
        route("/events", _list_stream),
        route(LOGIN, _login_page),
        route(LOGIN, _log_in, method="POST"),
        route("/static/{name}", _static_file),
    ]
    for base in ("/runs/{key}", "/runs/{key}/trials/{trial:int}"):
        routes += [
            route(base, _run_page),
            route(f"{base}/events", _run_stream),
            route(f"{base}/figures", _figures),
            route(f"{base}/stop", _stop, method="POST"),
        ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _answer_http})
    return AccessGuard(app, access=access)


async def _list_page(pages: Pages, request: Request) -> Response:
    await asyncio.to_thread(pages.refresh_runs)
    runs = pages.runs
    version = runs.version
    return pages.render(
        "list.html.j2",
        runs=[(row.key, row.as_row()) for row in runs.rows()],
        columns=list(COLUMNS),
        root=str(runs.root.absolute()),
        cluster=runs.cluster,
        problem=runs.problem,
        num_unread=runs.num_unread,
        version=version,
        first=_FIRST_ROWS,
        statuses=[*(name for name in STATUS_COLORS if name not in ("waiting", "diverged")), "broken"],
    )


async def _list_stream(pages: Pages, request: Request) -> Response:
    given = request.headers.get("last-event-id") or request.query_params.get("since", "")
    since = int(given) if re.fullmatch(r"[0-9]{1,18}", given) else -1
    note = ""

    def look() -> tuple[dict[str, Any] | None, int]:
        nonlocal note
        pages.refresh_runs()
        version = pages.runs.version
        rows = pages.runs.changes(since=since)
        if rows is None:
            return {"reload": True}, version
        body: dict[str, Any] = {"state": {"runs": rows}} if rows else {}
        if note != (note := pages.remote.note_on(pages.runs)):
            body["note"] = clipped(note)
        return body or None, version

    async def messages() -> AsyncIterator[str | None]:
        nonlocal since
        while True:
            body, version = await asyncio.to_thread(look)
            yield None if body is None else message(body, number=version)
            since = version
            await asyncio.sleep(_EVERY_S)

    return _stream(pages, messages())


async def _run_page(pages: Pages, request: Request) -> Response:
    folder = pages.folder_of(request)
    view = await asyncio.to_thread(pages.view_of, folder)
    run, search = view.run, search_folder(folder)
    annotations = read_annotations(folder)
    facts = [*plan_facts(run.plan), *search_facts(run.plan)]
    return pages.render(
        "run_page.html.j2",
        path=request.url.path,
        parent=f"/runs/{request.path_params['key']}" if search is not None else "/",
        parent_name=search.name if search is not None else "all runs",
        name=run.run_id,
        headline=view.headline(),
        status=run.status,
        tags=annotations.tags,
        note=annotations.note,
        warnings=[clipped(warning) for warning in run.plan.warnings[:_MAX_FACTS]],
        facts=[(clipped(name), clipped(text)) for name, text in facts[:_MAX_FACTS]],
        is_trial=search is not None,
        trial_columns=columns(run.plan.job.search.metric) if run.plan.job.search is not None else (),
        logs=await asyncio.to_thread(pages.remote.log_names, folder),
        bucket_colors=BUCKET_COLORS,
        alert_columns=ALERT_COLUMNS,
        alert_settings=[clipped(text) for _, text in alert_facts(run.plan)] if search is None else [],
    )


async def _run_stream(pages: Pages, request: Request) -> Response:
    folder = pages.folder_of(request)
    view = await asyncio.to_thread(pages.view_of, folder)
    name = request.query_params.get("log")
    log = pages.remote.log_of(folder, name=name) if name else None

    async def messages() -> AsyncIterator[str | None]:
        feed = _RunFeed(pages, view, log=log)
        while True:
            try:
                body = await asyncio.to_thread(feed.news)
            except ForgeError as error:
                yield message({"gone": harmless(str(error))})
                return
            yield message(body) if body else None
            await asyncio.sleep(_EVERY_S)

    return _stream(pages, messages())


class _RunFeed:
    """What one browser has been sent of a run."""

    def __init__(self, pages: Pages, view: RunView, *, log: RunLog | None) -> None:
        self._pages, self._view, self._log = pages, view, log
        self._sent: State = {}
        self._num_opened = view.num_opened
        self._num_redraws = self._num_steps = -1
        self._is_first = True

    def news(self) -> dict[str, Any]:
        """Return what has changed since the last call. Raises: ForgeError if the run cannot be read any more."""
        view, body = self._view, dict[str, Any]()
        self._pages.remote.follow(view.folder)
        view.refresh()
        state = dict(view.state())
        problems = self._pages.remote.messages(view.folder)
        if problems:
            state["problem"] = {**state["problem"], "connection": [problems]}
        if changes := changed(self._sent, state):
            body["state"], self._sent = changes, state
        if self._num_opened != view.num_opened or self._num_redraws != view.num_redraws:
            body["draw"] = True
        elif points := view.points(since=self._num_steps):
            body["points"] = points
        self._num_opened, self._num_redraws, self._num_steps = view.num_opened, view.num_redraws, view.num_steps
        if self._log is not None and (text := self._log.read()):
            body["log"] = harmless(text)
        if self._is_first:
            body["first"], self._is_first = True, False
        return body


async def _figures(pages: Pages, request: Request) -> Response:
    view = await asyncio.to_thread(pages.view_of, pages.folder_of(request))
    try:
        figures = await asyncio.to_thread(view.figures)
    except ForgeError as error:
        raise HTTPException(404, str(error)) from None
    body = [
        {"key": figure.key, "title": figure.title, "note": harmless(figure.note), "spec": figure.spec}
        for figure in figures
    ]
    return JSONResponse(body, headers={"Cache-Control": "no-store"})


async def _stop(pages: Pages, request: Request) -> Response:
    folder = pages.folder_of(request)
    try:
        text = await asyncio.to_thread(stop_run, folder, remote=pages.remote)
    except ForgeError as error:
        return PlainTextResponse(harmless(str(error)), 409)
    return PlainTextResponse(harmless(text))


async def _login_page(pages: Pages, request: Request) -> Response:
    return pages.render("login.html.j2", problem="")


async def _log_in(pages: Pages, request: Request) -> Response:
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > _MAX_BODY_BYTES:
                return PlainTextResponse("That is too long for a token.\n", 413)
    except ClientDisconnect:
        return Response(status_code=400)
    given = parse_qs(body.decode(errors="replace")).get("token", [""])[0]
    if not pages.access.has_token(given.strip()):
        answer = pages.render("login.html.j2", problem="That is not the token of this server.")
        answer.status_code = 401
        return answer
    response = RedirectResponse("/", 303)
    is_secure = request.url.scheme == "https"
    response.set_cookie(
        pages.access.cookie, pages.access.session, httponly=True, samesite="strict", secure=is_secure
    )
    return response


async def _static_file(pages: Pages, request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _STATIC:
        raise HTTPException(404, "There is no such file.")
    headers = {"Cache-Control": "max-age=31536000, immutable" if request.query_params.get("v") else "no-cache"}
    kind = f"{_TYPES[name.rpartition('.')[2]]}; charset=utf-8"
    headers["Vary"] = "Accept-Encoding"
    if "gzip" in request.headers.get("accept-encoding", ""):
        packed = await asyncio.to_thread(_packed_file, name)
        return Response(packed, media_type=kind, headers=headers | {"Content-Encoding": "gzip"})
    return Response(_file(name), media_type=kind, headers=headers)


def _stream(pages: Pages, messages: AsyncIterator[str | None]) -> Response:
    """Answer with a stream of messages; None is one that has nothing new."""
    if pages.num_streams >= _MAX_STREAMS:
        raise HTTPException(503, "Too many pages are open.")

    async def content() -> AsyncIterator[str]:
        sent_at = time.monotonic()
        pages.num_streams += 1
        try:
            yield "retry: 2000\n\n"
            async for text in messages:
                if text is not None or time.monotonic() - sent_at > _BEAT_S:
                    sent_at = time.monotonic()
                    yield text or ":\n\n"  # a comment, so that a closed connection is noticed
        finally:
            pages.num_streams -= 1

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(content(), media_type="text/event-stream", headers=headers)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(f"{harmless(str(error.detail))}\n", error.status_code)


@cache
def _file(name: str) -> bytes:
    """Return a file of the package, or one that is made from it."""
    match name:
        case "plotly.js":
            return plotly_code().encode()
        case "colors.css":
            colors = {**STATUS_COLORS, "broken": "#cf3e3e", "finished-early": STATUS_COLORS["finished"]}
            lines = [f'.pill[data-status="{status}"] {{ --c: {color}; }}' for status, color in colors.items()]
            lines += [f'[data-part="{part}"] {{ background: {color}; }}' for part, color in BUCKET_COLORS.items()]
            return "\n".join([*lines, ""]).encode()
        case "page.css":
            return (_HERE.parents[1] / "report" / name).read_bytes()
    return (_HERE / name).read_bytes()


@cache
def _packed_file(name: str) -> bytes:
    return gzip.compress(_file(name), 6)


@cache
def static_version(name: str) -> str:
    """Return a part of the address of a file that changes with its content."""
    return hashlib.blake2b(_file(name), digest_size=6).hexdigest()
