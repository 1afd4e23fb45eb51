"""What is said of errors, and of packages that are missing or too old."""

from importlib import metadata

from packaging.requirements import Requirement


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


def too_old(extra: str = "") -> list[str]:
    """Installed packages that pyproject.toml does not allow: "diffusers must be >=0.42.1, got 0.39.0".

    extra: with what it needs besides. Nothing is known, and so nothing named, where lorasmith itself is not installed.
    """
    try:
        lines = metadata.requires("lorasmith") or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for needed in map(Requirement, lines):
        if needed.marker and not needed.marker.evaluate({"extra": extra}):
            continue
        try:
            version = metadata.version(needed.name)
        except metadata.PackageNotFoundError:  # the import says so
            continue
        if not needed.specifier.contains(version, prereleases=True):
            found.append(f"{needed.name} must be {needed.specifier}, got {version}")
    return found


def refuse_old() -> None:
    """ValueError where packages are too old for lorasmith to run."""
    if found := too_old():
        raise ValueError(f"{'; '.join(found)}: install lorasmith again with pip, or upgrade what is named")


def needs_extra(what: str, extra: str) -> ValueError:
    """The error where the packages of an extra cannot be imported."""
    old = "".join(f" ({line})" for line in too_old(extra))
    return ValueError(f"{what} needs the extra '{extra}': pip install 'lorasmith[{extra}]'{old}")
