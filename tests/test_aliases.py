"""Aliases, lists, catch-all and details: whom an address stands for, and what becomes of the mail for each."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from pathlib import Path

import pytest
from test_lists import compiled

from fastsmtp.address import Address, parse_address
from fastsmtp.aliases import Aliases, Entry, ExpansionError, parse_entry
from fastsmtp.domains import Domain, Domains, Found
from fastsmtp.lists import Listed, Lists
from fastsmtp.policy.recipients import Recipients
from fastsmtp.policy.verify import Verify
from fastsmtp.verdict import Ask, Client, NextHop, Stage, Verdict

TEXT = """\
# everywhere
abuse: postmaster, sec@else.test
sales@here.test: Ann, bob@here.test,
  carl@else.test
ann: ann, deputy@any.test
nested@here.test: sales@here.test, bob
staff@here.test: ann@here.test, bob@here.test, x@else.test
owner-staff@here.test: bob
all@here.test: staff@here.test, carl@here.test
owner-all@here.test: boss@here.test
ghost@here.test: nobody@here.test, bob@here.test
ghosts@here.test: nobody@here.test
"quoted: name"@here.test: bob@here.test
jürgen@here.test: "j ü"@bücher.test
"""
LOCALS = "ann: eve\nvip: ann@else.test\n"
OWN = ["ann", "bob", "carl", "boss", "eve"]


@pytest.fixture
def domains(tmp_path: Path) -> Domains:
    (tmp_path / "own").mkdir()
    return Domains(
        [
            Domain("here.test", "boxes", OWN, detail="+"),
            Domain("any.test", "boxes"),
            Domain("own.test", "boxes", ["eve"], aliases=compiled(tmp_path / "own", "aliases", LOCALS)),
            Domain("catch.test", "boxes", ["ann"], catch_all=parse_address("Rest@any.test")),
            Domain("caught.test", "boxes", ["ann"], catch_all=parse_address("sales@here.test")),
            Domain("plus.test", "boxes", ["ann", "ann+x"], detail="+"),
            Domain("open.test", "boxes", detail="-"),
        ],
        "mx.here.test",
        parse_address("boss@here.test"),
    )


@pytest.fixture
def aliases(domains: Domains, tmp_path: Path) -> Aliases:
    return Aliases(domains, compiled(tmp_path, "aliases", TEXT), 100)


def expand(aliases: Aliases, text: str) -> list[str] | None:
    members = aliases.expand(parse_address(text))
    if members is None:
        return None
    return [
        f"{member.address}{f' from {member.sender}' if member.sender else ''}"
        + f" ({member.fault})" * bool(member.fault)
        + " abroad" * (not member.ours)
        for member in members
    ]


SALES = ["ann@here.test", "deputy@any.test", "bob@here.test", "carl@else.test abroad"]


@pytest.mark.parametrize(
    ("address", "members"),
    [
        ("bob@here.test", None),
        ("abuse@here.test", ["boss@here.test", "sec@else.test abroad"]),
        ("ABUSE@any.test", ["boss@here.test", "sec@else.test abroad"]),
        ("abuse@else.test", None),
        ("Sales@here.test", SALES),
        ("sales@any.test", None),
        ("sales+berlin@here.test", SALES),
        ("ann@here.test", ["ann@here.test", "deputy@any.test"]),  # names itself: keeps its mailbox
        ("nested@here.test", SALES),  # each mailbox once
        (
            "staff@here.test",
            ["ann@here.test from owner-staff@here.test", "deputy@any.test from owner-staff@here.test",
             "bob@here.test from owner-staff@here.test", "x@else.test from owner-staff@here.test abroad"],
        ),
        ("owner-staff@here.test", ["bob@here.test"]),
        (
            "all@here.test",
            ["ann@here.test from owner-staff@here.test", "deputy@any.test from owner-staff@here.test",
             "bob@here.test from owner-staff@here.test", "x@else.test from owner-staff@here.test abroad",
             "carl@here.test from owner-all@here.test"],
        ),
        ("ghost@here.test", ["nobody@here.test (unknown mailbox)", "bob@here.test"]),
        ('"quoted: name"@here.test', ["bob@here.test"]),
        ("JÜRGEN@here.test", ['"j ü"@xn--bcher-kva.test abroad']),
        ("ann@own.test", ["eve@own.test"]),  # the domain's own go before those of all
        ("vip@own.test", ["ann@else.test abroad"]),
        ("vip@here.test", None),
        ("postmaster@here.test", None),
    ],
)  # fmt: skip
def test_expansion(aliases: Aliases, address: str, members: list[str] | None) -> None:
    assert expand(aliases, address) == members


def test_what_is_only_a_loop_at_run_time_ends(domains: Domains, tmp_path: Path) -> None:
    """Of two tables, which are not compiled together."""
    here = domains.find("own.test")
    assert here is not None
    (tmp_path / "2").mkdir()
    here.aliases = compiled(tmp_path / "2", "aliases", "a: b@any.test\n")
    aliases = Aliases(domains, compiled(tmp_path, "aliases", "b@any.test: a@own.test, eve@own.test\n"), 100)
    assert expand(aliases, "b@any.test") == ["b@any.test", "eve@own.test"]
    assert expand(aliases, "a@own.test") == ["a@own.test (unknown mailbox)", "eve@own.test"]


def test_what_names_the_same_again_and_again_ends_too(domains: Domains, tmp_path: Path) -> None:
    """Of two tables, each of them small enough: a million steps to one mailbox would hold up a worker for seconds."""
    here = domains.find("own.test")
    assert here is not None
    (tmp_path / "2").mkdir()
    here.aliases = compiled(tmp_path / "2", "aliases", "bomb: " + ", ".join(f"n{n}@any.test" for n in range(100)))
    again = ", ".join(["eve@own.test"] * 100)
    inner = "\n".join(f"n{n}@any.test: {again}" for n in range(100))
    aliases = Aliases(domains, compiled(tmp_path, "aliases", inner), 1000)
    with pytest.raises(ExpansionError, match="steps"):
        aliases.expand(parse_address("bomb@own.test"))
    assert expand(Aliases(domains, compiled(tmp_path, "aliases", inner), 1020), "bomb@own.test") == ["eve@own.test"]


def test_the_postmaster_may_be_an_alias(domains: Domains, tmp_path: Path) -> None:
    aliases = Aliases(domains, compiled(tmp_path, "aliases", "boss: ann, bob\nabuse: postmaster\n"), 100)
    for address in ("postmaster@any.test", "abuse@here.test", "boss@here.test"):
        assert expand(aliases, address) == ["ann@here.test", "bob@here.test"]
    assert aliases.expand(Address("Postmaster", "")) is not None


def test_bounds(domains: Domains, tmp_path: Path) -> None:
    many = ", ".join(f"u{n}@any.test" for n in range(101))
    aliases = Aliases(domains, compiled(tmp_path, "aliases", f"many: {many}\nfew: bob\n"), 100)
    with pytest.raises(ExpansionError):
        aliases.expand(parse_address("many@here.test"))
    deep = "".join(f"a{n}: a{n + 1}\n" for n in range(30)) + "a30: bob\n"
    aliases = Aliases(domains, compiled(tmp_path, "aliases", deep), 100)
    assert expand(aliases, "a15@here.test") == ["bob@here.test"]
    with pytest.raises(ExpansionError):
        aliases.expand(parse_address("a0@here.test"))


def test_aliases_that_name_each_other_often_are_walked_once(
    domains: Domains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way from top to bottom on its own would be 2 ** 13 of them."""
    text = "".join(f"a{n}: a{n + 1}, b{n + 1}\nb{n}: b{n + 1}, a{n + 1}\n" for n in range(13))
    aliases = Aliases(domains, compiled(tmp_path, "aliases", f"{text}a13: bob\nb13: bob, carl\n"), 100)
    found: list[Address] = []
    find = Aliases._find

    def count(self: Aliases, address: Address, row: Domain | None) -> str | None:
        found.append(address)
        assert len(found) < 200
        return find(self, address, row)

    monkeypatch.setattr(Aliases, "_find", count)
    assert expand(aliases, "a0@here.test") == ["bob@here.test", "carl@here.test"]


# What is remembered


class Counted:
    """A list that counts how often it is asked."""

    def __init__(self, listed: Listed) -> None:
        self._listed = listed
        self.asked = 0

    def get(self, key: str) -> str | None:
        self.asked += 1
        return self._listed.get(key)

    def has(self, mailbox: str) -> bool:
        self.asked += 1
        return self._listed.has(mailbox)


def test_members_are_looked_up_once(tmp_path: Path) -> None:
    """1,000 of them would hold up everybody else for 6 ms, at each RCPT."""
    (tmp_path / "boxes").mkdir()
    names = [f"u{n}@here.test" for n in range(1000)]
    boxes = Counted(compiled(tmp_path / "boxes", "mailboxes", "\n".join(names[1:])))
    table = Counted(compiled(tmp_path, "aliases", f"all: {', '.join(names)}\n"))
    domains = Domains([Domain("here.test", "boxes", listed=boxes, detail="+")], "mx.here.test")
    aliases = Aliases(domains, table, 1000)
    expected = ["u0@here.test (unknown mailbox)", *names[1:]]
    assert expand(aliases, "all@here.test") == expected
    assert min(boxes.asked, table.asked) >= 1000
    for address in ("all@here.test", "ALL@here.test", "all+x@here.test", "all+y@here.test"):
        boxes.asked = table.asked = 0
        assert expand(aliases, address) == expected
        assert (boxes.asked, table.asked <= 4) == (0, True), address


def test_what_is_remembered_is_what_would_be_found_again(domains: Domains, aliases: Aliases, tmp_path: Path) -> None:
    """Whatever was asked before: also where an alias is reached by way of another, of a list, or of another domain."""
    (tmp_path / "2").mkdir()
    locals_ = ("ann", "abuse", "sales", "sales+x", "nested", "staff", "all", "ghost")
    names = [f"{local}@{domain}.test" for local in locals_ for domain in ("here", "own", "any", "catch", "plus")]
    fresh = {name: expand(Aliases(domains, compiled(tmp_path / "2", "aliases", TEXT), 100), name) for name in names}
    for seed in range(5):
        random.Random(seed).shuffle(names)
        assert {name: expand(aliases, name) for name in names} == fresh


def test_a_list_that_has_changed_is_looked_up_anew(tmp_path: Path) -> None:
    (tmp_path / "boxes").mkdir()
    boxes = compiled(tmp_path / "boxes", "mailboxes", "ann\n").list_file
    table = compiled(tmp_path, "aliases", "all: ann, bob\n").list_file
    lists = Lists(tmp_path / "made")
    (tmp_path / "made" / boxes.compiled(Path()).name).symlink_to(boxes.compiled(tmp_path / "boxes" / "made"))
    row = Domain("here.test", "boxes", listed=lists.open("mailboxes", boxes.path))
    common = lists.open("aliases", table.path)
    aliases = Aliases(Domains([row], "mx.here.test"), common, 100, lambda: lists.version)
    for _ in range(2):
        assert expand(aliases, "all@here.test") == ["ann@here.test", "bob@here.test (unknown mailbox)"]
        assert lists.refresh() == []
    compiled(tmp_path / "boxes", "mailboxes", "bob\n")
    assert lists.refresh() == []
    assert expand(aliases, "all@here.test") == ["ann@here.test (unknown mailbox)", "bob@here.test"]
    compiled(tmp_path, "aliases", "all: ann, bob\nann: bob\n")
    assert lists.refresh() == []
    assert expand(aliases, "all@here.test") == ["bob@here.test"]


def test_what_the_next_host_takes_is_not_remembered(tmp_path: Path) -> None:
    hops: list[NextHop | None] = [None]
    row = Domain("here.test", "boxes", hop=lambda: hops[-1])
    aliases = Aliases(Domains([row], "mx.here.test"), compiled(tmp_path, "aliases", "all: ann, bob\n"), 100)
    for hop in (None, NextHop(1000), NextHop(2000), None):
        hops.append(hop)
        members = aliases.expand(parse_address("all@here.test"))
        assert members is not None
        assert [member.hop for member in members] == [hop, hop]


def test_what_is_remembered_is_bounded(domains: Domains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by an alias of every domain, in ever more domains."""
    monkeypatch.setattr("fastsmtp.aliases.REMEMBERED", 100)
    text = "".join(f"a{n}: x{n}@any.test, y{n}@any.test\n" for n in range(100))
    aliases = Aliases(domains, compiled(tmp_path, "aliases", text), 100)
    for n in range(300):
        number = n % 100
        assert expand(aliases, f"a{number}@any.test") == [f"x{number}@any.test", f"y{number}@any.test"]
        kept = sum(1 + len(known.targets) for known in aliases._known.values())
        assert kept == aliases._names <= 103


def test_entries() -> None:
    entry = Entry("", ("a@x", "b c@"))
    assert parse_entry(entry.render()) == entry


# What RCPT is answered


def decide(check: Recipients, text: str, sender: str = "x@else.test") -> Verdict:
    ask = Ask(Stage.RCPT, Client("192.0.2.7", 1, "test"), parse_address(sender), parse_address(text))

    async def run() -> Verdict:
        answer = check(ask)
        return answer if isinstance(answer, Verdict) else await answer

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("address", "reason", "mailboxes"),
    [
        ("sales@here.test", "alias", ["ann@here.test", "deputy@any.test", "bob@here.test", "carl@else.test"]),
        ("ghosts@here.test", "unknown-mailbox", []),
        ("ghost@here.test", "alias", ["nobody@here.test", "bob@here.test"]),
        ("bob@here.test", "known-mailbox", []),
        ("bob+list@here.test", "known-mailbox", ["bob@here.test"]),
        ("+bob@here.test", "unknown-mailbox", []),
        ("nobody@here.test", "unknown-mailbox", []),
        ("ann@catch.test", "alias", ["ann@catch.test", "deputy@any.test"]),
        ("nobody@catch.test", "known-mailbox", ["rest@any.test"]),
        ("nobody@caught.test", "alias", ["ann@here.test", "deputy@any.test", "bob@here.test", "carl@else.test"]),
        ("ann@else.test", "relaying-denied", []),
        ("sales@else.test", "relaying-denied", []),
        ("postmaster@any.test", "known-mailbox", ["boss@here.test"]),
    ],
)
def test_recipients(domains: Domains, aliases: Aliases, address: str, reason: str, mailboxes: list[str]) -> None:
    verdict = decide(Recipients(domains, aliases), address)
    found = [verdict.recipient] if verdict.recipient else [member.address for member in verdict.members]
    assert (verdict.reason, [address.mailbox for address in found]) == (reason, mailboxes)
    assert (verdict.reply is None) == (reason in ("alias", "known-mailbox"))


def test_an_alias_that_is_too_large_is_put_off(domains: Domains, tmp_path: Path) -> None:
    aliases = Aliases(domains, compiled(tmp_path, "aliases", "many: a, b, c\n"), 2)
    verdict = decide(Recipients(domains, aliases), "many@any.test")
    assert verdict.reply is not None
    assert (verdict.reason, verdict.reply.code, verdict.reply.enhanced) == ("alias-too-large", 451, "4.2.4")


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("ann@plus.test", "ann@plus.test"),
        ("Ann+x@plus.test", "ann+x@plus.test"),  # a mailbox of its own
        ("ann+y@plus.test", "ann@plus.test"),
        ("ann+@plus.test", "ann@plus.test"),
        ("x-a-b@open.test", "x@open.test"),
        ("-a@open.test", "-a@open.test"),
    ],
)
def test_details(domains: Domains, address: str, key: str) -> None:
    parsed = parse_address(address)
    mailbox = domains.resolve(parsed, domains.find(parsed.domain))
    assert mailbox is not None
    assert (mailbox.mailbox, str(mailbox)) == (key, address)  # the address stays as it came
    assert domains.route(parsed)[1].mailbox == key


def test_route_of_what_was_accepted(domains: Domains) -> None:
    """Mail for a mailbox that is gone since goes where it was accepted for, not to somebody else."""
    assert domains.route(parse_address("gone@catch.test"))[1].mailbox == "gone@catch.test"
    assert domains.route(parse_address("gone+x@here.test"))[1].mailbox == "gone+x@here.test"


# Whom somebody else is asked about


class Knows:
    """Somebody who is asked."""

    def __init__(self, answer: Found | Exception, waits: bool) -> None:
        self.answer = answer
        self.waits = waits
        self.asked: list[str] = []

    def __call__(self, address: Address) -> Found | Awaitable[Found]:
        self.asked.append(str(address))
        return self.later() if self.waits else self.now()

    def now(self) -> Found:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def later(self) -> Found:
        await asyncio.sleep(0)
        return self.now()


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    ("answer", "catch_all", "reason", "code", "mailbox"),
    [
        (Found.KNOWN, None, "known-mailbox", 0, "ann@asked.test"),
        (Found.UNKNOWN, None, "unknown-mailbox", 550, ""),
        (Found.UNKNOWN, "rest@any.test", "known-mailbox", 0, "rest@any.test"),
        (Found.TEMPFAIL, None, "recipient-not-checked", 451, ""),
        (Found.TEMPFAIL, "rest@any.test", "recipient-not-checked", 451, ""),
    ],
)
def test_somebody_else_is_asked(
    waits: bool, answer: Found, catch_all: str | None, reason: str, code: int, mailbox: str
) -> None:
    knows = Knows(answer, waits)
    rest = parse_address(catch_all) if catch_all else None
    asked = Domain("asked.test", "boxes", ask=knows, detail="+", catch_all=rest)
    check = Recipients(Domains([asked, Domain("any.test", "boxes")], "mx.test", parse_address("boss@asked.test")))
    verdict = decide(check, "Ann+x@asked.test")
    assert (verdict.reason, verdict.reply.code if verdict.reply else 0) == (reason, code)
    assert (verdict.recipient.mailbox if verdict.recipient else "") == mailbox
    assert knows.asked == ["Ann+x@asked.test"]
    # whose name only begins like the postmaster's
    assert decide(check, '"postmaster@x"@asked.test').reason == reason
    assert len(knows.asked) == 2
    assert decide(check, "postmaster@asked.test").reply is None
    assert decide(check, "ann@else.test").reason == "relaying-denied"
    assert len(knows.asked) == 2


def test_an_alias_is_found_before_anybody_is_asked(tmp_path: Path) -> None:
    knows = Knows(Found.UNKNOWN, False)
    domains = Domains([Domain("asked.test", "boxes", ask=knows), Domain("here.test", "boxes", ["bob"])], "mx.test")
    aliases = Aliases(domains, compiled(tmp_path, "aliases", "sales: bob@here.test, eve\n"), 10)
    verdict = decide(Recipients(domains, aliases), "sales@asked.test")
    # a member there is taken as it is: its host says at delivery whether it is one
    assert [(str(member.address), member.fault) for member in verdict.members] == [
        ("bob@here.test", ""), ("eve@asked.test", ""),
    ]  # fmt: skip
    assert knows.asked == []


# VRFY and EXPN


@pytest.mark.parametrize(
    ("stage", "address", "trusted", "code", "text"),
    [
        (Stage.VRFY, "bob@here.test", False, 252, ""),
        (Stage.VRFY, "bob@here.test", True, 250, "<bob@here.test>"),
        (Stage.VRFY, "bob@HERE.test", True, 250, "<bob@here.test>"),
        (Stage.VRFY, "bob", True, 250, "<bob@here.test>"),
        (Stage.VRFY, "nobody@here.test", True, 550, ""),
        (Stage.VRFY, "nobody@any.test", True, 252, ""),
        (Stage.VRFY, "sales@here.test", True, 250, "<sales@here.test>"),
        (Stage.VRFY, "ann@else.test", True, 252, ""),
        (Stage.VRFY, "postmaster@here.test", True, 250, "<boss@here.test>"),
        (Stage.EXPN, "sales@here.test", False, 252, ""),
        (Stage.EXPN, "sales", True, 250, "<ann@here.test>\n<deputy@any.test>\n<bob@here.test>\n<carl@else.test>"),
        (Stage.EXPN, "bob@here.test", True, 550, ""),
        (Stage.EXPN, "jürgen@here.test", True, 252, ""),
    ],
)
def test_verify(
    domains: Domains, aliases: Aliases, stage: Stage, address: str, trusted: bool, code: int, text: str
) -> None:
    client = Client("192.0.2.7", 1, "test")
    client.trusted = trusted
    asked = parse_address(address) if "@" in address else Address(address, "")
    verdict = Verify(stage, domains, aliases, False)(Ask(stage, client, recipient=asked))
    assert verdict.reply is not None
    assert verdict.reply.code == code
    if text:
        assert verdict.reply.text == text
    stranger = Client("192.0.2.7", 1, "test")
    told = Verify(stage, domains, aliases, True)(Ask(stage, stranger, recipient=asked))
    if trusted:
        assert told.reply is not None
        assert told.reply.wire == verdict.reply.wire
