"""fastsmtp: an SMTP server that says 250 only when the message is on stable storage.

`fastsmtp serve` is the server; what stands here is for your own asyncio program. What is not listed is private.
"""

from .embed import Destination, Mail, RefuseError, Server, start

__all__ = ["Destination", "Mail", "RefuseError", "Server", "start"]
