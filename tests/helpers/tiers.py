"""Tables of which the fast tests run a few rows."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def table(
    names: str | tuple[str, ...],
    rows: Iterable[Any],
    *,
    quick: Collection[Any],
    ids: Callable[[Any], str] | None = None,
) -> pytest.MarkDecorator:
    """`parametrize` with all but the quick rows marked `table`, which `make test` leaves out."""
    rows = list(rows)
    assert quick and all(row in rows for row in quick), [row for row in quick if row not in rows]

    def parameters(row: Any) -> Any:
        values = (row,) if isinstance(names, str) else row
        return pytest.param(*values, marks=() if row in quick else pytest.mark.table)

    return pytest.mark.parametrize(names, [parameters(row) for row in rows], ids=ids)
