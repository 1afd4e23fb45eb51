"""The command `lorasmith`, and `python -m lorasmith`."""

import sys

from lorasmith.installed import refuse_old
from lorasmith.signals import INTERRUPTED, interruptions
from lorasmith.torchrun import is_first_here


def main() -> None:
    """Refuses packages that are too old before anything imports them, as the import itself may fail.

    Ctrl-C ends it in order from here on, and not only once the command line is imported.
    """
    try:
        with interruptions() as interruption:
            refuse_old()
            from lorasmith.cli import main as run_command

            interruption.raise_if_it_has_come()  # and was swallowed by an import
            run_command()
    except KeyboardInterrupt:
        print("lorasmith: stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except ValueError as error:
        if is_first_here():
            print(f"lorasmith: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
