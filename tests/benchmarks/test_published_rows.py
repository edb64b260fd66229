"""Rows of measured throughput as other people write them: what is read, and what is refused with its line."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import pytest

from benchmarks import forecast
from benchmarks.published_rows import read_file, read_rows
from forge.errors import ArgumentError

ROW = {
    "model": "mpt-7b",
    "num_params": "6658859008",
    "seq_len": "2048",
    "gpus": "64",
    "gpu": "a100_80gb",
    "internode_gbps_per_node": "1600",
    "micro_batch": "8",
    "grad_accum": "1",
    "sharding": "zero-3",
    "act_ckpt": "True",
    "precision": "amp_bf16",
    "tokens_per_s_per_gpu": "3700",
}


def written(*rows: dict[str, str], end: str = "\n", first: str = "") -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return first + file.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        written(dict(reversed(ROW.items()))),
        written(ROW, end="\r\n", first="\ufeff"),
        written(ROW | {"table": 'quoted, with "commas"\nand a line'}) + "\n , \n\n",
        written({f" {name.upper()} ": f" {value} " for name, value in ROW.items()}),
        written(ROW | {"model": "MPT-7B", "gpu": "A100-80GB", "sharding": "FULL_SHARD", "precision": "fp16"}),
        written(ROW | {"seq_len": "2048.0", "num_params": "6.658859008e9", "act_ckpt": "full"}),
        written(ROW | {"model": "x", "hidden_size": "4096", "num_layers": "32", "vocab_size": "50368"}),
    ],
)
def test_read_file__same_row_written_otherwise__same_estimate(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(text.encode())
    (row,), (plain,) = read_file(path), read_rows(written(ROW), where="plain")
    assert row.estimate() == plain.estimate()
    assert row.assumed_shape is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": "tpu_v4"}, "rows:3: gpu 'tpu_v4' is not known; known are B200"),
        ({"gpus": "0"}, "rows:3: gpus is '0'; expected a number above 0"),
        ({"gpus": "8.5"}, "rows:3: gpus is '8.5'; expected a whole number"),
        ({"seq_len": "0"}, "seq_len is '0'"),
        ({"num_params": "inf"}, "num_params is 'inf'"),
        ({"num_params": "1e13"}, "num_params 1e+13 is not that of 32 layers of 4,096, about 6.65e+09"),
        ({"internode_gbps_per_node": "0"}, "internode_gbps_per_node is '0'"),
        ({"internode_gbps_per_node": ""}, "internode_gbps_per_node is ''"),
        ({"tokens_per_s_per_gpu": "nan"}, "tokens_per_s_per_gpu is 'nan'"),
        ({"precision": "amp_fp8"}, "precision 'amp_fp8' is not estimated; known are bf16"),
        ({"sharding": "zero-9"}, "sharding 'zero-9' is not estimated"),
        ({"act_ckpt": "maybe"}, "act_ckpt 'maybe' is not estimated"),
        ({"hidden_size": "0", "num_layers": "32"}, "hidden_size is '0'"),
        ({"hidden_size": "4096"}, "num_layers is ''"),
    ],
)
def test_read_rows__wrong_value__is_refused_with_its_line(change: dict[str, str], message: str) -> None:
    good = dict.fromkeys(change, "") | ROW
    with pytest.raises(ArgumentError, match=message.replace("+", r"\+")):
        read_rows(written(good, good | change), where="rows")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rows: no rows; expected a CSV file with the columns model"),
        (written({k: v for k, v in ROW.items() if k not in ("gpu", "seq_len")}), "no column seq_len, gpu"),
        (written(ROW) + "mpt-7b,1\n", "rows:3: 2 fields; the header has 12"),
        (written(ROW).replace("model,", "gpus,model,", 1), "the column gpus twice"),
    ],
)
def test_read_rows__not_such_a_file__says_what_is_missing(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        read_rows(text, where="rows")


def test_read_rows__one_node__needs_no_network() -> None:
    node = ROW | {"gpus": "8"}
    named, unnamed = read_rows(written(node, node | {"internode_gbps_per_node": ""}), where="rows")
    assert named.estimate() == unnamed.estimate()


@pytest.mark.parametrize("name", ["mpt-125m", "mpt-1b", "mpt-13b", "mpt-70b"])
def test_read_rows__model_without_a_shape__is_near_that_of_its_size_and_said(name: str) -> None:
    size = {"mpt-125m": "125311488", "mpt-1b": "1315950592", "mpt-13b": "12853954560", "mpt-70b": "64862437376"}
    known = ROW | {"model": name, "num_params": size[name]}
    one, other = read_rows(written(known, known | {"model": "another"}), where="rows")
    assert other.estimate() == pytest.approx(one.estimate(), rel=0.02)
    assert one.assumed_shape is None
    assert other.assumed_shape is not None


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read: No such file"), (b"\x1f\x8b\x08", "byte 1 is not UTF-8")]
)
def test_main__wrong_file__one_message_and_exit_code_2(
    content: bytes | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "rows.csv"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["forecast", "--published", str(path)])
    with pytest.raises(SystemExit) as stopped:
        forecast.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
