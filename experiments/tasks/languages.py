"""Labelled texts in several languages: treebanks with parts of speech, and XNLI."""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trustjax.data import DataError
from trustjax.data._parquet import read_table, split_files


class Text(NamedTuple):
    """A text in parts, with the class of each, an index of `Languages.classes`; -1 for no class.

    Attributes:
      parts: Words of a sentence, or the sentences of a pair.
      labels: As many classes.
      joined: Whether each word follows the one before it without a space; () if none does.
    """

    parts: Sequence[str]
    labels: Sequence[int]
    joined: Sequence[bool] = ()


class Languages(NamedTuple):
    """Texts to train on in one language, and test texts in that one and in others.

    Attributes:
      train: Texts to train on.
      validation: Texts on which the trials of a search are judged.
      tests: Test texts by language, the trained one first; the n-th text of every language says the
        same.
      classes: Names of the classes.
      is_words: Whether the parts are words of a sentence, between which there are spaces at most.
      families: Languages by how near they are to the trained one, the nearest first; those that are
        not listed are in no family.
    """

    train: list[Text]
    validation: list[Text]
    tests: dict[str, list[Text]]
    classes: tuple[str, ...]
    is_words: bool
    families: Mapping[str, Sequence[str]] = {}


# By descent. Romance and Slavic languages are Indo-European, as English is, and so is Hindi, whose
# branch parted from English's first.
_FROM_ENGLISH = {
    "germanic": ("german", "swedish"),
    "romance": ("french", "italian", "portuguese", "spanish"),
    "slavic": ("czech", "russian"),
    "distant": ("chinese", "finnish", "hindi", "indonesian", "turkish"),
}
_TAGS = ("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN",
         "PUNCT", "SCONJ", "SYM", "VERB", "X")  # fmt: skip


def treebanks(
    path: str | None = None,
    *,
    train: str = "english_ewt-dev",
    validation: str = "english_ewt-test",
    trained: str = "english",
) -> Languages:
    """Parts of speech of Universal Dependencies: an English treebank, and PUD in many languages.

    Args:
      path: Folder with NAME.parquet of columns text, tokens and upos; None for the folder ud_pud in
        the one that the environment variable TRUSTJAX_DATA names.
      train: File to train on, without its ending.
      validation: File for a search.
      trained: Language of both, one of the files LANGUAGE_pud-test.parquet.

    Raises DataError if a file is missing or cannot be read.

    Source: Universal Dependencies, PUD: Zeman et al. 2017, CoNLL 2017 Shared Task.
    """
    folder = Path(os.environ.get("TRUSTJAX_DATA", "")) / "ud_pud" if path is None else Path(path)
    banks = {
        file.stem.partition("_pud-")[0]: file for file in sorted(folder.glob("*_pud-*.parquet"))
    }
    if trained not in banks:
        raise DataError(
            f"{folder}: no {trained}_pud-test.parquet; give the folder of the treebanks as "
            "languages.path, or set TRUSTJAX_DATA to the folder that holds ud_pud"
        )
    order = [trained, *(language for language in banks if language != trained)]
    tests = {language: _sentences(banks[language]) for language in order}
    learned, judged = (_sentences(folder / f"{name}.parquet") for name in (train, validation))
    families = {
        family: [language for language in members if language in tests]
        for family, members in (_FROM_ENGLISH if trained == "english" else {}).items()
    }
    return Languages(learned, judged, tests, _TAGS, is_words=True, families=families)


def _sentences(file: Path) -> list[Text]:
    """Sentences as words and tags; the tag of a word that the treebank does not analyse is "_"."""
    names = ["text", "tokens", "upos"]
    table = read_table(file, names)
    columns: list[list[Any]] = [table.column(name).to_pylist() for name in names]
    index = {tag: number for number, tag in enumerate(_TAGS)}
    return [
        Text(words, [index.get(tag, -1) for tag in tags], _joined(sentence, words))
        for sentence, words, tags in zip(*columns, strict=True)
    ]


def _joined(sentence: str, words: Sequence[str]) -> list[bool]:
    """Whether each word follows the one before it without a space in the sentence.

    The parts of a contraction, such as French "de le" for "du", are not in the sentence as they
    are, and count as apart.
    """
    pairs = itertools.pairwise(words)
    after = [a + b in sentence and f"{a} {b}" not in sentence for a, b in pairs]
    return [False, *after][: len(words)]


def xnli(path: str, *, trained: str = "en") -> Languages:
    """Natural-language inference, XNLI in Hugging Face's layout: a folder for each language.

    Args:
      path: Folder with LANGUAGE/SPLIT-00000-of-0000N.parquet of columns premise, hypothesis, label.
      trained: Language to train on, whose folder has the splits train and validation.

    Raises DataError if a folder or column is missing.

    Source: Conneau et al. 2018, arXiv:1809.05053.
    """
    folder = Path(path)
    names = sorted(each.name for each in folder.iterdir() if each.is_dir() and each.name[0] != ".")
    if trained not in names:
        raise DataError(f"{folder}: no folder {trained!r}; found: {', '.join(names) or 'none'}")

    def pairs(language: str, split: str) -> list[Text]:
        found = []
        for file in split_files(folder / language, split):
            table = read_table(file, ["premise", "hypothesis", "label"])
            columns = [table.column(name).to_pylist() for name in table.column_names]
            for premise, hypothesis, label in zip(*columns, strict=True):
                found.append(Text((premise, hypothesis), (label, -1)))
        return found

    order = [trained, *(name for name in names if name != trained)]
    return Languages(
        pairs(trained, "train"),
        pairs(trained, "validation"),
        {language: pairs(language, "test") for language in order},
        ("entailment", "neutral", "contradiction"),
        is_words=False,
    )
