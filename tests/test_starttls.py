"""TLS on real sockets, on uvloop and on asyncio's own loop.

The client is a socket and an `ssl.MemoryBIO`: every octet on the wire is in the test's hands, so that it can put an
EHLO behind its own Finished into one segment, and see whether anything was answered in clear.
"""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from wire import Bench, make_service

from fastsmtp.connection import Connection
from fastsmtp.gate import Gate
from fastsmtp.metrics import Counter
from fastsmtp.service import Times
from fastsmtp.tls import server_context

SECONDS = 10.0
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}
EHLO = b"EHLO client.test\r\n"


def write_certificate(path: Path, key: ec.EllipticCurvePrivateKey, name: str) -> None:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    write_certificate(folder / "cert.pem", key, "mx.here.test")
    return folder / "cert.pem", folder / "key.pem"


def client_context(version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if version is not None:
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = version
    return context


class Wire:
    """A client whose octets are all seen: `clear` is what came outside of TLS."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.tls: ssl.SSLObject | None = None

    async def read(self) -> bytes:
        """Octets from the wire; empty at the end."""
        try:
            return await asyncio.wait_for(self.reader.read(65536), SECONDS)
        except ConnectionError:
            return b""

    async def reply(self, last: bytes = b" ") -> list[str]:
        """A reply in clear."""
        lines: list[str] = []
        while not lines or lines[-1][3:4] == "-":
            line = await asyncio.wait_for(self.reader.readline(), SECONDS)
            assert line.endswith(b"\r\n"), line
            lines.append(line.decode().rstrip())
        return lines

    async def say(self, line: bytes) -> list[str]:
        self.writer.write(line + b"\r\n")
        return await self.reply()

    async def start(self) -> None:
        """Up to the 220 of STARTTLS."""
        assert (await self.reply())[0].startswith("220 ")
        assert "250-STARTTLS" in (lines := await self.say(b"EHLO client.test")) or "250 STARTTLS" in lines
        assert await self.say(b"STARTTLS") == ["220 2.0.0 Ready to start TLS"]

    def begin(self, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> None:
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="mx.here.test", session=session)

    async def handshake(self, with_finished: bytes = b"") -> None:
        """`with_finished` leaves in the same segment as the client's Finished."""
        assert self.tls is not None
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.send()
                octets = await self.read()
                if not octets:
                    raise ConnectionResetError from None
                self.incoming.write(octets)
        if with_finished:
            self.tls.write(with_finished)
        self.send()

    def send(self) -> None:
        """What TLS has to say, as one segment."""
        octets = self.outgoing.read()
        if octets:
            self.writer.write(octets)

    def write(self, octets: bytes) -> None:
        assert self.tls is not None
        self.tls.write(octets)
        self.send()

    async def secure_reply(self) -> list[str]:
        """A reply inside TLS; [] at the end."""
        assert self.tls is not None
        text = ""
        while not text.endswith("\r\n") or text.splitlines()[-1][3:4] == "-":
            try:
                octets = self.tls.read(65536)
                if not octets:
                    return text.splitlines()
                text += octets.decode()
            except ssl.SSLWantReadError:
                octets = await self.read()
                if not octets:
                    return text.splitlines()
                # Nothing but TLS records: a reply in clear would begin with a digit.
                self.incoming.write(octets)
                self.send()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return text.splitlines()
        return text.splitlines()

    async def secure(self, line: bytes) -> list[str]:
        self.write(line + b"\r\n")
        return await self.secure_reply()


class Server:
    """A listener on a socket."""

    def __init__(self, made: Bench, port: int) -> None:
        self.made = made
        self.port = port
        self._writers: list[asyncio.StreamWriter] = []

    async def connect(self) -> Wire:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._writers.append(writer)
        return Wire(reader, writer)

    async def all_gone(self) -> None:
        """No session is left, and none is counted."""
        for _ in range(500):
            if not self.made.service.connections() and self.made.service.shared.open_sessions() == 0:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("a session was left")

    def disconnect(self) -> None:
        for writer in self._writers:
            writer.close()


def serve(
    loop: str, context: ssl.SSLContext | None, test: Callable[[Server], Awaitable[None]], **options: Any
) -> Bench:
    """Runs `test` against a listener, and sees to it that nothing of it is left and nothing was a bug."""
    implicit = options.pop("implicit", False)
    unheard: list[dict[str, Any]] = []

    async def run() -> Bench:
        running = asyncio.get_running_loop()
        running.set_exception_handler(lambda _, what: unheard.append(what))
        made = make_service(running, context=context, tls=context is not None and not implicit, **options)
        listening = await running.create_server(
            lambda: Gate(made.service) if implicit else Connection(made.service), "127.0.0.1", 0
        )
        server = Server(made, listening.sockets[0].getsockname()[1])
        try:
            await test(server)
        finally:
            server.disconnect()
            listening.close()
        await server.all_gone()
        made.check_bugs(0)
        return made

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        made = runner.run(run())
    errors = [what for what in unheard if not isinstance(what.get("exception"), (OSError, ssl.SSLError))]
    assert errors == []
    return made


pytestmark = pytest.mark.parametrize("loop", LOOPS)
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
Certificate = tuple[Path, Path]


@pytest.mark.parametrize("version", VERSIONS)
def test_mail_in_tls(loop: str, certificate: Certificate, version: ssl.TLSVersion) -> None:
    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.start()
        wire.begin(client_context(version))
        await wire.handshake()
        # RFC 3207 4.2: what was said before is forgotten.
        assert (await wire.secure(b"MAIL FROM:<>"))[0].startswith("503 5.5.1")
        lines = await wire.secure(b"EHLO client.test")
        assert not any("STARTTLS" in line for line in lines)
        for line, code in (
            (b"STARTTLS", "503 5.5.1"),
            (b"MAIL FROM:<s@b.test>", "250 "),
            (b"RCPT TO:<ann@here.test>", "250 "),
            (b"DATA", "354 "),
            (b"hello\r\n.", "250 "),
            (b"QUIT", "221 "),
        ):
            assert (await wire.secure(line))[0].startswith(code)
        assert await wire.secure_reply() == []

    made = serve(loop, server_context(*certificate), test)
    (kept,) = made.keeper.kept
    assert kept.body == b"hello\r\n"
    assert b"with ESMTPS id" in kept.message.prefix
    assert b"\r\n\t(TLSv1." in kept.message.prefix
    assert made.counted(Counter.TLS_HANDSHAKES) == 1
    assert made.logged("session")[0]["tls"].startswith("TLSv1.")
    assert made.logged("session")[0]["end"] == "quit"


@pytest.mark.parametrize("version", VERSIONS)
def test_ehlo_in_the_segment_of_the_finished(loop: str, certificate: Certificate, version: ssl.TLSVersion) -> None:
    """In TLS 1.2 the client's Finished is the last word of a resumed handshake only."""
    client = client_context(version)
    sessions: list[ssl.SSLSession | None] = [None]

    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.start()
        wire.begin(client, sessions[-1])
        early = version is ssl.TLSVersion.TLSv1_3 or sessions[-1] is not None
        await wire.handshake(with_finished=EHLO if early else b"")
        if not early:
            wire.write(EHLO)
        assert (await wire.secure_reply())[0] == "250-mx.here.test"
        assert (await wire.secure(b"NOOP")) == ["250 2.0.0 OK"]
        assert wire.tls is not None
        assert wire.tls.session_reused == (sessions[-1] is not None)
        sessions.append(wire.tls.session)

    context = server_context(*certificate)
    for _ in range(5):
        serve(loop, context, test)


def test_a_large_first_segment(loop: str, certificate: Certificate) -> None:
    """More records than one read takes, all behind the Finished."""

    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.start()
        wire.begin(client_context(ssl.TLSVersion.TLSv1_3))
        await wire.handshake(with_finished=b"NOOP\r\n" * 40_000)
        text = b""
        while text.count(b"\r\n") < 101:
            lines = await wire.secure_reply()
            text += "".join(f"{line}\r\n" for line in lines).encode()
            assert lines
        assert text.endswith(b"421 4.7.0 Too many commands without mail, closing\r\n")

    serve(loop, server_context(*certificate), test)


@pytest.mark.parametrize("behind", [b"NOOP\r\n", b"E", b"\r\n", b"MAIL FROM:<>\r\nRCPT TO:<ann@here.test>\r\nDATA\r\n"])
def test_octets_behind_starttls_are_executed_nowhere(loop: str, certificate: Certificate, behind: bytes) -> None:
    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.reply()
        await wire.say(b"EHLO client.test")
        wire.writer.write(b"STARTTLS\r\n" + behind)
        assert await wire.read() == b""

    made = serve(loop, server_context(*certificate), test)
    assert made.counted(Counter.TLS_HANDSHAKES) == 0
    assert made.keeper.kept == []


def test_octets_in_clear_before_the_handshake_are_executed_nowhere(loop: str, certificate: Certificate) -> None:
    """They come when the 220 is on its way: what is no TLS breaks the handshake."""

    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.start()
        wire.writer.write(b"NOOP\r\nMAIL FROM:<>\r\n")
        answer = await wire.read()
        assert not answer[:1].isdigit()
        while await wire.read():
            pass

    made = serve(loop, server_context(*certificate), test)
    assert made.counted(Counter.TLS_FAILURES) == 1
    assert len(made.logged("tls-failed")) == 1
    assert made.logged("session")[0]["end"] == "TLS failed"


def test_a_handshake_that_does_not_end(loop: str, certificate: Certificate) -> None:
    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.start()
        wire.begin(client_context())
        assert wire.tls is not None
        with pytest.raises(ssl.SSLWantReadError):
            wire.tls.do_handshake()
        wire.writer.write(wire.outgoing.read()[:20])
        assert await wire.read() == b""

    made = serve(loop, server_context(*certificate), test, times=Times(tls=0.2))
    assert made.counted(Counter.TLS_FAILURES) == 1


@pytest.mark.parametrize("after", range(4))
def test_a_client_that_vanishes_in_the_handshake(loop: str, certificate: Certificate, after: int) -> None:
    """No session stays counted, wherever it was cut."""

    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.start()
        wire.begin(client_context())
        assert wire.tls is not None
        if after:
            with pytest.raises(ssl.SSLWantReadError):
                wire.tls.do_handshake()
            octets = wire.outgoing.read()
            wire.writer.write(octets if after > 1 else octets[:50])
        if after > 2:
            wire.incoming.write(await wire.read())
        transport = wire.writer.transport
        transport.abort()
        await server.all_gone()

    made = serve(loop, server_context(*certificate), test)
    assert len(made.logged("session")) == 1
    assert made.service.shared.open_sessions() == 0


def test_clients_that_vanish_before_the_handshake(loop: str, certificate: Certificate) -> None:
    """Octets and the end may be seen in one turn of the loop, in every order."""

    async def test(server: Server) -> None:
        for number in range(60):
            wire = await server.connect()
            await wire.reply()
            wire.writer.write(b"EHLO c\r\n")
            await wire.reply()
            wire.writer.write(b"STARTTLS\r\n")
            if number % 3 == 0:
                wire.writer.write_eof()
            if number % 2:
                await asyncio.sleep(0)
            wire.writer.transport.abort()
        await server.all_gone()

    made = serve(loop, server_context(*certificate), test)
    assert len(made.logged("session")) == 60


def test_a_client_that_closes_in_the_handshake(loop: str, certificate: Certificate) -> None:
    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.start()
        wire.writer.write_eof()
        assert await wire.read() == b""
        await server.all_gone()

    serve(loop, server_context(*certificate), test)


def test_counters_go_on_in_tls(loop: str, certificate: Certificate) -> None:
    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.reply()
        await wire.say(b"WHAT")
        await wire.say(b"WHAT")
        await wire.say(b"EHLO client.test")
        assert await wire.say(b"STARTTLS") == ["220 2.0.0 Ready to start TLS"]
        wire.begin(client_context())
        await wire.handshake()
        assert (await wire.secure(b"WHAT"))[0].startswith("421 4.7.0")
        assert await wire.secure_reply() == []

    made = serve(loop, server_context(*certificate), test, errors=3)
    assert made.logged("session")[0]["helo"] == ""


def test_a_transaction_is_forgotten_with_its_draft(loop: str, certificate: Certificate) -> None:
    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.reply()
        for line in (b"EHLO c", b"MAIL FROM:<old@b.test>", b"RCPT TO:<bob@here.test>", b"BDAT 5\r\nold"):
            assert (await wire.say(line))[0].startswith("250")
        await wire.say(b"STARTTLS")
        wire.begin(client_context())
        await wire.handshake()
        await wire.secure(b"EHLO c")
        assert (await wire.secure(b"RCPT TO:<ann@here.test>"))[0].startswith("503")
        await wire.secure(b"MAIL FROM:<new@b.test>")
        await wire.secure(b"RCPT TO:<ann@here.test>")
        assert (await wire.secure(b"BDAT 5 LAST\r\nnew"))[0].startswith("250 2.0.0 Queued")

    made = serve(loop, server_context(*certificate), test)
    (kept,) = made.keeper.kept
    assert (kept.reverse_path, kept.recipients, kept.body) == ("<new@b.test>", ["<ann@here.test>"], b"new\r\n")
    assert made.keeper.leaked == []


def test_without_a_certificate_there_is_no_tls(loop: str, certificate: Certificate) -> None:
    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.reply()
        assert not any("STARTTLS" in line for line in await wire.say(b"EHLO c"))
        assert (await wire.say(b"STARTTLS"))[0].startswith("454 4.7.0")
        assert (await wire.say(b"NOOP"))[0].startswith("250")

    serve(loop, None, test)


def test_starttls_with_an_argument(loop: str, certificate: Certificate) -> None:
    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.reply()
        await wire.say(b"EHLO c")
        assert (await wire.say(b"STARTTLS now"))[0].startswith("501 5.5.4")

    serve(loop, server_context(*certificate), test)


@pytest.mark.parametrize("version", VERSIONS)
def test_implicit_tls(loop: str, certificate: Certificate, version: ssl.TLSVersion) -> None:
    async def test(server: Server) -> None:
        wire = await server.connect()
        wire.begin(client_context(version))
        await wire.handshake()
        assert (await wire.secure_reply())[0].startswith("220 mx.here.test")
        lines = await wire.secure(b"EHLO c")
        assert not any("STARTTLS" in line for line in lines)
        assert (await wire.secure(b"STARTTLS"))[0].startswith("503 5.5.1")
        assert (await wire.secure(b"QUIT"))[0].startswith("221")

    made = serve(loop, server_context(*certificate), test, implicit=True)
    assert made.counted(Counter.TLS_HANDSHAKES) == 1


def test_implicit_tls_with_garbage(loop: str, certificate: Certificate) -> None:
    async def test(server: Server) -> None:
        wire = await server.connect()
        wire.writer.write(b"EHLO client.test\r\n")
        answer = await wire.read()
        assert not answer[:1].isdigit()

    made = serve(loop, server_context(*certificate), test, implicit=True)
    assert made.service.shared.open_sessions() == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
def test_old_tls_is_refused(loop: str, certificate: Certificate, version: str) -> None:
    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.start()
        wire.begin(client_context(ssl.TLSVersion[version]))
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await wire.handshake()
        assert await wire.read() == b""

    made = serve(loop, server_context(*certificate), test)
    assert made.counted(Counter.TLS_HANDSHAKES) == 0


def test_tls_1_2_can_be_switched_off(loop: str, certificate: Certificate) -> None:
    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.start()
        wire.begin(client_context(ssl.TLSVersion.TLSv1_2))
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await wire.handshake()

    serve(loop, server_context(*certificate, minimum="1.3"), test)


def test_renegotiation_is_off(loop: str, certificate: Certificate) -> None:
    """Python's client cannot ask for it; the option that refuses it is set for every version that has it."""

    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.start()
        wire.begin(client_context(ssl.TLSVersion.TLSv1_2))
        await wire.handshake()
        # A ClientHello inside the session is what a renegotiation begins with; as a record of its own it is not
        # encrypted, and breaks the session.
        other = ssl.MemoryBIO()
        hello = client_context(ssl.TLSVersion.TLSv1_2).wrap_bio(ssl.MemoryBIO(), other)
        with pytest.raises(ssl.SSLWantReadError):
            hello.do_handshake()
        wire.writer.write(other.read())
        while octets := await wire.read():
            assert not octets[:1].isdigit()

    context = server_context(*certificate)
    assert context.options & ssl.OP_NO_RENEGOTIATION
    serve(loop, context, test)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("same", [True, False])
def test_tickets_are_of_use_on_their_own_listener_only(
    loop: str, certificate: Certificate, version: ssl.TLSVersion, same: bool
) -> None:
    client = client_context(version)
    sessions: list[ssl.SSLSession] = []
    reused: list[bool | None] = []

    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.start()
        wire.begin(client, sessions[0] if sessions else None)
        await wire.handshake()
        await wire.secure(b"EHLO c")
        assert wire.tls is not None
        reused.append(wire.tls.session_reused)
        assert wire.tls.session is not None
        sessions.append(wire.tls.session)
        await wire.secure(b"QUIT")

    context = server_context(*certificate)
    serve(loop, context, test)
    serve(loop, context if same else server_context(*certificate), test)
    assert reused == [False, same]


def test_drain_in_the_middle_of_a_handshake(loop: str, certificate: Certificate) -> None:
    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.start()
        server.made.service.drain()
        wire.begin(client_context())
        await wire.handshake()
        lines = await wire.secure(b"EHLO c")
        lines += await wire.secure_reply()
        assert any(line.startswith("421 4.3.2") for line in lines)

    serve(loop, server_context(*certificate), test)


def test_timeouts_hold_in_tls(loop: str, certificate: Certificate) -> None:
    async def test(server: Server) -> None:
        wire = await server.connect()
        await wire.start()
        wire.begin(client_context())
        await wire.handshake()
        (connection,) = server.made.service.connections()
        now = asyncio.get_running_loop().time()
        await wire.secure(b"NOOP")
        connection.check(now)
        connection.check(now + 301)
        assert (await wire.secure_reply())[0].startswith("421 4.4.2")
        assert await wire.secure_reply() == []

    serve(loop, server_context(*certificate), test)
