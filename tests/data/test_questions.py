"""Questions of folders in Hugging Face's layout, and what is wrong with others."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_text import write

from trustjax.data import DataError, hugging_face_puzzles, hugging_face_questions

PUZZLE = {
    "quiz": "Who is Zoey?",
    "names": ["Zoey", "Oliver"],
    "knight_knave": {"knight": "a knight"},
    "solution": [False, True],
    "solution_text": "Zoey is a knave, and Oliver is a knight.",
    "index": 0,
}


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_numbers_in_parquet(tmp_path: Path) -> None:
    write(tmp_path, {"question": ["1 + 1?", "2 + 2?"], "answer": ["#### 2", "#### 4"]})
    found = hugging_face_questions(tmp_path)
    assert found.prompts == ("1 + 1?", "2 + 2?")
    assert found.answers == ("#### 2", "#### 4")
    assert found.name == f"{tmp_path.name}/train"


def test_puzzles_in_json_lines_and_parquet(tmp_path: Path) -> None:
    write_lines(tmp_path / "train" / "people2_num200.jsonl", [PUZZLE, {**PUZZLE, "index": 1}])
    write_lines(tmp_path / "test" / "people2_num100.jsonl", [PUZZLE])
    found = hugging_face_puzzles(tmp_path, split="train/people2_num200")
    assert found.prompts == ("Who is Zoey?",) * 2
    assert found.names[0] == ("Zoey", "Oliver")
    assert found.solutions[1] == (False, True)
    (tmp_path / "own").mkdir()
    write(tmp_path / "own", {name: [PUZZLE[name]] for name in ("quiz", "names", "solution")})
    assert hugging_face_puzzles(tmp_path / "own").solutions == ((False, True),)
    with pytest.raises(DataError, match="no split 'validation'; splits found: 'people2_num100'"):
        hugging_face_puzzles(tmp_path / "test", split="validation")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"question": "x"}, {}, "answer_column=None: no such column; name one of: question"),
        ({"question": "x", "problem": "x", "answer": "1"}, {}, "prompt_column=None: several"),
        ({"question": "x", "answer": "1"}, {"answer_column": "y"}, "answer_column='y': no such"),
        ({"question": "x", "answer": 1}, {}, "row 0: answer must be a string, got 1"),
        ({"question": None, "answer": "1"}, {}, "row 0: question"),
        ("no object", {}, "not a file of JSON objects"),
    ],
)
def test_errors_of_questions(
    tmp_path: Path, row: Any, options: dict[str, str], message: str
) -> None:
    write_lines(tmp_path / "train.jsonl", [row])
    with pytest.raises(DataError, match=message):
        hugging_face_questions(tmp_path, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": "Zoey"}, "row 0: names must be a list of strings, got 'Zoey'"),
        ({"solution": [True]}, "row 0: solution must be 2 booleans, one for each name"),
        ({"solution": ["knight", "knave"]}, "row 0: solution must be 2 booleans"),
    ],
)
def test_errors_of_puzzles(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_lines(tmp_path / "train.jsonl", [{**PUZZLE, **changes}])
    with pytest.raises(DataError, match=message):
        hugging_face_puzzles(tmp_path)
    write_lines(tmp_path / "again" / "train.jsonl", [PUZZLE])
    with pytest.raises(DataError, match="split 'train' is in several files, name one of: 'again/"):
        hugging_face_puzzles(tmp_path)
