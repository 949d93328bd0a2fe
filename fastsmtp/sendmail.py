"""`sendmail`: takes a message from standard input and hands it to the server on this machine.

In: the arguments that sendmail has always had, as cron, PHP, mutt and monitoring give them, and a message with the line
ends of a file. Out: an exit code of sysexits.h; 0 only when the server has kept the message for every recipient, 75
(EX_TEMPFAIL) when it cannot be reached or cannot take it now. What is missing is added (From, Date, Message-ID), Bcc
is taken out, names without a domain get the server's. It speaks SMTP to a worker's socket in the data directory (see
control.py), so the session's checks are those of every client, and who called is known from the kernel, not from us.
All recipients or none: a caller that hears of a failure sends everything again. Errors are lines on standard error.
RFC 5322 3.6; RFC 6409 8; RFC 3461 4.
"""

from __future__ import annotations

import getopt
import os
import pwd
import random
import re
import smtplib
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from email.utils import formataddr, formatdate, make_msgid
from pathlib import Path
from typing import NamedTuple

from .address import NULL, Address, AddressError, parse_address
from .config import CONFIG_VARIABLE, Config, ConfigError, default, load
from .header import HeaderError, parse_mailboxes, read_header
from .local_socket import SUBMIT, connect, workers
from .submission import render_missing

CONFIG_FILE = Path("/etc/fastsmtp/fastsmtp.toml")  # for callers that can give neither an option nor the variable
TIMEOUT = 300.0  # seconds for a reply; RFC 5321 4.5.3.2 has 10 minutes for the last one, between hosts

HELP = """\
Usage: fastsmtp sendmail [OPTION]... [ADDRESS]...    (also under the name sendmail)

Reads a message from standard input and hands it to the server on this machine.

  -t            recipients are taken from To, Cc and Bcc too
  -i, -oi       a line with a single dot does not end the message
  -f ADDRESS    the sender (also -r); "<>" for none. Default: the user who calls
  -F NAME       the sender's full name, where the message has no From
  -bm           read a message (what is done anyway)
  -bs           speak SMTP on standard input and output
  -bp           show the queue, as `fastsmtp queue list`
  -B TYPE       7BIT or 8BITMIME; found out anyway
  -N WHEN       reports: never, or some of success,failure,delay
  -R WHAT       what a report returns: full or hdrs
  -V ID         the envelope id that a report names
  -C FILE       the server's configuration. Default: the file that FASTSMTP_CONFIG
                names, else /etc/fastsmtp/fastsmtp.toml, else the embedded default
  --help        this text

Accepted and without effect: -A -G -h -L -m -n -o -O -p -U -v -X and every -o but -oi.
Exit codes (sysexits.h): 0 kept for all recipients; 64 wrong arguments or no recipient;
65 an address or the sender is malformed; 67 a recipient is unknown here; 69 refused for
good; 75 cannot be taken now, try again. With any but 0 the message went to nobody.
"""

OPTIONS = "A:B:C:F:GL:N:O:R:UV:X:b:e:f:h:imno:p:r:tv"
MODES = ("m", "s", "p")
RCPTMAX = re.compile(r"\bRCPTMAX=([0-9]{1,9})\b", re.IGNORECASE)
NOTIFY = re.compile(r"NEVER|(?:SUCCESS|FAILURE|DELAY)(?:,(?:SUCCESS|FAILURE|DELAY))*")


class RefusedError(Exception):
    """The message is not sent; `code` is of sysexits.h, the lines say why."""

    def __init__(self, code: int, *lines: str) -> None:
        super().__init__(*lines)
        self.code = code
        self.lines = lines


class Order(NamedTuple):
    """What the arguments say. `sender` None: whoever calls."""

    mode: str = "m"
    config: str = ""
    from_header: bool = False  # -t
    ignore_dots: bool = False
    sender: str | None = None
    full_name: str = ""
    notify: str = ""
    ret: str = ""
    envid: str = ""
    recipients: tuple[str, ...] = ()


class Mail(NamedTuple):
    """What is handed over. `octets` have CRLF for their line ends."""

    sender: Address
    recipients: list[Address]
    octets: bytes


def run(arguments: Sequence[str]) -> int:
    """The exit code."""
    if "--help" in arguments:
        sys.stdout.write(HELP)
        return os.EX_OK
    try:
        order = parse_arguments(arguments)
        config = _load(order.config)
        return MODE[order.mode](order, config)
    except RefusedError as error:
        for line in error.lines:
            sys.stderr.write(f"sendmail: {line}\n")
        return error.code


def parse_arguments(arguments: Sequence[str]) -> Order:
    """Raises RefusedError."""
    try:
        options, rest = getopt.gnu_getopt(list(arguments), OPTIONS)
    except getopt.GetoptError as error:
        raise RefusedError(os.EX_USAGE, f"{error.msg}; see sendmail --help") from None
    order = Order(recipients=tuple(rest))
    for option, value in options:
        match option[1], value:
            case "b", mode if mode in MODES:
                order = order._replace(mode=mode)
            case "b", mode:
                raise RefusedError(os.EX_USAGE, f"-b{mode} is not done here; see sendmail --help")
            case "t", _:
                order = order._replace(from_header=True)
            case ("i", _) | ("o", "i"):
                order = order._replace(ignore_dots=True)
            case (("f" | "r"), sender):
                order = order._replace(sender=sender)
            case "F", name:
                order = order._replace(full_name=name)
            case "C", file:
                order = order._replace(config=file)
            case "N", when if NOTIFY.fullmatch(when.upper()):
                order = order._replace(notify=when.upper())
            case "R", what if what.upper() in ("FULL", "HDRS"):
                order = order._replace(ret=what.upper())
            case (("N" | "R"), value):
                raise RefusedError(os.EX_USAGE, f"{option} {value}: not known; see sendmail --help")
            case "V", envid:
                order = order._replace(envid=envid)
    return order


def _load(file: str) -> Config:
    given = file or os.environ.get(CONFIG_VARIABLE, "")
    try:
        if given or CONFIG_FILE.exists():
            return load(Path(given) if given else CONFIG_FILE)
        return default()
    except ConfigError as error:
        raise RefusedError(os.EX_TEMPFAIL, *map(str, error.errors)) from None


# A message


def _send(order: Order, config: Config) -> int:
    limit = config.limits.message_size
    octets = sys.stdin.buffer.read(limit + 1)
    if len(octets) > limit:
        raise RefusedError(os.EX_UNAVAILABLE, f"the message is larger than {limit} octets")
    mail = prepare(order, octets, config.hostname, _user())
    _hand_over(mail, order, config)
    return os.EX_OK


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid{os.getuid()}"


def prepare(order: Order, octets: bytes, hostname: str, user: str) -> Mail:
    """The message as it goes to the server. Raises RefusedError."""
    if not order.ignore_dots:
        octets = re.split(rb"(?:\A|(?<=\n))\.\r?(?:\n|\Z)", octets, maxsplit=1)[0]
    text = re.sub(rb"\r?\n", b"\r\n", octets)
    if text and not text.endswith(b"\r\n"):
        text += b"\r\n"
    header = read_header(text)
    body = text[header.end :].removeprefix(b"\r\n")  # also where no empty line ends the header
    if order.sender is None:
        sender = _parse(user, hostname)
    elif order.sender.strip() in ("", "<>"):
        sender = NULL
    else:
        (sender,) = _addresses([order.sender], hostname)[:1] or [NULL]
    recipients = _addresses(order.recipients, hostname)
    if order.from_header:
        names = {field.name for field in header.fields}
        resent = "resent-" if names & {"resent-to", "resent-cc", "resent-bcc"} else ""
        wanted = {f"{resent}to", f"{resent}cc", f"{resent}bcc"}
        values = [re.sub(rb"\r\n(?:\Z|(?=[ \t]))", b"", field.value) for field in header.fields if field.name in wanted]
        recipients += _addresses([value.decode("utf-8", "surrogateescape") for value in values], hostname)
    recipients = list({address.mailbox: address for address in recipients}.values())
    if not recipients:
        raise RefusedError(os.EX_USAGE, "no recipient: give addresses, or -t and a message that names some")
    kept = [field for field in header.fields if field.name not in ("bcc", "resent-bcc")]
    wanted_fields = {
        "Message-ID": make_msgid(domain=hostname),
        "Date": formatdate(localtime=True),
        "From": _from(order.full_name, sender or _parse(user, hostname)),
    }
    added = render_missing({field.name for field in kept}, wanted_fields)
    return Mail(sender, recipients, b"".join([added, *[text[start:end] for _, start, end, _ in kept], b"\r\n", body]))


_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def _from(full_name: str, sender: Address) -> str:
    # Arguments are octets; what is not UTF-8 has no place in a header.
    name = " ".join(full_name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").split())
    return formataddr((name, sender.wire)) if sender.wire.isascii() else f"{sender.wire}"


def _addresses(values: Sequence[str], hostname: str) -> list[Address]:
    """The addresses in arguments or fields: "a@b", "Ann <a@b>, c", "friends: a@b, c@d;"."""
    for value in values:
        if _CONTROL.search(value):  # the parser would read on behind it
            raise RefusedError(os.EX_DATAERR, f"{value!a} is no address: it holds a control character")
    return [address for value in values for address in _parse_list(value, hostname)]


def _parse_list(text: str, hostname: str) -> list[Address]:
    try:
        return parse_mailboxes(text.encode("utf-8", "surrogateescape"), hostname)
    except HeaderError as error:
        shown = f"{text!a}" if len(text) <= 80 else f"{text[:80]!a}..."
        raise RefusedError(os.EX_DATAERR, f"{shown} is no address: {error}") from None


def _parse(text: str, hostname: str) -> Address:
    try:
        return parse_address(text if "@" in text else f"{text}@{hostname}")
    except AddressError as error:
        raise RefusedError(os.EX_DATAERR, f"{text!a} is no address: {error}") from None


# The dialogue


class _Local(smtplib.LMTP):
    """SMTP over a unix socket, which smtplib has for LMTP only."""

    ehlo_msg = "ehlo"


def _connect(config: Config) -> socket.socket:
    """To the first worker that listens. Raises RefusedError."""
    why = f"nobody listens in {config.data_dir / SUBMIT}; is it running?"
    try:
        for worker in random.sample(found := workers(config.data_dir, SUBMIT), len(found)):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connect(connection, config.data_dir, SUBMIT, worker)
                return connection
            except ConnectionRefusedError:
                connection.close()
    except OSError as error:
        why = f"{config.data_dir / SUBMIT}: {error.strerror}"
    raise RefusedError(os.EX_TEMPFAIL, f"the server cannot be reached: {why}")


def _hand_over(mail: Mail, order: Order, config: Config) -> None:
    client = _Local(local_hostname=config.hostname)
    client.sock = _connect(config)
    client.sock.settimeout(TIMEOUT)
    try:
        _expect("greeting", client.getreply())
        _expect("EHLO", client.ehlo())
        _transact(client, mail, order)
        client.quit()
    except smtplib.SMTPResponseException as error:
        text = error.smtp_error
        _expect("DATA", (error.smtp_code, text.encode() if isinstance(text, str) else text))
    except (OSError, smtplib.SMTPException) as error:
        raise RefusedError(os.EX_TEMPFAIL, f"the server cannot take the message now: {error}") from None
    finally:
        client.close()


def _transact(client: _Local, mail: Mail, order: Order) -> None:
    most = RCPTMAX.search(client.esmtp_features.get("limits", ""))
    if most is not None and len(mail.recipients) > int(most[1]):  # RFC 9422
        raise RefusedError(os.EX_UNAVAILABLE, f"more than {most[1]} recipients: send it to some of them at a time")
    options = [f"SIZE={len(mail.octets)}"]
    if not mail.octets.isascii():
        options.append("BODY=8BITMIME")
    if not all(address.wire.isascii() for address in (mail.sender, *mail.recipients)):
        options.append("SMTPUTF8")
        client.command_encoding = "utf-8"
    notify = []
    if client.has_extn("dsn"):
        options += [f"RET={order.ret}"] * bool(order.ret) + [f"ENVID={_xtext(order.envid)}"] * bool(order.envid)
        notify = [f"NOTIFY={order.notify}"] * bool(order.notify)
    _expect("MAIL", client.docmd("MAIL", " ".join([f"FROM:<{mail.sender.wire}>", *options])))
    refused = []
    for recipient in mail.recipients:
        code, text = client.docmd("RCPT", " ".join([f"TO:<{recipient.wire}>", *notify]))
        if code != 250:
            refused.append((recipient, code, text))
    if refused:
        lines = [f"<{recipient.wire}>: {code} {_line(text)}" for recipient, code, text in refused]
        if any(code < 500 for _, code, _ in refused):
            exit_code = os.EX_TEMPFAIL
        else:
            exit_code = os.EX_NOUSER if any(text.startswith(b"5.1.") for _, _, text in refused) else os.EX_UNAVAILABLE
        raise RefusedError(exit_code, *lines, "the message was sent to nobody")
    _expect("DATA", client.data(mail.octets))


REFUSALS = {"MAIL": os.EX_DATAERR, "DATA": os.EX_UNAVAILABLE}


def _expect(stage: str, reply: tuple[int, bytes]) -> None:
    code, text = reply
    if 200 <= code < 300:
        return
    exit_code = os.EX_TEMPFAIL if code < 500 else REFUSALS.get(stage, os.EX_UNAVAILABLE)
    if code == 552:
        exit_code = os.EX_UNAVAILABLE
    raise RefusedError(exit_code, f"{code} {_line(text)}")


def _line(text: bytes) -> str:
    return " ".join(text.decode("ascii", "backslashreplace").split())


def _xtext(text: str) -> str:
    """RFC 3461 4."""
    return "".join(
        c if "!" <= c <= "~" and c not in "+=" else "".join(f"+{o:02X}" for o in c.encode("utf-8", "surrogateescape"))
        for c in text
    )


# -bs and -bp


def _speak(order: Order, config: Config) -> int:
    """Passes octets between the caller and a worker, as they are, until the worker closes."""
    try:
        connection = _connect(config)
    except RefusedError:
        _write(f"421 4.3.2 {config.hostname} The server cannot be reached\r\n".encode())
        raise
    # Two directions that wait for each other in any order; standard input may be a file, which epoll does not take.
    threading.Thread(target=_pass_input, args=(connection,), daemon=True).start()
    try:
        while answer := connection.recv(65536):
            _write(answer)
    except OSError:
        return os.EX_TEMPFAIL
    return os.EX_OK


def _pass_input(connection: socket.socket) -> None:
    try:
        while said := os.read(0, 65536):
            connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other direction ends too, and says so


def _write(octets: bytes) -> None:
    while octets:
        octets = octets[os.write(1, octets) :]


def _show_queue(order: Order, config: Config) -> int:
    from .queue_command import queue  # and with it what sending does not need

    queue.main(["list", *(["--config", order.config] if order.config else [])], prog_name="sendmail -bp")
    return os.EX_OK


MODE: Mapping[str, Callable[[Order, Config], int]] = {"m": _send, "s": _speak, "p": _show_queue}
