"""What torchrun tells the processes that it starts; without torch, as what is printed first depends on it."""

import os
import platform


def is_first() -> bool:
    """Whether this is the first process of all, which writes files and shows the work."""
    return os.environ.get("RANK", "0") == "0"


def is_first_here() -> bool:
    """Whether this is the process that speaks for its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def num_restarts() -> int:
    """How often torchrun has started this group again after one of its processes died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch() -> str | None:
    """What all starts of this group by one torchrun have in common; None without torchrun."""
    return f"{platform.node()} {os.getppid()} {os.environ['TORCHELASTIC_RUN_ID']}" if is_under_torchrun() else None
