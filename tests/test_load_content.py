"""What the generator sends: patterns, sizes, files as they are, dots, and the Mail objects that come of them."""

from __future__ import annotations

import email
import email.policy
import hashlib
import re
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest import LoadError, content, messages
from loadtest.content import Mail, Source, make_source
from loadtest.ledger import find_fault
from loadtest.messages import as_lines, make_message, read_messages, stuff
from loadtest.options import Options
from loadtest.patterns import parse_pattern
from loadtest.proxy import render_proxy
from loadtest.sizes import mixed, parse_size, parse_sizes

CORPUS = Path(__file__).parent.parent.parent / "shared" / "corpus"
OCTETS = st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b".", b"a", b"\0", b"\xff"]), max_size=40).map(b"".join)


def addresses(pattern: str, count: int) -> list[str]:
    render = parse_pattern(pattern, Random(1)).render
    return [render(number) for number in range(count)]


def take(source: Source, count: int) -> list[Mail]:
    return [source() for _ in range(count)]


# Patterns


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("b@y.test", ["b@y.test"] * 7),
        ("100%@y.test", ["100%@y.test"] * 7),
        ("u{1..3}@y.test", [f"u{n}@y.test" for n in (1, 2, 3, 1, 2, 3, 1)]),
        ("u{08..10}@y.test", [f"u{n}@y.test" for n in ("08", "09", "10") * 2 + ("08",)]),
        ("u%{n}@y.test", [f"u%{n}@y.test" for n in range(7)]),
        ("u{n}@d{0..1}.test", [f"u{n}@d{n % 2}.test" for n in range(7)]),
        (
            "{1..2}@{5..7}.test",
            ["1@5.test", "2@5.test", "1@6.test", "2@6.test", "1@7.test", "2@7.test", "1@5.test"],
        ),
        ("Postmaster", ["Postmaster"] * 7),
    ],
)
def test_addresses_of_a_pattern(pattern: str, expected: list[str]) -> None:
    assert addresses(pattern, 7) == expected


def test_random_addresses_are_random_and_those_of_the_seed() -> None:
    found = addresses("m-{random}@y.test", 100)
    assert len(set(found)) == 100
    assert all(re.fullmatch("m-[0-9a-f]{10}@y[.]test", address) for address in found)
    assert found == addresses("m-{random}@y.test", 100)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("", "no address"),
        ("<>", "no address"),
        ("nobody", "no address"),
        ("<a@y.test>", "no address"),
        ("a b@y.test", "no address"),
        ("ä@y.test", "no address"),
        ("a@y.test\r\nDATA", "no address"),
        ("a@b@y.test", "no address"),
        ("a" * 250 + "@y.test", "no address"),
        ("u{3..1}@y.test", "none of"),
        ("u{}@y.test", "none of"),
        ("u{m}@y.test", "none of"),
        ("u{1..2@y.test", "brace"),
        ("u}@y.test", "brace"),
    ],
)
def test_what_is_no_pattern(pattern: str, said: str) -> None:
    with pytest.raises(LoadError, match=said):
        make_source(Options(recipient=pattern), 0, 1)


@pytest.mark.parametrize("null", ["", "<>"])
def test_null_sender(null: str) -> None:
    mail = make_source(Options(sender=null), 0, 1)()
    assert (mail.sender, mail.mail) == ("", b"MAIL FROM:<>\r\n")


# Envelopes


def test_a_fixed_message_is_the_same_object_each_time() -> None:
    source = make_source(Options(sender="s@x.test", recipient="r@y.test", size="1KB"), 0, 1)
    mail = source()
    assert all(source() is mail for _ in range(10))
    assert mail.mail == b"MAIL FROM:<s@x.test>\r\n"
    assert mail.rcpts == (b"RCPT TO:<r@y.test>\r\n",)
    assert (mail.sender, mail.recipients) == ("s@x.test", ("r@y.test",))
    assert (mail.id, mail.sha256, mail.raw, mail.eight_bit) == ("", "", b"", False)
    assert len(mail.text) == 1003


def test_a_counting_pattern_comes_round_with_the_same_objects() -> None:
    source = make_source(Options(recipient="u{1..5}@y.test"), 0, 1)
    first = take(source, 5)
    assert [mail.recipients[0] for mail in first] == [f"u{n}@y.test" for n in range(1, 6)]
    assert all(again is mail for again, mail in zip(take(source, 5), first, strict=True))
    assert len({id(mail.text) for mail in first}) == 1


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7, 10])
def test_processes_together_count_round_evenly(processes: int) -> None:
    options = Options(recipient="u{1..12}@y.test", processes=processes)
    seen = Counter(
        mail.recipients[0] for process in range(processes) for mail in take(make_source(options, process, 1), 12)
    )
    assert seen == {f"u{n}@y.test": processes for n in range(1, 13)}


def test_running_numbers_are_unique_over_processes() -> None:
    options = Options(sender="s{n}@x.test", recipient="u{n}@y.test", recipients=3, processes=4)
    mails = [mail for process in range(4) for mail in take(make_source(options, process, 1), 50)]
    assert sorted(mail.sender for mail in mails) == sorted(f"s{n}@x.test" for n in range(200))
    assert sorted(r for mail in mails for r in mail.recipients) == sorted(f"u{n}@y.test" for n in range(600))


def test_several_recipients_are_consecutive_and_differ() -> None:
    mails = take(make_source(Options(recipient="u{1..4}@y.test", recipients=3), 0, 1), 5)
    numbers = [tuple(int(recipient[1]) for recipient in mail.recipients) for mail in mails]
    assert numbers == [(1, 2, 3), (4, 1, 2), (3, 4, 1), (2, 3, 4), (1, 2, 3)]
    assert mails[1].rcpts == (b"RCPT TO:<u4@y.test>\r\n", b"RCPT TO:<u1@y.test>\r\n", b"RCPT TO:<u2@y.test>\r\n")


def test_more_recipients_than_addresses() -> None:
    with pytest.raises(LoadError, match=r"--recipients 3 needs a pattern .* user\{1\.\.3\}@y\.test; 'u\{1\.\.2\}@y"):
        make_source(Options(recipient="u{1..2}@y.test", recipients=3), 0, 1)


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("sender", ["a@x.test", "a{1..6}@x.test", "a{3..3}@x.test"])
def test_prepared_envelopes_are_those_made_one_by_one(
    sender: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(sender=sender, recipient="u{1..4}@y.test", recipients=3, processes=processes)
    prepared = [(m.mail, m.rcpts, m.sender, m.recipients) for m in take(make_source(options, 1, 1), 60)]
    assert all(mail == b"MAIL FROM:<%s>\r\n" % sender.encode() for mail, _, sender, _ in prepared)
    monkeypatch.setattr(content, "PREPARED", 0)
    assert prepared == [(m.mail, m.rcpts, m.sender, m.recipients) for m in take(make_source(options, 1, 1), 60)]


# Sizes


@pytest.mark.parametrize(
    ("text", "octets"),
    [("0", 0), ("1000", 1000), ("7B", 7), ("1KB", 1000), ("1.5 mb", 1_500_000), ("64KiB", 65_536), ("2MiB", 2 << 20)],
)
def test_size(text: str, octets: int) -> None:
    assert parse_size(text) == octets


@pytest.mark.parametrize("text", ["", "KB", "-1", "1GB", "1K", "1e3", "١KB", "2000MB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(LoadError):
        make_source(Options(size=text), 0, 1)


def test_sizes_with_shares(tmp_path: Path) -> None:
    file = tmp_path / "sizes"
    file.write_text("# of last week's log\n1KB 60\n\n10 KB : 30 %\n1MB:9.5  # newsletters\n1000: 1\n")
    assert parse_sizes("1KB:60, 10KB:30,1MB:9.5,7:0") == {1000: 60, 10_000: 30, 1_000_000: 9.5}
    assert parse_sizes(str(file)) == {1000: 61, 10_000: 30, 1_000_000: 9.5}
    assert parse_sizes(",".join(f"{n}:1" for n in range(1000))) == dict.fromkeys(range(1000), 1)
    (tmp_path / "a:1").write_text("5:1")
    assert parse_sizes(str(tmp_path / "a:1")) == {5: 1}


def test_what_are_no_sizes(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("# nothing\n")
    binary.write_bytes(b"\xff\xfe")
    for text in ("1KB:", "1KB:x", "1KB:60,", "1XB:60", "1KB:0", "nowhere", str(tmp_path), str(empty), str(binary)):
        with pytest.raises(LoadError):
            parse_sizes(text)


def test_mixed_is_the_table_it_is_said_to_be() -> None:
    sizes = mixed()
    below = {bound: sum(share for size, share in sizes.items() if size < bound) for bound in (2048, 65_536, 1 << 20)}
    assert below == pytest.approx({2048: 23.53, 65_536: 90.47, 1 << 20: 98.49})
    assert sum(sizes.values()) == pytest.approx(100)
    assert max(sizes) < 4 << 20
    assert sum(size * share for size, share in sizes.items()) / 100 == pytest.approx(53_000, rel=0.01)


def test_sizes_come_by_their_shares_and_the_seed() -> None:
    options = Options(sizes="500:60,2KB:30,10KB:10")
    mails = take(make_source(options, 0, 7), 10_000)
    seen = Counter(len(mail.text) - 3 for mail in mails)
    assert {size: round(number / 1000) for size, number in seen.items()} == {500: 6, 2000: 3, 10_000: 1}
    assert len({id(mail.text) for mail in mails}) == 3
    order = [len(mail.text) for mail in mails[:50]]
    assert order == [len(mail.text) for mail in take(make_source(options, 0, 7), 50)]
    assert order != [len(mail.text) for mail in take(make_source(options, 0, 8), 50)]
    assert order != [len(mail.text) for mail in take(make_source(options, 1, 7), 50)]


def test_more_than_a_process_can_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.eml").write_bytes(b"x" * 600)
    (tmp_path / "b.eml").write_bytes(b"x" * 600)
    monkeypatch.setattr(messages, "HELD", 1200)
    make_source(Options(corpus=str(tmp_path)), 0, 1)
    make_source(Options(sizes="600:1,500:1"), 0, 1)
    for options in (Options(corpus=str(tmp_path)), Options(sizes="600:1,500:1")):
        with pytest.raises(LoadError, match="each process holds"):
            make_source(replace(options, body="bdat"), 0, 1)
    (tmp_path / "c.eml").write_bytes(b"x")
    with pytest.raises(LoadError, match="each process holds"):
        make_source(Options(corpus=str(tmp_path)), 0, 1)


# Messages


def check_lines(raw: bytes) -> None:
    assert not raw or raw.endswith(b"\r\n")
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n", raw)


@pytest.mark.parametrize("around", [0, 200, 360, 720, 1000, 64_800, 64_800 * 2, 1_000_000])
def test_made_messages_have_their_size(around: int) -> None:
    for size in range(max(around - 80, 0), around + 80):
        raw = make_message(size)
        assert len(raw) == (2 if size == 1 else size)
        check_lines(raw)
        assert max(map(len, raw.split(b"\r\n"))) <= 72
        assert b"\n." not in raw


def test_made_message_is_mail() -> None:
    found = email.message_from_bytes(make_message(1000), policy=email.policy.default)
    assert not found.defects
    assert set(found.keys()) >= {"From", "To", "Date", "Subject"}
    assert found["Message-ID"] is None


def slowly_stuffed(raw: bytes) -> bytes:
    """RFC 5321 4.5.2, line by line."""
    lines = raw.split(b"\r\n")[:-1]
    return b"".join((b"." if line[:1] == b"." else b"") + line + b"\r\n" for line in lines) + b".\r\n"


def slowly_unstuffed(text: bytes) -> bytes:
    """As a receiver reads DATA: octets up to the first line that is a dot."""
    out = b""
    while not text.startswith(b".\r\n"):
        line, end, text = text.partition(b"\r\n")
        out += line.removeprefix(b".") + end
    assert text == b".\r\n"
    return out


def slow_lines(octets: bytes) -> bytes:
    out = b""
    for position in range(len(octets)):
        octet = octets[position : position + 1]
        out += b"\r" if octet == b"\n" and octets[position - 1 : position] != b"\r" else b""
        out += octet
    return out + (b"\r\n" if out and out[-2:] != b"\r\n" else b"")


@given(OCTETS)
def test_dots_and_lines_as_slow_ones_do_them(octets: bytes) -> None:
    raw = as_lines(octets)
    assert raw == slow_lines(octets)
    assert not re.search(rb"(?<!\r)\n", raw)
    assert stuff(raw) == slowly_stuffed(raw)
    assert slowly_unstuffed(stuff(raw)) == raw


@pytest.mark.parametrize(
    ("file", "raw", "text", "eight_bit"),
    [
        (b"", b"", b".\r\n", False),
        (b"A: b\n\nc\n", b"A: b\r\n\r\nc\r\n", b"A: b\r\n\r\nc\r\n.\r\n", False),
        (b".\n..\nx", b".\r\n..\r\nx\r\n", b"..\r\n...\r\nx\r\n.\r\n", False),
        (b"gr\xc3\xbcn\r\n", b"gr\xc3\xbcn\r\n", b"gr\xc3\xbcn\r\n.\r\n", True),
        (b"a\rb\r", b"a\rb\r\r\n", b"a\rb\r\r\n.\r\n", False),
    ],
)
@pytest.mark.parametrize("body", ["data", "bdat"])
def test_files(tmp_path: Path, file: bytes, raw: bytes, text: bytes, eight_bit: bool, body: str) -> None:
    (tmp_path / "m.eml").write_bytes(file)
    mail = make_source(Options(corpus=str(tmp_path), body=body), 0, 1)()
    assert (mail.text, mail.eight_bit) == (text, eight_bit)
    assert mail.raw == (raw if body == "bdat" else b"")


def test_every_file_of_a_folder_comes_in_turn(tmp_path: Path) -> None:
    for name in ("a", "b", "deep/c", "deep/er/d", ".hidden", ".git/x", "deep/.e"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    options = Options(corpus=str(tmp_path), recipient="u{n}@y.test")
    mails = take(make_source(options, 0, 1), 8)
    assert sorted(mail.text for mail in mails[:4]) == [
        b"a\r\n.\r\n",
        b"b\r\n.\r\n",
        b"deep/c\r\n.\r\n",
        b"deep/er/d\r\n.\r\n",
    ]
    assert [mail.text for mail in mails[4:]] == [mail.text for mail in mails[:4]]
    orders = {tuple(mail.text for mail in take(make_source(options, process, 1), 4)) for process in range(10)}
    assert len(orders) > 1


def test_a_folder_without_files(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("x")
    for folder in (tmp_path, tmp_path / "missing", tmp_path / ".hidden"):
        with pytest.raises(LoadError, match="no folder with files"):
            make_source(Options(corpus=str(folder)), 0, 1)


@pytest.mark.skipif(not CORPUS.is_dir(), reason="no corpus of real messages")
def test_real_mail_goes_as_it_stands() -> None:
    files = sorted(path for path in CORPUS.rglob("*") if path.is_file())
    read = read_messages(CORPUS, keep_raw=True)
    assert len(read) == len(files) > 900
    eight_bit = 0
    for path, message in zip(files, read, strict=True):
        octets = path.read_bytes()
        assert message.raw == slow_lines(octets) if len(octets) < 20_000 else as_lines(octets), path
        assert message.raw.replace(b"\r\n", b"\n").rstrip(b"\n") == octets.replace(b"\r\n", b"\n").rstrip(b"\n"), path
        assert slowly_unstuffed(message.text) == message.raw, path
        assert message.eight_bit == any(octet > 127 for octet in octets), path
        eight_bit += message.eight_bit
    assert eight_bit > 20


# Ledger


def test_messages_of_a_ledger(tmp_path: Path) -> None:
    options = Options(
        ledger=str(tmp_path / "ledger"),
        sizes="0:1,2:1,1KB:5,40KB:2",
        sender="s{1..9}@x{1..2}.test",
        recipient="u{1..3}@y.test",
        recipients=2,
        processes=2,
        body="bdat",
    )
    mails = [mail for process in (0, 1) for mail in take(make_source(options, process, 1), 200)]
    assert len({mail.id for mail in mails}) == 400
    again = {mail.id for mail in take(make_source(options, 0, 1), 200)}
    assert not again & {mail.id for mail in mails}
    assert {len(mail.raw) for mail in mails} >= {0, 2}
    assert {mail.sender.partition("@")[2] for mail in mails} == {"x1.test", "x2.test"}
    assert any(mail.eight_bit for mail in mails)
    assert any(b"\r\n.." in mail.text for mail in mails)
    for mail in mails:
        assert mail.sender.partition("@")[0] == mail.id
        assert mail.mail == b"MAIL FROM:<%s>\r\n" % mail.sender.encode()
        assert len(set(mail.recipients)) == len(mail.rcpts) == 2
        assert slowly_unstuffed(mail.text) == mail.raw
        assert mail.sha256 == hashlib.sha256(mail.raw).hexdigest()
        assert not find_fault(mail.id, mail.raw)
    without = make_source(replace(options, body="data", sender="<>"), 0, 1)()
    assert (without.raw, without.sender) == (b"", f"{without.id}@ledger.test")
    assert without.sha256


def test_a_ledger_makes_its_own_messages(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="--corpus"):
        make_source(Options(ledger="x", corpus=str(tmp_path)), 0, 1)


# PROXY headers


def test_proxy_version_1() -> None:
    assert render_proxy("v1", ("192.0.2.7", 5000), ("198.51.100.1", 25)) == (
        b"PROXY TCP4 192.0.2.7 198.51.100.1 5000 25\r\n"
    )
    assert render_proxy("v1", ("2001:db8::7", 5000), ("::1", 25)) == b"PROXY TCP6 2001:db8::7 ::1 5000 25\r\n"
    longest = render_proxy("v1", ("ffff:" * 7 + "ffff", 65535), ("ffff:" * 7 + "fffe", 65535))
    assert len(longest) <= 107  # the protocol's bound


def test_proxy_version_2() -> None:
    four = render_proxy("v2", ("192.0.2.7", 5000), ("198.51.100.1", 25))
    assert four == (
        b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a\x21\x11\x00\x0c"
        b"\xc0\x00\x02\x07\xc6\x33\x64\x01\x13\x88\x00\x19"
    )
    six = render_proxy("v2", ("2001:db8::7", 5000), ("::1", 25))
    assert struct.unpack("!12sBBH16s16sHH", six)[1:4] == (0x21, 0x21, 36)
    assert six[16:32] == bytes.fromhex("20010db8" + "00" * 11 + "07")


def test_proxy_of_two_families() -> None:
    header = render_proxy("v2", ("192.0.2.7", 5000), ("::1", 25))
    assert header[13] == 0x21
    assert header[16:32] == bytes(10) + b"\xff\xff\xc0\x00\x02\x07"
    with pytest.raises(ValueError, match="nowhere"):
        render_proxy("v1", ("nowhere", 1), ("::1", 25))
