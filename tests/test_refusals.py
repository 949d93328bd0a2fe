"""A refusal has one word, which stands in reply, log and counter, whichever stage it was made at."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from peer import Peer
from servers import running, toml
from test_connection import greeted
from wire import Bench, bench

import fastsmtp
from fastsmtp import reply as replies_of_the_server
from fastsmtp.lists import Networks
from fastsmtp.metrics import Counter, counter_of
from fastsmtp.policy import quota
from fastsmtp.policy.rules import Rule, make_rules
from fastsmtp.reply import R451_RECIPIENT_NOT_CHECKED, SILENT_CLOSE, Reply, reason, softened
from fastsmtp.verdict import Ask, Stage, Verdict


class NotChecked:
    """What recipients.py says when a source has no answer."""

    stage = Stage.RCPT

    def __call__(self, ask: Ask) -> Verdict | None:
        return Verdict("recipient-not-checked", R451_RECIPIENT_NOT_CHECKED)


def counted_by(word: str) -> Counter:
    counter = counter_of(word)
    assert counter is not None, word
    return counter


def refused(made: Bench) -> list[tuple[object, ...]]:
    return [tuple(line[key] for key in ("stage", "reason", "from", "to")) for line in made.logged("refused")]


@pytest.mark.parametrize(
    ("rule", "said", "stage", "sender"),
    [
        (Rule("a", "refuse", Networks.of(())), (), "", ""),
        (Rule("a", "refuse"), ("554",), "CONNECT", None),
        (Rule("a", "defer"), ("421",), "CONNECT", None),
        (Rule("a", "refuse", helo={"c"}), ("220", "550"), "EHLO", None),
        (Rule("a", "defer", helo={"c"}), ("220", "450"), "EHLO", None),
        (Rule("a", "refuse", senders={"b.test"}), ("220", "250", "550"), "MAIL", "s@b.test"),
        (Rule("a", "refuse", recipients={"*"}), ("220", "250", "250", "550"), "RCPT", "s@b.test"),
    ],
)
def test_rules_are_named_at_every_stage(rule: Rule, said: tuple[str, ...], stage: str, sender: str | None) -> None:
    with bench(checks=make_rules([rule])) as made:
        player = made.connect()
        heard = [*player.take().decode().splitlines()]
        for line in ("EHLO c", "MAIL FROM:<s@b.test>", "RCPT TO:<ann@here.test>"):
            if len(heard) < len(said) and not player.transport.ended:
                heard.append(player.say(line)[-1])
        assert tuple(line[:3] for line in heard[: len(said)]) == said
        if not stage:
            assert refused(made) == []
            return
        assert "(rule-a)" in heard[-1]
        recipient = "ann@here.test" if stage == "RCPT" else ""
        assert refused(made) == [(stage, "rule-a", sender, recipient)]
        assert made.counted(Counter.REFUSED_BY_RULE) == 1
        assert made.counted(Counter.COMMANDS_REJECTED) == 0


def test_what_could_not_be_looked_up_is_counted() -> None:
    with bench(checks=[NotChecked()]) as made:
        greeted(made).say("MAIL FROM:<>", "RCPT TO:<ann@here.test>")
        assert refused(made) == [("RCPT", "recipient-not-checked", "<>", "ann@here.test")]
        assert made.counted(counted_by("recipient-not-checked")) == made.counted(Counter.RECIPIENTS_REFUSED) == 1


def test_who_is_unknown_is_counted() -> None:
    with bench() as made:
        greeted(made).say("MAIL FROM:<s@b.test>", "RCPT TO:<nobody@here.test>")
        assert made.counted(counted_by("unknown-mailbox")) == 1


def test_words_and_counters_are_one() -> None:
    """Whatever is refused is counted by the word that stands in the log, by who refuses or by the connection."""
    by_limits = {"address-full", "network-full", "session-rate", "failure-rate", "message-rate", "recipient-rate"}
    replies = [value for name, value in vars(replies_of_the_server).items() if re.match(r"R[45]\d\d_", name)]
    assert len(replies) > 80
    for reply in (*replies, *map(softened, replies), SILENT_CLOSE):
        counter = counter_of(reason(reply))
        assert (counter is None) == (reason(reply) in by_limits), reply
        assert counter is None or counter.reason == reason(reply)
    assert counter_of("rule-spam") is Counter.REFUSED_BY_RULE
    for word in (*quota.REASONS.values(), reason(Reply(550, "5.7.1", "What a program says"))):
        assert counted_by(word).reason == word
    words = [counter.reason for counter in Counter if counter.reason]
    assert by_limits <= set(words)
    assert len(words) == len(set(words))


def test_every_counter_is_counted_somewhere() -> None:
    """One that stays at 0 for ever is a lie."""
    modules = Path(fastsmtp.__file__).parent.rglob("*.py")
    sources = "".join(path.read_text() for path in modules if path.stem != "metrics")
    for counter in Counter:
        if not counter.reason:
            assert re.search(rf"\bCounter\.{counter.name}\b", sources) or counter is Counter.REFUSED_BY_RULE, counter


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["NOSUCH"], ["syntax"]),
        (["EHLO c", "MAIL FROM:<>", "DATA"], ["rcpt-first"]),
        (["EHLO c", "AUTH PLAIN AAA="], ["not-implemented"]),
        (["GET / HTTP/1.1"], ["dropped"]),
        (["NOSUCH"] * 30, ["syntax", "too-many-errors"]),
    ],
)
def test_what_is_refused_is_counted_by_its_word(lines: list[str], words: list[str]) -> None:
    with bench() as made:
        player = made.connect()
        for line in lines:
            if not player.transport.ended:
                player.say(line)
        assert {row.reason for row in Counter if row.reason and made.counted(row)} == set(words)


def test_what_ends_a_session_unasked_is_counted_by_its_word() -> None:
    with bench(session_limit=1) as made:
        made.connect()
        made.connect()
        made.service.drain()
        counted = [made.counted(counted_by(word)) for word in ("too-many-sessions", "shutting-down", "timeout")]
        assert counted == [1, 1, 0]


@pytest.mark.parametrize(
    ("commands", "wanted"),
    [
        (["RCPT TO:<ann@here.test>"], [("RCPT", None, "")]),
        (["DATA"], [("DATA", None, "")]),
        (["MAIL FROM:<a@@b>"], [("MAIL", None, "")]),
        (["MAIL FROM:<s@b.test>", "RSET", "MAIL FROM:<a@@b>"], [("MAIL", None, "")]),
        (["MAIL FROM:<s@b.test> SIZE=999999999999"], [("MAIL", "s@b.test", "")]),
        (
            ["MAIL FROM:<s@b.test> SIZE=999999999999", "RCPT TO:<ann@here.test>"],
            [("MAIL", "s@b.test", ""), ("RCPT", None, "")],
        ),
        (["MAIL FROM:<s@b.test>", "RCPT TO:<x@@y>"], [("RCPT", "s@b.test", "")]),
        (["MAIL FROM:<>", "DATA"], [("DATA", "<>", "")]),
    ],
)
def test_the_log_names_whom_it_heard(commands: list[str], wanted: list[tuple[str, str | None, str]]) -> None:
    with bench() as made:
        greeted(made).say(*commands)
        assert [(stage, sender, to) for stage, _, sender, to in refused(made)] == wanted


def test_a_connection_that_a_rule_refuses_is_logged(tmp_path: Path) -> None:
    tables = '[[rule]]\nname = "blocked"\nclient = ["127.7.0.0/16"]\naction = "refuse"\n[inbound]\nfailures = "3/d"\n'
    with running(tmp_path, toml(tmp_path, tables=tables)) as server:
        for _ in range(5):
            with Peer(server.address, hello="", source="127.7.0.1") as peer:
                assert peer.reply().startswith("554 5.7.1 Refused (rule-blocked)"), "it is told each time"
        lines = server.wait_for("refused", 5, reason="rule-blocked", stage="CONNECT", client="127.7.0.1")
        assert [line["from"] for line in lines] == [None] * 5
