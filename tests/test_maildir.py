"""delivery/maildir: what stands in the files, where they lie, and what became of each recipient."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from errno import EDQUOT, EIO, ENAMETOOLONG, ENODATA, ENOSPC, EOPNOTSUPP
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
import uvloop
from hypothesis import example, given
from hypothesis import strategies as st
from needs import needs, volume

import fastsmtp
from fastsmtp.address import NULL, Address
from fastsmtp.delivery import Delivery, Outcome, Result, Scope, Transport
from fastsmtp.delivery import maildir as module
from fastsmtp.delivery.maildir import (
    Maildir,
    folder_name,
    mailbox_path,
    open_probe,
    remove_leftovers,
    temporary_folder,
)
from fastsmtp.domains import Domain, Domains
from fastsmtp.message import Content, Envelope, Message, Recipient

SENDER = Address("Ann", "x.test")
BODY = b"Subject: hello\r\n\r\n.leading dot\r\ncaf\xe9\r\n"
PREFIX = b"Received: from x\r\n\tby y; now\r\n"


def message(
    number: int = 1,
    body: bytes | list[bytes] = BODY,
    sender: Address = SENDER,
    content: Content = Content.NONE,
    file: Path | None = None,
    size: int | None = None,
    cuts: tuple[tuple[int, int], ...] = (),
) -> Message:
    envelope = Envelope(sender)
    envelope.id = f"id{number}"
    parts = [body] if isinstance(body, bytes) else body
    size = sum(map(len, parts)) if size is None else size
    held = None if file else parts
    return Message(envelope, PREFIX, held, size, 18, content, 1234567890.75, str(file or ""), cuts)


def delivery(mail: Message, *addresses: Address) -> Delivery:
    return Delivery(mail, [Recipient(address) for address in addresses], range(len(addresses)))


def deliver(
    root: Path, *deliveries: Delivery, path: str = "{domain}/{local}", worker: int = 0, sync: str = "batch"
) -> list[list[Outcome]]:
    async def run() -> list[list[Outcome]]:
        maildir: Transport = Maildir(f"{root}/{path}", worker, "mx.y.test", "cafe", sync)
        try:
            return [list(group) for group in await maildir.deliver(deliveries)]
        finally:
            await maildir.close()

    return uvloop.run(run())


def results(groups: Sequence[Sequence[Outcome]]) -> list[list[Result]]:
    return [[outcome.result for outcome in group] for group in groups]


def found(mailbox: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (mailbox / "new").iterdir()}


BOB = Address("Bob", "y.test")
HEAD = b"Return-Path: <Ann@x.test>\nDelivered-To: Bob@y.test\nReceived: from x\n\tby y; now\n"


# ---- what stands in the file


@pytest.mark.parametrize("sync", ["batch", "file"])
def test_a_message_lies_in_its_mailbox(tmp_path: Path, sync: str) -> None:
    assert results(deliver(tmp_path, delivery(message(), BOB), sync=sync)) == [[Result.DELIVERED]]
    want = HEAD + b"Subject: hello\n\n.leading dot\ncaf\xe9\n"
    assert found(tmp_path / "y.test/bob") == {f"1234567890.Mid1R0.mx.y.test,S={len(want)}": want}
    assert os.listdir(tmp_path / ".fastsmtp-cafe") == []


def test_bounces_have_an_empty_return_path(tmp_path: Path) -> None:
    deliver(tmp_path, delivery(message(sender=NULL), BOB))
    [content] = found(tmp_path / "y.test/bob").values()
    assert content.startswith(b"Return-Path: <>\nDelivered-To: Bob@y.test\n")


def test_the_addresses_stand_in_their_wire_form(tmp_path: Path) -> None:
    quoted, utf8 = Address('a "b"', "y.test"), Address("jürgen", "y.test")
    deliver(tmp_path, delivery(message(sender=utf8), quoted))
    [content] = found(tmp_path / "y.test" / folder_name('a "b"')).values()
    assert content.startswith('Return-Path: <jürgen@y.test>\nDelivered-To: "a \\"b\\""@y.test\nReceived:'.encode())


def test_no_address_can_begin_a_field(tmp_path: Path) -> None:
    # An Address holds no control character; this is the second lock.
    deliver(tmp_path, delivery(message(sender=Address("a\r\nX: y\0", "x.test")), Address("b\nc", "y.test")))
    [content] = found(tmp_path / "y.test/b%0Ac").values()
    assert content.startswith(b'Return-Path: <"a??X: y?"@x.test>\nDelivered-To: "b?c"@y.test\nReceived')


@pytest.mark.parametrize("content", [Content.BARE, Content.BINARY, Content.BARE | Content.BINARY])
def test_what_is_not_convertible_stays_as_it_is(tmp_path: Path, content: Content) -> None:
    body = b"A: b\r\n\r\nbare \r and \n and \r\n\0"
    deliver(tmp_path, delivery(message(body=body, content=content), BOB))
    assert list(found(tmp_path / "y.test/bob").values()) == [HEAD + body]


@pytest.mark.parametrize("cuts", [(), ((0, 16),), ((3, 7),), ((0, 2), (5, 9), (16, 18)), ((0, len(BODY)),)])
@pytest.mark.parametrize("pieces", [1, 4, len(BODY), 0])
def test_cuts_are_left_out_in_memory_and_from_a_file(
    tmp_path: Path, cuts: tuple[tuple[int, int], ...], pieces: int
) -> None:
    if pieces:
        step = -(-len(BODY) // pieces)
        mail = message(body=[BODY[i : i + step] for i in range(0, len(BODY), step)], cuts=cuts)
    else:
        (tmp_path / "body").write_bytes(BODY)
        mail = message(file=tmp_path / "body", cuts=cuts)
    deliver(tmp_path, delivery(mail, BOB))
    kept = bytes(octet for i, octet in enumerate(BODY) if not any(start <= i < end for start, end in cuts))
    assert list(found(tmp_path / "y.test/bob").values()) == [HEAD + kept.replace(b"\r\n", b"\n")]


def test_a_body_file_that_is_short_is_the_message_s_error(tmp_path: Path) -> None:
    (tmp_path / "body").write_bytes(BODY)
    short = delivery(message(1, file=tmp_path / "body", size=len(BODY) + 1), BOB, Address("c", "y.test"))
    gone = delivery(message(2, file=tmp_path / "none"), BOB)
    good = delivery(message(3, file=tmp_path / "body"), BOB)
    groups = deliver(tmp_path, short, gone, good)
    assert results(groups) == [[Result.DEFERRED] * 2, [Result.DEFERRED], [Result.DELIVERED]]
    assert {outcome.scope for outcome in [*groups[0], *groups[1]]} == {Scope.MESSAGE}
    assert groups[0][0].text == f"{tmp_path}/body: missing or shorter than the message"
    assert len(found(tmp_path / "y.test/bob")) == 1
    assert not (tmp_path / "y.test/c").exists()


# ---- names


def test_delivered_again_it_replaces_itself_until_a_reader_moved_it(tmp_path: Path) -> None:
    mail = delivery(message(), BOB, Address("carol", "y.test"), Address("BOB", "y.test"))
    deliver(tmp_path, mail)
    first = found(tmp_path / "y.test/bob")
    assert len(first) == 2  # two recipients, one mailbox
    deliver(tmp_path, mail, worker=1)
    assert found(tmp_path / "y.test/bob") == first
    name = next(iter(first))
    (tmp_path / "y.test/bob/new" / name).rename(tmp_path / "y.test/bob/cur" / name)
    deliver(tmp_path, mail)
    assert found(tmp_path / "y.test/bob") == first


def test_the_host_in_a_name_is_no_path(tmp_path: Path) -> None:
    async def run(hostname: str) -> None:
        maildir = Maildir(f"{tmp_path}/{{local}}", 0, hostname, "cafe")
        assert results(await maildir.deliver([delivery(message(), BOB)])) == [[Result.DELIVERED]]
        await maildir.close()

    asyncio.run(run("[IPv6:::1]/x"))
    [name] = found(tmp_path / "bob")
    assert name.startswith("1234567890.Mid1R0.[IPv6\\072\\072\\0721]\\057x,S=")
    asyncio.run(run("h" * 255))


def test_paths_of_all_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {
        "{domain}/{local}": "y.test/bob",
        "{local}@{domain}/Maildir": "bob@y.test/Maildir",
        "x-{domain}": "x-y.test",
        "everybody": "everybody",
    }
    for shape, mailbox in shapes.items():
        deliver(tmp_path / "a/b", delivery(message(), BOB), path=shape)
        assert len(found(tmp_path / "a/b" / mailbox)) == 1
    assert sorted(os.listdir(tmp_path / "a/b")) == [
        ".fastsmtp-cafe", "bob@y.test", "everybody", "x-y.test", "y.test",
    ]  # fmt: skip
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    monkeypatch.chdir(tmp_path)
    deliver(Path("relative"), delivery(message(), BOB))
    assert len(found(tmp_path / "relative/y.test/bob")) == 1


NASTY = [
    "", ".", "..", "...", "../../etc/passwd", "/", "/etc", "a/b", ".hidden", "-rf", "~", "%", "%-", "%%", "%2E",
    "%2e", "%41", "a%00", "\0", "new", "tmp", "cur", "é" * 125, "\U0001f600" * 62, "x" * 200, "x" * 201, "x" * 250,
    "x" * 251, "X" * 251, "é" * 34, "é" * 33, "{domain}", "{local}", " ", "a b", "\\", '"', ":", ",S=1", "[192.0.2.1]",
    "[ipv6:2001:db8::1]", "xn--bcher-kva.test", "*", "a\u0301", "\u00e1", "ﬁ", "fi", "\ud800",
]  # fmt: skip
NAMES = st.one_of(
    st.text(max_size=260),
    st.text("./%-_aA2eE~é\0{}", max_size=12),
    st.text("aé", min_size=190, max_size=260),
    st.sampled_from(NASTY),
    st.sampled_from(NASTY).map(folder_name),
)


def folded(text: str) -> str:
    return normalize("NFC", normalize("NFD", text).casefold())


@given(NAMES)
@example("x" * 250)
def test_a_folder_name_stays_in_its_folder(text: str) -> None:
    name = folder_name(text)
    assert 1 <= len(name) <= 250
    assert name.isascii()
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789ABCDEF._+=-%")
    assert not name.startswith(".")
    assert name not in ("", ".", "..")


@given(NAMES, NAMES)
@example("a/b", "a%2Fb")
@example("x" * 251, folder_name("x" * 251))
@example("", "%")
@example("Bob", "bOB")
@example("Bob", "%42ob")
def test_two_texts_never_share_a_name(one: str, other: str) -> None:
    assert (folder_name(one) == folder_name(other)) == (one == other)


def test_all_nasty_names_at_once() -> None:
    assert len({folder_name(text) for text in NASTY}) == len(set(NASTY))


@given(NAMES, NAMES)
@example("Bob", "bOB")
def test_addresses_share_a_folder_only_when_they_are_the_same_mailbox(one: str, other: str) -> None:
    one_path, other_path = (mailbox_path("/{domain}/{local}", Address(it, "y.test").mailbox) for it in (one, other))
    assert (one_path == other_path) == (folded(one) == folded(other))


def test_where_case_matters_each_mailbox_has_its_own_folder(tmp_path: Path) -> None:
    domains = Domains([Domain("y.test", "x", case_sensitive=True)], "mx.y.test", Address("Root", "y.test"))
    for local in ("Ann", "ann", "%41nn", "postmaster"):
        deliver(tmp_path, delivery(message(), domains.route(Address(local, "y.test"))[1]))
    assert sorted(os.listdir(tmp_path / "y.test")) == ["%2541nn", "%41nn", "%52oot", "ann"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ann", "ann"), ("Ann+Tag", "%41nn+%54ag"), (".a", "%2Ea"), ("a.b", "a.b"), ("a/b", "a%2Fb"), ("50%", "50%25"),
        ("jürgen", "j%C3%BCrgen"), ("[192.0.2.1]", "%5B192.0.2.1%5D"), ("[ipv6:::1]", "%5Bipv6%3A%3A%3A1%5D"),
        ("", "%"), ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 200 + "%-" + "84a0678c90937f5dcf9994d5866668da6b995109c8ad8454"),
    ],
)  # fmt: skip
def test_folder_names_never_change(text: str, name: str) -> None:
    assert folder_name(text) == name


def test_nasty_addresses_are_delivered_inside_the_root(tmp_path: Path) -> None:
    addresses = [Address(local, "y.test") for local in NASTY if "\ud800" not in local]
    groups = deliver(tmp_path / "root", delivery(message(), *addresses), delivery(message(2), Address("a", "")))
    assert results(groups) == [[Result.DELIVERED] * len(addresses), [Result.DELIVERED]]
    assert os.listdir(tmp_path) == ["root"]
    assert sorted(os.listdir(tmp_path / "root")) == ["%", ".fastsmtp-cafe", "y.test"]
    boxes = list((tmp_path / "root/y.test").iterdir())
    assert sum(len(found(box)) for box in boxes) == len(addresses)
    assert len(boxes) == len({folded(address.local) for address in addresses})


# ---- what became of it


def test_an_error_is_one_recipient_s_only(tmp_path: Path) -> None:
    (tmp_path / "y.test").mkdir()
    (tmp_path / "y.test/file").write_bytes(b"")
    groups = deliver(tmp_path, delivery(message(), BOB, Address("file", "y.test"), Address("c", "y.test")))
    assert results(groups) == [[Result.DELIVERED, Result.DEFERRED, Result.DELIVERED]]
    assert groups[0][1].text == f"{tmp_path}/y.test/file: Not a directory"
    assert (groups[0][1].status, groups[0][1].scope) == ("4.3.0", Scope.RECIPIENT)


def test_a_path_that_is_too_long_fails(tmp_path: Path) -> None:
    [[outcome]] = deliver(tmp_path, delivery(message(), BOB), path="{domain}/{local}" + "x" * 300)
    assert (outcome.result, outcome.status) == (Result.FAILED, "5.1.1")


def test_a_full_disk_defers_and_serves_again(tmp_path: Path) -> None:
    with volume("tmpfs", tmp_path / "disk", "1M"):
        (tmp_path / "disk/ballast").write_bytes(b"x" * 1000 * 1024)
        big = delivery(message(1, body=b"x" * 100_000), BOB)
        [[outcome]] = deliver(tmp_path / "disk", big)
        assert (outcome.result, outcome.status, outcome.scope) == (Result.DEFERRED, "4.3.1", Scope.HOST)
        assert outcome.text == f"{tmp_path}/disk/y.test/bob: No space left on device"
        assert not (tmp_path / "disk/y.test").exists()
        (tmp_path / "disk/ballast").unlink()
        assert results(deliver(tmp_path / "disk", big)) == [[Result.DELIVERED]]


@pytest.mark.parametrize("sync", ["batch", "file"])
def test_a_domain_on_a_file_system_of_its_own(tmp_path: Path, sync: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        volume("tmpfs", tmp_path / "root/one.test", "1M"),
        volume("tmpfs", tmp_path / "root/two.test", "1M"),
    ):

        async def run() -> None:
            maildir = Maildir(f"{tmp_path}/root/{{domain}}/{{local}}", 0, "mx.y.test", "cafe", sync)
            (tmp_path / "root/one.test/file").write_bytes(b"")
            addresses = [Address(local, domain) for domain in ("one.test", "two.test", "y.test") for local in "ab"]
            for number in range(3):
                mail = delivery(message(number), *addresses, Address("file", "one.test"))
                groups = await maildir.deliver([mail])
                assert results(groups) == [[Result.DELIVERED] * 6 + [Result.DEFERRED]]
                assert len(maildir._elsewhere) == 4
            monkeypatch.setattr("fastsmtp.delivery.maildir.CACHE_SIZE", 3)  # what is known of mailboxes is bounded
            for number in range(3, 5):
                await maildir.deliver([delivery(message(number), Address(f"new{number}", "one.test"))])
                assert len(maildir._elsewhere) <= 3
            # what is too large for one of them is that one's error
            groups = await maildir.deliver([delivery(message(9, body=b"x" * 2_000_000), *addresses)])
            assert [outcome.status for outcome in groups[0]] == ["4.3.1"] * 4 + ["2.0.0"] * 2
            await maildir.close()

        uvloop.run(run())
        for box in ("one.test/a", "one.test/b", "two.test/a", "two.test/b"):
            assert len(found(tmp_path / "root" / box)) == 3
            assert os.listdir(tmp_path / "root" / box / "tmp") == []
        assert len(found(tmp_path / "root/y.test/a")) == 4
        assert os.listdir(tmp_path / "root/.fastsmtp-cafe") == []


def test_a_root_that_was_removed_is_made_anew(tmp_path: Path) -> None:
    async def run() -> None:
        maildir = Maildir(f"{tmp_path}/root/{{local}}", 0, "mx.y.test", "cafe")
        os.rmdir(tmp_path / "root/.fastsmtp-cafe")
        os.rmdir(tmp_path / "root")
        assert results(await maildir.deliver([delivery(message(), BOB)])) == [[Result.DEFERRED]]
        (tmp_path / "root").write_bytes(b"in the way")
        assert results(await maildir.deliver([delivery(message(), BOB)])) == [[Result.DEFERRED]]
        (tmp_path / "root").unlink()
        assert results(await maildir.deliver([delivery(message(), BOB)])) == [[Result.DELIVERED]]
        await maildir.close()

    asyncio.run(run())


def test_a_root_that_cannot_be_made_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        Maildir(f"{tmp_path}/file/{{local}}", 0, "mx.y.test", "cafe")


def test_every_errno_has_a_meaning_for_the_queue() -> None:
    rows = {number: module._MEANING.get(number, module._DEFERRED) for number in range(1, 134)}
    failed = [number for number, row in rows.items() if row[0] is Result.FAILED]
    assert failed == [ENAMETOOLONG]
    assert {number: rows[number][1] for number in (ENOSPC, EDQUOT, ENODATA, EIO)} == {
        ENOSPC: "4.3.1", EDQUOT: "4.2.2", ENODATA: "4.3.0", EIO: "4.3.0",
    }  # fmt: skip
    assert all(status[0] == ("5" if result is Result.FAILED else "4") for result, status, _ in rows.values())


# ---- many, at once, and after a kill


def test_more_than_a_batch_in_order(tmp_path: Path) -> None:
    (tmp_path / "y.test").mkdir()
    (tmp_path / "y.test/bad").write_bytes(b"")
    boxes = [Address("bad" if i % 100 == 7 else f"u{i % 3}", "y.test") for i in range(1100)]
    groups = deliver(tmp_path, *[delivery(message(i), box) for i, box in enumerate(boxes)])
    assert results(groups) == [[Result.DEFERRED if box.local == "bad" else Result.DELIVERED] for box in boxes]
    assert sum(len(found(tmp_path / f"y.test/u{i}")) for i in range(3)) == 1100 - 11


def test_close_waits_for_what_is_under_way(tmp_path: Path) -> None:
    async def run() -> None:
        maildir = Maildir(f"{tmp_path}/{{local}}", 0, "mx.y.test", "cafe")
        under_way = [
            asyncio.ensure_future(maildir.deliver([delivery(message(10 * k + i), BOB) for i in range(10)]))
            for k in range(5)
        ]
        await asyncio.sleep(0)
        await maildir.close()
        assert all(future.done() for future in under_way[:-1])
        for future in under_way:
            assert results(await future) == [[Result.DELIVERED]] * 10

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(run())
    assert len(found(tmp_path / "bob")) == 50
    assert len(os.listdir("/proc/self/fd")) == before


def test_left_overs_of_this_worker_only_are_removed(tmp_path: Path) -> None:
    folder = Path(temporary_folder(f"{tmp_path}/{{local}}", "cafe"))
    folder.mkdir()
    other = tmp_path / ".fastsmtp-beef"
    other.mkdir()
    for name in ("1.aa.0", "1.bb.1", "11.aa.0", "2.aa.0", "1"):
        (folder / name).write_bytes(b"x")
    (other / "1.aa.0").write_bytes(b"x")
    deliver(tmp_path, path="{local}", worker=1)
    assert sorted(os.listdir(folder)) == ["1", "11.aa.0", "2.aa.0"]
    assert os.listdir(other) == ["1.aa.0"]
    remove_leftovers(str(folder), 11)
    assert sorted(os.listdir(folder)) == ["1", "2.aa.0"]


def test_a_transport_that_comes_in_place_of_another_leaves_what_that_one_writes(tmp_path: Path) -> None:
    """As at a reload: the former one is still delivering."""

    async def run() -> None:
        path = f"{tmp_path}/{{local}}"
        former = Maildir(path, 1, "mx.test", "cafe")
        (name, *_), *_ = former._items(delivery(message(), BOB))
        under_way = Path(temporary_folder(path, "cafe")) / os.fsdecode(name)
        under_way.touch()
        other = Maildir(path, 1, "mx.test", "cafe")
        assert under_way.exists()
        await former.close()
        await other.close()
        await Maildir(path, 1, "mx.test", "cafe").close()
        assert not under_way.exists()

    asyncio.run(run())


@pytest.mark.parametrize("call", ["write", "close", "syncfs", "renameat"])
@pytest.mark.parametrize("when", [1, 2])
def test_a_kill_at_any_step_leaves_whole_files_and_a_second_run_completes(tmp_path: Path, call: str, when: int) -> None:
    needs("strace")
    code = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from test_maildir import BOB, deliver, delivery, message
        deliver(Path(sys.argv[2]), *[delivery(message(i), BOB) for i in range(4)])
    """
    root = tmp_path / "root"
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
    if call in ("write", "close"):
        # Python itself writes and closes: only what touches the first temporary files counts.
        for number in range(4):
            strace += ["-P", f"{root}/.fastsmtp-cafe/0.{number}.token"]
        code = code.replace("deliver(Path", "import secrets; secrets.token_hex = lambda _: 'token'; deliver(Path")
    strace += ["-e", f"inject={call}:signal=KILL:when={when}"]
    program = [sys.executable, "-c", textwrap.dedent(code), os.path.dirname(__file__), str(root)]
    environment = {**os.environ, "PYTHONPATH": str(Path(fastsmtp.__file__).parents[1])}
    done = subprocess.run([*strace, *program], env=environment, capture_output=True, check=False, timeout=60)
    if b"not permitted" in done.stderr:
        pytest.skip("needs the right to trace processes")
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
    new = root / "y.test/bob/new"
    want = HEAD + b"Subject: hello\n\n.leading dot\ncaf\xe9\n"
    assert all(path.read_bytes() == want for path in (new.iterdir() if new.exists() else []))
    deliver(root, *[delivery(message(i), BOB) for i in range(4)])
    assert list(found(root / "y.test/bob").values()) == [want] * 4
    assert os.listdir(root / ".fastsmtp-cafe") == []


def three_batches(tmp_path: Path, *strace: str) -> tuple[list[str], list[str]]:
    """Three batches of three messages under strace with these arguments: what became of each, and the calls."""
    needs("strace")
    code = """
        import asyncio, os, sys
        sys.path.insert(0, sys.argv[1])
        from test_maildir import BOB, Maildir, delivery, message
        async def run():
            maildir = Maildir(sys.argv[2] + "/{local}", 0, "mx.y.test", "cafe")
            for _ in range(3):
                groups = await maildir.deliver([delivery(message(i), BOB) for i in range(3)])
                print([(o.result.value, o.status, o.scope.value) for [o] in groups])
            print(groups[0][0].text)
            await maildir.close()
        asyncio.run(run())
    """
    trace = tmp_path / "trace"
    program = [sys.executable, "-c", textwrap.dedent(code), os.path.dirname(__file__), str(tmp_path / "root")]
    environment = {**os.environ, "PYTHONPATH": str(Path(fastsmtp.__file__).parents[1])}
    done = subprocess.run(
        ["strace", "-f", "-qq", "-y", "-o", str(trace), "-e", "trace=syncfs,fallocate,close,openat", *strace, *program],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if "not permitted" in done.stderr:
        pytest.skip("needs the right to trace processes")
    return done.stdout.splitlines(), trace.read_text().splitlines()


DEFERRED_ONCE = [
    repr([("deferred", "4.3.0", "host")] * 3), *[repr([("delivered", "2.0.0", "recipient")] * 3)] * 2, "delivered"
]  # fmt: skip


def test_a_flush_that_fails_defers_the_batch_and_the_next_one_starts_afresh(tmp_path: Path) -> None:
    said, calls = three_batches(tmp_path, "-e", "inject=syncfs:error=EIO:when=2")
    assert said == DEFERRED_ONCE
    folder = f"{tmp_path}/root/.fastsmtp-cafe>"
    touched = [line.split()[1].partition("(")[0] for line in calls if folder in line and "O_CREAT" not in line]
    # two flushes, the second one fails; the descriptor is closed, opened anew, and then kept
    assert [name for name in touched[touched.index("syncfs") :] if name != "openat"] == [
        "syncfs", "syncfs", "close", "syncfs", "syncfs", "syncfs", "syncfs", "close",
    ]  # fmt: skip
    assert len(found(tmp_path / "root/bob")) == 3


def test_a_flush_that_is_not_confirmed_has_failed_and_the_next_batch_has_another_probe(tmp_path: Path) -> None:
    """A probe is asked once before there are names."""
    said, calls = three_batches(tmp_path, "-e", "inject=fallocate:error=EROFS:when=2")
    assert said == DEFERRED_ONCE
    assert len(found(tmp_path / "root/bob")) == 3
    asked = [line.split()[1].partition("(")[0] for line in calls if ("O_TMPFILE" in line or "fallocate(" in line)]
    assert asked == ["openat", "fallocate", "fallocate", "openat", "fallocate", "fallocate", "fallocate"]


def test_where_nothing_can_be_confirmed_nothing_is_written(tmp_path: Path) -> None:
    said, calls = three_batches(tmp_path, "-e", "inject=fallocate:error=EROFS:when=1+")
    assert said[:3] == [repr([("deferred", "4.3.0", "host")] * 3)] * 3
    assert not (tmp_path / "root/bob").exists()
    assert not any("syncfs(" in line for line in calls)


def test_mailboxes_on_another_file_system_are_confirmed_there(tmp_path: Path) -> None:
    with volume("tmpfs", tmp_path / "root/bob", "1M"):
        said, calls = three_batches(tmp_path, "-e", "inject=fallocate:error=EROFS:when=3")
        assert said == DEFERRED_ONCE
        asked = [line for line in calls if "fallocate(" in line][1:]  # the first is of the root
        assert len(asked) == 6
        assert all(f"{tmp_path}/root/bob/tmp/#" in line for line in asked)


def test_a_file_system_without_unnamed_files_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, refused = os.open, []

    def without(path: str | bytes, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            refused.append(path)
            raise OSError(EOPNOTSUPP, os.strerror(EOPNOTSUPP))
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", without)
    assert results(deliver(tmp_path, delivery(message(), BOB))) == [[Result.DELIVERED]]
    assert refused == [f"{tmp_path}/.fastsmtp-cafe"]


def test_a_probe_has_no_name(tmp_path: Path) -> None:
    probe = open_probe(str(tmp_path))
    assert os.fstat(probe).st_nlink == 0
    os.close(probe)
    with pytest.raises(FileNotFoundError):
        open_probe(str(tmp_path / "missing"))
