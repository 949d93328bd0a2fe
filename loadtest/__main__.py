"""`python -m loadtest`: the commands run, verify, sink, compare and crash.

In: a command line. Out: what the command prints, and its exit code. Each command stands in a module of its own, which
is imported when it is called or asked for help: what one needs (plots, for example) the others do not pay for.
On failure: a LoadError is one line on stderr and exit code 1; what is wrong with the command line is 2; Ctrl-C is 130,
where a command makes nothing better of it.
"""

from __future__ import annotations

import sys
from importlib import import_module

import click

from . import LoadError

COMMANDS = {
    "run": "Send mail to a server and measure it.",
    "verify": "Check mailboxes or a sink's record against a ledger.",
    "sink": "Receive mail, for tests of relaying.",
    "compare": "Race servers against each other.",
    "crash": "Break fastsmtp on purpose, and look for lost mail.",
}


class Commands(click.Group):
    """NAME is `NAME_command` in the module NAME."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"{__package__}.{cmd_name}"), f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def commands() -> None:
    """Load tests for SMTP servers, and fair races between them."""


def main(arguments: list[str]) -> int:
    try:
        code = commands.main(arguments, prog_name="python -m loadtest", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except LoadError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
