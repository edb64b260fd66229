"""Data sets that others made to hang, to leave their folder, or to show what is on this machine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from forge.config.data import DataSpec
from forge.data.sources.dataset import list_dataset
from forge.data.sources.path_glob import matching_paths
from forge.errors import DataError

MOST_S = 10.0


def data_set(folder: Path, *, configs: str) -> DataSpec:
    """A folder with one file, `train.jsonl`, and the `configs` of its README.md."""
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {configs}\n---\n")
    return DataSpec(dataset=str(folder))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["a.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "d/b.jsonl", "d/e/c.jsonl"]),
        ("d/**", ["d/b.jsonl", "d/e/c.jsonl"]),
        ("**", ["a.jsonl", "d/b.jsonl", "d/e/c.jsonl"]),
        ("d/**/c.*", ["d/e/c.jsonl"]),
        ("d/**/b.jsonl", ["d/b.jsonl"]),
        ("[ab].jsonl", ["a.jsonl"]),
        ("[!b].jsonl", ["a.jsonl"]),
        ("d/?.jsonl", ["d/b.jsonl"]),
        ("[z-a].jsonl", []),
        ("../**", []),
        ("d//b.jsonl", []),
        ("a.jsonl", ["a.jsonl"]),
        ("d", []),
    ],
)
def test_matching_paths__pattern__matches_as_in_fsspec(pattern: str, expected: list[str]) -> None:
    assert matching_paths([pattern], ["a.jsonl", "d/b.jsonl", "d/e/c.jsonl"]) == expected


@pytest.mark.parametrize("pattern", ["a*" * 100 + "b", "**/" * 300 + "b", "*?" * 200 + "/b", "[a-z]*" * 100 + "!"])
def test_matching_paths__pattern_with_many_stars__takes_no_exponential_time(pattern: str) -> None:
    started = time.monotonic()
    assert matching_paths([pattern], ["a" * 250, "/".join("a" * 100)]) == []
    assert time.monotonic() - started < MOST_S


@pytest.mark.parametrize("pattern", ["a**.jsonl", "*" + "a" * 1000])
def test_list_dataset__pattern_that_is_none__is_refused(tmp_path: Path, pattern: str) -> None:
    spec = data_set(tmp_path, configs=f"data_files: '{pattern}'")
    with pytest.raises(DataError, match=r"the `configs` in its README.md cannot be used: .*(pattern|characters)"):
        list_dataset(spec)


def test_matching_paths__too_many_patterns__are_refused() -> None:
    with pytest.raises(ValueError, match="5,000 patterns for 3,000 files are too many"):
        matching_paths([f"{number}*" for number in range(5000)], [str(number) for number in range(3000)])


def test_list_dataset__environment_in_a_readme__is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE_OF_MINE", "not-for-others")
    spec = data_set(tmp_path, configs="data_files: [{split: '${env:PLACE_OF_MINE}', path: '*.jsonl'}]")
    with pytest.raises(DataError, match="PLACE_OF_MINE") as caught:
        list_dataset(spec)
    assert "not-for-others" not in str(caught.value)


def test_list_dataset__links_out_of_the_folder__are_skipped_and_named(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
    (outside / "private.jsonl").write_text('{"text": "private"}\n')
    (outside / "dangling").symlink_to(outside / "nothing")
    (inside / "own.jsonl").write_text('{"text": "own"}\n')
    (inside / "same.jsonl").symlink_to("own.jsonl")
    (inside / "file.jsonl").symlink_to(outside / "private.jsonl")
    (inside / "folder").symlink_to(outside)
    (inside / "root").symlink_to("/")
    (inside / "README.md").symlink_to(outside / "private.jsonl")
    (tmp_path / "link").symlink_to(inside)
    for given in (inside, tmp_path / "link"):
        found = list_dataset(DataSpec(dataset=str(given)))
        assert [file.name for file in found.files] == ["own.jsonl"]
        reasons = {Path(one.path).name: one.reason for one in found.skipped}
        out = "a link that leads out of the folder"
        assert reasons == {
            "file.jsonl": out,
            "folder": out,
            "root": out,
            "README.md": out,
            "same.jsonl": "a second name of a file that is read",
        }


def test_list_dataset__snapshot_of_the_hubs_cache__follows_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (blobs / "1f").write_text('{"text": "a"}\n')
    (snapshot / "train.jsonl").symlink_to("../../blobs/1f")
    assert [file.name for file in list_dataset(DataSpec(dataset=str(snapshot))).files] == ["train.jsonl"]
