"""Users submit over a connection: whose mail is taken, what is kept of it, how much; and on which listener."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from test_rewrite import LONG, decoded
from users import Users, plain
from wire import ARRIVED, HOSTNAME, Bench, Kept, Player, bench

from fastsmtp._shared import Shared
from fastsmtp.address import NULL, Address, parse_address
from fastsmtp.config_values import Rate, parse_rate
from fastsmtp.message import date
from fastsmtp.metrics import Counter
from fastsmtp.policy import Check
from fastsmtp.policy.quota import Quota
from fastsmtp.policy.senders import Senders
from fastsmtp.rights import Rights
from fastsmtp.submission import Handling
from fastsmtp.verdict import Ask, Client, Stage, Verdict

HANDLING = Handling()
RIGHTS = Rights(frozenset({"ann@here.test"}), frozenset({"ann.test"}))


class Store:
    """Where rights are looked up. `wait`: the answer has to be waited for."""

    def __init__(self, rights: Rights | None = RIGHTS, wait: bool = False) -> None:
        self.rights = rights
        self.wait = wait
        self.asked: list[str] = []

    def __call__(self, user: str) -> Rights | Awaitable[Rights | None] | None:
        self.asked.append(user)
        return self._later() if self.wait else self.rights

    async def _later(self) -> Rights | None:
        await asyncio.sleep(0)
        return self.rights


@contextmanager
def submission(
    handling: Handling | None = HANDLING, *checks: Check, store: Store | None = None, **terms: Any
) -> Iterator[Bench]:
    options = {"auth_clear": True, "early_refused": False} | terms
    role = options.pop("role", "submission")
    found = [Senders(store or Store()), *checks]
    with bench(role, users=Users(), checks=found, handling=handling, reports="all", **options) as desk:
        yield desk


def log_in(desk: Bench, user: str = "ann", password: str = "secret") -> Player:
    player = desk.connect()
    player.say("EHLO [192.168.0.7]")
    assert player.say(f"AUTH PLAIN {plain(user, password)}") == ["235 2.7.0 Authentication successful"]
    return player


def submit(player: Player, *lines: str, sender: str = "ann@here.test", recipient: str = "eve@away.test") -> str:
    """The last reply."""
    for command in (f"MAIL FROM:<{sender}>", f"RCPT TO:<{recipient}>", "DATA"):
        (reply,) = player.say(command)
        if reply[0] > "3":
            return reply
    (reply,) = player.say(*lines, ".")
    return reply


def sent(kept: Kept) -> bytes:
    """As it goes on."""
    message, body = kept.message, kept.body
    edges = [0, *(edge for cut in message.cuts for edge in cut), len(body)]
    return message.prefix + b"".join(body[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))


def test_a_message_is_completed() -> None:
    with submission() as desk:
        player = log_in(desk)
        assert submit(player, "To: b@away.test", "Bcc: c@away.test", "", "Hi").startswith("250 2.0.0 Queued")
        (kept,) = desk.keeper.kept
        prefix = kept.message.prefix
        trace = prefix[: prefix.index(b"From: ")]
        today = date(int(ARRIVED)).encode()
        assert trace.startswith(b"Received: from [192.168.0.7] ([192.0.2.7])\r\n\tby ")
        assert b" with ESMTPA id " in trace
        assert trace.endswith(b";\r\n\t" + today + b"\r\n")
        assert prefix[len(trace) :] == (
            b"From: ann@here.test\r\nDate: %b\r\nMessage-ID: <%b@%b>\r\n"
            % (today, kept.message.id.encode(), HOSTNAME.encode())
        )
        assert kept.body == b"To: b@away.test\r\nBcc: c@away.test\r\n\r\nHi\r\n"
        assert sent(kept) == prefix + b"To: b@away.test\r\n\r\nHi\r\n"
        assert kept.message.header_end == len(b"To: b@away.test\r\nBcc: c@away.test\r\n\r\n")


def test_a_message_without_a_header_gets_one() -> None:
    with submission() as desk:
        submit(log_in(desk), "hello", "", "world")
        (kept,) = desk.keeper.kept
        assert sent(kept).endswith(f"@{HOSTNAME}>\r\n\r\nhello\r\n\r\nworld\r\n".encode())
        assert kept.message.header_end == 0


def test_the_client_is_hidden() -> None:
    with submission(Handling(hide_client=True)) as desk:
        submit(log_in(desk), "Subject: x", "")
        (kept,) = desk.keeper.kept
        assert kept.message.prefix.startswith(b"Received: from localhost (hidden)\r\n\tby ")
        assert b"192." not in kept.message.prefix
        assert kept.message.envelope.client == "192.0.2.7"  # for our own log


def test_another_author_is_refused_and_the_session_goes_on() -> None:
    with submission() as desk:
        player = log_in(desk)
        refusal = submit(player, "From: eve@away.test", "", "Hi")
        assert refusal == "550 5.7.1 The From field is not an address that you may use"
        assert submit(player, "From: x@ann.test", "", "Hi").startswith("250 ")
        (line,) = desk.logged("refused")
        assert (line["reason"], line["from"], line["stage"]) == ("from-not-yours", "ann@here.test", "end-of-data")
        assert not desk.keeper.leaked


def test_a_sender_is_added() -> None:
    with submission(Handling("add_sender")) as desk:
        assert submit(log_in(desk), "From: eve@away.test", "", "Hi").startswith("250 ")
        assert b"\r\nSender: ann@here.test\r\n" in desk.keeper.kept[0].message.prefix


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize(
    ("sender", "rights", "reply"),
    [
        ("ann@here.test", RIGHTS, "250 2.1.0 Sender OK"),
        ("ANN@HERE.TEST", RIGHTS, "250 2.1.0 Sender OK"),
        ("any.body@ann.test", RIGHTS, "250 2.1.0 Sender OK"),
        ("", RIGHTS, "250 2.1.0 Sender OK"),
        ("", Rights(), "553 5.7.1 The sender is not an address that you may use"),
        ("eve@here.test", RIGHTS, "553 5.7.1 The sender is not an address that you may use"),
        ("x@sub.ann.test", RIGHTS, "553 5.7.1 The sender is not an address that you may use"),
        ("ann@here.test", Rights(), "553 5.7.1 The sender is not an address that you may use"),
        ("eve@away.test", Rights(domains=frozenset("*")), "250 2.1.0 Sender OK"),
        ("ann@here.test", None, "451 4.3.0 Your addresses cannot be looked up now, try again later"),
    ],
)
def test_who_may_send_as_whom(sender: str, rights: Rights | None, reply: str, wait: bool) -> None:
    store = Store(rights, wait)
    with submission(store=store) as desk:
        player = log_in(desk)
        player.send(f"MAIL FROM:<{sender}>\r\n".encode())
        desk.run()
        assert player.take().decode() == f"{reply}\r\n"
        assert store.asked == ["ann"]


def test_rights_are_those_of_this_message() -> None:
    store = Store()
    with submission(store=store) as desk:
        player = log_in(desk)
        assert submit(player, "From: x@ann.test", "").startswith("250 ")
        store.rights = Rights(frozenset({"ann@here.test"}))
        assert submit(player, "From: x@ann.test", "").startswith("550 5.7.1 ")


def test_who_is_no_user_is_left_alone() -> None:
    store = Store()
    lines = ("Bcc: c@away.test", "From: eve@away.test", "", "Hi")
    with submission(Handling(complete=False), store=store, role="mx") as desk:
        player = desk.connect()
        player.say("EHLO c")
        assert submit(player, *lines, sender="eve@away.test", recipient="ann@here.test").startswith("250 ")
        (kept,) = desk.keeper.kept
        assert kept.message.cuts == ()
        assert kept.message.prefix.startswith(b"Received: from c ([192.0.2.7])")
        assert kept.message.prefix.count(b"\r\n") == 4
        player = log_in(desk)
        assert submit(player, *lines).startswith("550 5.7.1 The From")
        assert submit(player, "Bcc: c@away.test", "").startswith("250 ")
        assert sent(desk.keeper.kept[1]).endswith(b"\r\nBcc: c@away.test\r\n\r\n")
    assert store.asked == ["ann", "ann"]


def test_without_handling_nothing_is_done() -> None:
    with submission(None) as desk:
        assert submit(log_in(desk), "From: eve@away.test", "Bcc: x@y.test", "").startswith("250 ")
        assert desk.keeper.kept[0].message.cuts == ()


def test_a_bare_line_feed_by_bdat_hides_nobody() -> None:
    with submission() as desk:
        player = log_in(desk)
        octets = b"Subject: x\nFrom: eve@away.test\r\n\r\n"
        player.say("MAIL FROM:<ann@here.test>", "RCPT TO:<eve@away.test>")
        player.send(b"BDAT %d LAST\r\n%b" % (len(octets), octets))
        assert player.take() == b"550 5.6.0 The header holds a line that is no field\r\n"


@pytest.mark.parametrize(("keeps", "offered"), [("all", True), ("strangers", False), ("nobody", False)])
def test_require_tls_of_a_user_goes_into_the_queue(keeps: str, offered: bool) -> None:
    """Where whatever a user may send stays on verified hosts; what strangers may send says nothing about that."""
    with submission(keeps_tls=keeps) as desk:
        player = desk.connect()
        player.connection.client.tls = "TLSv1.3 with cipher TLS_AES_256_GCM_SHA384"
        player.say("EHLO c")
        player.say(f"AUTH PLAIN {plain('ann', 'secret')}")
        assert ("250-REQUIRETLS" in player.say("EHLO c")) == offered
        (reply,) = player.say("MAIL FROM:<ann@here.test> REQUIRETLS")
        assert reply[:3] == ("250" if offered else "555")
        if offered:
            player.say("RCPT TO:<eve@away.test>", "DATA")
            player.say("Subject: x", "", ".")
            (kept,) = desk.keeper.kept
            assert kept.message.envelope.require_tls
            assert kept.message.envelope.protocol == "ESMTPSA"


# Long lines


@pytest.mark.parametrize("step", [1 << 20, 7])
@pytest.mark.parametrize("bdat", [False, True])
def test_long_lines_are_rewritten(bdat: bool, step: int) -> None:
    message = b"From: ann@here.test\r\nBcc: x@y.test\r\n\r\n" + LONG + b"\r\n"
    with submission(Handling(rewrite=True)) as desk:
        player = log_in(desk)
        player.say("MAIL FROM:<ann@here.test>", "RCPT TO:<eve@away.test>")
        if bdat:
            half = len(message) // 2
            octets = b"BDAT %d\r\n%bBDAT %d LAST\r\n%b" % (half, message[:half], len(message) - half, message[half:])
        else:
            player.say("DATA")
            octets = message + b".\r\n"
        for place in range(0, len(octets), step):
            player.send(octets[place : place + step])
        assert b"250 2.0.0 Queued" in player.take()
        (kept,) = desk.keeper.kept
        assert kept.message.size == len(kept.body)
        assert kept.body[: kept.message.header_end].endswith(b"quoted-printable\r\n\r\n")
        assert max(map(len, kept.body.split(b"\r\n"))) <= 76
        assert decoded(sent(kept)) == [LONG + b"\r\n"]
        assert b"Bcc" not in sent(kept)
        assert submit(player, "Subject: x", "", "short").startswith("250 ")
        assert desk.keeper.kept[1].body == b"Subject: x\r\n\r\nshort\r\n"


def test_long_lines_stay_where_they_are_not_rewritten() -> None:
    with submission() as desk:
        assert submit(log_in(desk), "Subject: x", "", LONG.decode()).startswith("250 ")
        assert LONG in desk.keeper.kept[0].body


def test_binary_mime_is_not_offered_to_users() -> None:
    """What the next host takes is not known yet; and then there is nothing to rewrite."""
    with submission(Handling(rewrite=True)) as desk:
        player = log_in(desk)
        assert "250-CHUNKING" in player.say("EHLO c")
        assert player.say("MAIL FROM:<ann@here.test> BODY=BINARYMIME")[0].startswith("501 5.5.4 ")


def test_a_refused_message_leaves_nothing_behind() -> None:
    """In the rewriter: the next message begins anew."""
    with submission(Handling(rewrite=True), message_size=5000) as desk:
        player = log_in(desk)
        assert submit(player, "Subject: x", "", "y" * 6000).startswith("552 ")
        assert submit(player, "From: eve@away.test", "", LONG.decode()).startswith("550 5.7.1")
        player.say("MAIL FROM:<ann@here.test>", "RCPT TO:<eve@away.test>", "BDAT 4")
        player.send(b"AAAA")
        player.say("RSET")
        assert submit(player, "Subject: x", "", "Hi").startswith("250 ")
        (kept,) = desk.keeper.kept
        assert kept.body == b"Subject: x\r\n\r\nHi\r\n"
        assert not desk.keeper.leaked


# Quotas


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def quota(stage: Stage, clock: Clock, *rates: str, shared: Shared | None = None) -> Quota:
    return Quota(stage, [parse_rate(rate) for rate in rates], shared or Shared(1, 1), clock)


def ask(quota: Quota, user: str = "ann") -> str:
    """The reply, empty when there is none."""
    client = Client("192.0.2.7", 1, "test")
    client.user = user
    verdict = quota(Ask(quota.stage, client, parse_address("ann@here.test"), Address("eve", "away.test")))
    if verdict is None:
        return ""
    assert isinstance(verdict, Verdict)
    assert verdict.reply is not None
    assert verdict.reason == verdict.reply.reason
    return f"{verdict.reason} {verdict.reply.wire.decode().strip()}"


def test_a_quota_is_used_up_and_fills_again() -> None:
    clock = Clock()
    check = quota(Stage.MAIL, clock, "3/h")
    assert [ask(check) for _ in range(3)] == ["", "", ""]
    text = "quota-messages 450 4.7.1 Your quota of messages (3/h) is used up, try again in"
    assert ask(check) == f"{text} 20 min"
    clock.now += 1150
    assert ask(check) == f"{text} 50 s"
    clock.now += 50
    assert ask(check) == ""
    assert ask(check) == f"{text} 20 min"
    assert ask(check, "bob") == ""
    assert [ask(check, "") for _ in range(9)] == [""] * 9


def test_of_several_rates_each_holds_and_none_is_spent_for_nothing() -> None:
    clock = Clock()
    check = quota(Stage.RCPT, clock, "2/h", "3/d")
    assert [ask(check), ask(check)] == ["", ""]
    assert ask(check).endswith("recipients (2/h) is used up, try again in 30 min")
    clock.now += 1800
    assert ask(check) == ""
    clock.now += 3600
    for _ in range(5):  # the hour's is there and must stay so
        reply = ask(check)
    assert reply == "quota-recipients 452 4.7.1 Your quota of recipients (3/d) is used up, try again in 7 h"
    clock.now += 7 * 3600
    assert ask(check) == ""


def test_messages_and_recipients_are_counted_apart_and_over_all_workers() -> None:
    clock, shared = Clock(), Shared(2, 1)
    messages = [quota(Stage.MAIL, clock, "2/h", shared=shared) for _ in range(2)]
    recipients = quota(Stage.RCPT, clock, "2/h", shared=shared)
    assert [bool(ask(check)) for check in (*messages, *messages)] == [False, False, True, True]
    assert ask(recipients) == ""


def test_quotas_in_a_session() -> None:
    checks = [quota(stage, Clock(), rate) for stage, rate in ((Stage.MAIL, "2/h"), (Stage.RCPT, "3/d"))]
    with submission(Handling(), *checks) as desk:
        player = log_in(desk)
        player.say("MAIL FROM:<ann@here.test>", "RCPT TO:<a@away.test>", "RCPT TO:<b@away.test>", "RSET")
        player.say("MAIL FROM:<eve@here.test>")  # refused for another reason
        assert submit(player, "Subject: x", "").startswith("250 ")
        assert submit(player, "Subject: x", "").startswith("450 4.7.1 Your quota of messages (2/h)")
        assert [line["reason"] for line in desk.logged("refused")] == ["path-not-yours", "quota-messages"]
    checks = [quota(Stage.RCPT, Clock(), "1/d")]
    with submission(Handling(), *checks) as desk:
        player = log_in(desk)
        player.say("MAIL FROM:<ann@here.test>", "RCPT TO:<a@away.test>")
        (reply,) = player.say("RCPT TO:<b@away.test>")
        assert reply == "452 4.7.1 Your quota of recipients (1/d) is used up, try again in 24 h"
        assert desk.counted(Counter.RECIPIENTS_REFUSED) == 1
        assert player.say("DATA")[0].startswith("354")


def test_null_is_nobodys_address() -> None:
    client = Client("192.0.2.7", 1, "test")
    client.user = "ann"
    assert Senders(Store())(Ask(Stage.MAIL, client, NULL)) is None
    assert client.rights is RIGHTS
    nothing = Senders(lambda _: Rights())(Ask(Stage.MAIL, client, NULL))
    assert isinstance(nothing, Verdict), "the user has been deleted meanwhile"
    assert nothing.reason == "path-not-yours"
    assert Rate(1, 60.0).count == 1
