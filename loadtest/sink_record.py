"""What a sink writes down: a line of JSON for each message, and the message itself where it is to be kept.

In: the envelope, the answers and the octets. Out: one write of a whole line to a file that several processes may share,
done before the sink answers; with `fsync` it is on the disk then. The keys:
    time client helo protocol tls user          when (epoch seconds), from whom, how
    sender sender_parameters                    MAIL
    recipients                                  of each: address, parameters, answer ("" where none was given)
    id sha256 octets                            the ledger's id (""), the digest of what was sent, trace fields aside,
                                                and the size of all that came
    file                                        where the message is kept
    notification fault                          what a delivery status notification says; why it has no id or digest
Not here: which answers (sink_plan). On failure: OSError, and the sink must not answer 250.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quote
from pathlib import Path
from typing import NamedTuple

from .ledger import split_trace
from .notifications import read_notification


class Client(NamedTuple):
    """Who sends. Rendered once, for all messages of a session."""

    address: str
    helo: str
    protocol: str
    tls: str
    user: str

    def render(self) -> str:
        return (
            f'"client":{quote(self.address)},"helo":{quote(self.helo)},"protocol":"{self.protocol}",'
            f'"tls":"{self.tls}","user":{quote(self.user)},'
        )


class Recipient(NamedTuple):
    """A recipient that was accepted at RCPT."""

    address: str
    parameters: str


class Recorder:
    """The file of lines and the folder of messages; either may be missing."""

    def __init__(self, path: Path | None, folder: Path | None, fsync: bool) -> None:
        self._fd = -1
        self._folder = folder
        self._fsync = fsync
        self._kept = 0
        if path is not None:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def write(
        self,
        client: str,
        sender: Recipient,
        recipients: Sequence[Recipient],
        answers: Sequence[str],
        octets: bytes,
    ) -> None:
        """`client` is a rendered Client, `octets` the message without its stuffed dots. Raises OSError."""
        file = self._keep(octets) if self._folder is not None else ""
        if self._fd < 0:
            return
        more = f',"file":{quote(file)}' if file else ""
        message_id, sha256 = "", ""
        try:
            message_id, _, sent = split_trace(octets)
            sha256 = hashlib.sha256(sent).hexdigest()
            if not message_id and (notification := read_notification(octets)) is not None:
                more += f',"notification":{json.dumps(notification._asdict())}'
        except ValueError as error:
            more += f',"fault":{quote(str(error))}'
        listed = ",".join(
            [
                f'{{"address":{quote(address)},"parameters":{quote(parameters)},"answer":{quote(answer)}}}'
                for (address, parameters), answer in zip(recipients, answers, strict=True)
            ]
        )
        line = (
            f'{{"time":{time.time():.6f},{client}"sender":{quote(sender[0])},"sender_parameters":{quote(sender[1])},'
            f'"recipients":[{listed}],"id":{quote(message_id)},"sha256":"{sha256}","octets":{len(octets)}{more}}}\n'
        ).encode()
        if os.write(self._fd, line) != len(line):
            raise OSError("a line is cut")
        if self._fsync:
            os.fdatasync(self._fd)

    def _keep(self, octets: bytes) -> str:
        """Writes the message to a file of its own; its path. Raises OSError."""
        assert self._folder is not None
        self._kept += 1
        path = self._folder / f"{time.time_ns()}.{os.getpid()}.{self._kept}.eml"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            view = memoryview(octets)
            while view:
                view = view[os.write(fd, view) :]
            if self._fsync:
                os.fsync(fd)
        finally:
            os.close(fd)
        if self._fsync:
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return str(path)
