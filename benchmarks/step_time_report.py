"""What step_time.py found, as a table."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEADS = (
    "contender", "layers", "numbers", "s a step", "min", "max", "times the first", "first step, s", "GB", "of peak",
)  # fmt: skip


BUSY = 0.2  # cores that other programs may use before the table says so


@dataclass(frozen=True)
class Line:
    """One contender's line."""

    name: str
    layers: int
    numbers: int  # that are trained
    median: float  # seconds a step, over all turns
    min: float
    max: float
    ratio: float  # median over the rounds of its median by the first contender's
    first_step: float  # seconds from the plain net in memory to the end of the first step, median
    gigabytes: float  # the most held, above what it held after its imports; the greatest of all turns
    share: float  # of the peak: what the plain net computes in a step by the seconds

    @classmethod
    def all_of(cls, found: Mapping[str, Any]) -> "list[Line]":
        """A line for each contender with a turn."""
        racing = [contender for contender in found["contenders"] if contender["turns"]]
        peak = statistics.median(found["peak_flops"])
        return [cls._of(contender, racing[0], found["flops"] / peak) for contender in racing]

    @classmethod
    def _of(cls, contender: Mapping[str, Any], first: Mapping[str, Any], at_peak: float) -> "Line":
        """at_peak: a step's seconds at the peak."""
        turns = contender["turns"]
        seconds = [second for turn in turns for second in turn["seconds"]]
        medians, others = ([statistics.median(t["seconds"]) for t in c["turns"]] for c in (contender, first))
        median = statistics.median(seconds)
        return cls(
            contender["name"], contender["layers"], contender["numbers"],
            median=median, min=min(seconds), max=max(seconds),
            ratio=statistics.median(own / other for own, other in zip(medians, others, strict=False)),
            first_step=statistics.median(turn["first_step"] for turn in turns),
            gigabytes=max(turn["memory"]["above_imports"] for turn in turns),
            share=at_peak / median,
        )  # fmt: skip

    def cells(self) -> tuple[str, ...]:
        return (
            self.name, str(self.layers), f"{self.numbers:,}", f"{self.median:.3f}", f"{self.min:.3f}",
            f"{self.max:.3f}", f"{self.ratio:.2f}", f"{self.first_step:.2f}", f"{self.gigabytes:.2f}",
            f"{self.share:.1%}",
        )  # fmt: skip


def table(found: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """The machine and settings, a Markdown table, and who was left out."""
    machine, settings = found["machine"], found["settings"]
    packages = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    told = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; {packages}",
        f"{settings['size']}, {settings['resolution']} px, batch {settings['batch']}, {settings['algorithm']} of rank "
        f"{settings['rank']} on {settings['layers']} layers, {settings['dtype']}; {settings['rounds']} rounds of "
        f"{settings['steps']} steps after {settings['warmup']}",
        f"{found['flops'] / 1e9:.4g} GFLOP a step; peak {statistics.median(found['peak_flops']) / 1e9:.4g} GFLOP/s",
    ]
    rows = [HEADS, *(line.cells() for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    ruled = [rows[0], tuple("-" * width for width in widths), *rows[1:]]
    shown = [f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |" for row in ruled]
    notes = [
        f"{contender['name']}: {'ended early' if contender['turns'] else 'left out'}: "
        f"{contender['left_out'].splitlines()[0]}"
        for contender in found["contenders"]
        if contender["left_out"]
    ]
    busy = max((turn["busy_elsewhere"] for c in found["contenders"] for turn in c["turns"]), default=0.0)
    if busy > BUSY:
        notes.append(f"other programs kept up to {busy:.1f} cores busy during the steps, which makes them longer")
    return "\n".join([*told, "", *shown, *([""] if notes else []), *notes])
