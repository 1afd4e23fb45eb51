"""Several faults of one input, which are shown together."""


class Faults(ValueError):
    """A heading and a line for each fault."""

    def __init__(self, heading: str, *lines: str) -> None:
        super().__init__("\n".join((heading, *lines)))
