"""The packages that lorasmith and its extras need, and whether those that are installed are new enough."""

from importlib import metadata

from packaging.requirements import Requirement


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
