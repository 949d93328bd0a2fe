"""The client dialogue: scripts that a mail administrator reads, our own server, and hosts that say anything at all."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outgoing import Player, Script, make_address, make_message, make_terms, parse_scripts, play
from test_login import FINAL, FIRST, NONCE, PROOF, USER
from wire import bench

from fastsmtp.address import NULL, Address
from fastsmtp.delivery import Delivery, Result, Retry, Scope, login, transaction
from fastsmtp.delivery.body import PIECE
from fastsmtp.delivery.dialogue import Dialogue, Step
from fastsmtp.delivery.failures import PATIENCE, TABLE, Answer, Stage
from fastsmtp.delivery.login import ScramSha256
from fastsmtp.delivery.offers import Terms
from fastsmtp.delivery.transaction import EAGER
from fastsmtp.message import Message, Recipient

FOLDER = Path(__file__).parent / "dialogs_out"
SCRIPTS = [
    pytest.param(script, id=f"{file.stem}: {script.name}")
    for file in sorted(FOLDER.glob("*.smtp"))
    for script in parse_scripts(file.read_text())
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script: Script) -> None:
    """Whole, octet by octet, and with each run of the host's octets cut in two at every place."""
    longest = max(play(script, None).runs)
    if script.as_written_only:
        return
    play(script, 1)
    for at in range(1, min(400, longest)):
        play(script, None, at)


WRONG = {
    "another command": "S: 220 mx\nC: HELO me.test\nS: 250 mx\nready\n",
    "a command that is not expected": "S: 220 mx\nhang-up\nclosed\n",
    "another outcome": "mail: <> <bob@there.test>\nhang-up\noutcome: failed 4.4.2 host next-host\nclosed\n",
    "an outcome too few": "mail: <> <bob@there.test>\nhang-up\nclosed\n",
    "an outcome too many": "mail: <> <bob@there.test>\nhang-up\n" + "outcome: deferred 4.4.2 host next-host\n" * 2,
    "closed and not said": "mail: <> <bob@there.test>\nhang-up\noutcome: deferred 4.4.2 host next-host\n",
    "open and said to be closed": "S: 220 mx\nC: EHLO me.test\nclosed\n",
    "no word": "X: what\n",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_the_player_finds_what_is_wrong(text: str) -> None:
    (script,) = parse_scripts(f"=== wrong\n{text}")
    with pytest.raises(AssertionError):
        play(script, None)


# What scripts do not show: large messages, files, addresses that no parser gives.


def to(*names: str, octets: bytes = b"Hi\r\n") -> Delivery:
    recipients = [Recipient(make_address(f"{name}@there.test")) for name in names]
    return Delivery(make_message(NULL, recipients, octets), recipients, list(range(len(names))))


def opened(*keywords: str, terms: Terms | None = None) -> Dialogue:
    """Greeted, and ready."""
    dialogue = Dialogue(terms or make_terms(""), "mx.test")
    dialogue.feed(b"220 mx\r\n")
    lines = ["mx", *keywords]
    reply = "".join(f"250{' ' if line is lines[-1] else '-'}{line}\r\n" for line in lines)
    assert dialogue.feed(reply.encode()) is Step.READY
    dialogue.take_output()
    return dialogue


def test_a_small_message_leaves_with_its_envelope_in_one_write() -> None:
    dialogue = opened("PIPELINING", "CHUNKING", "SIZE")
    assert dialogue.send(to("bob", octets=b"x" * EAGER)) is Step.WAIT
    (write,) = dialogue.take_output()
    assert write.endswith(b"BDAT %d LAST\r\n" % EAGER + b"x" * EAGER)
    assert dialogue.feed(b"250 ok\r\n250 ok\r\n250 ok\r\n") is Step.READY
    assert [outcome.result for outcome in dialogue.outcomes] == [Result.DELIVERED]
    assert dialogue.take_output() == []


@pytest.mark.parametrize("keywords", [("PIPELINING", "CHUNKING"), ("PIPELINING",), ("CHUNKING",), ()])
def test_a_larger_one_waits_for_its_recipients(keywords: tuple[str, ...]) -> None:
    """And is not sent at all when there are none."""
    dialogue = opened(*keywords)
    dialogue.send(to("bob", octets=b"x" * (EAGER + 1)))
    sent = b""
    for reply in (b"250 ok\r\n", b"550 nobody\r\n", b"554 no recipients\r\n"):
        sent += b"".join(dialogue.take_output())
        if dialogue.outcomes:
            break
        dialogue.feed(reply)
    assert [outcome.result for outcome in dialogue.outcomes] == [Result.FAILED]
    assert b"xx" not in sent


def test_a_large_message_goes_in_chunks_that_are_answered_meanwhile() -> None:
    dialogue = opened("PIPELINING", "CHUNKING")
    octets = b"x" * (2 * PIECE + 7)
    assert dialogue.send(to("bob", octets=octets)) is Step.WAIT
    assert dialogue.take_output() == [b"MAIL FROM:<>\r\nRCPT TO:<bob@there.test>\r\n"]
    assert dialogue.feed(b"250 ok\r\n250 ok\r\n") is Step.BODY
    body = dialogue.body
    assert body is not None
    assert dialogue.send_piece(body.read()) is Step.BODY
    assert dialogue.take_output()[0] == b"BDAT %d\r\n" % PIECE
    assert dialogue.feed(b"250 ok\r\n") is Step.WAIT  # the pump is at work already
    assert dialogue.body is body
    assert dialogue.send_piece(body.read()) is Step.BODY
    assert dialogue.send_piece(body.read()) is Step.WAIT
    assert dialogue.body is None
    assert dialogue.take_output()[2] == b"BDAT 7 LAST\r\n"
    assert dialogue.stage is Stage.BODY
    assert dialogue.feed(b"250 ok\r\n") is Step.WAIT
    assert dialogue.stage is Stage.END
    assert dialogue.feed(b"250 ok\r\n") is Step.READY
    assert dialogue.outcomes[0].result is Result.DELIVERED


@pytest.mark.parametrize("keywords", [("PIPELINING", "CHUNKING"), ("PIPELINING",)])
@pytest.mark.parametrize(
    ("word", "status"), [(b"250 taken\r\n", "4.5.0"), (b"552 5.2.3 too big\r\n", "5.2.3"), (b"421 bye\r\n", "4.3.2")]
)
def test_a_message_is_not_taken_before_its_end_has_left(word: bytes, status: str, keywords: tuple[str, ...]) -> None:
    dialogue = opened(*keywords)
    dialogue.send(to("bob", octets=b"x" * (PIECE + 7)))
    dialogue.feed(b"250 ok\r\n250 ok\r\n" + b"354 go\r\n" * (len(keywords) == 1))
    while (body := dialogue.body) is not None:
        dialogue.send_piece(body.read())
    answers = b"250 ok\r\n" * (len(keywords) == 2)  # to the first chunk
    assert dialogue.feed(answers, early=True) is Step.WAIT
    assert dialogue.feed(word, early=True) is Step.CLOSE
    assert [each.status for each in dialogue.outcomes] == [status]


def test_a_chunk_is_refused_no_more_are_sent() -> None:
    dialogue = opened("PIPELINING", "CHUNKING")
    dialogue.send(to("bob", "carl", octets=b"x" * (3 * PIECE)))
    dialogue.feed(b"250 ok\r\n250 ok\r\n550 5.1.1 nobody\r\n")
    body = dialogue.body
    assert body is not None
    dialogue.send_piece(body.read())
    dialogue.send_piece(body.read())
    assert dialogue.feed(b"552 5.2.3 too big\r\n") is Step.WAIT
    assert dialogue.body is None
    assert dialogue.feed(b"552 5.2.3 too big\r\n") is Step.READY
    assert [(each.status, each.scope) for each in dialogue.outcomes] == [
        ("5.2.3", Scope.MESSAGE),
        ("5.1.1", Scope.RECIPIENT),
    ]
    dialogue.take_output()
    dialogue.send(to("dora"))
    assert dialogue.take_output()[0].startswith(b"RSET\r\nMAIL ")


@pytest.mark.parametrize("keywords", [("PIPELINING",), ("CHUNKING",)])
@pytest.mark.parametrize(
    ("octets", "result", "retry"),
    [
        (b"552 5.3.4 too big\r\n", Result.FAILED, Retry.LATER),
        (b"451 4.3.0 disk full\r\n", Result.DEFERRED, Retry.NEXT_HOST),
        (b"421 bye\r\n", Result.DEFERRED, Retry.NEXT_HOST),
        (b"250 taken already\r\n", Result.DEFERRED, Retry.NEXT_HOST),
        (b"what\r\n", Result.DEFERRED, Retry.NEXT_HOST),
        (b"", Result.DEFERRED, Retry.NEXT_HOST),
    ],
)
def test_the_last_word_before_the_message_is_whole(
    keywords: tuple[str, ...], octets: bytes, result: Result, retry: Retry
) -> None:
    """Never delivered; and the session has ended, for nobody knows where its stream is."""
    for cut in range(0, len(octets) + 1, 4):
        dialogue = opened(*keywords)
        dialogue.send(to("bob", octets=b"x" * (2 * PIECE)))
        for reply in (b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n"):
            if dialogue.body is None:
                dialogue.feed(reply)
        body = dialogue.body
        assert body is not None
        dialogue.send_piece(body.read())
        dialogue.feed(octets[:cut])
        dialogue.feed(octets[cut:])
        if not octets:
            dialogue.lost("reset")
        assert dialogue.closed
        assert dialogue.body is None
        assert [(each.result, each.retry) for each in dialogue.outcomes] == [(result, retry)]


@pytest.mark.parametrize("keywords", [("PIPELINING",), ("CHUNKING",), ("PIPELINING", "CHUNKING"), ()])
def test_a_message_in_a_file_is_asked_for_and_its_loss_is_told(keywords: tuple[str, ...]) -> None:
    delivery = to("bob")
    message = delivery.message
    message.parts, message.file = None, "/nowhere/body"
    dialogue = opened(*keywords)
    dialogue.send(delivery)
    for reply in (b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n"):
        if dialogue.body is None:
            step = dialogue.feed(reply)
    assert step is Step.BODY
    assert dialogue.body is not None
    assert dialogue.body.blocking
    dialogue.take_output()
    assert dialogue.body_failed("gone") is Step.CLOSE
    assert [(each.result, each.scope, each.status) for each in dialogue.outcomes] == [
        (Result.DEFERRED, Scope.MESSAGE, "4.3.0")
    ]
    assert dialogue.take_output() == []


@pytest.mark.parametrize("keywords", [("PIPELINING", "CHUNKING"), ()])
def test_a_message_that_is_shorter_than_it_says(keywords: tuple[str, ...]) -> None:
    delivery = to("bob")
    delivery.message.size = 100
    dialogue = opened(*keywords)
    dialogue.send(delivery)
    for reply in (b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n"):
        dialogue.feed(reply)
    assert dialogue.closed
    assert [each.status for each in dialogue.outcomes] == ["4.3.0"]
    assert b"\r\n.\r\n" not in b"".join(dialogue.take_output())


@pytest.mark.parametrize("bad", ["a\r\nRSET", "a\0", "a\nb"])
def test_no_argument_has_a_line_end(bad: str) -> None:
    """No parser gives such an address; were there one, it would not leave."""
    dialogue = opened("PIPELINING", "DSN")
    delivery = to("carl")
    evil = Recipient(Address(bad, "there.test"))
    dialogue.send(Delivery(delivery.message, [evil, Recipient(NULL, notify=bad), *delivery.recipients], [0, 1, 2]))
    assert b"".join(dialogue.take_output()) == b"MAIL FROM:<>\r\nRCPT TO:<carl@there.test>\r\nDATA\r\n"
    dialogue.lost()
    assert [each.status for each in dialogue.outcomes] == ["5.1.3", "5.1.3", "4.4.2"]
    for name in ("envid", "ret"):
        dialogue = opened("PIPELINING", "DSN")
        delivery = to("carl")
        setattr(delivery.message.envelope, name, bad)
        assert dialogue.send(delivery) is Step.READY
        assert [each.status for each in dialogue.outcomes] == ["5.1.7"]
    with pytest.raises(ValueError, match="EHLO"):
        Terms(bad)


def test_patience_is_that_of_the_stage_and_begins_anew_with_whole_replies_only() -> None:
    dialogue = Dialogue(make_terms(""), "mx.test")
    assert (dialogue.stage, dialogue.patience) == (Stage.GREETING, PATIENCE[Stage.GREETING])
    before = dialogue.progress
    dialogue.feed(b"220-mx\r\n22")
    assert dialogue.progress == before
    dialogue.feed(b"0 mx\r\n")
    assert dialogue.progress > before
    assert dialogue.stage is Stage.EHLO
    dialogue.feed(b"250 mx\r\n")
    dialogue.send(to("bob"))
    for stage, reply in ((Stage.MAIL, b"250"), (Stage.RCPT, b"250"), (Stage.DATA, b"354"), (Stage.END, b"250")):
        assert (dialogue.stage, dialogue.patience) == (stage, PATIENCE[stage])
        dialogue.feed(reply + b" ok\r\n")


def test_scram_through_the_dialogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """235 counts only behind the host's proof."""
    from base64 import b64encode as b64

    monkeypatch.setattr(login, "MECHANISMS", {"SCRAM-SHA-256": lambda _: ScramSha256(USER, NONCE)})
    for proof in (FINAL, b""):
        dialogue = Dialogue(make_terms("login=SCRAM-SHA-256"), "mx.test", secure=True, trusted=True)
        dialogue.feed(b"220 mx\r\n")
        dialogue.feed(b"250-mx\r\n250 AUTH SCRAM-SHA-256\r\n")
        dialogue.feed(b"334 " + b64(FIRST) + b"\r\n")
        assert dialogue.take_output()[-1] == b64(PROOF) + b"\r\n"
        if proof:
            dialogue.feed(b"334 " + b64(proof) + b"\r\n")
            assert dialogue.take_output() == [b"\r\n"]
        step = dialogue.feed(b"235 welcome\r\n")
        assert step is (Step.READY if proof else Step.CLOSE)


HELLO = b"250 mx\r\n"
CELLS = [(stage, answer) for stage in TABLE for answer in TABLE[stage] if stage is not Stage.CONNECT]


def bring_to(stage: Stage) -> Dialogue:
    """With a message for bob, at the moment when `stage` is to be answered."""
    terms = make_terms({Stage.LMTP_END: "lmtp", Stage.AUTH: "login=PLAIN", Stage.REUSE: ""}.get(stage, ""))
    if stage in (Stage.STARTTLS, Stage.TLS):
        terms = make_terms("starttls=required")
    dialogue = Dialogue(terms, "mx.test", trusted=True)
    if stage is Stage.REUSE:
        for octets in (b"220 mx\r\n", HELLO):
            dialogue.feed(octets)
        dialogue.send(to("carl"))
        for octets in (b"250 ok\r\n", b"550 no\r\n"):
            dialogue.feed(octets)
    dialogue.send(to("bob", octets=b"x" * (2 * PIECE)) if stage is Stage.BODY else to("bob"))
    script = [b"220 mx\r\n", HELLO, b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n"]
    if stage in (Stage.STARTTLS, Stage.TLS):
        script = [b"220 mx\r\n", b"250-mx\r\n250 STARTTLS\r\n", b"220 go\r\n"]
    if stage is Stage.AUTH:
        script = [b"220 mx\r\n", b"250-mx\r\n250 AUTH PLAIN\r\n"]
    while dialogue.stage is not stage:
        dialogue.feed(script.pop(0))
    dialogue.take_output()
    return dialogue


@pytest.mark.parametrize(("stage", "answer"), CELLS)
def test_each_cell_of_the_table(stage: Stage, answer: Answer) -> None:
    dialogue = bring_to(stage)
    octets = {Answer.TEMPORARY: b"450 x\r\n", Answer.PERMANENT: b"550 x\r\n", Answer.CLOSING: b"421 x\r\n"}
    if answer is Answer.HANG_UP:
        dialogue.lost()
    elif answer is Answer.TIME_OUT:
        dialogue.timed_out()
    elif stage is Stage.TLS:
        dialogue.tls_failed("bad certificate")
    else:
        dialogue.feed(octets.get(answer, b"what\r\n"))
    if stage is Stage.EHLO and answer is Answer.PERMANENT:
        assert dialogue.take_output() == [b"HELO me.test\r\n"]
        dialogue.feed(b"550 x\r\n")
    (outcome,) = dialogue.outcomes
    assert (outcome.result, outcome.scope, outcome.retry) == TABLE[stage][answer]
    assert outcome.host == "mx.test"
    # What is refused in words leaves the session open once mail is spoken of.
    spoken = answer in (Answer.TEMPORARY, Answer.PERMANENT)
    mail = stage in (Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.END, Stage.LMTP_END)
    assert dialogue.closed != (spoken and mail)


@pytest.mark.parametrize("answer", [Answer.HANG_UP, Answer.TIME_OUT, Answer.GARBAGE])
@pytest.mark.parametrize("stage", [Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.END])
def test_only_a_kept_connection_that_closes_unheard_says_nothing_of_its_host(stage: Stage, answer: Answer) -> None:
    dialogue = opened()
    dialogue.send(to("carl"))
    dialogue.feed(b"550 no\r\n")
    dialogue.send(to("bob"))
    for reply in (b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n"):
        if dialogue.stage is not stage:
            dialogue.feed(reply)
    if answer is Answer.GARBAGE:
        dialogue.feed(b"what\r\n")
    elif answer is Answer.TIME_OUT:
        dialogue.timed_out()
    else:
        dialogue.lost()
    row = Stage.REUSE if stage is Stage.MAIL and answer is Answer.HANG_UP else stage
    (outcome,) = dialogue.outcomes
    assert (outcome.result, outcome.scope, outcome.retry) == TABLE[row][answer]


@pytest.mark.parametrize("octets", [b"", b"421 bye\r\n", b"250 what\r\n", b"what\r\n"])
def test_between_two_deliveries_nothing_fails(octets: bytes) -> None:
    dialogue = opened()
    assert dialogue.idle
    assert (dialogue.feed(octets) if octets else dialogue.lost()) is Step.CLOSE
    assert dialogue.failure is None
    assert dialogue.take_output() == []
    assert dialogue.quit() is Step.CLOSE
    assert dialogue.take_output() == []


def test_a_session_that_fails_without_a_delivery_says_why() -> None:
    dialogue = Dialogue(make_terms(""), "mx.test")
    assert dialogue.feed(b"554 5.7.1 away\r\n") is Step.CLOSE
    assert dialogue.failure is not None
    assert (dialogue.failure.status, dialogue.failure.reply) == ("4.7.1", "554 5.7.1 away")
    assert dialogue.outcomes == []


@pytest.mark.parametrize("words", ["", "lmtp"])
@pytest.mark.parametrize(
    "octets",
    [
        b"250 ok\r\n250 ok\r\n250 2.6.0 as 4711\r\n",
        b"250 ok\n251 2.1.5 forwarded\n299 \n",
        b"250 ok\r\n250 ok\r\n250 5.0.0 ok\r\n",
        b"250 ok\r\n250 ok\r\n250 " + b"x" * 2000 + b"\r\n",
        b"250 ok\r\n250 ok\r\n250 \0\xff\r\n",
        b"250 ok\r\n250 ok\r\n450 no\r\n",
        b"250 ok\r\n250 ok\r\n250-a\r\n250 b\r\n",
        b"250 ok\r\n250 ok\r\n250 ok\r\n250 ok\r\n",
        b"250 ok\r\n250 ok\r\n250 ok\r\n2",
        b"250 ok\r\n250 ok\r\n250\r\n",
        b"250 ok\r\n250 ok\r\nwhat\r\n",
    ],
)
def test_the_shortcut_is_the_long_way(octets: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for _ in range(2):
        dialogue = opened("PIPELINING", "CHUNKING", terms=make_terms(words))
        dialogue.send(to("bob"))
        dialogue.take_output()
        dialogue.feed(octets)
        told = ("host", "relayed", "reply", "reports", "result", "retry", "scope", "status", "text")
        outcomes = [[getattr(each, name) for name in told] for each in dialogue.outcomes]
        output = [] if dialogue.closed else [dialogue.send(to("carl")), dialogue.take_output()]
        seen.append((outcomes, dialogue.closed, dialogue.progress, dialogue.stage, output))
        monkeypatch.setattr(transaction, "_ALL_TAKEN", re.compile(b"(?!)"))
    assert seen[0] == seen[1]


def test_a_session_full_by_the_hosts_limits_is_not_reusable() -> None:
    dialogue = opened("PIPELINING", "CHUNKING", "LIMITS MAILMAX=1")
    assert dialogue.reusable
    dialogue.send(to("bob"))
    dialogue.feed(b"250 ok\r\n" * 3)
    assert not dialogue.closed
    assert not dialogue.reusable


# Our own server takes what the dialogue says.

TEXTS = st.lists(st.sampled_from([b"a", b".", b"\r\n", b"\r\n.", b"..", b"long" * 300]), max_size=20).map(b"".join)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.sampled_from(["", "CHUNKING", "PIPELINING", "CHUNKING,PIPELINING"]), st.sampled_from(["mx", "lmtp"]))
def test_our_server_keeps_what_was_sent(octets: bytes, ignored: str, role: str) -> None:
    recipients = [Recipient(make_address(text)) for text in ("ann@here.test", "nobody@here.test", "bob@here.test")]
    message = make_message(make_address("carl@x.test"), recipients, octets)
    with bench(role=role) as made:
        server = made.connect()
        words = f"{'lmtp ' if role == 'lmtp' else ''}ignore={ignored or 'X'}"
        client = Player(make_terms(words))
        client.took(client.dialogue.send(Delivery(message, recipients, [0, 1, 2])))
        for _ in range(20):
            client.took(client.dialogue.feed(server.take()))
            server.send(client.said)
            client.said = b""
            if client.step is Step.READY:
                break
        results = [(each.result.value, each.status) for each in client.dialogue.outcomes]
        assert results == [("delivered", "2.0.0"), ("failed", "5.1.1"), ("delivered", "2.0.0")]
        (kept,) = made.keeper.kept
        assert kept.recipients == ["<ann@here.test>", "<bob@here.test>"]
        whole = octets if not octets or octets.endswith(b"\r\n") else octets + b"\r\n"
        assert kept.body in ((octets, whole) if "CHUNKING" not in ignored else (whole, b"\r\n"[len(octets) :] + whole))
        server.vanish()


# A host that says anything.


class Host:
    """Reads what the client says, and holds what it may believe of each recipient.

    A reply answers the oldest command that has none. `taken`: recipients for whom MAIL, RCPT and the message were
    answered 2xx; `refused`: a 5xx was said to a command of a mail."""

    def __init__(self, lmtp: bool) -> None:
        self.lmtp = lmtp
        self.unread = b""
        self.waiting: deque[str] = deque(["greeting"])
        self.in_text = False
        self.text_left = 0
        self.mailed = False
        self.accepted: list[str] = []
        self.taken: set[str] = set()
        self.refused = False

    def read(self, octets: bytes) -> None:
        self.unread += octets
        while self.unread:
            if self.text_left:
                step = min(self.text_left, len(self.unread))
                self.unread = self.unread[step:]
                self.text_left -= step
            elif self.in_text:
                end = re.match(rb"(?s)(?:.*?\r\n)?\.\r\n", self.unread)
                if end is None:
                    return
                self.unread = self.unread[end.end() :]
                self.in_text = False
                self.waiting.append("END")
            elif b"\r\n" in self.unread:
                line, _, self.unread = self.unread.partition(b"\r\n")
                self.command(line.decode())
            else:
                return

    def command(self, line: str) -> None:
        if line.startswith("BDAT"):
            self.text_left = int(line.split()[1])
            self.waiting.append("END" if line.endswith("LAST") else "BDAT")
        else:
            self.waiting.append(line)

    def reply(self, code: int) -> None:
        """What a reply of ours means, whoever else understands it."""
        if not self.waiting:
            return
        command = self.waiting.popleft()
        if command.startswith("MAIL"):
            self.mailed, self.accepted = code < 300, []
        elif command.startswith("RCPT"):
            if code < 300 and self.mailed:
                self.accepted.append(command.partition("<")[2].partition("@")[0])
        elif command == "DATA":
            self.in_text = code == 354
        elif command == "END" and self.lmtp and len(self.accepted) > 1:
            self.waiting.appendleft("END")
            if code < 300:
                self.taken.add(self.accepted[0])
            self.accepted.pop(0)
        elif command == "END":
            if code < 300:
                self.taken |= set(self.accepted)
            self.accepted = []
        if code >= 500 and command.startswith(("MAIL", "RCPT", "DATA", "BDAT", "END")):
            self.refused = True


LIKELY = {"DATA": 354, "greeting": 220}
CODES = st.sampled_from([220, 250, 250, 250, 354, 421, 450, 451, 452, 500, 550, 552])
EVENTS = st.one_of(
    st.just("as wanted"), st.just("as wanted"), st.just("as wanted"), st.just("all as wanted"), CODES,
    st.sampled_from(["hang-up", "time-out", "garbage", "half", "excess", "shift", "shift"]),
)  # fmt: skip
KEYWORDS = st.sets(st.sampled_from(["PIPELINING", "CHUNKING", "8BITMIME", "DSN", "LIMITS RCPTMAX=2 MAILMAX=3"]))


@settings(max_examples=400, deadline=None)
@given(st.booleans(), KEYWORDS, st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_one_outcome_each_and_delivered_only_with_2xx(
    lmtp: bool, keywords: set[str], sizes: list[int], data: st.DataObject
) -> None:
    host = Host(lmtp)
    player = Player(make_terms("lmtp" if lmtp else ""))
    dialogue = player.dialogue
    names: list[str] = []

    def take(step: Step) -> None:
        player.took(step)
        host.read(player.said)
        player.said = b""

    def say(code: int) -> bytes:
        command = host.waiting[0] if host.waiting else ""
        host.reply(code)
        if command[:4] in ("EHLO", "LHLO") and code == 250:
            return "".join(f"250-{word}\r\n" for word in sorted(keywords)).encode() + b"250 end\r\n"
        return b"%d text\r\n" % code

    def wanted() -> int:
        return LIKELY.get(host.waiting[0], 250) if host.waiting else 250

    for number, count in enumerate(sizes):
        if dialogue.closed:
            break
        names = [f"r{number}x{place}" for place in range(count)]
        host.taken.clear()
        host.refused = False
        octets = b"x\r\n" * data.draw(st.sampled_from([1, 1, EAGER]))
        take(dialogue.send(to(*names, octets=octets)))
        for _ in range(60):
            if player.step in (Step.READY, Step.CLOSE):
                break
            event = data.draw(EVENTS)
            if event == "hang-up":
                take(dialogue.lost())
            elif event == "time-out":
                take(dialogue.timed_out())
            elif event == "garbage":
                take(dialogue.feed(b"what\r\n"))
            elif event == "half":
                octets = say(wanted())
                take(dialogue.feed(octets[:3]))
                take(dialogue.feed(octets[3:]))
            elif event == "excess":
                octets = b""
                while host.waiting:
                    octets += say(wanted())
                take(dialogue.feed(octets + b"250 more\r\n"))
            elif event == "shift":  # one reply too many, at any place among those to a group
                replies = []
                while host.waiting:
                    replies.append(say(data.draw(st.sampled_from([wanted(), wanted(), 250, 450, 550]))))
                replies.insert(data.draw(st.integers(0, len(replies))), b"250 more\r\n")
                take(dialogue.feed(b"".join(replies)))
            elif event == "all as wanted":
                octets = b""
                while host.waiting:
                    octets += say(wanted())
                take(dialogue.feed(octets))
            else:
                take(dialogue.feed(say(event if isinstance(event, int) else wanted())))
        else:
            take(dialogue.lost())
        outcomes = dialogue.outcomes
        assert len(outcomes) == count
        for name, outcome in zip(names, outcomes, strict=True):
            if outcome.result is Result.DELIVERED:
                assert name in host.taken, (name, outcome.text)
            if outcome.result is Result.FAILED:
                assert host.refused
                assert name not in host.taken or outcome.scope is Scope.MESSAGE


def test_the_host_of_these_tests_knows_what_it_took() -> None:
    host = Host(lmtp=False)
    host.reply(220)
    host.read(b"MAIL FROM:<>\r\nRCPT TO:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n")
    for code in (250, 250, 550, 354):
        host.reply(code)
    host.read(b"x\r\n..\r\n.\r")
    host.read(b"\nMAIL FROM:<>\r\nRCPT TO:<c@x>\r\nBDAT 3 LAST\r\nxxx")
    for code in (250, 250, 250, 450):
        host.reply(code)
    assert host.taken == {"a"}
    assert host.refused
    assert not host.waiting


def test_types_are_as_the_queue_has_them() -> None:
    """A delivery's message is never changed by sending it."""
    delivery = to("bob")
    before = {name: getattr(delivery.message, name) for name in dir(Message) if not name.startswith("_")}
    dialogue = opened("PIPELINING")
    dialogue.send(delivery)
    dialogue.feed(b"250 ok\r\n250 ok\r\n354 go\r\n")
    dialogue.feed(b"250 ok\r\n")
    assert {name: getattr(delivery.message, name) for name in before} == before
