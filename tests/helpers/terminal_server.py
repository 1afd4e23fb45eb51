"""Runs commands on the terminal that this program was started on, each in a process forked off with all imports done.

Usage: python terminal_server.py REQUESTS ANSWERS, two pipes by name. A request is a line of JSON: folder and arguments;
answers are READY, once, and for each command the number of its process and its exit code.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import TextIO


def run(folder: str, arguments: list[str], answers: TextIO) -> int:
    """The exit code of `lorasmith ARGUMENTS` in a process of its own."""
    from lorasmith.cli.main import main

    child = os.fork()
    if child:
        print(child, file=answers)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    sys.argv = ["lorasmith", *arguments]
    code = 1
    try:
        main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def serve(requests: Path, answers: Path) -> None:
    import lorasmith.cli.train  # noqa: F401
    import lorasmith.tools.convert
    import lorasmith.tools.extract
    import lorasmith.tools.merge_into_model
    import lorasmith.tools.resize  # noqa: F401

    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the command
    with answers.open("w", buffering=1) as out, requests.open() as lines:
        print("READY", file=out)
        for line in lines:
            folder, arguments = json.loads(line)
            print(run(folder, arguments, out), file=out)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
