import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from trustjax.data import DataError, hugging_face_text, python_topics, split, text_folder

DATA = os.environ.get("TRUSTJAX_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="TRUSTJAX_DATA is not set")


def write(folder: Path, columns: dict, name: str = "train-00000-of-00001.parquet") -> Path:
    parquet.write_table(pa.table(columns), folder / name)
    return folder / name


def test_pages_of_python() -> None:
    found = python_topics()
    assert len(found.documents) > 50
    assert sum(map(len, found.documents)) > 300_000
    assert set(found.labels) == {0}
    assert any("while_stmt" in document for document in found.documents)


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "news.txt").write_text("\ufeffOne.\nStill one.\n\n \nTwo.\n", encoding="utf-8")
    (tmp_path / "lore").mkdir()
    (tmp_path / "lore" / "b.txt").write_text("\nB\n\nstill B\n")
    (tmp_path / "lore" / "a.txt").write_text("A")
    (tmp_path / "notes.md").write_text("not read")
    found = text_folder(tmp_path)
    assert found.documents == ("A", "B\n\nstill B", "One.\nStill one.", "Two.")
    assert found.label_names == ("lore", "news")
    assert found.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"good\nb\xe4d", r"news.txt, line 2: not utf-8: byte 0xe4 at position 6"),
        (b"", "news.txt: an empty document"),
        (b" \n\n", "news.txt: an empty document"),
        (None, "no text; expected files DOMAIN.txt"),
    ],
)
def test_bad_folders(tmp_path: Path, content: bytes | None, text: str) -> None:
    if content is not None:
        (tmp_path / "news.txt").write_bytes(content)
    with pytest.raises(DataError, match=text):
        text_folder(tmp_path)
    with pytest.raises(DataError, match="must be a folder"):
        text_folder(tmp_path / "nowhere")


def test_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "news.txt").write_bytes("Bär".encode("latin-1"))
    assert text_folder(tmp_path, encoding="latin-1").documents == ("Bär",)


def test_parquet(tmp_path: Path) -> None:
    write(tmp_path, {"text": ["a", "b"], "topic": ["x", "y"]}, "train-00000-of-00002.parquet")
    write(tmp_path, {"text": ["c"], "topic": ["x"]}, "train-00001-of-00002.parquet")
    found = hugging_face_text(tmp_path, label_column="topic")
    assert found.documents == ("a", "b", "c")
    assert found.label_names == ("x", "y")
    assert found.labels.tolist() == [0, 1, 0]
    assert hugging_face_text(tmp_path).label_names == ("train",)


@pytest.mark.parametrize(
    ("columns", "options", "text"),
    [
        ({"text": ["a", None]}, {}, "row 1, column 'text': null"),
        ({"text": ["a", "\n"]}, {}, "row 1, column 'text': an empty document"),
        ({"text": [1]}, {}, "column 'text': int64 is not a string type"),
        ({"words": ["a"]}, {}, "text_column=None: no such column; name one of: words"),
        ({"text": ["a"], "content": ["b"]}, {}, "several columns fit"),
        ({"text": ["a"]}, {"label_column": "topic"}, "label_column='topic': no such column"),
        ({"text": ["a"], "topic": [3]}, {"label_column": "topic"}, "row 0, column 'topic': 3 is"),
        ({"text": pa.array([], pa.string())}, {}, "no rows"),
    ],
)
def test_bad_parquet(tmp_path: Path, columns: dict, options: dict, text: str) -> None:
    write(tmp_path, columns)
    with pytest.raises(DataError, match=text):
        hugging_face_text(tmp_path, **options)


def test_parts_share_no_document() -> None:
    found = python_topics()
    parts = split(found, {"train": 0.8, "test": 0.2}, seed=0)
    assert set(parts["train"]).isdisjoint(parts["test"])
    assert len(parts["train"]) + len(parts["test"]) == len(found.documents)


@needs_data
def test_brown() -> None:
    found = text_folder(Path(DATA) / "brown")
    assert len(found.label_names) == 15
    assert len(found.documents) == 500  # the corpus has 500 texts
    parts = split(found, {"test": 0.1}, seed=0)
    assert len(np.unique(found.labels[parts["test"]])) == 15


@needs_data
def test_treebank() -> None:
    found = hugging_face_text(Path(DATA) / "ud_pud", split="german_pud-test")
    assert len(found.documents) == 1000
