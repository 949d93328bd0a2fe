"""What the server costs and how it behaves under load, measured from outside.

In: a server's address and its process id. Out: figures, in a table and as JSON. Nothing here imports fastsmtp, so that
a mistake there cannot hide here. `receive` is the program; `client` sends, `processes` starts servers and reads /proc,
`report` holds the goals and prints. Everything is on loopback, bounded, and stopped by its process id.
On failure: a LoadError, which is one line for people.
"""


class LoadError(Exception):
    """Why something could not be measured, in one line."""
