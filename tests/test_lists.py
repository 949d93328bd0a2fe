"""Compiled lists: what is looked up in a mapped file is what stands in the text, and a wrong line changes nothing."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsmtp.address import AddressError, parse_address
from fastsmtp.list_compile import compile_list
from fastsmtp.lists import Kind, Listed, ListError, ListFile, Lists, Networks, merge


def compiled(folder: Path, kind: Kind, text: str | bytes) -> Listed:
    path = folder / "list"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    source = ListFile(kind, path)
    compile_list(source, folder / "made")
    return Listed(source, folder / "made")


def error_of(folder: Path, kind: Kind, text: str | bytes) -> ListError:
    with pytest.raises(ListError) as caught:
        compiled(folder, kind, text)
    return caught.value


# Mailboxes


def test_mailboxes(tmp_path: Path) -> None:
    text = '# ours\n\nAnn\r\n bob \n"b c"\no\'neil\njürgen\nCarl@Here.Test\nd@bücher.test\n"x@y"@here.test\nlast'
    listed = compiled(tmp_path, "mailboxes", text)
    for local in ("ann", "bob", "b c", "o'neil", "jürgen", "last"):
        assert listed.has(f"{local}@any.test"), local
    assert listed.has("carl@here.test")
    assert listed.has("d@xn--bcher-kva.test")
    assert listed.has("x@y@here.test")
    for local, domain in (("carl", "else.test"), ("Ann", "any.test"), ("", ""), ("an", "any.test"), ("# ours", "x")):
        assert not listed.has(f"{local}@{domain}")
    assert not listed.has("carl@here.test@else.test"), "a local-part that looks like another's address"


def test_where_case_matters(tmp_path: Path) -> None:
    listed = compiled(tmp_path, "mailboxes-case", "Ann\nBob@HERE.test\n")
    assert listed.has("Ann@x")
    assert listed.has("Bob@here.test")
    assert not any(map(listed.has, ("ann@x", "bob@here.test")))


def test_a_list_of_nobody(tmp_path: Path) -> None:
    assert not compiled(tmp_path, "mailboxes", "").has("ann@here.test")
    assert "192.0.2.1" not in compiled(tmp_path, "networks", "# none\n")


LINES = st.sampled_from(
    [
        "ann",
        "Ann",
        "a.b",
        "a..b",
        ".a",
        "ann@here.test",
        "ANN@Here.TEST",
        "a@",
        "@b",
        "a@b.",
        "a@-b",
        "a@b-c",
        "a b",
        "#x",
        "#x@here.test",
        "",
        "  ann",
        '"q"',
        '"q"@here.test',
        "ä",
        "a@ä.test",
        "a\tb",
        "a@" + "x" * 63,
        "a@" + "x" * 64,
        "x@[192.0.2.1]",
        "a@b@c",
        "a_b+c",
        "a@b\x7f",
        "x" * 240,
        "x" * 241,
        "x" * 192 + "@" + "y" * 61,
        "x" * 192 + "@" + "y" * 62,
        "a@b_c.d",
    ]
)


def slowly(lines: list[str]) -> set[str] | int:
    """The keys by the parsers alone, or the number of the first wrong line."""
    keys = set()
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            address = parse_address(text if "@" in text else f"{text}@local.invalid")
        except AddressError:
            return number
        keys.add(address.mailbox if "@" in text else address.mailbox.removesuffix("@local.invalid"))
    return keys


@settings(max_examples=300, deadline=None)
@given(lines=st.lists(LINES, max_size=6))
def test_the_fast_way_is_the_slow_way(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("list")
    wanted = slowly(lines)
    text = "".join(f"{line}\n" for line in lines)
    if isinstance(wanted, int):
        assert error_of(folder, "mailboxes", text).line == wanted
        return
    listed = compiled(folder, "mailboxes", text)
    assert all(key in listed for key in wanted)
    assert all((line in listed) == (line in wanted) for line in lines if line.isprintable())


def test_many_keys_in_all_buckets(tmp_path: Path) -> None:
    names = [f"user{n}" for n in range(60_000)]
    listed = compiled(tmp_path, "mailboxes", "\n".join(names))
    assert all(listed.has(f"{name}@here.test") for name in names)
    assert not any(listed.has(f"{name}x@here.test") for name in names[:5000])
    assert listed.list_file.compiled(tmp_path / "made").stat().st_size < 60_000 * 20


# What is wrong


@pytest.mark.parametrize(
    ("kind", "text", "line", "says"),
    [
        ("mailboxes", "ann\nbob\na b\n", 3, 'expected a local-part or an address, found "a b"'),
        ("mailboxes", b"ann\n\xff\n", 2, "not UTF-8"),
        ("mailboxes", "ann\nb@x..test", 2, "empty label"),
        ("mailboxes", "a" * (1 << 19), 1, "expected a local-part"),
        ("mailboxes", "ann\n" + "a" * (6 << 20), 2, "too long"),
        (
            "networks",
            "192.0.2.0/24\n203.0.113.9/24\n",
            2,
            'expected an IP address or a network, found "203.0.113.9/24" '
            "(it has bits set beyond /24; did you mean 203.0.113.0/24?)",
        ),
        ("networks", "192.0.2.1/255.255.255.0", 1, "(it has bits set beyond /24; did you mean 192.0.2.0/24?)"),
        ("networks", "2001:db8::1/32", 1, "did you mean 2001:db8::/32?"),
        ("networks", "192.0.2.0/33", 1, 'expected an IP address or a network, found "192.0.2.0/33" (it is neither)'),
        ("networks", "\n\nfe80::/10%eth0", 3, "expected an IP address or a network"),
        ("networks", "192.0.2", 1, "expected an IP address or a network"),
        ("names", "x.test\n*.y.test\n*z\n", 3, "expected a name"),
        ("addresses", "a@x.test\n<>\n*\n<a@b>\n", 4, "expected an address, a domain or <>"),
        ("aliases", "a: b\nc\n", 2, 'there is no ":"'),
        ("aliases", "a: b\nA: c\n", 2, "a stands in line 1 already"),
        ("aliases", " a: b\n", 1, "goes on with nothing"),
        ("aliases", "a:\n", 1, "it stands for nobody"),
        ("aliases", "a: b c\n", 1, "addresses stand between commas"),
        ("aliases", "a: b\nx: |/bin/program\n", 2, "files, programs"),
        ("aliases", "a: b\nx: :include:/etc/passwd\n", 2, "files, programs"),
        ("aliases", "a: b\nb: c\nc: x@y.test, a\n", 3, "a loop: a -> b -> c -> a"),
        ("aliases", "x: y\na@here.test: b\nb@here.test: a@here.test", 3, "a loop: a@here.test -> b@here.test"),
    ],
)
def test_the_first_wrong_line_is_named(tmp_path: Path, kind: Kind, text: str, line: int, says: str) -> None:
    error = error_of(tmp_path, kind, text)
    assert (error.line, error.file) == (line, str(tmp_path / "list"))
    assert says in error.message
    assert str(error).startswith(f"{tmp_path}/list:{line}: ")
    assert not list((tmp_path / "made").glob("*")) if (tmp_path / "made").exists() else True


def test_a_wrong_line_far_down_leaves_the_list_before_in_force(tmp_path: Path) -> None:
    path = tmp_path / "list"
    listed = compiled(tmp_path, "mailboxes", "ann\n")
    with path.open("w") as file:
        file.write("u@x.test\n" * 3_456_788 + "no mailbox\n" + "v@x.test\n" * 10)
    with pytest.raises(ListError) as caught:
        compile_list(listed.list_file, tmp_path / "made")
    assert caught.value.line == 3_456_789
    assert not listed.refresh()
    assert listed.has("ann@x")
    assert len(list((tmp_path / "made").iterdir())) == 1


def test_an_alias_that_stands_for_too_many(tmp_path: Path) -> None:
    text = "all: " + ", ".join(f"u{n}" for n in range(10_001)) + "\n"
    assert error_of(tmp_path, "aliases", text + "twice: all, more\nmore: " + text[5:]).message.startswith(
        "twice stands"
    )


def test_two_ways_to_one_alias_are_no_loop(tmp_path: Path) -> None:
    listed = compiled(tmp_path, "aliases", "x: a, b\na: c\nb: c\nc: d\n")
    assert listed.get("x") is not None


def test_many_values_in_all_buckets(tmp_path: Path) -> None:
    listed = compiled(tmp_path, "aliases", "".join(f"a{n}: b{n}@x.test\n" for n in range(40_000)))
    assert all((listed.get(f"a{n}") or "").endswith(f"b{n}@x.test") for n in range(40_000))
    assert listed.get("b1@x.test") is None


def test_no_room_for_what_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = compiled(tmp_path, "mailboxes", "ann\n")
    (tmp_path / "list").write_text("bob\n")

    def fsync(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastsmtp.list_compile.os.fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        compile_list(listed.list_file, tmp_path / "made")
    assert not listed.refresh()
    assert len(list((tmp_path / "made").iterdir())) == 1


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ListError, match="list: cannot be read: No such file"):
        compile_list(ListFile("mailboxes", tmp_path / "list"), tmp_path)
    with pytest.raises(ListError, match="cannot be read: Is a directory"):
        compile_list(ListFile("mailboxes", tmp_path), tmp_path)


@pytest.mark.parametrize("damage", ["short", "other", "empty", "kind"])
def test_a_compiled_file_that_is_not_whole(tmp_path: Path, damage: str) -> None:
    listed = compiled(tmp_path, "mailboxes", "ann\nbob\n")
    file = listed.list_file.compiled(tmp_path / "made")
    octets = bytearray(file.read_bytes())
    if damage == "short":
        octets = octets[:-1]
    elif damage == "other":
        octets[0] ^= 1
    elif damage == "empty":
        octets = octets[:0]
    else:
        octets[16] ^= 1
    fresh = file.with_name("fresh")
    fresh.write_bytes(octets)
    fresh.rename(file)
    with pytest.raises(ListError, match="cannot be used"):
        listed.refresh()
    assert listed.has("ann@x")
    assert not listed.refresh()  # said once


# Replacement


def test_a_new_version_is_taken(tmp_path: Path) -> None:
    lists = Lists(tmp_path / "made")
    listed = compiled(tmp_path, "mailboxes", "ann\n")
    opened = lists.open("mailboxes", listed.list_file.path)
    assert lists.open("mailboxes", listed.list_file.path) is opened
    assert lists.refresh() == []
    compiled(tmp_path, "mailboxes", "bob@x.test\n")
    assert opened.has("ann@x.test")
    assert lists.refresh() == []
    assert [opened.has("ann@x.test"), opened.has("bob@x.test")] == [False, True]


def test_what_nobody_names_any_more_is_forgotten(tmp_path: Path) -> None:
    lists = Lists(tmp_path / "made")
    kept = compiled(tmp_path, "mailboxes", "ann\n").list_file
    gone = compiled(tmp_path, "names", "x.test\n").list_file
    for one in (kept, gone):
        lists.open(one.kind, one.path)
        one.compiled(tmp_path / "made").write_bytes(b"")
    lists.keep({kept})
    assert [error.file for error in lists.refresh()] == [str(kept.path)]


def test_a_list_whose_file_is_removed_goes_on(tmp_path: Path) -> None:
    """As of a session that began before a reload."""
    lists = Lists(tmp_path / "made")
    file = compiled(tmp_path, "mailboxes", "ann\n").list_file
    listed = lists.open("mailboxes", file.path)
    file.compiled(tmp_path / "made").unlink()
    assert (lists.refresh(), lists.version) == ([], 0)
    assert listed.has("ann@x.test")
    with pytest.raises(ListError, match="cannot be used: No such file"):
        Listed(file, tmp_path / "made")
    compiled(tmp_path, "mailboxes", "bob\n")
    assert (lists.refresh(), lists.version) == ([], 1)
    assert listed.has("bob@x.test")


def mapped(file: Path) -> float:
    """Which part of a file's mapping has pages. proc(5)."""
    fields: dict[str, int] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split()
        if not name.endswith(":"):
            within = words[-1:] == [str(file)]
        elif within and words[-1] == "kB":
            fields[name] = fields.get(name, 0) + int(words[0])
    return fields["Rss:"] / fields["Size:"]


def test_pages_are_mapped_before_they_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = Lists(tmp_path / "made")
    text = "".join(f"user{n}@x.test\n" for n in range(100_000))
    listed = compiled(tmp_path, "mailboxes", text)
    file = listed.list_file.compiled(tmp_path / "made")
    del listed
    opened = lists.open("mailboxes", tmp_path / "list")
    assert mapped(file) < 1
    lists.map_ahead(0.0)
    assert mapped(file) < 1
    monkeypatch.setattr("fastsmtp.lists.PIECE", 1 << 16)
    lists.map_ahead(60.0)
    assert mapped(file) == 1
    # a new version, and a kernel that cannot do it
    monkeypatch.setattr("fastsmtp.lists.POPULATE", 9999)
    compiled(tmp_path, "mailboxes", f"{text}ann\n")
    assert lists.refresh() == []
    lists.map_ahead(60.0)
    assert mapped(file) < 1
    assert opened.has("ann@x.test")


@pytest.mark.parametrize(
    ("kind", "text", "key"),
    [("mailboxes", "ann\nbob\n", "ann"), ("networks", "192.0.2.0/24\n", "192.0.2.1"), ("names", "x.test\n", "x.test")],
)
def test_a_file_may_begin_as_those_of_windows_do(tmp_path: Path, kind: Kind, text: str, key: str) -> None:
    """Else its first entry would be another, and somebody be refused for good."""
    for written in (f"\ufeff{text}", f"\ufeff{text}".replace("\n", "\r\n"), f"\ufeff# ours\n{text}"):
        assert key in compiled(tmp_path, kind, written)
    assert error_of(tmp_path, "mailboxes", "ann\n\ufeff\x01").line == 2, "but not in its midst"


def test_only_a_file_is_read(tmp_path: Path) -> None:
    """Whoever opened a FIFO would wait for ever, and all lists with it."""
    path = tmp_path / "list"
    os.mkfifo(path)
    for _ in range(2):
        with pytest.raises(ListError, match="no regular file"):
            compile_list(ListFile("mailboxes", path), tmp_path / "made")
        path.unlink()
        path.symlink_to("/dev/zero")
    path.unlink()
    path.mkdir()
    with pytest.raises(ListError, match=r"Is a directory|no regular file"):
        compile_list(ListFile("mailboxes", path), tmp_path / "made")


def test_what_is_written_in_the_same_tick_is_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the same time, and may have the same size: nobody could see later that it is another text."""
    path = tmp_path / "list"
    path.write_text("ann\n")
    begun = path.stat().st_mtime_ns

    def sleep(seconds: float) -> None:
        assert seconds >= 0.01
        path.write_text("bob\n")
        os.utime(path, ns=(begun, begun))

    monkeypatch.setattr("fastsmtp.list_compile.time.time_ns", lambda: begun + 1_000_000)
    monkeypatch.setattr("fastsmtp.list_compile.time.sleep", sleep)
    compile_list(ListFile("mailboxes", path), tmp_path / "made")
    assert "bob" in Listed(ListFile("mailboxes", path), tmp_path / "made")


def test_what_changes_while_it_is_read_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "list"
    path.write_text("ann\n")
    real = os.fstat
    calls = []

    def fstat(fd: int) -> os.stat_result:
        calls.append(fd)
        if len(calls) == 2:
            path.write_text("ann\nbob\n")
        return real(fd)

    monkeypatch.setattr("fastsmtp.list_compile.os.fstat", fstat)
    with pytest.raises(ListError, match="changed while it was read"):
        compile_list(ListFile("mailboxes", path), tmp_path / "made")
    assert not (tmp_path / "made").exists()


# Networks

V4 = st.builds(
    lambda n, length: ipaddress.ip_network((n >> (32 - length) << (32 - length), length)),
    st.integers(0, (1 << 32) - 1), st.sampled_from([0, 1, 8, 24, 31, 32, 32]),
)  # fmt: skip
V6 = st.builds(
    lambda n, length: ipaddress.ip_network((n >> (128 - length) << (128 - length), length)),
    st.integers(1 << 100, (1 << 128) - 1), st.sampled_from([1, 16, 63, 64, 65, 127, 128, 128]),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(networks=st.lists(V4 | V6, max_size=8), data=st.data())
def test_networks_are_what_ipaddress_says(
    networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network],
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    listed = compiled(tmp_path_factory.mktemp("list"), "networks", "\n".join(map(str, networks)))
    in_memory = Networks.of(networks)
    edges = [end + step for one in networks for end in (one[0], one[-1]) for step in (-1, 0, 1)
             if 0 <= int(end) + step < 1 << one.max_prefixlen]  # fmt: skip
    others = data.draw(st.lists(st.ip_addresses(), max_size=5))
    for address in [*edges, *others]:
        known = any(address in one for one in networks)
        assert (str(address) in listed) == known
        assert (str(address) in in_memory) == known


def test_networks_of_one_prefix(tmp_path: Path) -> None:
    """Many IPv6 intervals whose first words are equal."""
    listed = compiled(tmp_path, "networks", "\n".join(f"2001:db8::{n:x}" for n in range(0, 2000, 2)))
    assert all((f"2001:db8::{n:x}" in listed) == (n % 2 == 0) for n in range(2000))


@pytest.mark.parametrize("written", ["::ffff:192.0.2.0/120", "192.0.2.0/24", "192.0.2.0/255.255.255.0"])
def test_forms_of_a_network(tmp_path: Path, written: str) -> None:
    listed = compiled(tmp_path, "networks", f"{written}\n")
    assert "192.0.2.255" in listed
    assert "192.0.3.0" not in listed
    assert "" not in listed
    assert "here.test" not in listed
    assert "::1" not in listed


def test_answers_are_kept_until_the_list_changes(tmp_path: Path) -> None:
    listed = compiled(tmp_path, "networks", "192.0.2.1\nfe80::/10")
    assert "192.0.2.1" in listed
    assert "fe80::1%eth0" in listed
    compiled(tmp_path, "networks", "192.0.2.2\n")
    assert listed.refresh()
    assert ["192.0.2.1" in listed, "192.0.2.2" in listed] == [False, True]


def test_what_touches_becomes_one() -> None:
    assert merge([(5, 6), (1, 2), (3, 3), (8, 9), (8, 8)]) == [(1, 3), (5, 6), (8, 9)]
