"""fastsmtp: an SMTP server that says 250 only when the message is on stable storage."""
