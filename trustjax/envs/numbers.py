"""Rules that score answers whose solution is a number, as those of GSM8K.

The number of an answer is the last one in it, behind "####" or within the last \\boxed{} if there
is such a mark. With tags demanded, levels and rewards are those of knights and knaves, and the
number stands between <answer> and </answer>:

    level   condition                                        reward
    1       well-formed, and the number is right               3
    2       well-formed, and the number is wrong              -0.5
    3       well-formed, but there is no number               -1
    4       empty answer between tags that are well-formed    -1
    4       not well-formed                                   -3

Without tags every text is well-formed. All rules are linear in the length of the text.

Cobbe et al., arXiv:2110.14168, from where "####" is; the levels are those of Su et al.,
arXiv:2504.04524.
"""

import re
from fractions import Fraction

from trustjax.envs.knights_text import EMPTY, MALFORMED, REWARDS, Score, answer_of

_LONGEST = 100  # digits of a number, beyond which it cannot be read
# Groups of three digits behind commas, or digits; a minus that follows a digit is an operator.
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<=\W)-?\.\d+")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def read_number(text: str) -> Fraction | None:
    r"""The number that a text ends up with; None if there is none.

    >>> read_number("3 + 4 = 7, so $1,007.50 in all.")
    Fraction(2015, 2)
    >>> read_number(r"It is \boxed{-3}, as 10 - 13 shows. #### 5"), read_number("none")
    (Fraction(5, 1), None)
    """
    _, mark, behind = text.rpartition("####")
    boxed = _BOXED.findall(text)
    source = behind if mark else boxed[-1] if boxed else text
    found = _NUMBER.findall(source.replace("$", " "))
    if not found or len(found[-1]) > _LONGEST:
        return None
    return Fraction(found[-1].replace(",", ""))


def score_number(response: str, solution: Fraction, *, tags: bool = True) -> Score:
    """Level and reward of a response, by the rules of this module.

    Args:
      response: The text of the assistant alone.
      solution: The right number.
      tags: Whether the response must have reasoning and answer in tags, as `worked_answer` has.

    >>> score_number("<think>2 + 2</think><answer>4</answer>", Fraction(4))
    Score(level=1, reward=3.0)
    >>> score_number("It is 5.", Fraction(4), tags=False)
    Score(level=2, reward=-0.5)
    """
    answer = answer_of(response) if tags else response.strip()
    if not answer:
        return Score(4, MALFORMED if answer is None else EMPTY)
    number = read_number(answer)
    if number is None:
        return Score(3, REWARDS[3])
    level = 1 if number == solution else 2
    return Score(level, REWARDS[level])
