"""How much of a model's weights has been read, told to whoever watches.

Weights are read tensor by tensor, but for text encoders in folders, which their library reads in one call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from lorasmith.reporting.progress import Advance, Progress, megabytes, unwatched

_watcher: ContextVar[Advance] = ContextVar("_watcher", default=unwatched)


def was_read(num_bytes: int) -> None:
    """Tells the watcher of more bytes of weights."""
    _watcher.get()(num_bytes)


@contextmanager
def loading_shown(num_bytes: int, progress: Progress) -> Iterator[None]:
    """A stage in which a model is loaded from weights of this many bytes."""
    with megabytes("loading the model", num_bytes, progress) as advance:
        token = _watcher.set(advance)
        try:
            yield
        finally:
            _watcher.reset(token)
