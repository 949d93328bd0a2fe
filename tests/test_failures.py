"""The table of failures: what it says to people is what it says to the program, and nothing in it loses mail."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastsmtp.delivery import Result, Retry, Scope
from fastsmtp.delivery.failures import (
    FINDINGS,
    PATIENCE,
    TABLE,
    Answer,
    Finding,
    Meaning,
    Stage,
    classify,
    failure,
    finding,
)
from fastsmtp.delivery.replies import Reply

PAGE = Path(__file__).parents[1] / "docs" / "failures.md"
WORDS = {Retry.SAME_HOST: "same host", Retry.NEXT_HOST: "next host", Retry.LATER: "later"}


def in_words(meaning: Meaning) -> str:
    """As a cell of the page has it: "deferred: host, next host"; of what has failed no "later" is said."""
    result, scope, retry = meaning
    again = "" if result is Result.FAILED and retry is Retry.LATER else f", {WORDS[retry]}"
    return f"{result.value}: {scope.value}{again}"


def tables() -> list[list[list[str]]]:
    """The tables of the page: rows of cells, without the head's rule."""
    found: list[list[list[str]]] = [[]]
    for line in PAGE.read_text().splitlines():
        if line.startswith("|"):
            if not line.startswith("|---"):
                found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def test_the_page_has_the_table() -> None:
    head, *rows = tables()[0]
    assert head == ["stage", *(answer.value for answer in Answer), "waits for, s"]
    assert [row[0] for row in rows] == [stage.value for stage in Stage]
    for stage, (_, *cells, patience) in zip(Stage, rows, strict=True):
        wanted = [in_words(TABLE[stage][answer]) if answer in TABLE[stage] else "–" for answer in Answer]
        assert cells == wanted, stage
        assert float(patience) == PATIENCE[stage]


def test_the_page_has_the_findings() -> None:
    head, *rows = tables()[1]
    assert head == ["what is found", "status", "meaning"]
    assert rows == [[what.value, FINDINGS[what][1], in_words(FINDINGS[what][0])] for what in Finding]


CELLS = [(stage, answer) for stage in TABLE for answer in TABLE[stage]]


@pytest.mark.parametrize(("stage", "answer"), CELLS)
def test_a_failure_never_delivers_and_only_5xx_to_the_mail_itself_gives_up(stage: Stage, answer: Answer) -> None:
    result, scope, retry = TABLE[stage][answer]
    mail = stage in (Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.BODY, Stage.END, Stage.LMTP_END)
    if answer is Answer.PERMANENT and mail:
        assert result is Result.FAILED
        assert scope in (Scope.MESSAGE, Scope.RECIPIENT)
    else:
        assert result is Result.DEFERRED
    if stage in (Stage.END, Stage.LMTP_END) and answer in (Answer.HANG_UP, Answer.TIME_OUT, Answer.GARBAGE):
        # It may have been taken: no other host may have it at once.
        assert retry is Retry.LATER
    assert (retry is Retry.SAME_HOST) == (stage is Stage.REUSE)
    assert (scope is Scope.SESSION) == (stage is Stage.REUSE)


@pytest.mark.parametrize(("stage", "answer"), CELLS)
def test_an_outcome_tells_what_the_table_says(stage: Stage, answer: Answer) -> None:
    spoken = answer in (Answer.TEMPORARY, Answer.PERMANENT, Answer.CLOSING)
    reply = Reply({"4xx": 450, "5xx": 550}.get(answer.value, 421), [b"{what} {0}\x1b"]) if spoken else None
    made = failure(stage, answer, "mx.test", reply, "" if spoken else "why")
    assert Meaning(made.result, made.scope, made.retry) == TABLE[stage][answer]
    assert made.status[0] == ("5" if made.result is Result.FAILED else "4")
    assert made.host == "mx.test"
    assert made.text.isprintable()
    assert "mx.test" in made.text
    assert stage.value in made.text
    if reply is not None:
        assert made.reply == reply.text
        assert "{what} {0}?" in made.text
    else:
        assert made.reply == ""
        assert "why" in made.text


def test_a_status_follows_the_result_and_not_the_host() -> None:
    greeting = failure(Stage.GREETING, Answer.PERMANENT, "mx.test", Reply(554, [b"5.7.1 away"]))
    assert (greeting.result, greeting.status) == (Result.DEFERRED, "4.7.1")
    assert failure(Stage.CONNECT, Answer.TIME_OUT, "mx.test").status == "4.4.1"
    no_tls = failure(Stage.TLS, Answer.GARBAGE, "mx.test", why="certificate: expired")
    assert (no_tls.status, no_tls.text) == ("4.7.5", "mx.test: the TLS handshake failed: certificate: expired")
    assert failure(Stage.MAIL, Answer.GARBAGE, "mx.test", Reply(354, [b"go"])).text.endswith("(MAIL): 354 go")


def test_every_answer_is_classified() -> None:
    classes = {code: classify(Reply(code, [b""])) for code in (250, 354, 421, 450, 499, 500, 599)}
    assert [answer.value for answer in classes.values()] == ["garbage", "garbage", "421", "4xx", "4xx", "5xx", "5xx"]


@pytest.mark.parametrize("what", Finding)
def test_findings(what: Finding) -> None:
    meaning, status, _ = FINDINGS[what]
    made = finding(what, "mx.test", "why")
    assert Meaning(made.result, made.scope, made.retry) == meaning
    assert made.status == status
    assert status[0] == ("5" if meaning.result is Result.FAILED else "4")
    assert made.text.endswith(": why")
    assert made.reply == ""


def test_every_stage_is_waited_for() -> None:
    assert set(PATIENCE) == set(Stage) == set(TABLE)
    # RFC 5321 4.5.3.2, in minutes
    least = {Stage.GREETING: 5, Stage.MAIL: 5, Stage.RCPT: 5, Stage.DATA: 2, Stage.BODY: 3, Stage.END: 10}
    assert all(PATIENCE[stage] >= 60 * minutes for stage, minutes in least.items())
