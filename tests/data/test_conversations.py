from pathlib import Path

import pytest
from test_text import write

from trustjax.data import DataError, hugging_face_instructions, hugging_face_preferences

USER = {"role": "user", "content": "Why?"}
SYSTEM = {"role": "system", "content": "Be brief."}
YES = {"role": "assistant", "content": "Because."}
NO = {"role": "assistant", "content": "Never mind."}


def test_instructions_of_messages(tmp_path: Path) -> None:
    write(tmp_path, {"messages": [[USER, YES], [USER, NO, USER, YES]]})
    found = hugging_face_instructions(tmp_path)
    assert found.prompts == ([USER], [USER, NO, USER])
    assert found.responses == ([YES], [YES])


def test_names_of_sharegpt(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    write(tmp_path, {"conversations": [turns]})
    found = hugging_face_instructions(tmp_path)
    assert (found.prompts, found.responses) == (([USER],), ([YES],))


def test_instructions_in_columns(tmp_path: Path) -> None:
    columns = {"instruction": ["Add.", "Wait."], "input": ["1 + 1", ""], "output": ["2", "..."]}
    write(tmp_path, columns)
    found = hugging_face_instructions(tmp_path)
    assert found.prompts == ("Add.\n\n1 + 1", "Wait.")
    assert found.responses == ("2", "...")
    other = hugging_face_instructions(tmp_path, prompt_column="output", response_column="output")
    assert other.prompts == ("2", "...")


@pytest.mark.parametrize("repeated", [True, False])
def test_preferences_of_conversations(tmp_path: Path, repeated: bool) -> None:
    start = [USER] if repeated else []
    columns = {"prompt": ["Why?"], "chosen": [[*start, YES]], "rejected": [[*start, NO]]}
    write(tmp_path, columns)
    found = hugging_face_preferences(tmp_path)
    assert (found.prompts, found.chosen, found.rejected) == (([USER],), ([YES],), ([NO],))


def test_preferences_of_strings(tmp_path: Path) -> None:
    columns = {
        "chosen": ["Human: Why? Assistant: Then"],
        "rejected": ["Human: Why? Assistant: The"],
    }
    write(tmp_path, columns)
    found = hugging_face_preferences(tmp_path)
    assert found.prompts == ("Human: Why? Assistant:",)
    assert (found.chosen, found.rejected) == ((" Then",), (" The",))
    write(tmp_path, {"question": ["Why?"], "chosen": ["So."], "rejected": ["No."]})
    found = hugging_face_preferences(tmp_path)
    assert (found.prompts, found.chosen, found.rejected) == (("Why?",), ("So.",), ("No.",))


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"chosen": ["a"]}, "rejected_column='rejected': no such column"),
        ({"chosen": ["a"], "rejected": ["a"]}, "row 0: both responses are the same"),
        ({"chosen": ["a"], "rejected": [""]}, "row 0, column 'rejected': an empty document"),
        ({"chosen": [["a"]], "rejected": [["b"]]}, "message 0: must have a role and a content"),
        ({"chosen": [[YES]], "rejected": ["b"]}, "one response is a string"),
        ({"chosen": [1], "rejected": [2]}, "must be a string or a list of messages, got 1"),
        (
            {"prompt": ["Other?"], "chosen": [[USER, YES]], "rejected": [[USER, NO]]},
            "row 0: the responses must begin with the prompt or with different messages, got the",
        ),
        (
            {"prompt": [[SYSTEM, USER]], "chosen": [[USER, YES]], "rejected": [[USER, NO]]},
            "row 0: the responses must begin with the prompt or with different messages, got the",
        ),
    ],
)
def test_bad_preferences(tmp_path: Path, columns: dict, text: str) -> None:
    write(tmp_path, columns)
    with pytest.raises(DataError, match=text):
        hugging_face_preferences(tmp_path)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"messages": [[YES, USER]]}, "row 0: must end with a message of the assistant"),
        ({"prompt": ["a"]}, "response_column=None: no such column"),
        ({"prompt": ["a"], "output": [None]}, "row 0, column 'output': null"),
    ],
)
def test_bad_instructions(tmp_path: Path, columns: dict, text: str) -> None:
    write(tmp_path, columns)
    with pytest.raises(DataError, match=text):
        hugging_face_instructions(tmp_path)
