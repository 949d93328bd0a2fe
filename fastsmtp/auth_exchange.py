"""AUTH as SMTP has it: base64 and 334 around a mechanism, and what its end is answered.

In: the initial response, the client's lines, and verdicts. Out: a Reply, or an `Ask` of the stage AUTH. A reply whose
`then` is `LINE` is a challenge: the exchange goes on with the next line, or with the verdict on the Ask. Any other
reply ends it, and `attempt.reason` says why it failed; empty: it did not, or it was left (cancelled, no base64).
Nothing of what the client sent gets into an error that could be logged. RFC 4954 4, 4.1.
"""

from __future__ import annotations

from base64 import b64encode

from ._parser import Line
from .auth import MECHANISMS, Attempt, AuthError, Challenge, Facts, Run, decode_base64
from .reply import (
    R235_AUTHENTICATED,
    R500_AUTH_LINE_TOO_LONG,
    R501_BAD_BASE64,
    R501_CANCELLED,
    Reply,
    challenge,
)
from .verdict import Ask, Client, Stage, Verdict


class Exchange:
    """One AUTH command, from its mechanism's name to the last reply."""

    def __init__(self, mechanism: str, client: Client, offered: tuple[str, ...]) -> None:
        """`mechanism` is one of those that are `offered` to this client."""
        self.attempt = Attempt(mechanism)
        self._client = client
        self._run: Run = MECHANISMS[mechanism].run(Facts(client, self.attempt, offered))

    def begin(self, initial: bytes) -> Reply | Ask:
        """`initial` is what stands behind the mechanism: nothing, "=" for an empty response (RFC 4954 4), or base64."""
        prompt = self._go(None)
        if not initial:
            return prompt
        return self._go(b"") if initial == b"=" else self._decode(initial)

    def respond(self, line: Line) -> Reply | Ask:
        """To the response to a challenge."""
        if line.too_long:
            return R500_AUTH_LINE_TOO_LONG
        if line.rest == b"*":
            return R501_CANCELLED
        return self._decode(line.rest)

    def resume(self, verdict: Verdict) -> Reply | Ask:
        return self._go(verdict)

    def _decode(self, text: bytes) -> Reply | Ask:
        try:
            response = decode_base64(text)
        except ValueError:
            return R501_BAD_BASE64
        return self._go(response)

    def _go(self, answer: bytes | Verdict | None) -> Reply | Ask:
        try:
            step = self._run.send(answer)
        except StopIteration as end:
            self._client.user = str(end.value)
            return R235_AUTHENTICATED
        except AuthError as error:
            self.attempt.reason = error.reason
            return error.reply
        except Exception as error:
            # A bug is logged with its error, which may hold what the client sent.
            raise RuntimeError(f"{type(error).__name__} in AUTH").with_traceback(error.__traceback__) from None
        if isinstance(step, Challenge):
            return challenge(b64encode(step.octets))
        return Ask(Stage.AUTH, self._client, question=step)
