"""Parquet files with long values that are stored once for many rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge.data.sources import parquet_batches as module
from forge.data.sources.files import FileSource
from forge.data.sources.parquet_batches import batches


@pytest.fixture
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 16 << 20)


def sizes(path: Path, *, columns: list[str] | None = None) -> list[int]:
    with path.open("rb") as stream:
        return [len(batch) for batch in batches(pq.ParquetFile(stream), stream, columns=columns)]


def repeated(value: str, *, count: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value]))


@pytest.mark.usefixtures("few_bytes")
@pytest.mark.parametrize("settings", [{}, {"compression": "zstd"}, {"data_page_version": "2.0"}])
def test_batches__long_value_in_every_row__have_few_rows(tmp_path: Path, settings: dict[str, Any]) -> None:
    table = pa.table({"text": repeated("a" * (4 << 20), count=40), "number": list(range(40))})
    pq.write_table(table, tmp_path / "bomb.parquet", store_schema=False, **settings)
    assert max(sizes(tmp_path / "bomb.parquet", columns=["text"])) <= 4
    assert sizes(tmp_path / "bomb.parquet", columns=["number"]) == [40]


@pytest.mark.usefixtures("few_bytes")
def test_batches__prefixes_of_the_value_before__have_few_rows(tmp_path: Path) -> None:
    value = "a" * (4 << 20)
    table = pa.table({"text": [value + str(number) for number in range(20)]})
    path = tmp_path / "bomb.parquet"
    pq.write_table(table, path, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})
    with path.open("rb") as stream:
        group = pq.ParquetFile(stream).metadata.row_group(0)
    assert group.column(0).total_uncompressed_size < 5 << 20
    assert max(sizes(path)) <= 4
    assert sum(sizes(path)) == 20


def test_batches__ordinary_file__are_large_and_have_every_row(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": [f"{number} " + "word " * 200 for number in range(3000)],
            "messages": [[{"role": "user", "content": "a" * number}] for number in range(3000)],
            "label": ["a", "b", None] * 1000,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1024)
    assert sizes(tmp_path / "a.parquet", columns=["text"])[:8] == [256] * 8
    source = FileSource(patterns=(str(tmp_path / "a.parquet"),), file_type="auto", text_key="text", columns=None)
    records = list(source.records())
    assert [record.fields for record in records] == table.to_pylist()
    assert records[-1].name == "a.parquet:3000"
