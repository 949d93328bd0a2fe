"""Long lines made quoted-printable: decoded, it is what was sent; what was signed or is short stays octet for octet."""

from __future__ import annotations

import email
import email.policy
import re
from email.message import Message
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsmtp import rewrite
from fastsmtp.rewrite import BOUNDARY_LIMIT, HEADER_LIMIT, LINE_LIMIT, PIECE, Rewriter

LONG = ("x = \t" + "ü. " * 600).encode()
BINARY = bytes(range(14, 256)) * 5
TOP = b"From: ann@example.org\r\nMIME-Version: 1.0\r\n"


def run(octets: bytes, step: int = 0) -> tuple[bytes, int]:
    """What comes out, fed whole or in pieces, and where its header ends."""
    rewriter = Rewriter()
    step = step or max(len(octets), 1)
    out = b"".join(rewriter.feed(octets[place : place + step]) for place in range(0, len(octets), step))
    return out + rewriter.end(), rewriter.header_end


def leaves(octets: bytes) -> list[Message]:
    return [part for part in email.message_from_bytes(octets).walk() if not part.is_multipart()]


def decoded(octets: bytes) -> list[bytes]:
    return [bytes(part.get_payload(decode=True) or b"") for part in leaves(octets)]


def multipart(*parts: bytes, kind: str = "mixed", boundary: str = "=_b", header: bytes = TOP) -> bytes:
    """Each part with its own header."""
    line = f"--{boundary}".encode()
    body = b"".join(b"%b\r\n%b\r\n" % (line, part) for part in parts)
    return (
        header + f'Content-Type: multipart/{kind};\r\n boundary="{boundary}"\r\n\r\n'.encode() + body + line + b"--\r\n"
    )


def plain(text: bytes, *fields: bytes) -> bytes:
    return b"".join(field + b"\r\n" for field in fields) + b"\r\n" + text


PLAIN = b"Content-Type: text/plain; charset=utf-8"
BASE64 = b"Content-Transfer-Encoding: base64"
ENCODED = {
    "a message": TOP + plain(LONG + b"\r\n", PLAIN),
    "a message of 8bit": TOP + plain(LONG + b"\r\n", PLAIN, b"Content-Transfer-Encoding: 8bit"),
    "a message without MIME": b"Subject: x\r\n\r\n" + LONG + b"\r\nshort \r\n",
    "a message without a header": b"\r\n" + LONG + b"\r\n",
    "octets of all kinds": TOP + plain(BINARY + b"\r\n", PLAIN),
    "an encoding without a version": b"Subject: x\r\nContent-Transfer-Encoding: 8bit\r\n\r\n" + LONG + b"\r\n",
    "blanks behind the delimiters": multipart(plain(LONG), plain(b"x")).replace(b"--=_b\r\n", b"--=_b \t\r\n"),
    "without a line end": TOP + plain(LONG, PLAIN),
    "one octet too many": TOP + plain(b"x" * (LINE_LIMIT + 1) + b"\r\n"),
    "a part": multipart(plain(LONG, PLAIN)),
    "a part without a header": multipart(b"\r\n" + LONG),
    "the second part": multipart(plain(b"short"), plain(LONG, PLAIN, b"content-TRANSFER-encoding:\r\n 8bit (x)")),
    "a part in a part": multipart(multipart(plain(LONG, PLAIN), boundary="=_b2", header=b""), plain(b"short")),
    "JSON": multipart(plain(LONG, b"Content-Type: application/json")),
    "a line beside base64": multipart(plain(LONG), plain(b"QUJD\r\n" * 400, BASE64)),
    "a part that does not end": multipart(plain(LONG)).removesuffix(b"--=_b--\r\n"),
    "lines that look like delimiters": multipart(plain(LONG + b"\r\n--=_bx\r\n--=_\r\n --=_b")),
    "dots and blanks": TOP + plain(LONG + b"\r\n.\r\nFrom here \r\n \t\r\n\r\n"),
}


@pytest.mark.parametrize("octets", ENCODED.values(), ids=ENCODED)
def test_long_lines_are_encoded(octets: bytes) -> None:
    out, header_end = run(octets)
    assert decoded(out) == decoded(octets)
    assert max(map(len, out.split(b"\r\n"))) <= LINE_LIMIT
    encoded = [part for part in leaves(out) if part["Content-Transfer-Encoding"] == "quoted-printable"]
    assert len(encoded) == 1
    assert all(len(part.get_all("Content-Transfer-Encoding", [])) <= 1 for part in leaves(out))
    assert email.message_from_bytes(out).get_all("MIME-Version") == ["1.0"]
    assert out[:header_end].endswith(b"\r\n\r\n") or header_end == 2
    assert header_end == out.find(b"\r\n\r\n") + 4


@pytest.mark.parametrize("octets", ENCODED.values(), ids=ENCODED)
def test_however_it_is_cut_it_comes_out_the_same(octets: bytes) -> None:
    whole = run(octets)
    for step in (1, 2, 3, 61, 1000):
        assert run(octets, step) == whole


def signed(name: str) -> bytes:
    return TOP + f"{name}: v=1; bh=x\r\n".encode() + plain(LONG, PLAIN)


SHORT = plain(b"x" * LINE_LIMIT + b"\r\n", PLAIN)
KEPT = {
    "short lines": TOP + SHORT,
    "nothing": b"",
    "an empty line": b"\r\n",
    "no body": TOP,
    "no header": LONG + b"\r\n",
    "what is no header": b"hello\r\n" + plain(LONG, PLAIN),
    "DKIM": signed("DKIM-Signature"),
    "DKIM, folded name": signed("dkim-signature "),
    "ARC": signed("ARC-Message-Signature"),
    "signed, behind a comment": multipart(plain(LONG), kind="signed").replace(b" multipart", b" (x) multipart"),
    "signed, before a comment": multipart(plain(LONG), kind="signed").replace(b"signed;", b"signed (x);"),
    "signed, with a comment inside": multipart(
        multipart(plain(LONG), plain(b"x"), kind="signed", boundary="=_b2", header=b"").replace(b"/sig", b"(a)/(b)sig")
    ),
    "a type that nobody can read": TOP + plain(LONG, b"Content-Type: =?utf-8?q?multipart/signed?="),
    "S/MIME": multipart(plain(LONG, PLAIN), plain(b"x", BASE64), kind="signed"),
    "signed, behind an obsolete field": b"X :y\r\n" + multipart(plain(LONG), kind="signed"),
    "encrypted": multipart(plain(b"Version: 1"), plain(LONG), kind="encrypted"),
    "signed inside": multipart(multipart(plain(LONG), plain(b"x"), kind="signed", boundary="=_b2", header=b"")),
    "OpenPGP": TOP + plain(LONG + b"\r\n-----BEGIN PGP SIGNED MESSAGE-----\r\n", PLAIN),
    "pkcs7": TOP + plain(LONG, b"Content-Type: application/pkcs7-mime"),
    "a message in it": multipart(plain(TOP + plain(LONG), b"Content-Type: message/rfc822")),
    "a digest": multipart(plain(TOP + plain(LONG)), kind="digest"),
    "base64": TOP + plain(LONG, BASE64),
    "an unknown encoding": TOP + plain(LONG, b"Content-Transfer-Encoding: x-uuencode"),
    "two types": TOP + plain(LONG, PLAIN, b"Content-Type: text/html"),
    "two encodings": TOP + plain(LONG, b"Content-Transfer-Encoding: 8bit", b"Content-Transfer-Encoding: 7bit"),
    "no boundary": TOP + plain(LONG, b"Content-Type: multipart/mixed"),
    "too long a boundary": multipart(plain(LONG), boundary="b" * (BOUNDARY_LIMIT + 1)),
    "the boundary of the outer part": multipart(multipart(plain(LONG), header=b"")),
    "before and behind the parts": multipart(plain(b"short")).replace(b"\r\n\r\n--", b"\r\n\r\n%b\r\n--" % LONG) + LONG,
    "a header that does not end": multipart(b"X: y").replace(b"\r\n\r\nX", b"\r\nX") + LONG,
    "a delimiter in a header": multipart(b"X: y\r\n--b:\r\n\r\n" + LONG, boundary="b:"),
    "an endless header": b"X: " + b"y" * HEADER_LIMIT + b"\r\n" + plain(LONG),
    "long header lines": TOP + b"X: " + b"y" * 2000 + b"\r\n" + plain(b"short"),
}


@pytest.mark.parametrize("octets", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("step", [0, 1, 61])
def test_the_rest_stays_as_it_is(octets: bytes, step: int) -> None:
    if step == 1 and len(octets) > 1 << 16:
        step = 997
    out, header_end = run(octets, step)
    assert out == octets
    assert header_end in (-1, octets.find(b"\r\n\r\n") + 4, 2)


def test_only_the_part_is_touched() -> None:
    parts = [plain(b"short \r\n", PLAIN), plain(LONG, PLAIN), plain(b"QUJD\r\n" * 400, BASE64), plain(b"\0 \r\nend")]
    octets = multipart(*parts)
    out, _ = run(octets)
    for kept in (octets[: octets.index(LONG) - 2], *(parts[number] for number in (0, 2, 3))):
        assert kept in out
    assert len(out.split(b"--=_b")) == len(octets.split(b"--=_b"))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is held for so long only; what it was up to there it stays."""
    monkeypatch.setattr(rewrite, "HELD", 5000)
    late = TOP + plain(b"short\r\n" * 1000 + LONG + b"\r\n", PLAIN)
    rewriter = Rewriter()
    out = rewriter.feed(late[:6000])
    assert out
    assert out + rewriter.feed(late[6000:]) + rewriter.end() == late
    early = TOP + plain((LONG + b"\r\n") * 10 + b"y" * 100_000 + b"\r\n" + LONG, PLAIN)
    for step in (0, 1000):
        out, _ = run(early, step)
        assert decoded(out) == decoded(early)
        assert max(map(len, out.split(b"\r\n"))) <= 76


def test_a_line_may_have_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is broken where it was cut, and what follows a cut is no line of its own."""
    monkeypatch.setattr(rewrite, "HELD", 5000)
    line = b"x" * (3 * PIECE) + b"--=_b\r\n"
    octets = multipart(plain(line + b"y" * (PIECE + 1) + b"\r\nshort", PLAIN), plain(b"short"))
    place = octets.index(line) + len(line)
    for cuts in ([place - 7], [place - 1], [place - 2, place - 1], range(0, len(octets), 509), range(len(octets))):
        rewriter = Rewriter()
        edges = [0, *cuts, len(octets)]
        out = b"".join(rewriter.feed(octets[start:end]) for start, end in pairwise(edges))
        out += rewriter.end()
        assert decoded(out) == decoded(octets)
        assert b"=0D" not in out  # a line end stays one
        assert max(map(len, out.split(b"\r\n"))) <= 76


LINES = st.sampled_from(
    [b"--a", b"--a--", b"--ab", b"--ab--", b"--a \t", b"", b"short", LONG[:1200], b"=", b" ", b".", PLAIN, BASE64,
     b'Content-Type: multipart/mixed; boundary="ab"', b"Content-Type: multipart/signed; boundary=ab",
     b"Content-Type: message/rfc822", b"-----BEGIN PGP MESSAGE-----"]
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(LINES, max_size=14), st.sampled_from([b"\r\n", b"\r\n", b"\n", b""]), st.integers(1, 40))
def test_any_message_keeps_its_content(lines: list[bytes], last: bytes, step: int) -> None:
    octets = b"Content-Type: multipart/mixed; boundary=a\r\n" + b"\r\n".join(lines) + last
    out, header_end = run(octets)
    assert run(octets, step) == (out, header_end)
    if out != octets:
        assert b"\r\n\r\n" in octets
        shape = [part.get_content_type() for part in email.message_from_bytes(octets).walk()]
        assert [part.get_content_type() for part in email.message_from_bytes(out).walk()] == shape
        assert [re.sub(rb"\r?\n\Z", b"", text) for text in decoded(out)] == [
            re.sub(rb"\r?\n\Z", b"", text) for text in decoded(octets)
        ]


def test_many_parts_and_deep_ones_cost_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind so many the rest stays as it is: a delimiter is looked for under the names of all that are open."""
    read: list[bytes] = []
    read_header = rewrite.read_header
    monkeypatch.setattr(rewrite, "read_header", lambda octets: read.append(octets) or read_header(octets))
    many = TOP + b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\n" * 5000 + b"x" * 2000 + b"\r\n"
    assert run(many, 4096)[0] == many
    assert len(read) == rewrite.PARTS
    read.clear()
    deep = TOP + b"Content-Type: multipart/mixed; boundary=b0\r\n\r\n"
    for n in range(500):
        deep += b"--b%d\r\nContent-Type: multipart/mixed; boundary=b%d\r\n\r\n" % (n, n + 1)
    deep += b"x" * 2000 + b"\r\n"
    assert run(deep, 4096)[0] == deep
    assert len(read) == rewrite.DEPTH + 1
