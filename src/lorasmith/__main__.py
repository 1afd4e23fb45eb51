"""The command `lorasmith`, and `python -m lorasmith`."""

import sys

from lorasmith.distributed.torchrun import is_first_here
from lorasmith.errors import refuse_old
from lorasmith.reporting.signals import INTERRUPTED, interruptions


def main() -> None:
    """Refuses packages that are too old before anything imports them, as the import itself may fail.

    Ctrl-C ends it in order from here on, and not only once the command line is imported.
    """
    try:
        with interruptions() as interruption:
            refuse_old()
            from lorasmith.cli.main import main as run_command

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
