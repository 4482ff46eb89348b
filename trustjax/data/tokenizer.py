"""Tokenizers: of a Hugging Face folder, and two that need no files: bytes and words."""

import collections
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trustjax._checks import FieldError, check_choice, check_count
from trustjax._files import extra, local_folder, one_line, read_json
from trustjax.data.decoding import DataError

_CONFIG = "tokenizer_config.json"
_TOKENS = "special_tokens_map.json"
_FILES = [
    "tokenizer.json", _CONFIG, _TOKENS, "chat_template.jinja", "generation_config.json",
    "config.json",
]  # fmt: skip
_WORD = r"\w+|[^\w\s]"


class TokenBatch(NamedTuple):
    """Texts as rows of equal length.

    Attributes:
      tokens: Tokens, int32 [texts, length].
      segments: 1 at tokens, 0 at padding, int32 [texts, length].
    """

    tokens: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Tokenizer:
    """Turns text into tokens and back.

    Attributes:
      to_tokens: Function of a text that returns its tokens, without those that frame it.
      to_text: Function of tokens that returns their text.
      vocab_size: Number of tokens.
      prefix: Tokens before each text, such as BERT's [CLS].
      suffix: Tokens behind each text, such as BERT's [SEP].
      pad_token: Token of padding.
      stop_tokens: Tokens at which a generated text ends.
      special_tokens: Tokens that stand for no text, which `decode` leaves out.
      chat_template: Template in Jinja that turns messages into a text; None if there is none.
      variables: Further names that the template uses, such as bos_token.
    """

    to_tokens: Callable[[str], list[int]]
    to_text: Callable[[list[int]], str]
    vocab_size: int
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    pad_token: int = 0
    stop_tokens: tuple[int, ...] = ()
    special_tokens: frozenset[int] = frozenset()
    chat_template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text, between `prefix` and `suffix` if `special`."""
        if not isinstance(text, str):
            raise FieldError("text", "be a str", type(text).__name__)
        tokens = self.to_tokens(text)
        return [*self.prefix, *tokens, *self.suffix] if special else tokens

    def decode(
        self, tokens: Sequence[int] | npt.NDArray[Any], *, special: bool = False, stop: bool = True
    ) -> str:
        """The text of tokens [time].

        Args:
          tokens: Integers in [0, vocab_size).
          special: Whether special tokens are written out.
          stop: Whether the text ends before the first stop token.
        """
        ids = [int(token) for token in tokens]
        if wrong := [token for token in ids if not 0 <= token < self.vocab_size]:
            raise FieldError("tokens", f"be in [0, {self.vocab_size})", wrong[0])
        if stop:
            end = next((i for i, token in enumerate(ids) if token in self.stop_tokens), len(ids))
            ids = ids[:end]
        if not special:
            ids = [token for token in ids if token not in self.special_tokens]
        return self.to_text(ids)

    def batch(
        self,
        texts: Sequence[str],
        *,
        length: int | None = None,
        padding: str = "right",
        truncation: str | None = None,
        special: bool = True,
    ) -> TokenBatch:
        """Texts as rows of tokens.

        Args:
          texts: At least one text.
          length: Length of the rows; None for that of the longest text.
          padding: Side on which short texts are padded, "left" or "right".
          truncation: Side on which long texts are cut, "left" or "right"; `prefix` and `suffix`
            stay. None for an error where a text is too long.
          special: Whether `prefix` and `suffix` are added.

        Raises ValueError for no texts, a text that is too long, or an unknown side.
        """
        check_choice("padding", padding, ("left", "right"))
        if truncation is not None:
            check_choice("truncation", truncation, ("left", "right"))
        if isinstance(texts, str) or len(texts) == 0:
            raise FieldError("texts", "be a sequence of at least one text", repr(texts)[:40])
        before, behind = (self.prefix, self.suffix) if special else ((), ())
        check_count("length", length, at_least=len(before) + len(behind) + 1)
        rows = [self.encode(text, special=False) for text in texts]
        if length is not None:
            room = length - len(before) - len(behind)
            longest = max(map(len, rows))
            if longest > room and truncation is None:
                got = longest + len(before) + len(behind)
                advice = 'truncation="right" or "left" cuts them'
                raise FieldError(
                    "texts", f"have at most length = {length} tokens", got, advice=advice
                )
            rows = [row[:room] if truncation == "right" else row[-room:] for row in rows]
        return self.pad([[*before, *row, *behind] for row in rows], length=length, padding=padding)

    def pad(
        self, rows: Sequence[Sequence[int]], *, length: int | None = None, padding: str = "right"
    ) -> TokenBatch:
        """Rows of tokens as one array.

        Args:
          rows: At least one row of tokens.
          length: Length that no row exceeds; None for that of the longest row.
          padding: Side on which short rows are padded, "left" or "right".

        Raises ValueError for no rows, a row that is too long, or an unknown side.
        """
        check_choice("padding", padding, ("left", "right"))
        if len(rows) == 0:
            raise FieldError("rows", "be a sequence of at least one row", rows)
        longest = max(map(len, rows))
        width = longest if length is None else length
        if longest > width:
            raise FieldError("rows", f"have at most length = {length} tokens", longest)
        tokens = np.full((len(rows), width), self.pad_token, np.int32)
        segments = np.zeros_like(tokens)
        for index, row in enumerate(rows):
            where = slice(width - len(row), width) if padding == "left" else slice(len(row))
            tokens[index, where], segments[index, where] = row, 1
        return TokenBatch(tokens, segments)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation, to be encoded with `special=False`.

        The template runs in Jinja's sandbox: it reaches no files, no modules and no attributes that
        begin with an underscore.

        Args:
          messages: Messages {"role": ..., "content": ...}.
          add_generation_prompt: Whether the text ends where the assistant's answer begins.
          **variables: Further names that the template uses.

        Raises:
          ValueError: There is no template, or it fails on these messages.
          ImportError: jinja2 is missing.
        """
        if self.chat_template is None:
            raise FieldError("chat_template", "be given to a tokenizer of conversations", None)
        with extra("text"):
            from jinja2 import TemplateError
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> str:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = lambda x, **how: json.dumps(x, ensure_ascii=False, **how)
        environment.globals["raise_exception"] = refuse
        names = {**self.variables, **variables, "add_generation_prompt": add_generation_prompt}
        try:
            template = environment.from_string(self.chat_template)
            return template.render(messages=list(messages), **names)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise DataError(f"messages do not fit the chat template: {one_line(error)}") from error


def byte_tokenizer() -> Tokenizer:
    """Tokenizer whose tokens are the 256 bytes of UTF-8, and 256 for the end of a text.

    >>> tokenizer = byte_tokenizer()
    >>> tokenizer.encode("hé")
    [104, 195, 169, 256]
    """
    return Tokenizer(
        to_tokens=lambda text: list(text.encode("utf-8", "replace")),
        to_text=lambda tokens: bytes(t for t in tokens if t < 256).decode("utf-8", "replace"),
        vocab_size=257,
        suffix=(256,),
        pad_token=256,
        stop_tokens=(256,),
        special_tokens=frozenset({256}),
    )


def word_tokenizer(
    texts: Iterable[str], vocab_size: int = 10_000, *, pattern: str = _WORD
) -> Tokenizer:
    """Tokenizer of the most frequent words and punctuation marks of texts.

    Token 0 is the end of a text, 1 a word that is not known; the others are sorted by frequency,
    then by the alphabet. Text comes back with single spaces between words.

    Args:
      texts: The texts to count in.
      vocab_size: Number of tokens at most, at least 3.
      pattern: Regular expression of a word, by default a run of letters and digits or a mark. What
        it does not match is left out.

    >>> tokenizer = word_tokenizer(["the cat and the dog"], vocab_size=4)
    >>> tokenizer.encode("the bird and the cat"), tokenizer.decode([2, 1, 3])
    ([2, 1, 3, 2, 1, 0], 'the <unk> and')
    """
    check_count("vocab_size", vocab_size, at_least=3)
    find = re.compile(pattern).findall
    counts = collections.Counter(word for text in texts for word in find(text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - 2]
    words = ["</s>", "<unk>", *ranked]
    index = {word: number for number, word in enumerate(words) if number > 1}
    return Tokenizer(
        to_tokens=lambda text: [index.get(word, 1) for word in find(text)],
        to_text=lambda tokens: " ".join(words[token] for token in tokens),
        vocab_size=len(words),
        suffix=(0,),
        stop_tokens=(0,),
        special_tokens=frozenset({0}),
    )


def pretrained_tokenizer(
    pretrained: str | os.PathLike[str], *, stop_tokens: Sequence[int | str] | None = None
) -> Tokenizer:
    """The tokenizer in a Hugging Face folder: tokenizer.json, with what stands in files beside it.

    Args:
      pretrained: A folder, or a hub id `owner/name`, which is downloaded once.
      stop_tokens: Tokens at which a generated text ends, as numbers or texts; None for eos_token of
        tokenizer_config.json, or else of special_tokens_map.json, and eos_token_id of
        generation_config.json, or else of config.json.

    Raises:
      DataError: There is no such folder or hub id, or a file in it is missing or damaged.
      ValueError: A stop token is unknown.
      ImportError: A package of the `text` extra is missing.
    """
    folder = local_folder("pretrained", pretrained, DataError, "model", allow_patterns=_FILES)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{folder} must hold tokenizer.json")
    with extra("text"):
        import tokenizers
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path} must be a tokenizer: {one_line(error)}") from error
    library.no_truncation()
    library.no_padding()
    config, older, model = (_optional(folder / name) for name in (_CONFIG, _TOKENS, "config.json"))
    named = {
        name: text
        for name in ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token")
        if (text := _content(config.get(name) or older.get(name))) is not None
    }
    ids = {name: library.token_to_id(text) for name, text in named.items()}
    stops = _stops(folder, ids, model) if stop_tokens is None else _numbers(library, stop_tokens)
    prefix, suffix = _frame(library)
    pads = (ids.get("pad_token"), model.get("pad_token_id"), *stops, ids.get("eos_token"), 0)
    return Tokenizer(
        to_tokens=lambda text: list(library.encode(text, add_special_tokens=False).ids),
        to_text=lambda tokens: str(library.decode(tokens, skip_special_tokens=False)),
        vocab_size=library.get_vocab_size(),
        prefix=prefix,
        suffix=suffix,
        pad_token=next(token for token in pads if isinstance(token, int)),
        stop_tokens=stops,
        special_tokens=frozenset(
            number for number, token in library.get_added_tokens_decoder().items() if token.special
        ),
        chat_template=_template(folder, config),
        variables=named,
    )


def _content(token: Any) -> str | None:
    """The text of a token in tokenizer_config.json, a string or an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _optional(path: Path) -> dict[str, Any]:
    """What a file of JSON holds; nothing if there is none. Raises DataError if it is damaged."""
    return read_json(path, DataError) if path.exists() else {}


def _stops(
    folder: Path, ids: Mapping[str, int | None], model: Mapping[str, Any]
) -> tuple[int, ...]:
    found = _optional(folder / "generation_config.json").get("eos_token_id")
    found = model.get("eos_token_id") if found is None else found
    found = found if isinstance(found, list) else [found]
    tokens = [ids.get("eos_token"), *found]
    return tuple(dict.fromkeys(token for token in tokens if isinstance(token, int)))


def _numbers(library: Any, tokens: Sequence[int | str]) -> tuple[int, ...]:
    numbers = []
    for token in [tokens] if isinstance(tokens, str) else tokens:
        number = library.token_to_id(token) if isinstance(token, str) else token
        if number is None or library.id_to_token(number) is None:
            raise FieldError("stop_tokens", "be tokens of the vocabulary", repr(token))
        numbers.append(int(number))
    return tuple(numbers)


def _frame(library: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that the library puts before and behind a text."""
    framed = library.encode("a")
    special = framed.special_tokens_mask
    inner = [index for index, mask in enumerate(special) if not mask]
    if not inner:
        return tuple(framed.ids), ()
    return tuple(framed.ids[: inner[0]]), tuple(framed.ids[inner[-1] + 1 :])


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: in a file of its own, in the config, or the default one of several."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"{path} must be text: {one_line(error)}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry for entry in template if isinstance(entry, dict)}
        template = named.get("default", {}).get("template")
    if template is not None and not isinstance(template, str):
        raise DataError(f"{folder / _CONFIG}: chat_template must be a text, got {template!r:.60}")
    return template
