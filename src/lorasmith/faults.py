"""What is said of errors: one line, or a line for each of several faults of one input."""


class Faults(ValueError):
    """A heading and a line for each fault."""

    def __init__(self, heading: str, *lines: str) -> None:
        super().__init__("\n".join((heading, *lines)))


def text_of(error: BaseException) -> str:
    """What an error says, in one line unless it is of several faults; Python's own about a file get a verb."""
    if isinstance(error, Faults):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot use {error.filename}: {error.strerror}"
    return " ".join(str(error).split())
