"""Errors that name the argument they are about."""

import pickle

import pytest

from trustjax._checks import FieldError, InputError, check_choice, check_count, check_number


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FieldError("rho", "be >= 0", -1.0), "rho must be >= 0, got -1.0"),
        (FieldError("a.b", "be one", 2, advice="give 1"), "a.b must be one, got 2; give 1"),
    ],
)
def test_text_and_field(error: FieldError, text: str) -> None:
    assert str(error) == text
    assert isinstance(error, ValueError)
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.field, copied.got) == (text, error.field, error.got)


def test_without_a_field() -> None:
    assert InputError("file: no rows").field is None
    copied = pickle.loads(pickle.dumps(InputError("env must be one", "env")))
    assert (str(copied), copied.field) == ("env must be one", "env")


def test_checks_name_the_argument() -> None:
    with pytest.raises(FieldError, match=r"^rho must be < 1, got 1\.0") as error:
        check_number("rho", 1.0, below=1)
    assert error.value.field == "rho"
    with pytest.raises(FieldError, match=r"^n must be an int, got 2\.0"):
        check_count("n", 2.0)
    with pytest.raises(FieldError, match=r"^mode must be one of 'a', 'b', got 'c'"):
        check_choice("mode", "c", ("a", "b"))
