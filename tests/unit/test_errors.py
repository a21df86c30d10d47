"""Errors carry their exit code, and read as a problem and its remedy."""

import pytest

from hidream.errors import HidreamError, InputError, MemoryExceeded, ModelError, UsageError


@pytest.mark.parametrize(
    ("kind", "code"), [(UsageError, 2), (InputError, 3), (ModelError, 4), (MemoryExceeded, 5)]
)
def test_exit_codes(kind, code):
    error = kind("This is wrong.", "Do that.")
    assert isinstance(error, HidreamError)
    assert error.exit_code == code
    assert str(error) == "This is wrong. Do that."
    assert str(kind("This is wrong.")) == "This is wrong."


def test_a_users_mistake_is_a_value_error():
    assert issubclass(UsageError, ValueError)
    assert issubclass(InputError, ValueError)
