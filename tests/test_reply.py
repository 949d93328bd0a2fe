"""Replies: their form, their names, and that each is used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastsmtp import reply
from fastsmtp.reply import R221_BYE, R250_OK, R354_GO_AHEAD, SILENT_CLOSE, Reply, Then, joined, named, queued, reason

CONSTANTS = {name: value for name, value in vars(reply).items() if isinstance(value, Reply) and name != "SILENT_CLOSE"}
SOURCE = Path(reply.__file__).parent


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_called_what_it_says(name: str) -> None:
    value = CONSTANTS[name]
    assert re.fullmatch(rf"R{value.code}_[A-Z0-9_]+", name)
    if value.enhanced:
        assert re.fullmatch(rf"{value.code // 100}\.\d{{1,3}}\.\d{{1,3}}", value.enhanced)
    else:
        assert value.code == 354
    assert value.plain == (value.code < 400 and value.then is Then.CONTINUE)
    assert (value.then is Then.DATA) == (value.code == 354)
    if value.code == 421:
        assert value.then is Then.CLOSE  # RFC 5321 3.8


@pytest.mark.parametrize("value", CONSTANTS.values(), ids=CONSTANTS)
def test_what_goes_over_the_wire(value: Reply) -> None:
    lines = value.wire.decode("ascii").split("\r\n")
    assert lines.pop() == ""
    for number, line in enumerate(lines, 1):
        assert len(line) + 2 <= 512  # RFC 5321 4.5.3.1.5
        status = f"{value.enhanced} " if value.enhanced else ""
        assert line.startswith(f"{value.code}{' ' if number == len(lines) else '-'}{status}")
        assert line.isprintable()


def test_every_reply_says_something_of_its_own() -> None:
    assert len({(value.code, value.text) for value in CONSTANTS.values()}) == len(CONSTANTS)


def unused(names: list[str], sources: list[str]) -> list[str]:
    """Names that are used nowhere but where they are made."""
    return [name for name in names if not any(re.search(rf"\b{name}\b(?! = Reply\()", source) for source in sources)]


def test_every_reply_is_used() -> None:
    sources = [path.read_text() for path in SOURCE.rglob("*.py")]
    assert unused(list(CONSTANTS), sources) == []


def test_a_reply_that_is_not_used_is_found() -> None:
    assert unused(["R250_A", "R250_B"], ["R250_A = Reply(250)\nR250_B = Reply(250)", "return R250_B"]) == ["R250_A"]


@pytest.mark.parametrize("text", ["a\r\nb", "a\rb", "ü", "\0", "\x7f", "x" * 503, "a\n" + "x" * 503])
def test_a_text_that_does_not_fit_on_the_wire(text: str) -> None:
    with pytest.raises(ValueError, match=r"printable|512"):
        Reply(250, "2.0.0", text)


def test_a_line_of_512_octets() -> None:
    assert len(Reply(250, "", "x" * 506).wire) == 512
    with pytest.raises(ValueError, match="513"):
        Reply(250, "", "x" * 507)


def test_several_lines() -> None:
    assert Reply(214, "2.0.0", "one\ntwo").wire == b"214-2.0.0 one\r\n214 2.0.0 two\r\n"
    assert Reply(354, "", "go").wire == b"354 go\r\n"


def test_made_as_they_would_be_rendered() -> None:
    made = queued("0" * 20)
    rendered = Reply(250, "2.0.0", f"Queued as {'0' * 20}")
    names = ("code", "enhanced", "plain", "text", "then", "wire")
    assert [getattr(made, name) for name in names] == [getattr(rendered, name) for name in names]


def test_joined() -> None:
    both = joined([R250_OK, reply.R554_LOOP])
    assert both.wire == R250_OK.wire + reply.R554_LOOP.wire
    assert (both.code, both.then, both.plain) == (554, Then.CONTINUE, False)
    assert reason(both) == "loop"


def test_named() -> None:
    assert named(R221_BYE, "mx.here.test").wire == b"221 2.0.0 mx.here.test Bye\r\n"
    assert named(R221_BYE, "mx.here.test").then is Then.CLOSE


def test_silence_has_no_octets() -> None:
    assert SILENT_CLOSE.wire == b""
    assert SILENT_CLOSE.then is Then.CLOSE


def test_reasons() -> None:
    assert reason(reply.R550_UNKNOWN_MAILBOX) == "unknown-mailbox"
    assert reason(Reply(550, "5.7.1", "Something of a policy")) == "policy"
    assert reason(R354_GO_AHEAD) == "go-ahead"


def test_repr() -> None:
    assert repr(R250_OK) == "Reply(b'250 2.0.0 OK\\r\\n')"
