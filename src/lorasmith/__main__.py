"""The command `lorasmith`, and `python -m lorasmith`."""

import sys

from lorasmith.installed import refuse_old
from lorasmith.torchrun import is_first_here


def main() -> None:
    """Refuses packages that are too old before anything imports them, as the import itself may fail."""
    try:
        refuse_old()
    except ValueError as error:
        if is_first_here():
            print(f"lorasmith: {error}", file=sys.stderr)
        sys.exit(2)
    from lorasmith.cli import main as run_command

    run_command()


if __name__ == "__main__":
    main()
