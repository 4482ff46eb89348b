"""Tokenizers: bytes, words, and those of Hugging Face folders that the tests write."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from trustjax.data import (
    DataError,
    Tokenizer,
    byte_tokenizer,
    pretrained_tokenizer,
    word_tokenizer,
)

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "cat", "dog", "sat", "ran"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{{ sep_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As of BERT: words between [CLS] and [SEP], with settings of its own for length."""
    library = tokenizers.Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.WordPiece()
    library.add_special_tokens(WORDS[:3])
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    library.enable_truncation(4)  # ours are arguments
    library.enable_padding(length=9)
    library.save(str(tmp_path / "tokenizer.json"))
    config = {"pad_token": "[PAD]", "sep_token": {"content": "[SEP]"}, "eos_token": "[SEP]",
              "chat_template": TEMPLATE}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_folder(folder: Path) -> None:
    tokenizer = pretrained_tokenizer(folder)
    assert tokenizer.encode("the cat sat") == [1, 4, 5, 7, 2]
    assert tokenizer.encode("the cat sat", special=False) == [4, 5, 7]
    assert tokenizer.encode("a long text of more than four words", special=False) == [3] * 8
    assert (tokenizer.vocab_size, tokenizer.pad_token, tokenizer.stop_tokens) == (9, 0, (2,))
    assert tokenizer.decode([1, 4, 5, 2, 7]) == "the cat"
    assert tokenizer.decode([1, 4, 5, 2, 7], stop=False) == "the cat sat"
    assert tokenizer.decode([1, 4, 2], special=True, stop=False) == "[CLS] the [SEP]"


def test_padding_and_truncation(folder: Path) -> None:
    tokenizer = pretrained_tokenizer(folder)
    texts = ["the cat sat", "dog"]
    right = tokenizer.batch(texts)
    np.testing.assert_array_equal(right.tokens, [[1, 4, 5, 7, 2], [1, 6, 2, 0, 0]])
    np.testing.assert_array_equal(right.segments, [[1] * 5, [1, 1, 1, 0, 0]])
    assert right.tokens.dtype == right.segments.dtype == np.int32
    left = tokenizer.batch(texts, padding="left", length=6, special=False)
    np.testing.assert_array_equal(left.tokens, [[0, 0, 0, 4, 5, 7], [0] * 5 + [6]])
    np.testing.assert_array_equal(left.segments, [[0, 0, 0, 1, 1, 1], [0] * 5 + [1]])
    # What frames the text stays.
    for side, kept in (("right", [4, 5]), ("left", [5, 7])):
        cut = tokenizer.batch(texts, length=4, truncation=side)
        np.testing.assert_array_equal(cut.tokens, [[1, *kept, 2], [1, 6, 2, 0]])


def test_rows_of_tokens_are_padded_and_checked(folder: Path) -> None:
    tokenizer = pretrained_tokenizer(folder)
    found = tokenizer.pad([[5], [6, 7]], length=3, padding="left")
    np.testing.assert_array_equal(found.tokens, [[0, 0, 5], [0, 6, 7]])
    np.testing.assert_array_equal(found.segments, [[0, 0, 1], [0, 1, 1]])
    with pytest.raises(ValueError, match="rows must be a sequence of at least one row"):
        tokenizer.pad([])
    with pytest.raises(ValueError, match="rows must have at most length = 1 tokens, got 2"):
        tokenizer.pad([[6, 7]], length=1)
    with pytest.raises(ValueError, match="padding must be one of 'left', 'right'"):
        tokenizer.pad([[5]], padding="up")


def test_empty_texts(folder: Path) -> None:
    """Rows of padding alone, or of what frames the text."""
    tokenizer = pretrained_tokenizer(folder)
    np.testing.assert_array_equal(tokenizer.batch([""]).tokens, [[1, 2]])
    batch = tokenizer.batch(["", "cat"], special=False)
    np.testing.assert_array_equal(batch.segments, [[0], [1]])
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": "both"}, "padding must be one of 'left', 'right', got 'both'"),
        ({"truncation": "middle"}, "truncation must be one of 'left', 'right', got 'middle'"),
        ({"length": 4}, 'texts must have at most length = 4 tokens, got 5; truncation="right"'),
        ({"length": 2}, "length must be >= 3, got 2"),
        ({"length": 4.0}, "length must be an int"),
        ({"texts": []}, "texts must be a sequence of at least one text"),
        ({"texts": "the cat"}, "texts must be a sequence of at least one text, got 'the cat'"),
        ({"texts": [b"the"]}, "text must be a str, got bytes"),
    ],
)
def test_wrong_batches(arguments: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        pretrained_tokenizer(folder).batch(**{"texts": ["the cat sat"], **arguments})


def test_stop_tokens(folder: Path) -> None:
    assert pretrained_tokenizer(folder, stop_tokens=["cat", 6]).stop_tokens == (5, 6)
    assert pretrained_tokenizer(folder, stop_tokens=[]).decode([4, 2, 5]) == "the cat"
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 8]}')
    assert pretrained_tokenizer(folder).stop_tokens == (2, 8)
    assert pretrained_tokenizer(folder).decode([4, 8, 5]) == "the"
    for wrong in ("bird", 99):
        with pytest.raises(ValueError, match="stop_tokens must be tokens of the vocabulary, got"):
            pretrained_tokenizer(folder, stop_tokens=[wrong])


def test_chat(folder: Path) -> None:
    tokenizer = pretrained_tokenizer(folder)
    messages = [{"role": "user", "content": "sat?"}]
    assert tokenizer.chat(messages) == "<user>sat?[SEP]\n<assistant>"
    assert tokenizer.chat(messages, add_generation_prompt=False) == "<user>sat?[SEP]\n"
    (folder / "chat_template.jinja").write_text("{{ messages | length }} of {{ topic }}")
    assert pretrained_tokenizer(folder).chat(messages, topic="cats") == "1 of cats"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE, "no tools"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__' .* is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' .* is unsafe"),
        ("{{ range(10000000) }}", "Range too big"),
        ("{% include 'secret' %}", "no loader"),
        ("{% for m in %}", "Expected an expression"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages + 1 }}", "can only concatenate list"),
    ],
)
def test_templates_are_sandboxed_and_may_fail(template: str, message: str) -> None:
    tokenizer = Tokenizer(list, str, 1, chat_template=template)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"messages do not fit the chat template: .*{message}") as e:
        tokenizer.chat([{"role": "tool", "content": "x"}])
    assert "\n" not in str(e.value)


def test_no_template() -> None:
    with pytest.raises(ValueError, match="chat_template must be given to a tokenizer of conver"):
        byte_tokenizer().chat([])


@pytest.mark.parametrize("text", ["", "plain", "naïve, 日本語 🙂", "\0\n\t"])
def test_bytes(text: str) -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode(text)
    assert tokens[-1] == 256
    assert tokenizer.decode(tokens) == text
    assert max(tokens) < tokenizer.vocab_size == 257


def test_bytes_that_are_no_text() -> None:
    assert byte_tokenizer().decode([104, 255, 105]) == "h\ufffdi"
    assert byte_tokenizer().encode("\ud800", special=False) == [63]
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 257\), got 257"):
        byte_tokenizer().decode([257])


def test_words() -> None:
    tokenizer = word_tokenizer(["b a.", "b c!"], vocab_size=5)
    # "b" is there twice; the others follow by the alphabet, in which marks come first.
    assert tokenizer.encode("b ! . a z") == [2, 3, 4, 1, 1, 0]
    assert tokenizer.vocab_size == 5
    with pytest.raises(ValueError, match="vocab_size must be >= 3"):
        word_tokenizer([], vocab_size=2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "must hold tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json must be a tokenizer"),
        ("tokenizer.json", "nonsense", "tokenizer.json must be a tokenizer"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json must be a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be a text, got 3"),
        ("generation_config.json", "{", "generation_config.json must be a JSON file"),
    ],
)
def test_damaged_folders(folder: Path, name: str, content: str | None, message: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        pretrained_tokenizer(folder)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["tokenizers", "jinja2"])
def test_missing_package_names_the_extra(
    package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = pretrained_tokenizer(folder)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "trustjax\[text\]"'):
        pretrained_tokenizer(folder) if package == "tokenizers" else tokenizer.chat([])


def test_special_tokens_in_older_files(folder: Path) -> None:
    """special_tokens_map.json and config.json, where newer files do not have them."""
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 8, "pad_token_id": 3}))
    tokenizer = pretrained_tokenizer(folder)
    assert (tokenizer.stop_tokens, tokenizer.pad_token) == ((8,), 3)
    content = {"eos_token": {"content": "[SEP]"}, "pad_token": "[PAD]"}
    (folder / "special_tokens_map.json").write_text(json.dumps(content))
    tokenizer = pretrained_tokenizer(folder)
    assert (tokenizer.stop_tokens, tokenizer.pad_token) == ((2, 8), 0)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    assert pretrained_tokenizer(folder).stop_tokens == (2, 7)
