"""Which puzzles of knights and knaves are trained on, and which are kept for the test."""

from collections.abc import Sequence

from trustjax._checks import FieldError
from trustjax.envs.knights import Puzzle, sample_puzzles

TEST_SEED, TRAIN_SEED = 1234, 4321
# There are 369 puzzles of two people, and drawing the last ones would take long.
_MOST_OF_TWO = 300


def check_people(field: str, num_people: Sequence[int]) -> None:
    """Raises FieldError unless there are numbers of people, all from 2 to 8."""
    if not num_people or not all(2 <= number <= 8 for number in num_people):
        raise FieldError(field, "be numbers from 2 to 8", list(num_people))


def train_and_test(num_people: int, train: int, test: int) -> tuple[Puzzle, Puzzle]:
    """Puzzles to train on, and others to test with; of two people there are fewer to train on.

    Args:
      num_people: Number of people, 2 to 8.
      train: Puzzles to train on; of two people at most 300 minus `test` are drawn.
      test: Puzzles to test with.
    """
    unseen = sample_puzzles(num_people, test, TEST_SEED)
    count = min(train, _MOST_OF_TWO - test) if num_people == 2 else train
    return sample_puzzles(num_people, max(1, count), TRAIN_SEED, known=unseen), unseen
