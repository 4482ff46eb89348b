"""Questions with solutions by which answers are judged: puzzles of knights, and numbers.

The files are Hugging Face's parquet files of a split, or one file of JSON lines.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trustjax._files import experiments_extra, local_folder, one_line
from trustjax.data._parquet import find_column, read_schema, read_table, split_files
from trustjax.data.decoding import DataError
from trustjax.data.text import not_empty

_PROMPT_NAMES = ("quiz", "question", "problem", "prompt", "query")
_ANSWER_NAMES = ("answer", "solution", "response", "output")


class QuestionDataset(NamedTuple):
    """Questions with their answers.

    Attributes:
      prompts: The questions.
      answers: Their answers in words; for GSM8K with its reasoning, and the number behind "####".
      name: Short name for logs.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    name: str


class PuzzleDataset(NamedTuple):
    """Knights-and-knaves puzzles with the roles of the people.

    Attributes:
      prompts: The puzzles.
      names: The names of the people of each.
      solutions: Whether each of them is a knight.
      name: Short name for logs.
    """

    prompts: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    solutions: tuple[tuple[bool, ...], ...]
    name: str


def hugging_face_questions(
    path: str | os.PathLike[str],
    *,
    split: str = "train",
    prompt_column: str | None = None,
    answer_column: str | None = None,
) -> QuestionDataset:
    """One split of a set like GSM8K: a column of questions and one of answers.

    Args:
      path: A folder, or a hub id `owner/name`, which is downloaded once and then read in the same
        way.
      split: Name of the split: of files `SPLIT-00000-of-0000N.parquet` at any depth, or of a file
        `SPLIT.jsonl`, which may be a path within the folder.
      prompt_column: Column of questions. By default the only column called quiz, question, problem,
        prompt or query.
      answer_column: Column of answers. By default the only column called answer, solution, response
        or output.

    Returns:
      The questions in the order of the files.

    Raises:
      DataError: There is no such folder, split or column, or several columns fit; a file cannot be
        read; or a text is null, empty or no string.
      ImportError: A package of the `experiments` extra is missing.
    """
    prompts: list[str] = []
    answers: list[str] = []
    for file in _files(path, split):
        columns = {
            "prompt_column": (prompt_column, _PROMPT_NAMES),
            "answer_column": (answer_column, _ANSWER_NAMES),
        }
        for source, (prompt, answer) in _rows(file, columns):
            prompts.append(_string(f"{source} question", prompt))
            answers.append(_string(f"{source} answer", answer))
    return QuestionDataset(tuple(prompts), tuple(answers), f"{Path(path).name}/{split}")


def hugging_face_puzzles(
    path: str | os.PathLike[str],
    *,
    split: str = "train",
    prompt_column: str | None = None,
    names_column: str = "names",
    solution_column: str = "solution",
) -> PuzzleDataset:
    """One split of a set like K-and-K/knights-and-knaves.

    Args:
      path, split, prompt_column: As in `hugging_face_questions`.
      names_column: Column of lists of the names.
      solution_column: Column of lists that say of each name whether it is a knight.

    Returns:
      The puzzles in the order of the files.

    Raises:
      DataError: As `hugging_face_questions`, or a row has not one role for each of its names.
      ImportError: A package of the `experiments` extra is missing.
    """
    prompts: list[str] = []
    all_names: list[tuple[str, ...]] = []
    solutions: list[tuple[bool, ...]] = []
    for file in _files(path, split):
        columns = {
            "prompt_column": (prompt_column, _PROMPT_NAMES),
            "names_column": (names_column, ()),
            "solution_column": (solution_column, ()),
        }
        for source, (prompt, names, solution) in _rows(file, columns):
            prompts.append(_string(f"{source} puzzle", prompt))
            if not _is_list_of(names, str) or not names:
                raise DataError(f"{source} names must be a list of strings, got {names!r:.100}")
            if not _is_list_of(solution, bool) or len(solution) != len(names):
                must = f"be {len(names)} booleans, one for each name"
                raise DataError(f"{source} solution must {must}, got {solution!r:.100}")
            all_names.append(tuple(names))
            solutions.append(tuple(solution))
    name = f"{Path(path).name}/{split}"
    return PuzzleDataset(tuple(prompts), tuple(all_names), tuple(solutions), name)


def _files(path: str | os.PathLike[str], split: str) -> list[Path]:
    """The file of JSON lines of a split, or its parquet files."""
    folder = local_folder(
        "path", path, DataError, "dataset",
        repo_type="dataset", allow_patterns=["*.parquet", "*.jsonl"],
    )  # fmt: skip
    lines = {
        file: (file.stem, file.relative_to(folder).with_suffix("").as_posix())
        for file in sorted(folder.rglob("*.jsonl"))
    }
    found = [file for file, names in lines.items() if split in names]
    if len(found) > 1:
        names = ", ".join(repr(lines[file][1]) for file in found)
        raise DataError(f"{folder}: split {split!r} is in several files, name one of: {names}")
    if not found and lines and not any(folder.rglob("*.parquet")):
        names = ", ".join(repr(name) for _, name in lines.values())
        raise DataError(f"{folder}: no split {split!r}; splits found: {names}")
    return found or split_files(folder, split)


def _rows(
    file: Path, columns: Mapping[str, tuple[str | None, Sequence[str]]]
) -> list[tuple[str, tuple[Any, ...]]]:
    """Where every row is, for errors, and its values in the columns of these arguments."""
    table = _json_lines(file) if file.suffix == ".jsonl" else None
    schema = read_schema(file) if table is None else table.schema
    names = [
        find_column(file, schema, argument, given, "", usual)
        for argument, (given, usual) in columns.items()
    ]
    table = read_table(file, names) if table is None else table
    values = [table.column(name).to_pylist() for name in names]
    return [(f"{file}, row {row}:", given) for row, given in enumerate(zip(*values, strict=True))]


def _json_lines(file: Path) -> Any:
    """A table of the objects in the lines of a file. Raises DataError, which names the file."""
    with experiments_extra():
        import pyarrow
        from pyarrow import json
    try:
        return json.read_json(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a file of JSON objects: {one_line(error)}") from error


def _string(source: str, value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise DataError(f"{source} must be a string, got {value!r:.100}")
    return not_empty(source, value)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)
