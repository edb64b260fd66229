"""The routes of `forge ui`: who is let in, what the pages contain, and what stopping does."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from forge.events import CostUpdated, RunFailed, RunFinished, event_to_record
from forge.runs.scores import append_score
from forge.ui import app
from forge.ui.access import Access, token_access
from forge.ui.app import Pages, _RunFeed, build_app
from forge.ui.live import changed, message
from forge.ui.remote_runs import RemoteRuns
from forge.ui.run_list import RunList
from forge.ui.run_view import RunView
from tests.report.test_run_report import EVIL, eventful, score
from tests.support.runs import make_run, metrics
from tests.support.searches import lifelike, search_plan

TOKEN = "a-token-of-more-than-20-characters"
ORIGIN = {"Origin": "http://127.0.0.1:8400"}


def client_of(
    root: Path, *, host: str = "127.0.0.1", token: str | None = None, more_hosts: tuple[str, ...] = ()
) -> tuple[TestClient, Access]:
    runs = RunList(root)
    runs.refresh(whole=True)
    access = token_access(host, 8400, token=token, more_hosts=more_hosts)
    app: Any = build_app(runs, access=access)
    return TestClient(app, base_url=f"http://{host}:8400", follow_redirects=False), access


def key_of(client: TestClient, name: str) -> str:
    page = client.get("/", headers={"Authorization": f"Bearer {TOKEN}"}).text
    return next(key for key, found in re.findall(r'<a href="/runs/(\w+)">([^<]*)</a>', page) if found == name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    make_run(root, "plain", endings=[RunFinished(step=3)])
    eventful(text=EVIL).write(root, EVIL.replace("/", "_"))
    lifelike().write(root, search_plan())
    return root


def test_pages__every_route__has_the_policy_and_loads_nothing_else(root: Path) -> None:
    client, _ = client_of(root)
    key = key_of(client, "plain")
    for path in ("/", f"/runs/{key}", "/login"):
        answer = client.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy
        assert not re.search(r"'unsafe|\*", policy)
        assert answer.headers["x-frame-options"] == "DENY" and answer.headers["cache-control"] == "no-store"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert not re.search(r"<script>|\son\w+=|style=\"|https?://", answer.text)
        assert all(
            link.startswith(("/", "data:", "#")) for link in re.findall(r'(?:src|href)="([^"]*)"', answer.text)
        )
    for name in ("page.css", "ui.css", "colors.css", "sort.js", "ui.js"):
        answer = client.get(f"/static/{name}")
        assert answer.status_code == 200 and not re.search(r"https?://|@import|url\(|innerHTML|eval\(", answer.text)
    assert client.get("/static/plotly.js").status_code == 200
    for name in ("app.py", "../app.py", "..%2fapp.py", "list.html.j2"):
        assert client.get(f"/static/{name}").status_code == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8400", 200), ("localhost:9000", 200), ("LOCALHOST", 200), ("[::1]:8400", 200),
        ("evil.example:8400", 403), ("127.0.0.1.evil.example", 403), ("10.1.2.3:8400", 403), ("", 403),
        ("known.example", 200), ("known.example.:8400", 200),
    ],
)  # fmt: skip
def test_loopback__host_header__other_names_are_refused(root: Path, host: str, status: int) -> None:
    client, _ = client_of(root, more_hosts=("Known.example",))
    for path in ("/", "/events?since=0", "/static/ui.js"):
        if path.startswith("/events") and status == 200:
            continue  # it does not end
        assert client.get(path, headers={"Host": host}).status_code == status


def test_other_address__host_header__addresses_in_digits_are_known(root: Path) -> None:
    client, _ = client_of(root, host="0.0.0.0", token=TOKEN)
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert client.get("/", headers=bearer | {"Host": "10.1.2.3:8400"}).status_code == 200
    assert client.get("/", headers=bearer | {"Host": "evil.example"}).status_code == 403


def test_token__missing_or_wrong__is_refused_everywhere(root: Path) -> None:
    client, _ = client_of(root, token=TOKEN)
    key = key_of(client, "plain")
    for path in ("/", "/events", f"/runs/{key}", f"/runs/{key}/events", f"/runs/{key}/figures"):
        for headers in ({}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": f"Basic {TOKEN}"},
                        {"Cookie": "forge-ui-8400="}, {"Cookie": f"forge-ui-8400={TOKEN}"}):  # fmt: skip
            assert client.get(path, headers=headers).status_code == 401
        assert client.post(f"/runs/{key}/stop", headers=ORIGIN).status_code == 401
    answer = client.get("/", headers={"Accept": "text/html"})
    assert answer.status_code == 303 and answer.headers["location"] == "/login"
    assert client.get("/login").status_code == 200


def test_login__token__gives_a_cookie_that_is_not_the_token(root: Path) -> None:
    client, access = client_of(root, token=TOKEN)
    assert client.post("/login", data={"token": "wrong"}, headers=ORIGIN).status_code == 401
    assert client.post("/login", data={"token": TOKEN}).status_code == 403
    assert (
        client.post("/login", data={"token": TOKEN}, headers={"Origin": "http://evil.example"}).status_code == 403
    )
    assert client.post("/login", content=b"token=" + b"x" * 10_000, headers=ORIGIN).status_code == 413
    answer = client.post("/login", data={"token": TOKEN}, headers=ORIGIN)
    assert answer.status_code == 303
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and TOKEN not in cookie
    assert client.get("/").status_code == 200
    other, _ = client_of(root, token=TOKEN)
    assert other.get("/", headers={"Cookie": f"{access.cookie}={access.session}"}).status_code == 401


@pytest.mark.parametrize("token", [None, "short", ""])
def test_other_address__without_a_good_token__is_refused(token: str | None) -> None:
    from forge.errors import ArgumentError

    with pytest.raises(ArgumentError, match=r"token|TOKEN"):
        token_access("0.0.0.0", 8400, token=token)


def test_stop__requests_from_elsewhere__change_nothing(waiting_run: tuple[Path, subprocess.Popen[bytes]]) -> None:
    folder, process = waiting_run
    client, access = client_of(folder.parent)
    path = f"/runs/{key_of(client, folder.name)}/stop"
    good = {**ORIGIN, "X-Forge-Csrf": access.csrf}
    assert client.get(path, headers=good).status_code == 405
    for headers in (
        {}, ORIGIN, {"X-Forge-Csrf": access.csrf}, good | {"X-Forge-Csrf": "x"}, good | {"X-Forge-Csrf": ""},
        good | {"Origin": "http://evil.example"}, good | {"Origin": "null"}, good | {"Host": "evil.example"},
        good | {"Origin": "http://127.0.0.1:9999"}, good | {"Sec-Fetch-Site": "cross-site"},
    ):  # fmt: skip
        assert client.post(path, headers=headers).status_code == 403, headers
    assert process.poll() is None
    answer = client.post(path, headers=good)
    assert answer.status_code == 200 and "stops after its current step" in answer.text
    assert process.wait(timeout=20) == 0
    assert "is not running" in client.post(path, headers=good).text


def test_stop__trial__is_refused_as_on_the_command_line(tmp_path: Path) -> None:
    search = lifelike().write(tmp_path, search_plan())
    make_run(search / "trials", f"{search.name}-0001")
    client, access = client_of(tmp_path)
    path = f"/runs/{key_of(client, search.name)}/trials/1"
    assert client.get(path).status_code == 200 and 'id="stop"' not in client.get(path).text
    answer = client.post(f"{path}/stop", headers={**ORIGIN, "X-Forge-Csrf": access.csrf})
    assert answer.status_code == 409 and "stop the whole search" in answer.text


def test_pages__hostile_texts__are_escaped(root: Path) -> None:
    client, _ = client_of(root)
    name = EVIL.replace("/", "_")
    page = client.get("/").text
    assert "<evil" not in page and "&lt;evil" in page
    (key,) = [key for key, found in re.findall(r'<a href="/runs/(\w+)">([^<]*)</a>', page) if "evil" in found]
    run = client.get(f"/runs/{key}").text
    assert "<evil" not in run and "&lt;evil" in run and name not in run
    figures = client.get(f"/runs/{key}/figures").text
    assert "<evil" not in figures


def test_figures__run_and_search__are_those_of_the_report(root: Path) -> None:
    client, _ = client_of(root)
    keys = re.findall(r'<a href="/runs/(\w+)">([^<]*)</a>', client.get("/").text)
    for key, name in keys:
        figures = client.get(f"/runs/{key}/figures").json()
        expected = ["loss", "speed", "workers", "cost"]
        if name.startswith("tune"):
            expected = ["optimization-history", "learning-curves", "parallel-coordinates", "importances"]
            assert figures[2]["spec"] is None, "plotly compiles it at run time, which the policy forbids"
        assert [figure["key"] for figure in figures] == expected


def test_unknown_runs__are_not_found(root: Path) -> None:
    client, _ = client_of(root)
    for path in ("/runs/none", "/runs/%2e%2e", "/runs/plain", "/nothing"):
        assert client.get(path).status_code == 404
    key = key_of(client, "plain")
    for path in (f"/runs/{key}/trials/1", f"/runs/{key}/trials/-1", f"/runs/{key}/trials/x", f"/runs/{key}/x"):
        assert client.get(path).status_code == 404


def feed_of(root: Path, folder: Path, *, log: str | None = None) -> tuple[RunView, Callable[[], dict[str, Any]]]:
    """A run's view, and what a browser that has its page open is sent next."""
    remote = RemoteRuns()
    pages = Pages(RunList(root), access=token_access("127.0.0.1", 1, token=None), remote=remote)
    view = RunView(folder)
    feed = _RunFeed(pages, view, log=remote.log_of(folder, name=log) if log else None)

    def news() -> dict[str, Any]:
        view._refreshed_at = 0.0
        return feed.news()

    return view, news


def test_feed__steps_appended__sends_points_and_changed_texts_alone(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=3)
    _, news = feed_of(tmp_path, folder, log="rank-0")
    (folder / "logs" / "rank-0.log").write_text("first\nhalf")
    first = news()
    assert first["first"] and first["draw"] and first["log"] == "first\n"
    assert first["state"]["tiles"]["step"][0] == "3 of 6"
    assert news() == {}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics(4, loss=0.25).as_record() | {"time": 2e9}) + "\n")
    with (folder / "logs" / "rank-0.log").open("a") as file:
        file.write(" line\n")
    body = news()
    assert body["points"]["loss"]["training"] == [[4], [0.25]] and "draw" not in body
    assert body["log"] == "half line\n"
    assert body["state"]["tiles"]["step"][0] == "4 of 6" and "events" not in body["state"]
    assert len(message(body)) < 800


def test_feed__scores__are_among_the_results(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    _, news = feed_of(tmp_path, folder)
    results = dict(news()["state"]["results"].values())
    assert "perplexity 7.39" in results["held out"] and not any(name.startswith("task") for name in results)
    append_score(folder, score("support"))
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 2e9, "event": "Unknown"}) + "\n")
    assert any(name == "task support" and "0.8125" in text for name, text in news()["state"]["results"].values())


def test_feed__many_steps_at_once__sends_few_points(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=1)
    _, news = feed_of(tmp_path, folder)
    news()
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(2, 1000):
            file.write(json.dumps(metrics(step).as_record() | {"time": 2e9}) + "\n")
    steps, losses = news()["points"]["loss"]["training"]
    assert len(steps) <= 10 and steps[-1] == 999 and len(losses) == len(steps)


def test_feed__change_of_members__draws_again(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    _, news = feed_of(tmp_path, folder)
    news()
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 2e9} | event_to_record(CostUpdated(usd=1.0, usd_per_hour=1.0))) + "\n")
    assert news()["draw"]


def test_feed__folder_vanishes__says_so(tmp_path: Path) -> None:
    import shutil

    from forge.errors import ArgumentError

    folder = make_run(tmp_path)
    _, news = feed_of(tmp_path, folder)
    news()
    shutil.rmtree(folder)
    with pytest.raises(ArgumentError, match="no longer there"):
        news()


def test_feed__replaced_by_a_link__is_not_followed(tmp_path: Path) -> None:
    from forge.errors import ArgumentError

    folder, outside = make_run(tmp_path / "runs"), make_run(tmp_path / "private")
    _, news = feed_of(tmp_path, folder, log="rank-0")
    news()
    folder.rename(tmp_path / "moved")
    folder.symlink_to(outside)
    with pytest.raises(ArgumentError, match="no longer there"):
        news()


def test_view__records_replaced__is_read_from_its_start(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=5)
    view, news = feed_of(tmp_path, folder)
    news()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))
    body = news()
    assert body["state"]["tiles"]["step"][0] == "2 of 6" and body["draw"] and view.num_opened == 2


def test_feed__huge_texts__are_cut(tmp_path: Path) -> None:
    history = eventful(text="x" * 100_000)
    history.record(RunFailed(error="RunError", message="y" * 1_000_000))
    folder = history.write(tmp_path, "huge")
    _, news = feed_of(tmp_path, folder)
    body = news()
    assert "[1,000,000 characters]" in body["state"]["problem"]["failure"][0]
    assert len(message(body)) < 20_000
    client, _ = client_of(tmp_path)
    key = key_of(client, "huge")
    assert len(client.get(f"/runs/{key}").content) < 50_000


def test_views__many_runs__keep_a_bounded_number_of_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_MAX_EVENTS", 10)
    folders = [make_run(tmp_path, f"run-{number}") for number in range(8)]
    runs = RunList(tmp_path)
    pages = Pages(runs, access=token_access("127.0.0.1", 1, token=None), remote=RemoteRuns())
    views = [pages.view_of(folder) for folder in folders]
    assert sum(view.num_events for view in pages._views.values()) <= 10 < sum(view.num_events for view in views)
    assert pages.view_of(folders[-1]) is views[-1]


def test_changed__only_what_differs__with_none_for_what_is_gone() -> None:
    before = {"a": {"1": ["x"], "2": ["y"]}, "b": {"1": ["z"]}}
    now = {"a": {"1": ["x"], "2": ["\x1b[2J"], "3": ["n"]}}
    assert changed(before, now) == {"a": {"2": ["\ufffd[2J"], "3": ["n"]}, "b": {"1": None}}
    assert changed(now, now) == {}
    assert message({"a": "x\ny"}, number=3) == 'id: 3\ndata: {"a":"x\\ny"}\n\n'
