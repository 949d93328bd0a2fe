"""One question to an HTTPS server: a request, and an answer of bounded size.

In: an `https` address, what is sent, a TLS context that verifies. Out: the body of a 200. A connection serves one
request; redirects are not followed, for a client secret would go along. The caller sets the time-out.
HttpError, with one line, for everything else: no connection, no valid certificate, another status, too long.
HTTP/1.1 as h11 speaks it; RFC 9110, RFC 9112.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from urllib.parse import urlsplit

import h11

AGENT = "fastsmtp"


class HttpError(Exception):
    """There is no answer; one line says why."""


async def ask(
    url: str, context: ssl.SSLContext, *, form: bytes = b"", fields: Sequence[tuple[str, str]] = (), limit: int
) -> bytes:
    """The body of at most `limit` octets; POST of a form where there is one, else GET. Raises HttpError."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        reader, writer = await asyncio.open_connection(host, parts.port or 443, ssl=context, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raise HttpError(f"{host}: its certificate is not to be believed: {error.verify_message}") from None
    except OSError as error:
        raise HttpError(f"{host}: {error.strerror or error}") from None
    try:
        return await _converse(reader, writer, parts.netloc, _target(url), form, fields, limit)
    except (OSError, h11.RemoteProtocolError) as error:
        raise HttpError(f"{host}: {error or 'the connection ended'}") from None
    finally:
        writer.transport.abort()


def _target(url: str) -> str:
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


async def _converse(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    netloc: str,
    target: str,
    form: bytes,
    fields: Sequence[tuple[str, str]],
    limit: int,
) -> bytes:
    headers = [
        ("Host", netloc),
        ("User-Agent", AGENT),
        ("Accept", "application/json"),
        ("Connection", "close"),
        *fields,
    ]
    if form:
        headers += [("Content-Type", "application/x-www-form-urlencoded"), ("Content-Length", str(len(form)))]
    http = h11.Connection(h11.CLIENT)
    writer.write(http.send(h11.Request(method="POST" if form else "GET", target=target, headers=headers)) or b"")
    if form:
        writer.write(http.send(h11.Data(data=form)) or b"")
    writer.write(http.send(h11.EndOfMessage()) or b"")
    body = b""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Response):
            if event.status_code != 200:
                raise HttpError(f"{netloc}: it answered {event.status_code}")
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > limit:
                raise HttpError(f"{netloc}: its answer is longer than {limit} octets")
        elif isinstance(event, h11.EndOfMessage):
            return body
        elif not isinstance(event, h11.InformationalResponse):
            raise HttpError(f"{netloc}: the connection ended in its answer")
