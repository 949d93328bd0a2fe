"""python -m fastsmtp: the command line, as `fastsmtp`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="fastsmtp")
