"""Rules: the first that matches decides, when all before it are decided, and its refusal says which one it is."""

from __future__ import annotations

import re
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsmtp.address import NULL, Address, AddressError, parse_address
from fastsmtp.lists import Networks
from fastsmtp.patterns import has_address, has_name, parse_name_pattern, parse_pattern
from fastsmtp.policy.rules import ORDER, Rule, Rules, make_rules
from fastsmtp.reply import Then
from fastsmtp.verdict import Ask, Client, Stage

CONNECT, HELO, MAIL, RCPT = ORDER


def asks(client: str, helo: str, sender: str, recipient: str) -> dict[Stage, Ask]:
    """What is asked in the course of a session."""
    who = Client(client, 1, "test")
    path = parse_address(sender) if sender else NULL
    asked = {CONNECT: Ask(CONNECT, who), HELO: Ask(HELO, who, helo=helo)}
    who = Client(client, 1, "test")
    who.helo = helo
    asked[MAIL] = Ask(MAIL, who, path)
    asked[RCPT] = Ask(RCPT, who, path, parse_address(recipient))
    return asked


def play(rules: list[Rule], client: str, helo: str, sender: str, recipient: str) -> tuple[str, str] | None:
    """The stage at which the session is refused, and why."""
    checks = make_rules(rules)
    for stage, ask in asks(client, helo, sender, recipient).items():
        for check in checks:
            if check.stage is stage and (verdict := check(ask)) is not None:
                assert verdict.reply is not None
                return stage.value, verdict.reason
    return None


def networks(*texts: str) -> Networks:
    return Networks.of([ip_network(text) for text in texts])


BAD, GOOD, OTHER = networks("192.0.2.0/24"), networks("192.0.2.7"), networks("10.0.0.0/8")
MALLORY = ("192.0.2.7", "x.test", "mallory@bad.test", "ann@here.test")


@pytest.mark.parametrize(
    ("rules", "refused"),
    [
        ([], None),
        ([Rule("a", "refuse", BAD)], ("connect", "rule-a")),
        ([Rule("a", "refuse", networks("198.51.100.0/24"))], None),
        ([Rule("a", "allow", GOOD), Rule("b", "refuse", BAD)], None),
        ([Rule("a", "refuse", BAD), Rule("b", "allow", GOOD)], ("connect", "rule-a")),
        ([Rule("a", "refuse", helo={"*.test"})], ("helo", "rule-a")),
        ([Rule("a", "refuse", senders={"bad.test"})], ("mail", "rule-a")),
        ([Rule("a", "refuse", recipients={"ann@here.test"})], ("rcpt", "rule-a")),
        ([Rule("a", "refuse", BAD, senders={"bad.test"})], ("mail", "rule-a")),
        ([Rule("a", "refuse", BAD, senders={"good.test"})], None),
        # a rule that may match yet keeps those behind it waiting
        ([Rule("a", "allow", recipients={"ann@here.test"}), Rule("b", "refuse", BAD)], None),
        ([Rule("a", "allow", recipients={"bob@here.test"}), Rule("b", "refuse", BAD)], ("rcpt", "rule-b")),
        ([Rule("a", "allow", helo={"y.test"}), Rule("b", "refuse", BAD)], ("helo", "rule-b")),
        ([Rule("a", "allow", GOOD, senders={"good.test"}), Rule("b", "refuse", BAD)], ("mail", "rule-b")),
        # but not one that cannot
        ([Rule("a", "allow", OTHER, recipients={"*"}), Rule("b", "refuse", BAD)], ("connect", "rule-b")),
        ([Rule("a", "refuse", recipients={"*"}), Rule("b", "refuse", BAD)], ("rcpt", "rule-a")),
        ([Rule("a", "refuse")], ("connect", "rule-a")),
        ([Rule("a", "allow", BAD), Rule("b", "refuse")], None),
    ],
)  # fmt: skip
def test_the_first_that_matches(rules: list[Rule], refused: tuple[str, str] | None) -> None:
    assert play(rules, *MALLORY) == refused


FACTS = (BAD, {"x.test"}, {"bad.test"}, {"ann@here.test"})
NOT_FACTS = (networks("10.0.0.0/8"), {"y.test"}, {"good.test"}, {"bob@here.test"})
CONDITION = st.sampled_from([0, 1, 2])  # not asked, true, false


@given(
    given_rules=st.lists(
        st.tuples(st.sampled_from(["allow", "refuse", "defer"]), st.tuples(CONDITION, CONDITION, CONDITION, CONDITION)),
        max_size=5,
    )
)
def test_the_stage_changes_nothing(given_rules: list[tuple[str, tuple[int, ...]]]) -> None:
    """What a session hears is what the rules in their order say of all facts together."""
    rules = [
        Rule(str(n), action, *[(None, FACTS[i], NOT_FACTS[i])[which] for i, which in enumerate(conditions)])  # type: ignore[arg-type]
        for n, (action, conditions) in enumerate(given_rules)
    ]
    deciding = next((n for n, (_, conditions) in enumerate(given_rules) if 2 not in conditions), None)
    wanted = None if deciding is None or given_rules[deciding][0] == "allow" else f"rule-{deciding}"
    played = play(rules, *MALLORY)
    assert (played and played[1]) == wanted


def test_replies() -> None:
    def reply(rule: Rule, at_connect: bool) -> str:
        verdict = rule.at_connect if at_connect else rule.verdict
        assert verdict is not None
        assert verdict.reply is not None
        assert (verdict.reply.then is Then.CLOSE) == (verdict.reply.code == 421)
        return verdict.reply.wire.decode()

    refuse = Rule("spam", "refuse", text="Go away, see https://here.test/why")
    assert reply(refuse, True) == "554 5.7.1 Go away, see https://here.test/why (rule-spam)\r\n"
    assert reply(refuse, False) == "550 5.7.1 Go away, see https://here.test/why (rule-spam)\r\n"
    assert reply(Rule("2", "defer"), True) == "421 4.7.1 Not now, try again later (rule-2)\r\n"
    at_connect = Rules(CONNECT, [refuse])(Ask(CONNECT, Client("192.0.2.7", 1, "test")))
    assert at_connect is refuse.at_connect
    assert Rules(HELO, [refuse])(Ask(HELO, Client("192.0.2.7", 1, "test"), helo="x")) is refuse.verdict
    assert reply(Rule("2", "defer"), False) == "450 4.7.1 Not now, try again later (rule-2)\r\n"


def test_who_is_not_asked() -> None:
    check = Rules(CONNECT, [Rule("a", "refuse")])
    stranger, trusted, user = (Client("192.0.2.7", 1, "test") for _ in range(3))
    trusted.trusted = True
    user.user = "ann"
    assert check(Ask(CONNECT, stranger)) is not None
    assert check(Ask(CONNECT, trusted)) is None
    assert check(Ask(CONNECT, user)) is None


def test_a_unix_socket_is_in_no_network() -> None:
    assert play([Rule("a", "refuse", networks("0.0.0.0/0", "::/0"))], "", *MALLORY[1:]) is None
    assert play([Rule("a", "refuse", networks("::/0"))], "2001:db8::1", *MALLORY[1:]) == ("connect", "rule-a")


@pytest.mark.parametrize(
    ("patterns", "helo", "refused"),
    [
        ({"localhost"}, "LOCALHOST", True),
        ({"*.dyn.test"}, "a.b.dyn.test.", True),
        ({"*.dyn.test"}, "dyn.test", False),
        ({"[192.0.2.1]"}, "[192.0.2.1]", True),
        ({"xn--bcher-kva.test"}, "bücher.test", True),
        ({"x.test"}, "no name!", False),
        ({"*"}, "no name!", True),
    ],
)
def test_helo(patterns: set[str], helo: str, refused: bool) -> None:
    assert (play([Rule("a", "refuse", helo=patterns)], "192.0.2.7", helo, *MALLORY[2:]) is not None) == refused


# Patterns


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("Ann@X.test", ["ann@x.test", '"ann"@x.test'], ["bob@x.test", "ann@y.test", ""]),
        ("x.test", ["ann@x.test"], ["ann@sub.x.test", "ann@yx.test"]),
        ("@x.test", ["ann@x.test"], ["ann@sub.x.test"]),
        ("*.x.test", ["ann@sub.x.test", "ann@a.b.x.test"], ["ann@x.test", "ann@yx.test"]),
        ("<>", [""], ["ann@x.test"]),
        ("*", ["", "ann@x.test"], []),
        ("bücher.test", ["a@xn--bcher-kva.test"], []),
        ("[192.0.2.1]", ["a@[192.0.2.1]"], []),
    ],
)
def test_patterns(pattern: str, matches: list[str], others: list[str]) -> None:
    keys = {parse_pattern(pattern)}
    for text in matches + others:
        address = parse_address(text) if text else NULL
        assert has_address(keys, address) == (text in matches), text


@pytest.mark.parametrize("text", ["", "a..b", "<a@b.test>", "*x", "a@", "x.test.", "*.*.x"])
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(AddressError):
        parse_pattern(text)
    with pytest.raises(AddressError):
        parse_name_pattern(text or "a b")


def test_names_of_few_labels() -> None:
    assert has_name({"*.test"}, "x.test")
    assert not has_name({"*.test"}, "test")
    assert not has_name(set(), "")
    assert re.fullmatch("rule-.*", Rule("x", "refuse").reason)
    assert has_address({"a@b"}, Address("A", "b"))
