"""What a setting of another program is here."""

from collections.abc import Callable
from dataclasses import dataclass

EPOCHS = "steps = epochs × pictures / batch_size; default: 100 epochs"
CHECKPOINTS = "no LoRA files are written during training, only checkpoints to resume from"


@dataclass(frozen=True)
class Name:
    """A setting of another program: what to type in its place, and what else there is to know."""

    theirs: str
    """Its names, separated by spaces; "a.b" is the key b of a table a."""
    ours: str = ""
    """As typed on the command line. A key alone takes over the value; "" where there is nothing of the kind."""
    note: str = ""
    """For people: it follows the answer in messages, and stands beside it on the page."""
    is_nearest: bool = False
    """Whether `ours` is not the same thing, only the nearest."""
    is_needless: bool = False
    """Whether the setting can be left out, as `note` says."""
    is_flag: bool = False
    """Whether it takes no value."""
    is_other_value: bool = False
    """Whether its value means something else here, so that an example stands in its place."""
    to: Callable[[str], str] | None = None
    """Its value -> what to type; "" where there is nothing of the kind."""
    default: str = ""
    """Its default, where it differs."""
    shown: str = ""
    """Its name on the page, where that is another."""

    @property
    def names(self) -> list[str]:
        return self.theirs.split()


def missing(theirs: str, note: str = "", nearest: str = "", *, is_flag: bool = False) -> Name:
    """A setting that has no counterpart; `nearest` is typed as it stands."""
    return Name(theirs, nearest, note, is_nearest=bool(nearest), is_flag=is_flag)


def needless(theirs: str, note: str, *, is_flag: bool = True) -> Name:
    """A setting that can be left out."""
    return Name(theirs, note=note, is_needless=True, is_flag=is_flag)


@dataclass(frozen=True)
class Tool:
    """Another program, and its names."""

    whose: str
    """As in "--network_dim is kohya's name"."""
    page: str
    """Of docs/from, without its ending."""
    prefix: str
    """What its names begin with on its page: "--", or nothing."""
    names: tuple[Name, ...]
    sections: tuple[str, ...] = ()
    """Keys of tables that show that a file is this program's."""
