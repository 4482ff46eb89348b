"""Numbers are read out of answers, and the levels that they get."""

from fractions import Fraction

import pytest

from trustjax.envs.knights_text import Score
from trustjax.envs.numbers import read_number, score_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", 18),
        ("He has 18 eggs.", 18),
        ("16 - 3 - 4 = <<16-3-4=9>>9 eggs a day. #### 18", 18),
        ("#### 7 #### 1,234,567.5.", "1234567.5"),
        ("$-3.00", -3),
        ("5-3", 3),  # a minus behind a number is no sign
        ("1,23", 23),  # no group of three digits
        (r"so \boxed{42}, not 43", 42),
        (r"\boxed{1} and \boxed{2}", 2),
        ("twelve", None),
        ("", None),
        ("5 #### none", None),
        ("x2 is 3", 3),
        ("half is .5", "0.5"),
        ("9" * 101, None),
        ("1/0", 0),
        ("\u0664", 4),  # a digit of another script, which Python reads as well
    ],
)
def test_read_number(text: str, number: object) -> None:
    expected = None if number is None else Fraction(str(number))
    assert read_number(text) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>2 + 2</think><answer>4</answer>", Score(1, 3.0)),
        ("<think>2 + 2</think><answer>It is 4.0</answer>", Score(1, 3.0)),
        ("<think>4</think><answer>5</answer>", Score(2, -0.5)),
        ("<think>4</think><answer>four</answer>", Score(3, -1.0)),
        ("<think>4</think><answer> </answer>", Score(4, -1.0)),
        ("<think>4</think><answer>4</answer><answer>4</answer>", Score(4, -3.0)),
        ("4", Score(4, -3.0)),
    ],
)
def test_levels_with_tags(response: str, expected: Score) -> None:
    assert score_number(response, Fraction(4)) == expected


def test_levels_without_tags() -> None:
    found = [score_number(text, Fraction(4), tags=False).level for text in ("so 4", "5", "x", "")]
    assert found == [1, 2, 3, 4]


def test_long_texts_are_read_in_linear_time() -> None:
    for piece in ("1,", "-", "1.", "####", "\\boxed{", "9"):
        score_number(piece * 100_000, Fraction(4), tags=False)
