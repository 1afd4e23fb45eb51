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


def is_out_of_memory(error: BaseException) -> bool:
    """By its text, or by what it comes from: torch raises a class of its own for some devices alone."""
    words = (
        "out of memory", "not enough memory", "can't allocate memory", "Cannot allocate memory", "bad_alloc",
        "could not create a memory", "could not create a primitive", "failed to map segment",
    )  # fmt: skip
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, RuntimeError | ImportError) and any(word in str(error) for word in words):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)
