"""Instructions with their responses, and preferences between two responses, from parquet folders.

Texts are strings, or conversations: lists of messages {"role": ..., "content": ...}, to which the
chat template of a tokenizer gives a form.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trustjax.data._parquet import find_column, read_schema, read_table, split_files, split_name
from trustjax.data.decoding import DataError
from trustjax.data.text import not_empty

Message = dict[str, str]
Text = str | list[Message]

_MESSAGES_NAMES = ("messages", "conversations", "conversation")
_PROMPT_NAMES = ("prompt", "instruction", "question", "query")
_RESPONSE_NAMES = ("completion", "response", "output", "answer")
# ShareGPT's names of the same.
_ROLES = {"human": "user", "gpt": "assistant"}


class InstructionDataset(NamedTuple):
    """Prompts with the responses to learn.

    Attributes:
      prompts: Prompts, strings or conversations that end with a message of the user.
      responses: Their responses, of the same kind.
      name: Short name for logs.
    """

    prompts: tuple[Text, ...]
    responses: tuple[Text, ...]
    name: str


class PreferenceDataset(NamedTuple):
    """Prompts with two responses, of which the first was preferred.

    Attributes:
      prompts: Prompts, strings (empty where the responses have nothing in common) or conversations.
      chosen: The preferred responses, of the same kind.
      rejected: The other responses.
      name: Short name for logs.
    """

    prompts: tuple[Text, ...]
    chosen: tuple[Text, ...]
    rejected: tuple[Text, ...]
    name: str


def hugging_face_instructions(
    path: str | os.PathLike[str],
    *,
    split: str = "train",
    messages_column: str | None = None,
    prompt_column: str | None = None,
    response_column: str | None = None,
) -> InstructionDataset:
    """One split of an instruction set in Hugging Face's parquet layout.

    Args:
      path: A folder with files `SPLIT-00000-of-0000N.parquet` at any depth, or a hub id
        `owner/name`, which is downloaded once and then read in the same way.
      split: Name of the split to read.
      messages_column: Column of conversations, whose last message is the response. By default the
        only column called messages, conversation or conversations, if there is one and no other
        column is named.
      prompt_column: Column of prompts. By default the only column called prompt, instruction,
        question or query. A column `input` next to `instruction` (Alpaca's layout) follows its
        text after a blank line.
      response_column: Column of responses. By default the only column called completion, response,
        output or answer.

    Returns:
      The examples in the order of the files.

    Raises:
      DataError: There is no such folder, split or column, or several columns fit; a file cannot be
        read; a text is null or empty; or a conversation is malformed or does not end with a
        message of the assistant.
      ImportError: A package of the `experiments` extra is missing.
    """
    prompts: list[Text] = []
    responses: list[Text] = []
    for file in split_files(path, split):
        schema = read_schema(file)
        whole = messages_column is not None or (
            prompt_column is None
            and response_column is None
            and any(name in schema.names for name in _MESSAGES_NAMES)
        )
        if whole:
            messages = find_column(
                file, schema, "messages_column", messages_column, "", _MESSAGES_NAMES
            )
            for source, (conversation,) in _rows(file, [messages]):
                if isinstance(conversation, str) or conversation[-1]["role"] != "assistant":
                    raise DataError(f"{source}: must end with a message of the assistant")
                prompts.append(conversation[:-1])
                responses.append(conversation[-1:])
            continue
        prompt = find_column(file, schema, "prompt_column", prompt_column, "", _PROMPT_NAMES)
        response = find_column(
            file, schema, "response_column", response_column, "", _RESPONSE_NAMES
        )
        columns = [prompt, response]
        inputs: list[str | None] = []
        if prompt == "instruction" and "input" in schema.names:
            inputs = read_table(file, ["input"]).column("input").to_pylist()
        for row, (_, (text, answer)) in enumerate(_rows(file, columns)):
            extra = inputs[row] if inputs else None
            prompts.append(f"{text}\n\n{extra}" if extra else text)
            responses.append(answer)
    return InstructionDataset(tuple(prompts), tuple(responses), split_name(path, split))


def hugging_face_preferences(
    path: str | os.PathLike[str],
    *,
    split: str = "train",
    prompt_column: str | None = None,
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
) -> PreferenceDataset:
    """One split of a preference set in Hugging Face's parquet layout.

    Args:
      path, split: As in `hugging_face_instructions`.
      prompt_column: Column of prompts. By default the only column called prompt, instruction,
        question or query; without one, what both responses begin with is the prompt: whole
        messages of conversations, or the characters of strings up to a space.
      chosen_column, rejected_column: Columns of the responses, strings or conversations. A
        conversation that repeats the prompt, as many sets have it, is taken from where it goes on.

    Returns:
      The pairs in the order of the files.

    Raises:
      DataError: As `hugging_face_instructions`, or both responses of a pair are the same.
      ImportError: A package of the `experiments` extra is missing.
    """
    found: list[tuple[Text, Text, Text]] = []
    for file in split_files(path, split):
        schema = read_schema(file)
        given = prompt_column is not None or any(name in schema.names for name in _PROMPT_NAMES)
        columns = [
            find_column(file, schema, "chosen_column", chosen_column, "", ()),
            find_column(file, schema, "rejected_column", rejected_column, "", ()),
        ]
        if given:
            columns.append(
                find_column(file, schema, "prompt_column", prompt_column, "", _PROMPT_NAMES)
            )
        for source, (chosen, rejected, *prompt) in _rows(file, columns):
            if isinstance(chosen, str) != isinstance(rejected, str):
                raise DataError(f"{source}: one response is a string, the other a conversation")
            if chosen == rejected:
                raise DataError(f"{source}: both responses are the same")
            try:
                found.append(_pair(chosen, rejected, *prompt))
            except DataError as error:
                raise DataError(f"{source}: {error}") from error
    prompts, all_chosen, all_rejected = zip(*found, strict=True)
    return PreferenceDataset(prompts, all_chosen, all_rejected, split_name(path, split))


def _pair(chosen: Any, rejected: Any, prompt: Text | None = None) -> tuple[Text, Text, Text]:
    """The prompt and what each response adds to it."""
    if isinstance(chosen, str):
        if prompt is not None:
            return prompt, chosen, rejected
        common = chosen[: _shared(chosen, rejected)]
        # Not within a word, so that both responses begin where a token may begin.
        common = common[: common.rfind(" ") + 1].rstrip(" ")
        return common, chosen[len(common) :], rejected[len(common) :]
    number = min(_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if isinstance(prompt, str) and number == 0:
        return [{"role": "user", "content": prompt}], chosen, rejected
    if isinstance(prompt, list) and number == 0:
        return prompt, chosen, rejected
    # What both responses begin with must hold the prompt, or the prompt would be lost.
    shared = chosen[:number]
    if isinstance(prompt, str):
        repeated = prompt in [message["content"] for message in shared]
    else:
        repeated = prompt is None or shared[: len(prompt)] == prompt
    if not repeated:
        must = "begin with the prompt or with different messages"
        raise DataError(f"the responses must {must}, got the prompt {prompt!r:.200}")
    return chosen[:number], chosen[number:], rejected[number:]


def _shared(first: Sequence[object], second: Sequence[object]) -> int:
    """How many elements two sequences begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def _rows(file: Path, columns: list[str]) -> list[tuple[str, tuple[Any, ...]]]:
    """Where every row is, for errors, and its texts."""
    table = read_table(file, columns)
    values = [table.column(name).to_pylist() for name in columns]
    return [
        (
            f"{file}, row {row}",
            tuple(
                _text(f"{file}, row {row}, column {name!r}", value)
                for name, value in zip(columns, given, strict=True)
            ),
        )
        for row, given in enumerate(zip(*values, strict=True))
    ]


def _text(source: str, value: Any) -> Text:
    """A string, or a conversation with the keys role and content."""
    if value is None or isinstance(value, str):
        return not_empty(source, value)
    if not isinstance(value, list) or not value:
        raise DataError(f"{source}: must be a string or a list of messages, got {value!r:.100}")
    messages = []
    for number, message in enumerate(value):
        given = message if isinstance(message, dict) else {}
        role = given.get("role") or given.get("from")
        content = given.get("content") or given.get("value")
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"{source}, message {number}: must have a role and a content, got {message!r:.100}"
            )
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return messages
