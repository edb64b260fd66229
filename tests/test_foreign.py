from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from forge.checkpoint.storage import open_storage
from forge.data.sources.listing import list_files
from forge.errors import CheckpointError, DataError
from forge.foreign import LineReader, file_name, from_record, parse_json, parse_object, read_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    step: int
    loss: float
    mode: Literal["min", "max"] = "min"
    inner: Inner | None = None
    names: tuple[str, ...] = ()
    pair: tuple[int, str] = (0, "")
    values: Mapping[str, float | None] | None = None
    rest: Any = None


class TestReadFile:
    def test_read_file__regular_file_up_to_the_limit__is_read(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"12345")
        assert read_file(tmp_path / "a", max_bytes=5) == b"12345"
        with pytest.raises(ValueError, match="a has 5 bytes; forge reads at most 4 of it"):
            read_file(tmp_path / "a", max_bytes=4)

    def test_read_file__link__is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("secret")
        (tmp_path / "b").symlink_to("a")
        with pytest.raises(OSError, match="it is a link"):
            read_file(tmp_path / "b", max_bytes=100)

    def test_read_file__pipe_device_folder__are_refused_at_once(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
            with pytest.raises(OSError, match="is not a regular file"):
                read_file(path, max_bytes=100)

    def test_read_file__sparse_terabyte__is_not_read(self, tmp_path: Path) -> None:
        with (tmp_path / "a").open("wb") as file:
            file.truncate(2**40)
        with pytest.raises(ValueError, match="1099511627776 bytes"):
            read_file(tmp_path / "a", max_bytes=2**20)


class TestParseJson:
    def test_parse_json__values__equal_those_of_json(self) -> None:
        assert parse_object(b'{"a": [1, 2.5, null, true, "\\u00e9"]}') == {"a": [1, 2.5, None, True, "é"]}
        assert parse_json("[" * 64 + "]" * 64)

    @pytest.mark.parametrize(
        "text",
        [
            *(b"", b"{", b"\xff", b'"\xed\xa0\x80"', b'"\\ud800"', b'{"\\udfff": 1}', b"9" * 5000, b"\x00", b"nul"),
            *(b"[" * 65 + b"]" * 65, b'{"a":' * 65 + b"1" + b"}" * 65, b"[" * 100_000, b"[" + b"0," * 4_000_001),
        ],
        ids=range(13),
    )
    def test_parse_json__invalid_deep_or_too_many_values__raises_value_error(self, text: bytes) -> None:
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)

    def test_parse_object__not_an_object__says_what_it_is(self) -> None:
        with pytest.raises(ValueError, match="expected a JSON object, found a list of 1"):
            parse_object(b"[1]")


class TestLineReader:
    def test_lines__growing_file__yields_complete_lines_once(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        path.write_bytes(b"one\ntwo\nthr")
        reader = LineReader(path, max_bytes=100, max_line_bytes=10)
        assert list(reader.lines()) == [b"one", b"two"]
        path.write_bytes(b"one\ntwo\nthree\n\nfour\n")
        assert list(reader.lines()) == [b"three", b"", b"four"]

    def test_lines__line_too_long__is_skipped_and_counted(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        path.write_bytes(b"one\n" + b"x" * 35 + b"\n" + b"y" * 10 + b"\ntwo\n" + b"z" * 11 + b"\n")
        reader = LineReader(path, max_bytes=100, max_line_bytes=10)
        assert list(reader.lines()) == [b"one", b"y" * 10, b"two"]
        assert reader.num_skipped == 2

    def test_lines__file_larger_than_the_limit__raises(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"x\n" * 51)
        with pytest.raises(ValueError, match="a has 102 bytes"):
            list(LineReader(tmp_path / "a", max_bytes=100, max_line_bytes=10).lines())


class TestFileName:
    @pytest.mark.parametrize("name", ["part-00000-ab.safetensors", "a b", "é", "..a", "a" * 255])
    def test_file_name__plain_name__is_returned(self, name: str) -> None:
        assert file_name(name) == name

    @pytest.mark.parametrize(
        "name", ["", ".", "..", "a/b", "/etc/passwd", "a\0", "a\n", "\x1b[2J", "é" * 128, 3, None]
    )
    def test_file_name__path_or_odd__raises(self, name: Any) -> None:
        with pytest.raises(ValueError, match="name of a file"):
            file_name(name)


class TestFromRecord:
    def test_from_record__valid__builds_nested_values(self) -> None:
        record = {"step": 1, "loss": 2, "mode": "max", "inner": {"name": "a"}, "names": ["x"], "pair": [1, "y"]}
        built = from_record(Outer, record | {"values": {"a": None, "b": 1}, "rest": [{}]})
        assert built == Outer(
            step=1, loss=2.0, mode="max", inner=Inner(name="a"), names=("x",), pair=(1, "y"),
            values={"a": None, "b": 1.0}, rest=[{}],
        )  # fmt: skip
        assert isinstance(built.loss, float)

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"step": True}, "step: expected int, found bool True"),
            ({"step": 1.0}, "step: expected int"),
            ({"step": 2**63}, "step: expected int"),
            ({"step": None}, "step: expected int, found null"),
            ({"loss": math.inf}, "loss: expected float"),
            ({"loss": 10**400}, "loss: expected float"),
            ({"loss": None}, "loss: expected float"),
            ({"mode": "most"}, "mode: expected Literal"),
            ({"inner": 3}, "inner: expected a JSON object, found int 3"),
            ({"inner": {}}, "'inner.name' is missing"),
            ({"inner": {"name": 1}}, "inner.name: expected str"),
            ({"names": "x"}, "names: expected tuple"),
            ({"names": [1]}, "names: expected str"),
            ({"pair": [1]}, "pair: expected 2 values, found 1"),
            ({"values": {"a": "b"}}, "values.a: expected float"),
            ({"other": 1}, "unknown key 'other'"),
        ],
    )
    def test_from_record__wrong_value__names_the_key(self, change: dict[str, Any], problem: str) -> None:
        with pytest.raises(ValueError, match=problem):
            from_record(Outer, {"step": 1, "loss": 1.0} | change)

    def test_from_record__null_for_nan__only_where_asked(self) -> None:
        assert math.isnan(from_record(Outer, {"step": 1, "loss": None}, nan_for_null=True).loss)
        with pytest.raises(ValueError, match="'step' is missing"):
            from_record(Outer, {"loss": 1.0})
        with pytest.raises(ValueError, match="expected a JSON object, found a list of 0"):
            from_record(Outer, [])


@pytest.mark.parametrize("url", ["reference://::file:///{}", "reference::file://{}", "reference://a/*::{}"])
def test_url__file_that_names_other_files__is_not_followed(tmp_path: Path, url: str) -> None:
    (tmp_path / "private").write_text("secret")
    names = {"a/step-00000001/manifest.json": [str(tmp_path / "private")]}
    (tmp_path / "names.json").write_text(json.dumps({"version": 1, "refs": names}))
    with pytest.raises(DataError, match="the file system `reference` is not supported"):
        list_files([url.format(tmp_path / "names.json")])
    if url.startswith("reference://"):  # another is the path of a folder
        with pytest.raises(CheckpointError, match="the file system `reference` is not supported"):
            open_storage(url.format(tmp_path / "names.json"))
