"""The environment of vLLM: what is refused, and that it is made once."""

from __future__ import annotations

import os
import platform
import threading
from pathlib import Path
from typing import Any

import pytest

from forge.errors import ClusterError
from forge.runtime import vllm_environment
from forge.runtime.vllm_environment import VllmPackages, find_vllm, make_vllm
from forge.runtime.vllm_replicas import _prepare_there


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "python_version_tuple", lambda: ("3", "11", "7"))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("machine", "aarch64", "this is 3.11 on Linux aarch64"),
        ("system", "Darwin", "this is 3.11 on Darwin x86_64"),
        ("python_version_tuple", ("3", "13", "0"), "this is 3.13 on Linux x86_64"),
    ],
)
def test_make_vllm__machine_without_locked_packages__is_refused(
    name: str, value: Any, reason: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(platform, name, lambda: value)
    said: list[str] = []
    with pytest.raises(ClusterError, match=reason):
        make_vllm(is_cuda=False, on_message=said.append)
    there = list(_prepare_there(is_cuda=False))
    assert [type(one) for one in there] == [ClusterError] and reason in str(there[0]), "as on other machines"
    assert not said and not [path for path in cache.rglob("*") if path.suffix != ".lock" and path.is_file()]


@pytest.mark.parametrize("is_cuda", [False, True])
def test_make_vllm__too_little_disk__is_refused_with_numbers(
    is_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_environment, "free_bytes", lambda folder: 2**30)
    with pytest.raises(ClusterError, match=r"needs [0-9.]+ GiB .* has 1.00 GiB free.*FORGE_CACHE"):
        make_vllm(is_cuda=is_cuda, on_message=print)


def test_make_vllm__several_processes__make_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    is_waiting = threading.Event()

    def make(packages: VllmPackages, *, folder: Path, on_message: Any) -> None:
        assert is_waiting.wait(20)
        made.append(folder)
        folder.mkdir()
        (folder / "complete").touch()

    monkeypatch.setattr(vllm_environment, "_make", make)
    found: list[Any] = []
    said: list[str] = []

    def on_message(text: str) -> None:
        said.append(text)
        is_waiting.set()

    def ask() -> None:
        found.append(make_vllm(is_cuda=False, on_message=on_message))

    assert find_vllm(is_cuda=False) is None
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(made) == 1 and found[0] == found[1] == find_vllm(is_cuda=False)
    assert ["another process installs vLLM" in text for text in said] == [True]
    assert find_vllm(is_cuda=True) is None, "it has other packages"


@pytest.mark.slow  # makes a virtual environment
def test_make_vllm__package_index_without_them__says_what_to_set_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    said: list[str] = []
    with pytest.raises(ClusterError, match=r"torch==2\.13\.0\+cpu.*PIP_EXTRA_INDEX_URL"):
        make_vllm(is_cuda=False, on_message=said.append)
    assert "147 locked packages" in said[0] and "600 MiB to download" in said[0], "before anything is fetched"
    with pytest.raises(ClusterError, match=r"torch==2\.13\.0.*PIP_INDEX_URL.*--engine forge"):
        make_vllm(is_cuda=True, on_message=said.append)
    assert not [path for path in cache.rglob("*") if path.suffix != ".lock" and path.is_file()]
