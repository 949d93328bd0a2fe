"""The table of the configuration that says what is done to messages of users, and how many they may send.

As in config_tables.py each key's name, type, default and help stand once, here. It holds for whoever has logged in;
what is added to a message and taken out of it, only on listeners of role `submission`. Which addresses a user may use
is said where users are (config_auth.py). What these keys do is done in submission.py, rewrite.py and policy/quota.py.
RFC 6409.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool

from .config_values import Kind, RateLimit, Table

Rates = Annotated[tuple[RateLimit, ...], Kind("list of rates")]


class Submission(Table):
    """What is done to messages of users who have logged in (RFC 6409)."""

    header_from: Literal["refuse", "add_sender", "off"] = Field(
        "refuse",
        description="A From or Sender in the header that is none of the user's addresses: the message is refused, or "
        "gets a Sender field that names the user, or nobody looks.",
    )
    remove_bcc: StrictBool = Field(True, description="True: Bcc fields are taken out.")
    hide_client: StrictBool = Field(
        False, description="True: the Received field does not say from which address a user's message came."
    )
    rewrite: StrictBool = Field(
        False,
        description="True: parts of a message with lines of more than 998 octets are made quoted-printable, but for "
        "what is signed. False: such lines are sent as they are, by BDAT where the next host takes that.",
    )
    messages: Rates = Field(
        (), description='How many messages each user may send, such as `["100/h", "500/d"]`; empty: any number.'
    )
    recipients: Rates = Field((), description="The same for recipients, counted in each message.")
