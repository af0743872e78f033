"""Paired data in tables: parquet files, directories that datasets saved, and names on the Hub.

Pictures are datasets' Image feature (an object of `bytes` and `path`) or plain bytes, in a column `image` or the first
that has such; `mask` and `source` alike. A `path` without bytes is a name like any other: it stays in its folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from mmdlm.data.paired_rows import Record
from mmdlm.data.picture_contents import inside
from mmdlm.errors import InputError

_PICTURES = ("image", "mask", "source")


def parquet_records(root: Path, path: Path) -> Iterator[Record]:
    """The rows of one parquet file below `root`; pictures are read when asked for, a row group at a time."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    where = path.relative_to(root).as_posix()
    try:
        with pq.ParquetFile(path) as file:
            schema, groups = file.schema_arrow, file.metadata.num_row_groups
            pictures = _picture_columns({field.name: _is_picture(field.type) for field in schema})
            words = [name for name in schema.names if name not in pictures.values()]
            number = 0
            for group in range(groups):
                count = file.metadata.row_group(group).num_rows
                told = file.read_row_group(group, columns=words).to_pylist() if words else [{}] * count
                for row in range(count):
                    columns = {key: _plain(value) for key, value in told[row].items() if value is not None}
                    columns |= {as_: partial(_parquet_cell, str(root), str(path), name, group, row)
                                for as_, name in pictures.items()}
                    place = f"{where}#{number}"
                    columns |= _absent(columns, pictures, str(path), group, row)
                    key = _key(columns) if "image" not in pictures else place
                    yield Record(place, columns, partial(inside, root, path.parent), key)
                    number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        yield Record(where, reason=f"the file is no whole parquet file ({str(error).splitlines()[0][:80]})")


def saved_records(path: Path, split: str) -> Iterator[Record]:
    """The rows of a directory that datasets' `save_to_disk` wrote. Raises InputError without that split."""
    import datasets

    try:
        _check_tables(path)
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets and pyarrow raise many kinds on a broken directory
        raise InputError(f"{path} is no whole datasets directory ({_line(error)}): save it again.") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise InputError(f"{path} has no split {split!r}, expected one of {', '.join(found)}: name one of them.")
        found = found[split]
    elif split != "train":
        raise InputError(f"{path} has no splits, got {split!r}: name none.")
    return _dataset_records(found, path, path.name)


def _check_tables(path: Path) -> None:
    """Raises InputError where the directory names a table outside itself, which datasets would read."""
    folders = [path]
    if (path / "dataset_dict.json").is_file():
        folders = [path / str(name) for name in json.loads((path / "dataset_dict.json").read_text())["splits"]]
    for folder in folders:
        inside(path, path, os.path.relpath(folder / "dataset_info.json", path))
        inside(path, path, os.path.relpath(folder / "state.json", path))
        for table in json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
            inside(path, folder, table["filename"])


def hub_records(name: str, split: str) -> Iterator[Record]:
    """The rows of a data set on the Hub, as `load_dataset` finds it. Raises InputError where that fails."""
    import datasets

    try:
        found = datasets.load_dataset(name, split=split)
    except Exception as error:  # connection, cache, name and format errors are of many kinds
        raise InputError(
            f"{name!r} is no folder or file here, and as a data set on the Hub it cannot be loaded ({_line(error)}): "
            "check the path, or load it once with a connection."
        ) from error
    # Files that a table names without holding them may lie in the Hub's cache, and nowhere else.
    return _dataset_records(found, Path(datasets.config.HF_CACHE_HOME), f"{name}/{split}")


def _dataset_records(found: Any, root: Path, name: str) -> Iterator[Record]:
    import datasets

    pictures = _picture_columns({
        column: isinstance(feature, datasets.Image) or _is_picture(getattr(feature, "pa_type", None))
        for column, feature in found.features.items()
    })  # fmt: skip
    for column in pictures.values():
        if isinstance(found.features[column], datasets.Image):
            found = found.cast_column(column, datasets.Image(decode=False))
    words = found.remove_columns(list(pictures.values()))
    for number in range(len(found)):
        told = words[number] if words.column_names else {}
        columns = {key: _plain(value) for key, value in told.items() if value is not None}
        columns |= {as_: partial(_dataset_cell, found, root, column, number) for as_, column in pictures.items()
                    if as_ == "image" or found[number][column] is not None}
        place = f"{name}#{number}"
        yield Record(place, columns, partial(inside, root, root), place if "image" in pictures else _key(columns))


def _picture_columns(columns: Mapping[str, bool]) -> dict[str, str]:
    """{"image": column, ...} of a table's columns and whether each holds pictures."""
    found = {name: name for name in _PICTURES if columns.get(name)}
    if "image" not in found:
        first = next((name for name, holds in columns.items() if holds and name not in found), None)
        found |= {"image": first} if first else {}
    return found


def _is_picture(kind: Any) -> bool:
    import pyarrow as pa  # type: ignore[import-untyped]

    if kind is None:
        return False
    if pa.types.is_struct(kind):
        return {field.name for field in kind} >= {"bytes"}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _absent(columns: Mapping[str, Any], pictures: Mapping[str, str], path: str, group: int, row: int) -> dict[str, Any]:
    """Masks and sources may be empty cells: None instead of their content."""
    return {as_: None for as_, name in pictures.items()
            if as_ != "image" and not _row_group(path, name, group)[row].is_valid}


def _parquet_cell(root: str, path: str, column: str, group: int, row: int) -> bytes:
    cell = _row_group(path, column, group)[row].as_py()
    return _cell_bytes(cell, Path(root), Path(path).parent)


@lru_cache(maxsize=4)
def _row_group(path: str, column: str, group: int) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            return file.read_row_group(group, columns=[column]).column(0)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{Path(path).name} cannot be read ({_line(error)})") from error


def _dataset_cell(found: Any, root: Path, column: str, number: int) -> bytes:
    return _cell_bytes(found[number][column], root, root)


def _cell_bytes(cell: Any, root: Path, folder: Path) -> bytes:
    if isinstance(cell, Mapping):
        if cell.get("bytes"):
            return bytes(cell["bytes"])
        if cell.get("path"):
            name = str(cell["path"])
            if os.path.isabs(name) and Path(name).is_relative_to(root):
                name = str(Path(name).relative_to(folder))
            return inside(root, folder, name)()
    elif cell is not None:
        return bytes(cell)
    raise InputError("the cell of the picture is empty")


def _plain(value: Any) -> Any:
    """A cell without the empty fields that a table gives to every object of a list."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _key(columns: Mapping[str, Any]) -> str | None:
    name = columns.get("file_name")
    return name if isinstance(name, str) else None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
