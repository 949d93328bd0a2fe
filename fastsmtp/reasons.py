"""What an enhanced status code means for the one who wrote the message, in plain words.

In: a status code (RFC 3463). Out: what happened, and what its sender can do about it. A code that has no row of its
own is told by its subject, the middle digit; any other by the last row. The class, the first digit, is not looked
at: whether something was given up or is tried again is said elsewhere. Pure values, nothing fails.
RFC 3463 3; RFC 6531, 7372, 7505, 8689 for the codes that they added.
"""

from __future__ import annotations

from typing import NamedTuple


class Reason(NamedTuple):
    """`what` happened, and `advice` to the sender; whole sentences."""

    what: str
    advice: str


_SPELLING = "Check the address for typing errors, or ask the recipient for the right one."
_OTHER_WAY = "Tell the recipient in another way."
_SMALLER = "Send it again without large attachments, or hand over the files in another way."
_LATER = "Send the message again later. If it fails again, ask your postmaster."
_POSTMASTER = "You cannot repair this yourself: forward this report to your postmaster."
_RULES = "What stands below may say what to change. If you think that the refusal is wrong, tell the recipient."

# By subject and detail, or by subject alone.
REASONS = {
    "1.1": Reason("There is no such mailbox.", _SPELLING),
    "1.2": Reason("There is no such domain (the part behind the @), or it takes no mail.", _SPELLING),
    "1.3": Reason("The address is not written as an address must be.", _SPELLING),
    "1.6": Reason("The mailbox has moved.", "Ask the recipient for the new address."),
    "1.7": Reason("Your own address was refused: it is not written as an address must be.", _POSTMASTER),
    "1.8": Reason("Your own address was refused: its domain cannot be found.", _POSTMASTER),
    "1.10": Reason("The domain of the address (the part behind the @) takes no mail at all.", _SPELLING),
    "1": Reason("The address was refused.", _SPELLING),
    "2.1": Reason("The mailbox is switched off, or takes no messages at present.", _OTHER_WAY),
    "2.2": Reason("The mailbox is full.", "Tell the recipient in another way, and send it again when there is room."),
    "2.3": Reason("The message is larger than the recipient may receive.", _SMALLER),
    "2.4": Reason("The address is a mailing list that does not work at present.", _OTHER_WAY),
    "2": Reason("The mailbox cannot take the message.", _OTHER_WAY),
    "3.1": Reason("The recipient's mail system has no room.", _LATER),
    "3.4": Reason("The message is too big for the recipient's mail system.", _SMALLER),
    "3": Reason("The recipient's mail system does not work as it should.", _LATER),
    "4.1": Reason("The recipient's mail server did not answer.", _LATER),
    "4.2": Reason("The connection to the recipient's mail server broke.", _LATER),
    "4.3": Reason("The recipient's mail server could not be looked up.", _LATER),
    "4.4": Reason("No mail server was found for the domain of the address (the part behind the @).", _SPELLING),
    "4.6": Reason("The message goes round in a circle between mail servers.", _POSTMASTER),
    "4.7": Reason("The time in which the message had to be delivered is over.", _LATER),
    "4": Reason("The recipient's mail server could not be reached.", _LATER),
    "5.3": Reason("The message has too many recipients.", "Send it again to fewer recipients at once."),
    "5": Reason("The mail servers did not understand each other.", _POSTMASTER),
    "6.7": Reason(
        "The address has characters that the recipient's mail system cannot handle.",
        "Ask the recipient for an address of plain letters and digits.",
    ),
    "6": Reason(
        "The recipient's mail system cannot handle a message of this form.",
        "Send it again as plain text, or with its files in a simpler form.",
    ),
    "7.2": Reason("You may not write to this mailing list.", "Ask the people who run the list."),
    "7.30": Reason("The message cannot be encrypted all the way, as was asked for.", _OTHER_WAY),
    "7": Reason("The recipient's mail system refuses the message by its own rules.", _RULES),
    # DKIM, SPF, reverse lookup, several of them, null MX
    **dict.fromkeys(
        ("7.20", "7.21", "7.22", "7.23", "7.24", "7.25", "7.26", "7.27"),
        Reason("The recipient's mail system could not verify that the message is yours.", _POSTMASTER),
    ),
}
OTHER = Reason("The recipient's mail system did not take the message.", "What stands below may say why.")


def reason_of(status: str) -> Reason:
    """The reason of a code such as 5.1.1."""
    detail = status.partition(".")[2]
    return REASONS.get(detail) or REASONS.get(detail.partition(".")[0]) or OTHER
