"""embed: the public API, on both event loops; the README's example is run as it stands there."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import smtplib
import ssl
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop
from certs import Authority

import fastsmtp
from fastsmtp import Mail, RefuseError, Server

ROOT = Path(__file__).parents[1]
LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [uvloop.new_event_loop, asyncio.new_event_loop]


def run(loop: Callable[[], asyncio.AbstractEventLoop], test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await test()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(main(), 30))


async def send(
    server: Server, recipient: str = "b@y.test", text: str = "Subject: x\r\n\r\nhello\r\n"
) -> tuple[int, bytes]:
    """The reply to the final dot, or the refusal that came before."""

    def talk() -> tuple[int, bytes]:
        host, _, port = server.addresses[0].rpartition(":")
        client = smtplib.SMTP(host, int(port), "client.test")
        client.ehlo()
        client.mail("a@x.test")
        code, answer = client.rcpt(recipient)
        if code == 250:
            code, answer = client.data(text)
        client.close()
        return code, answer

    return await asyncio.to_thread(talk)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_message_reaches_the_function(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    mails: list[Mail] = []

    async def deliver(mail: Mail) -> None:
        await asyncio.sleep(0)
        mails.append(mail)

    async def test() -> None:
        async with await fastsmtp.start(deliver, "127.0.0.1:0", hostname="mx.test") as server:
            code, answer = await send(server)
        assert code == 250
        (mail,) = mails
        assert mail.id.encode() in answer
        assert (mail.sender, mail.recipients, mail.client, mail.helo, mail.tls) == (
            "a@x.test", ("b@y.test",), "127.0.0.1", "client.test", False,
        )  # fmt: skip
        received, _, rest = mail.data.partition(b"Subject:")
        assert received.startswith(b"Received: from client.test ([127.0.0.1])")
        assert b"by mx.test with ESMTP id " + mail.id.encode() in received
        assert rest == b" x\r\n\r\nhello\r\n"

    run(loop, test)


@pytest.mark.parametrize("hello", ["EHLO", "HELO"])
def test_a_mail_says_whether_it_came_over_tls(hello: str, tmp_path: Path) -> None:
    mails: list[Mail] = []
    files = Authority(tmp_path).issue("mx", "mx.test")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)

    def talk(address: str) -> None:
        host, _, port = address.rpartition(":")
        with smtplib.SMTP(host, int(port), "client.test") as client:
            for secure in (False, True):
                if secure:
                    client.starttls(context=ssl._create_unverified_context())
                client.docmd(hello, "client.test")
                client.mail("a@x.test")
                client.rcpt("b@y.test")
                assert client.data("Subject: x\r\n\t(TLS)\r\n\tby \r\n\r\n")[0] == 250

    async def test() -> None:
        async with await fastsmtp.start(mails.append, "127.0.0.1:0", tls=context) as server:
            await asyncio.to_thread(talk, server.addresses[0])
        assert [mail.tls for mail in mails] == [False, True]

    run(uvloop.new_event_loop, test)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_plain_function_will_do(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    sizes: list[int] = []

    async def test() -> None:
        async with await fastsmtp.start(lambda mail: sizes.append(len(mail.data)), "127.0.0.1:0") as server:
            assert (await send(server))[0] == 250
        assert len(sizes) == 1

    run(loop, test)


@pytest.mark.parametrize("loop", LOOPS)
def test_what_the_function_raises(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    errors: list[Exception] = [RefuseError(554, "5.7.1", "Not today"), ValueError("secret"), OSError("secret")]

    async def deliver(mail: Mail) -> None:
        raise errors.pop(0)

    async def test() -> None:
        async with await fastsmtp.start(deliver, "127.0.0.1:0") as server:
            assert await send(server) == (554, b"5.7.1 Not today")
            for _ in range(2):
                code, answer = await send(server)
                assert code == 451
                assert b"secret" not in answer

    run(loop, test)


def test_a_refusal_must_be_one() -> None:
    with pytest.raises(ValueError, match="from 400 to 599"):
        RefuseError(250, "2.0.0", "no")
    with pytest.raises(ValueError, match="not printable"):
        RefuseError(550, "5.0.0", "two\r\nlines")


def test_recipients_are_asked() -> None:
    async def test() -> None:
        known = {"b@y.test"}
        async with await fastsmtp.start(lambda mail: None, "127.0.0.1:0", recipients=known.__contains__) as server:
            assert (await send(server))[0] == 250
            assert await send(server, "c@y.test") == (550, b"5.1.1 No such mailbox here")

    run(uvloop.new_event_loop, test)


def test_a_slow_function_delays_only_its_own_session() -> None:
    release = asyncio.Event()

    async def deliver(mail: Mail) -> None:
        if mail.recipients == ("slow@y.test",):
            await release.wait()

    async def test() -> None:
        async with await fastsmtp.start(deliver, "127.0.0.1:0") as server:
            slow = asyncio.create_task(send(server, "slow@y.test"))
            assert (await send(server))[0] == 250
            assert not slow.done()
            release.set()
            assert (await slow)[0] == 250

    run(uvloop.new_event_loop, test)


def test_memory_is_bounded_and_given_back() -> None:
    async def test() -> None:
        async with await fastsmtp.start(lambda mail: None, "127.0.0.1:0", memory=100_000) as server:
            assert (await send(server, text="x" * 900 + "\r\n" * 200_000))[0] == 452
            for _ in range(30):
                assert (await send(server, text="Subject: x\r\n\r\n" + "y" * 70 + "\r\n" * 10_000))[0] == 250

    run(uvloop.new_event_loop, test)


def test_stop_waits_for_a_message_under_way() -> None:
    finished: list[str] = []

    async def deliver(mail: Mail) -> None:
        await asyncio.sleep(0.3)
        finished.append(mail.sender)

    async def test() -> None:
        server = await fastsmtp.start(deliver, "127.0.0.1:0")
        sending = asyncio.create_task(send(server))
        await asyncio.sleep(0.15)
        await server.stop()
        assert finished == ["a@x.test"]
        assert (await sending)[0] == 250

    run(uvloop.new_event_loop, test)


def test_a_unix_socket(tmp_path: Path) -> None:
    async def test() -> None:
        async with await fastsmtp.start(lambda mail: None, f"unix:{tmp_path}/lmtp", role="lmtp") as server:
            assert server.addresses == [f"unix:{tmp_path}/lmtp"]
            reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/lmtp")
            assert (await reader.readline()).startswith(b"220 ")
            writer.write(b"LHLO x\r\n")
            assert (await reader.readline()).startswith(b"250-")
            writer.close()

    run(uvloop.new_event_loop, test)


def test_addresses_that_are_none() -> None:
    async def test() -> None:
        for address in ("2525", "localhost", "localhost:smtp", ":25"):
            with pytest.raises(ValueError, match="is no address"):
                await fastsmtp.start(lambda mail: None, address)

    run(uvloop.new_event_loop, test)


def test_the_readme_example(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert example is not None
    code = (
        example[1]
        .replace("127.0.0.1:2525", "127.0.0.1:0")
        .replace('"):\n', '") as server:\n        print(server.addresses[0])\n')
    )
    assert len([line for line in example[1].splitlines() if line]) <= 10
    program = tmp_path / "example.py"
    program.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        host, _, port = process.stdout.readline().strip().rpartition(":")
        with smtplib.SMTP(host, int(port)) as client:
            client.sendmail("a@x.test", ["b@y.test"], "Subject: x\r\n\r\nhello\r\n")
        assert re.fullmatch(r"a@x\.test -> \('b@y\.test',\) \d+\n", process.stdout.readline())
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is not None
