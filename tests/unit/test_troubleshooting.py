"""The troubleshooting page lists every message that the code can give."""

import pytest

from tests.messages import BEGIN, END, PAGE, listing, messages


def test_every_message_is_on_the_page():
    page = PAGE.read_text(encoding="utf-8")
    missing = [message.line for message in messages() if message.line not in page]
    assert not missing, "run python -m tests.messages"


def test_the_page_lists_no_message_that_is_gone():
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    listed, _, _ = rest.partition(END)
    assert listed.strip() == listing().strip(), "run python -m tests.messages"


@pytest.mark.parametrize(
    ("code", "words"),
    [(2, "unknown flag"), (3, "does not exist"), (4, "is a pickle, which can run any code")],
)
def test_well_known_messages_are_found(code, words):
    assert any(message.code == code and words in message.problem for message in messages())
