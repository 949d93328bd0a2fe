"""TLS between a transport and a protocol, without any socket: real OpenSSL at both ends, and every octet seen.

Below is a transport that records, above a protocol that does. The client is an `ssl.MemoryBIO`. What real loops do with
it is tried in test_starttls.py.
"""

from __future__ import annotations

import asyncio
import gc
import ssl
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from certs import Authority
from wire import FakeTransport

from fastsmtp import tls_transport
from fastsmtp.tls import server_context
from fastsmtp.tls_transport import TlsTransport

VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
ALERT = 21  # a record's first octet (RFC 8446 5.1)
TEXT = b"MAIL FROM:<>\r\n" * 3000  # three records


class Above(asyncio.Protocol):
    """Records what it is told."""

    def __init__(self) -> None:
        self.octets = b""
        self.told: list[str] = []
        self.error: Exception | None = None
        self.on_octets: Callable[[], None] = lambda: None

    def data_received(self, data: bytes) -> None:
        self.octets += data
        self.on_octets()

    def eof_received(self) -> bool:
        self.told.append("eof")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.told.append("lost")
        self.error = exc

    def pause_writing(self) -> None:
        self.told.append("pause")

    def resume_writing(self) -> None:
        self.told.append("resume")


class Pair:
    """Both ends. `done` are the outcomes of the server's handshake that were told."""

    def __init__(self, loop: asyncio.AbstractEventLoop, server: ssl.SSLContext, client: ssl.SSLContext) -> None:
        self.loop = loop
        self.above = Above()
        self.below = FakeTransport()
        self.done: list[Exception | None] = []
        self.tls = TlsTransport(self.above, server, loop, 5.0, lambda _, error: self.done.append(error))
        self.tls.connection_made(self.below)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client.wrap_bio(self.incoming, self.outgoing, server_hostname="mx.test")
        self._taken = 0

    def turn(self) -> None:
        """A round of the loop; then the client has what the server has written."""
        self.loop.run_until_complete(asyncio.sleep(0))
        for octets in self.below.writes[self._taken :]:
            self.incoming.write(octets)
        self._taken = len(self.below.writes)

    def pass_on(self, cut: int = 0) -> None:
        """What the client has to say; in reads of `cut` octets."""
        octets = self.outgoing.read()
        for place in range(0, len(octets), cut or len(octets) or 1):
            self.tls.data_received(octets[place : place + (cut or len(octets))])
        self.turn()

    def shake_hands(self, cut: int = 0) -> None:
        for _ in range(5):
            try:
                self.client.do_handshake()
                self.pass_on(cut)
                return
            except ssl.SSLWantReadError:
                self.pass_on(cut)
        raise AssertionError("the handshake does not end")

    def lose(self) -> None:
        self.tls.connection_lost(None)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


Make = Callable[..., Pair]


@pytest.fixture
def make(loop: asyncio.AbstractEventLoop, authority: Authority) -> Make:
    files = authority.issue("mx", "mx.test")

    def make(version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, minimum: str = "1.2") -> Pair:
        context = server_context(Path(files.certificate), Path(files.key), "1.3" if minimum == "1.3" else "1.2")
        return Pair(loop, context, authority.client(version))

    return make


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cut", [0, 1, 7])
def test_octets_go_through_however_the_reads_are_cut(make: Make, version: ssl.TLSVersion, cut: int) -> None:
    pair = make(version)
    pair.shake_hands(cut)
    assert pair.done == [None]
    assert pair.tls.get_extra_info("ssl_object").version() == {VERSIONS[0]: "TLSv1.2", VERSIONS[1]: "TLSv1.3"}[version]
    assert pair.tls.get_extra_info("peername") == pair.below.peer
    pair.client.write(TEXT)
    pair.pass_on(cut)
    assert pair.above.octets == TEXT
    pair.tls.write(TEXT)
    pair.turn()
    found = b""
    while len(found) < len(TEXT):
        found += pair.client.read(65536)
    assert found == TEXT


def test_octets_in_the_segment_of_the_finished(make: Make) -> None:
    pair = make()
    with pytest.raises(ssl.SSLWantReadError):
        pair.client.do_handshake()
    pair.pass_on()
    pair.client.do_handshake()
    pair.client.write(b"EHLO c\r\n")
    pair.pass_on()
    assert pair.done == [None]
    assert pair.above.octets == b"EHLO c\r\n"


def test_what_is_said_first_leaves_with_the_tickets(make: Make) -> None:
    pair = make()
    pair.tls._done = lambda tls, _: loop_soon(pair, tls)
    pair.shake_hands()
    assert len(pair.below.writes) == 2  # its hello up to its Finished, and the rest
    assert pair.client.read(100) == b"220 hello\r\n"
    assert pair.client.session is not None


def loop_soon(pair: Pair, tls: TlsTransport) -> None:
    pair.loop.call_soon(tls.write, b"220 hello\r\n")


@pytest.mark.parametrize("version", VERSIONS)
def test_whoever_says_nothing_sends_the_end_of_the_handshake(make: Make, version: ssl.TLSVersion) -> None:
    pair = make(version)
    pair.shake_hands()
    assert len(pair.below.writes) == 2


@pytest.mark.parametrize(
    ("octets", "alerts"), [(b"EHLO client.test\r\n", []), (b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00", [ALERT])]
)
def test_a_client_that_is_wrong(make: Make, octets: bytes, alerts: list[int]) -> None:
    """OpenSSL has no alert for what is no TLS at all."""
    pair = make()
    pair.tls.data_received(octets)
    assert [type(error) for error in pair.done] == [ssl.SSLError]
    assert [written[0] for written in pair.below.writes] == alerts
    assert pair.below.closed
    assert not pair.below.aborted
    pair.lose()
    assert len(pair.done) == 1
    assert pair.above.told == ["lost"]


def test_an_old_version_is_told_why(make: Make) -> None:
    pair = make(minimum="1.3", version=ssl.TLSVersion.TLSv1_2)
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
        pair.shake_hands()
    assert len(pair.done) == 1


def test_a_handshake_ends_in_time(make: Make) -> None:
    pair = make()
    pair.tls.data_received(b"\x16\x03")
    pair.tls._seconds = 0.01
    pair.tls.connection_made(pair.below)
    pair.loop.run_until_complete(asyncio.sleep(0.05))
    assert [type(error) for error in pair.done] == [TimeoutError]
    assert pair.below.aborted
    assert pair.tls.is_closing()


@pytest.mark.parametrize("eof", [True, False])
def test_a_client_that_goes_in_the_handshake(make: Make, eof: bool) -> None:
    pair = make()
    if eof:
        assert not pair.tls.eof_received()
    pair.lose()
    assert [type(error) for error in pair.done] == [ConnectionResetError]
    assert pair.above.told == ["lost"]


def test_the_client_hears_the_end_and_is_waited_for(make: Make) -> None:
    pair = make()
    pair.shake_hands()
    pair.tls.write(b"221 bye\r\n")
    pair.tls.close()
    pair.tls.close()
    pair.tls.write(b"late")
    pair.turn()
    assert pair.client.read(100) == b"221 bye\r\n"
    assert pair.client.read(100) == b""
    assert pair.tls.is_closing()
    assert not pair.below.closed
    pair.client.write(b"NOOP\r\n")
    pair.pass_on()
    assert not pair.below.closed
    assert pair.above.octets == b""
    pair.client.unwrap()
    pair.pass_on()
    assert pair.below.closed
    assert not pair.below.aborted


def test_who_does_not_go_is_cut_off(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_transport, "LINGER", 0.01)
    pair = make()
    pair.shake_hands()
    pair.tls.pause_reading()
    pair.tls.close()
    assert pair.below.reading
    pair.loop.run_until_complete(asyncio.sleep(0.05))
    assert pair.below.aborted


def test_the_clients_end(make: Make) -> None:
    pair = make()
    pair.shake_hands()
    pair.client.write(b"QUIT\r\n")
    with pytest.raises(ssl.SSLWantReadError):
        pair.client.unwrap()
    pair.pass_on()
    assert pair.above.octets == b"QUIT\r\n"
    assert pair.above.told == ["eof"]
    assert pair.below.closed
    assert pair.client.unwrap() is None
    pair.lose()
    assert pair.above.told == ["eof", "lost"]
    assert pair.above.error is None


def test_an_end_without_a_word_is_no_eof(make: Make) -> None:
    pair = make()
    pair.shake_hands()
    assert not pair.tls.eof_received()
    pair.lose()
    assert pair.above.told == ["lost"]


def test_a_record_that_was_altered(make: Make) -> None:
    pair = make()
    pair.shake_hands()
    pair.client.write(b"NOOP\r\n")
    good = pair.outgoing.read()
    pair.client.write(b"RSET\r\n")
    bad = bytearray(pair.outgoing.read())
    bad[-1] ^= 1
    before = len(pair.below.writes)
    pair.tls.data_received(good + bytes(bad))
    assert pair.above.octets == b"NOOP\r\n"
    assert len(pair.below.writes) == before + 1
    assert pair.below.closed
    pair.tls.write(b"250 OK\r\n")
    assert len(pair.below.writes) == before + 1
    pair.lose()
    assert isinstance(pair.above.error, ssl.SSLError)


def test_a_write_that_fails_is_the_end_of_this_connection_only(make: Make) -> None:
    pair = make()
    pair.shake_hands()

    class Broken:
        def write(self, data: bytes) -> int:
            raise ssl.SSLError(1, "broken")

    pair.tls._object = Broken()  # type: ignore[assignment]
    pair.tls.write(b"250 OK\r\n")
    assert pair.below.closed
    pair.lose()
    assert isinstance(pair.above.error, ssl.SSLError)


def test_octets_behind_our_end_are_nobodys(make: Make) -> None:
    pair = make()
    pair.shake_hands()
    pair.above.on_octets = pair.tls.close
    pair.client.write(b"QUIT\r\n")
    pair.pass_on()
    pair.client.write(b"DATA\r\n")
    pair.client.unwrap()
    pair.pass_on()
    assert pair.above.octets == b"QUIT\r\n"
    assert pair.above.told == []
    assert pair.below.closed


def test_pauses_go_through(make: Make) -> None:
    pair = make()
    pair.shake_hands()
    pair.tls.pause_writing()
    pair.tls.resume_writing()
    assert pair.above.told == ["pause", "resume"]
    pair.tls.pause_reading()
    assert not pair.below.reading
    pair.tls.resume_reading()
    assert pair.below.reading
    pair.tls.abort()
    assert pair.below.aborted


def test_another_protocol_takes_over(make: Make) -> None:
    pair = make()
    pair.shake_hands()
    other = Above()
    pair.tls.set_protocol(other)
    pair.client.write(b"250 OK\r\n")
    pair.pass_on()
    pair.lose()
    assert (other.octets, other.told) == (b"250 OK\r\n", ["lost"])
    assert (pair.above.octets, pair.above.told) == (b"", [])


def test_nothing_is_left_for_the_garbage_collector(make: Make) -> None:
    """30 KB of OpenSSL's hang on it."""
    pair = make()
    pair.shake_hands()
    gone = weakref.ref(pair.tls.get_extra_info("ssl_object"))
    gc.disable()
    try:
        pair.lose()
        pair.turn()
        del pair
        assert gone() is None
    finally:
        gc.enable()
