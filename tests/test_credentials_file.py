"""The users file: what it says, who may read it, what a change does; and hashes, keys and imagined users."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from argon2.exceptions import VerificationError
from authority import Bench, client, settled

from fastsmtp.credentials import Account, Answer, Asked, BusyError, Denied, UnavailableError
from fastsmtp.credentials import hashes as hashes_module
from fastsmtp.credentials.directory import Directory, Record
from fastsmtp.credentials.file import (
    HEADER,
    Users,
    UsersError,
    change_users,
    parse_line,
    read_users,
    render_line,
)
from fastsmtp.credentials.hashes import NICENESS, NOBODYS, THREADS, WAITING, Hashes, check_form, hash_password, verify
from fastsmtp.credentials.scram import (
    ITERATIONS,
    Shape,
    fits,
    imagine_keys,
    make_keys,
    parse_keys,
    render_keys,
    take_secret,
)
from fastsmtp.credentials.senders import parse_sender, parse_senders
from fastsmtp.verdict import Identity, Password, ScramKeys, Token

SECRET = b"s" * 32
HASH = hash_password("correct horse")
KEYS = render_keys(make_keys("correct horse"))


def write(path: Path, *lines: str, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(
        tmp_path / "users",
        "# people",
        f"ann@x.test:{HASH}:{KEYS}:@x.test, Sales@Y.test",
        "",
        f"bob:{HASH}:{KEYS}:",
    )


def directory(path: Path, domain: str = "") -> Directory:
    users = Users(path, domain)
    users.load()
    return Directory(users, Hashes(), SECRET)


def check(store: Directory, *questions: Asked) -> list[Answer]:
    async def ask() -> list[Answer]:
        return [await store.check(question, client()) for question in questions]

    return asyncio.run(ask())


# What it says


def test_passwords(path: Path) -> None:
    ann, wrong, unknown, bob = check(
        directory(path, "z.test"),
        Password("Ann@X.test", "correct horse"),
        Password("ann@x.test", "wrong"),
        Password("eve@x.test", "correct horse"),
        Password("bob", "correct horse"),
    )
    assert isinstance(ann, Account)
    assert isinstance(bob, Account)
    assert (ann.name, ann.rights.addresses, ann.rights.domains) == (
        "ann@x.test",
        {"ann@x.test", "sales@y.test"},
        {"x.test"},
    )
    assert (bob.name, bob.rights.addresses, bob.rights.domains) == ("bob", {"bob@z.test"}, frozenset())
    assert wrong == unknown == Denied()


def test_identities_and_tokens(path: Path) -> None:
    yes, no, token = check(directory(path), Identity("ANN@x.test"), Identity("eve"), Token("t", "ann@x.test"))
    assert isinstance(yes, Account)
    assert yes.name == "ann@x.test"
    assert no == token == Denied()


def test_scram_keys_of_users_and_of_others(path: Path) -> None:
    store = directory(path)
    ann, eve, again, other = check(store, *map(ScramKeys, ["Ann@x.test", "eve@x.test", "EVE@x.test", "mallory"]))
    for account in (ann, eve, again, other):
        assert isinstance(account, Account)
        assert account.keys is not None
        assert (account.keys.iterations, len(account.keys.salt)) == (ITERATIONS, 16)
        assert len(account.keys.stored_key) == len(account.keys.server_key) == 32
    assert isinstance(ann, Account)
    assert ann.name == "ann@x.test"
    assert ann.keys is not None
    assert fits(ann.keys, "correct horse")
    assert not fits(ann.keys, "wrong")
    imagined = [cast("Account", each) for each in (eve, again, other)]
    salts = [each.keys.salt for each in imagined if each.keys is not None]
    assert [each.name for each in imagined] == ["", "", ""]
    assert salts[0] == salts[1] != salts[2]


def test_scram_is_offered_when_every_user_has_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "users")
    assert "SCRAM-SHA-256" in directory(path).mechanisms
    write(path, f"ann:{HASH}:{render_keys(make_keys('x', 4096))}:")
    store = directory(path)
    assert {"PLAIN", "LOGIN", "EXTERNAL", "SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"} == store.mechanisms
    (eve,) = check(store, ScramKeys("eve"))
    assert isinstance(eve, Account)
    assert eve.keys is not None
    assert eve.keys.iterations == 4096
    write(path, f"ann:{HASH}:{KEYS}:", f"bob:{HASH}::")
    assert directory(path).mechanisms == {"PLAIN", "LOGIN", "EXTERNAL"}
    (bob,) = check(directory(path), ScramKeys("bob"))
    assert isinstance(bob, Account)
    assert bob.name == ""


def test_imagined_keys_are_such_as_users_have(tmp_path: Path) -> None:
    """Else keys that were brought from elsewhere would show who exists."""
    usual, brought, rare = make_keys("x", 4096), make_keys("x", 1000, b"s" * 20), make_keys("x", 15_000, b"s" * 40)
    keys = [usual] * 70 + [brought] * 29 + [rare]
    path = write(tmp_path / "users", *[f"u{n}:{HASH}:{render_keys(each)}:" for n, each in enumerate(keys)])
    store = directory(path)
    assert "SCRAM-SHA-256" in store.mechanisms

    def shapes() -> list[tuple[int, int]]:
        accounts = check(store, *[ScramKeys(f"nobody{n}") for n in range(400)])
        found = [cast("Account", each).keys for each in accounts]
        return [(each.iterations, len(each.salt)) for each in found if each is not None]

    before = shapes()
    tally = Counter(before)
    assert set(tally) <= {(4096, 16), (1000, 20), (15_000, 40)}
    assert 230 < tally[4096, 16] < 330
    assert 70 < tally[1000, 20] < 170
    assert shapes() == before
    # Who joins changes nobody's but a few.
    write(path, *[f"u{n}:{HASH}:{render_keys(each)}:" for n, each in enumerate([*keys, usual])])
    after = shapes()
    assert sum(one != other for one, other in zip(before, after, strict=True)) < 20


def test_a_user_without_a_password_cannot_log_in(tmp_path: Path) -> None:
    path = write(tmp_path / "users", "ann:::")
    assert check(directory(path), Password("ann", "")) == [Denied()]
    (yes,) = check(directory(path), Identity("ann"))
    assert isinstance(yes, Account)


def test_an_unknown_user_costs_a_hash(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    original = Hashes.verify

    async def count(self: Hashes, stored: str, password: str, stranger: bytes | None = None) -> bool:
        compared.append(stored)
        return await original(self, stored, password)

    monkeypatch.setattr(Hashes, "verify", count)
    check(directory(path), Password("ann@x.test", "wrong"), Password("eve@x.test", "wrong"))
    assert compared == [HASH, NOBODYS]
    # With the same parameters, else it is not the same time.
    assert NOBODYS.rsplit("$", 2)[0] == HASH.rsplit("$", 2)[0] == "$argon2id$v=19$m=19456,t=2,p=1"


def test_a_file_edited_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "users"
    path.write_bytes(f"{HEADER}\r\n\r\n# ann:::\r\n Ann@X.test:{HASH}::\r\n".encode())
    path.chmod(0o600)
    (yes,) = check(directory(path), Password("ann@x.test", "correct horse"))
    assert isinstance(yes, Account)
    assert (yes.name, yes.rights.addresses) == ("ann@x.test", {"ann@x.test"})
    assert set(read_users(path)) == {"ann@x.test"}
    change_users(path, lambda _: {"ann@x.test": None})
    assert path.read_bytes() == f"{HEADER}\r\n\r\n# ann:::\r\n".encode()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ann", "is no users file"),
        ("# fastsmtp users 2\nann:::\n", "is no users file"),
        (f"{HEADER}\nann:::\n\nANN:::\n", ":4: user ann stands twice"),
        (f"{HEADER}\n\nann\n", ":3: a line is name:password:scram:senders"),
        (f"{HEADER}\nann:{HASH}\n", "user ann: a line is name:password:scram:senders"),
        (f"{HEADER}\nann:secret::\n", "user ann: no SCRAM keys"),
        (f"{HEADER}\nann:$argon2id$damaged::\n", "user ann: a password of argon2 that is damaged"),
        (f"{HEADER}\nann::{{SCRAM-SHA-256}}0,AA==,AA==,AA==:\n", "user ann: no SCRAM keys"),
        (f"{HEADER}\nann:::no address\n", "user ann: 'no address' is neither an address"),
    ],
)
def test_what_is_no_users_file(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "users"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(UsersError, match=problem):
        read_users(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_file_that_others_can_read_is_refused(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(UsersError, match="can be read by others: chmod 600"):
        directory(path)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UsersError, match=r"there is no .*users; `fastsmtp user add` makes it"):
        directory(tmp_path / "users")
    path = tmp_path / "latin"
    path.write_bytes(HEADER.encode() + b"\n\xe4:::\n")
    path.chmod(0o600)
    with pytest.raises(UsersError, match="is not UTF-8"):
        directory(path)


# When it changes


def test_a_change_is_seen_and_the_old_password_forgotten(path: Path) -> None:
    async def test() -> None:
        bench = Bench([store := directory(path)])
        old, new = Password("ann@x.test", "correct horse"), Password("ann@x.test", "new")
        assert await bench.words(old, old, new) == ["authenticated", "authenticated", "bad-credentials"]
        line = render_line(Record("ann@x.test", hash_password("new"), None, parse_senders("", "", "")), "")
        change_users(path, lambda _: {"ann@x.test": line})
        assert await bench.words(old, new) == ["bad-credentials", "authenticated"]
        change_users(path, lambda _: {"ann@x.test": None})
        assert await bench.words(new) == ["bad-credentials"]
        assert await settled(store.find("ann@x.test")) is None
        rights = await settled(bench.authority.rights("ann@x.test"))
        assert rights is not None
        assert not rights.addresses

    asyncio.run(test())


def test_a_file_that_breaks_is_trouble_and_heals(path: Path) -> None:
    async def test() -> None:
        bench = Bench([directory(path)])
        right = Password("ann@x.test", "correct horse")
        assert await bench.words(right) == ["authenticated"]
        good = path.read_text()
        path.write_text("rubbish")
        # Not even what is remembered: it may be about a user who is no more.
        assert await bench.words(right, right) == ["auth-unavailable"] * 2
        path.unlink()
        assert await bench.words(right) == ["auth-unavailable"]
        assert await settled(bench.authority.rights("ann@x.test")) is None
        path.write_text(good)
        path.chmod(0o644)
        assert await bench.words(right) == ["auth-unavailable"]
        path.chmod(0o600)
        assert await bench.words(right) == ["authenticated"]
        assert [line[0] for line in bench.lines] == ["auth-trouble", "auth-well"]
        assert bench.slept == [1.0] * 4

    asyncio.run(test())


def test_a_line_that_is_damaged_is_trouble_of_one_user(tmp_path: Path) -> None:
    async def test() -> None:
        path = write(tmp_path / "users", "ann:secret::", f"bob:{HASH}::")
        bench = Bench([directory(path)])
        assert await bench.words(Password("ann", "secret"), Password("bob", "correct horse")) == [
            "auth-unavailable",
            "authenticated",
        ]
        assert "user ann" in str(bench.lines[0])
        assert "secret" not in str(bench.lines)

    asyncio.run(test())


def test_changes_keep_the_rest(path: Path) -> None:
    before = path.read_text().splitlines()
    change_users(
        path, lambda present: {"bob": "bob:::", "eve": "eve:::"} if set(present) == {"ann@x.test", "bob"} else {}
    )
    assert path.read_text().splitlines() == [*before[:-1], "bob:::", "eve:::"]
    assert path.stat().st_mode & 0o777 == 0o600
    change_users(path, lambda _: {"ann@x.test": None})
    assert path.read_text().splitlines() == [HEADER, "# people", "", "bob:::", "eve:::"]
    assert os.listdir(path.parent) == ["users"]


def test_a_change_that_fails_changes_nothing(path: Path) -> None:
    before = path.read_text()

    def change(_: object) -> dict[str, str | None]:
        raise UsersError("no")

    with pytest.raises(UsersError, match=r"^no$"):
        change_users(path, change)
    with pytest.raises(UsersError, match="cannot be written: No such file"):
        change_users(path.parent / "none" / "users", lambda _: {})
    assert path.read_text() == before
    assert os.listdir(path.parent) == ["users"]


def test_what_cannot_be_put_in_place_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_text()

    def rename(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(UsersError, match="users cannot be written: No space left"):
        change_users(path, lambda _: {"bob": None})
    assert path.read_text() == before
    assert os.listdir(path.parent) == ["users"]


def test_changes_at_once_are_all_made(tmp_path: Path) -> None:
    path = tmp_path / "users"
    seen: list[int] = []

    def add(name: str) -> None:
        def change(present: Any) -> dict[str, str | None]:
            seen.append(len(present))
            time.sleep(0.01)
            return {name: f"{name}:::"}

        change_users(path, change)

    threads = [threading.Thread(target=add, args=(f"u{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_users(path)) == {f"u{n}" for n in range(8)}
    assert seen == list(range(8))


def test_a_link_to_the_file_stays_one(path: Path) -> None:
    link = path.parent / "link"
    link.symlink_to(path)
    change_users(link, lambda _: {"bob": None})
    assert link.is_symlink()
    assert set(read_users(path)) == {"ann@x.test"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_owner_stays_the_owner(path: Path, tmp_path: Path) -> None:
    os.chown(path, 65534, 65534)
    change_users(path, lambda _: {"bob": None})
    assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)
    change_users(tmp_path / "new", lambda _: {"bob": "bob:::"}, 65534)
    assert (tmp_path / "new").stat().st_uid == 65534
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


# Hashes and keys


def test_lines_are_read_as_they_are_written() -> None:
    record = Record("ann@x.test", HASH, make_keys("x"), parse_senders("@x.test,b@y.test", "ann@x.test", ""))
    line = render_line(record, "@x.test,b@y.test")
    again = parse_line(line, "")
    assert again.password == record.password
    assert again.keys is not None
    assert record.keys is not None
    assert render_keys(again.keys) == render_keys(record.keys)
    assert again.rights.addresses == record.rights.addresses


def test_schemes() -> None:
    keys = make_keys("secret", 4096)
    words = [b64encode(octets).decode() for octets in (keys.salt, keys.stored_key, keys.server_key)]
    for stored in (
        hash_password("secret"),
        "{ARGON2ID}" + hash_password("secret"),
        "{ARGON2}" + hash_password("secret"),
        render_keys(keys),
        f"SCRAM-SHA-256$4096:{words[0]}${words[1]}:{words[2]}",
    ):
        form = check_form(stored)
        assert verify(form, "secret")
        assert not verify(form, "Secret")
    for stored in ("secret", "", "{PLAIN}secret", "$6$abc$def", "$argon2id$"):
        with pytest.raises(ValueError, match=r"no SCRAM keys|damaged"):
            check_form(stored)


def test_scram_keys_are_those_of_rfc_7677() -> None:
    """User "user", password "pencil" (RFC 7677 3): the server's signature of the example proves its keys."""
    import hmac
    from base64 import b64decode

    keys = make_keys("pencil", 4096, b64decode("W22ZaJ0SNY7soEsUEjb6gQ=="))
    said = (
        b"n=user,r=rOprNGfwEbeRWgbNEkqO,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,"
        b"s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    )
    signature = hmac.digest(keys.server_key, said, "sha256")
    assert b64encode(signature) == b"6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{SCRAM-SHA-256}",
        "{SCRAM-SHA-1}4096,AA==,AA==,AA==",
        "{SCRAM-SHA-256}4096,AA==,AA==,AA==",
        "{SCRAM-SHA-256}99999999," + ",".join([b64encode(b"x" * 32).decode()] * 3),
        "{SCRAM-SHA-256}9999999," + ",".join([b64encode(b"x" * 32).decode()] * 3),
        "{SCRAM-SHA-256}0," + ",".join([b64encode(b"x" * 32).decode()] * 3),
        f"{{SCRAM-SHA-256}}4096,AAAA,AAAA,{b64encode(b'x' * 32).decode()}",
        f"{{SCRAM-SHA-256}}4096,AAAA,{b64encode(b'x' * 32).decode()},AAAA",
        "{SCRAM-SHA-256}4096,A=," + ",".join([b64encode(b"x" * 32).decode()] * 2),
    ],
)
def test_what_are_no_keys(text: str) -> None:
    with pytest.raises(ValueError, match="no SCRAM keys"):
        parse_keys(text)


def test_imagined_keys_depend_on_secret_and_name() -> None:
    shapes = {(4096, 16): 1}
    one = imagine_keys(SECRET, "ann", shapes)
    assert one.salt == imagine_keys(SECRET, "ann", shapes).salt
    assert one.salt != imagine_keys(SECRET, "bob", shapes).salt
    assert one.salt != imagine_keys(b"t" * 32, "ann", shapes).salt
    assert len({one.salt, one.stored_key[:16], one.server_key[:16]}) == 3


def test_the_secret_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "auth-secret"
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(take_secret(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(secret) for secret in found] == [32] * 8
    assert set(found) == {path.read_bytes()} == {take_secret(path)}
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["auth-secret"]
    path.write_bytes(b"short")
    with pytest.raises(OSError, match="not 32 octets"):
        take_secret(path)


def test_a_worker_that_made_the_secret_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "auth-secret"

    def late(count: int) -> bytes:
        path.write_bytes(b"1" * 32)
        return b"2" * count

    monkeypatch.setattr("fastsmtp.credentials.scram.secrets.token_bytes", late)
    assert take_secret(path) == b"1" * 32
    assert os.listdir(tmp_path) == ["auth-secret"]


def test_so_many_wait_for_a_hash_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop goes on meanwhile; who goes away leaves its place when the hash is done."""
    gate = threading.Event()
    running: list[int] = []
    most: list[int] = []

    def slow(stored: str, password: str) -> bool:
        running.append(1)
        most.append(len(running))
        gate.wait(10.0)
        running.pop()
        return True

    monkeypatch.setattr("fastsmtp.credentials.hashes.verify", slow)

    async def test() -> None:
        hashes = Hashes()
        work = [asyncio.create_task(hashes.verify(HASH, "x")) for _ in range(THREADS + WAITING)]
        await asyncio.sleep(0.05)
        try:
            for _ in range(2):
                with pytest.raises(BusyError):
                    await asyncio.wait_for(hashes.verify(HASH, "x"), 0.5)
                work[0].cancel()
                await asyncio.sleep(0)
        finally:
            gate.set()
        assert await asyncio.gather(*work[1:]) == [True] * (THREADS + WAITING - 1)
        await asyncio.sleep(0.05)
        assert await hashes.verify(HASH, "x")
        assert max(most) == THREADS
        hashes.close()

    asyncio.run(test())


def test_a_thread_that_cannot_be_begun_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        hashes = Hashes()
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("no more threads")))
            for stranger in (b"a", b"b", b"c", None, None, None):
                with pytest.raises(UnavailableError, match="no more threads"):
                    await asyncio.wait_for(hashes.verify(HASH, "x", stranger), 5)
        monkeypatch.setattr("fastsmtp.credentials.hashes.verify", lambda stored, password: True)
        assert await asyncio.wait_for(hashes.verify(HASH, "x", b"a"), 5)
        hashes.close()

    asyncio.run(test())


def test_who_waits_when_it_closes_is_told_and_nobody_comes_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr("fastsmtp.credentials.hashes.verify", lambda stored, password: gate.wait(10.0))

    async def test() -> None:
        hashes = Hashes()
        work = [asyncio.create_task(hashes.verify(HASH, "x", stranger)) for stranger in (b"a", b"a", b"b")]
        await asyncio.sleep(0.05)
        hashes.close()
        for waiting in work[1:]:
            with pytest.raises(BusyError):
                await asyncio.wait_for(waiting, 5)
        with pytest.raises(UnavailableError):
            await hashes.verify(HASH, "x")
        gate.set()
        assert await asyncio.wait_for(work[0], 5)

    asyncio.run(test())


def policy() -> int:
    return os.sched_getscheduler(threading.get_native_id())


@pytest.mark.parametrize("returns", [True, False])
def test_hashes_step_back_behind_the_loop(monkeypatch: pytest.MonkeyPatch, returns: bool) -> None:
    """Who may not get out of SCHED_IDLE again never gets into it."""
    if returns and not hashes_module._may_return():
        pytest.skip("neither root nor RLIMIT_NICE")
    seen: list[tuple[int, int]] = []

    def look(stored: str = "", password: str = "") -> bool:
        seen.append((policy(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        return True

    monkeypatch.setattr(hashes_module, "verify", look)
    monkeypatch.setattr(hashes_module, "_may_return", lambda: returns)
    before = policy(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def test() -> None:
        hashes = Hashes()
        assert await hashes.verify(HASH, "x")
        hashes._threads.submit(look).result()
        hashes.close()

    asyncio.run(test())
    during, after = seen
    assert during[0] == (os.SCHED_IDLE if returns else os.SCHED_OTHER)
    assert after[0] == os.SCHED_OTHER
    assert min(during[1], after[1]) >= NICENESS
    assert (policy(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())) == before


def test_a_hash_does_not_wait_for_ever_for_idle_time(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hashes_module._may_return():
        pytest.skip("neither root nor RLIMIT_NICE")

    def wait(stored: str, password: str) -> bool:
        assert policy() == os.SCHED_IDLE
        end = time.monotonic() + 20.0
        while policy() == os.SCHED_IDLE and time.monotonic() < end:
            time.sleep(0.01)
        return policy() == os.SCHED_OTHER

    monkeypatch.setattr(hashes_module, "verify", wait)
    monkeypatch.setattr(hashes_module, "HURRY", 0.05)

    async def test() -> None:
        hashes = Hashes()
        assert await hashes.verify(HASH, "x")
        await asyncio.sleep(0.1)
        assert not hashes._looking
        assert await hashes.verify(HASH, "x")  # and is looked at anew
        hashes.close()

    asyncio.run(test())


def test_a_machine_without_memory_is_no_wrong_password(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short:
        def verify(self, stored: str, password: str) -> bool:
            raise VerificationError("Memory allocation error")

    monkeypatch.setattr(hashes_module, "_HASHER", Short())
    with pytest.raises(UnavailableError, match="argon2: Memory allocation error"):
        verify(HASH, "right")


def test_being_busy_is_no_trouble(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy(self: Hashes, stored: str, password: str, stranger: bytes | None = None) -> bool:
        raise BusyError("busy")

    monkeypatch.setattr(Hashes, "verify", busy)

    async def test() -> None:
        bench = Bench([directory(path)])
        assert await bench.words(*[Password("ann@x.test", "x")] * 9) == ["auth-unavailable"] * 9
        assert bench.lines == []

    asyncio.run(test())


def test_what_a_store_cannot_compare_is_trouble() -> None:
    class Odd:
        label = "odd"
        shapes: Mapping[Shape, int] = {}

        def stamp(self, name: str) -> object:
            return None

        def find(self, name: str) -> Record:
            return Record(name, "{CRYPT}secret", None, parse_senders("", name, ""))

        async def close(self) -> None:
            pass

    async def test() -> None:
        with pytest.raises(UnavailableError, match="user ann: no SCRAM keys"):
            await Directory(Odd(), Hashes(), SECRET).check(Password("ann", "secret"), client())

    asyncio.run(test())


# Senders


def test_senders() -> None:
    rights = parse_senders(" @Bücher.example , Info@Y.test,*,", "ann@x.test", "")
    assert rights.addresses == {"ann@x.test", "info@y.test"}
    assert rights.domains == {"xn--bcher-kva.example", "*"}


@pytest.mark.parametrize(
    "text", ["x", "@", "@*.x.test", "a@", "<a@x.test>", '"a,b"@x.test', '"a:b"@x.test', "*@x.test "]
)
def test_what_is_no_sender(text: str) -> None:
    with pytest.raises(ValueError, match="is neither"):
        parse_sender(text)
