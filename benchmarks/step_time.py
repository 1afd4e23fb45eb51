"""Seconds a training step, memory, and share of the machine's peak: lorasmith beside PEFT, LyCORIS and ComfyUI.

`python benchmarks/step_time.py` trains adapters on a UNet of Stable Diffusion 1.5's shape with random weights, on the
processor, with every contender in turn: A B C A B C ... Each turn is a process of its own, which loads the net, warms
up and is timed, and the next one waits for its end. Before the first turn every contender predicts one fixed noised
latent, and the program stops where their losses differ.

Contenders, with options after a colon (`--contenders lorasmith lorasmith:gradient_checkpointing peft:bf16`):

  lorasmith  options are settings of its schema, as on its command line
  peft       diffusers' own script with PEFT; channels_last; bf16: adapters in bf16 too, without autocast; checkpointing
  lycoris    LyCORIS's wrapper under the same loop; options as peft's; bypass: outputs are added, no weights built
  comfyui    the Train LoRA node of the checkout in COMFYUI_PATH, under COMFYUI_PYTHON, with its defaults: all layers,
             checkpointing; options are the node's inputs; own_dtype: weights as ComfyUI keeps them unless told

No network is needed; the model and data go to a temporary folder.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from step_time_report import Line, table
from step_time_work import Work, machine

HERE = Path(__file__).parent
DEFAULTS = (
    "lorasmith", "peft", "peft:channels_last", "peft:bf16", "peft:bf16,channels_last", "lycoris", "comfyui",
    "comfyui:bypass_mode",
)  # fmt: skip
RESOLUTIONS = {"sd15": 512, "small": 64}
MULTIPLES = {"sd15": 64, "small": 16}
PROGRAMS = {
    "": "step_time_model.py",
    "lorasmith": "step_time_lorasmith.py",
    "peft": "step_time_script.py",
    "lycoris": "step_time_script.py",
    "comfyui": "step_time_comfyui.py",
}
CONTENDERS = tuple(kind for kind in PROGRAMS if kind)
TOLERANCES = {"bf16": 1e-2, "fp32": 1e-4}  # of losses, relative to the first one
FARTHEST = {"bf16": 5e-2, "fp32": 1e-3}  # of predictions


class Failed(Exception):
    """A process ended without an answer; what it said last."""


@dataclass
class Entry:
    """A contender, and what was found of it."""

    name: str
    check: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)
    left_out: str | None = None

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]

    @property
    def options(self) -> dict[str, str]:
        """bf16,adapter.rank=4 -> {"bf16": "true", "adapter.rank": "4"}."""
        parts = [part.partition("=") for part in self.name.partition(":")[2].split(",") if part]
        return {key: value if has_value else "true" for key, has_value, value in parts}


def answered(work: Work) -> dict[str, Any]:
    """What a process of its own answers; Failed where it ends without."""
    python = os.environ["COMFYUI_PYTHON"] if work.kind == "comfyui" else sys.executable
    program = HERE / PROGRAMS[work.kind]
    work_path = Path(work.folder, "work.json")
    work.answer_path.unlink(missing_ok=True)
    work.write(work_path)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if work.threads:
        environment["OMP_NUM_THREADS"] = str(work.threads)
    ended = subprocess.run(
        [python, str(program), str(work_path)], env=environment, text=True, errors="replace", check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if ended.returncode or not work.answer_path.exists():
        why = " (killed: most likely out of memory)" if ended.returncode == -9 else ""
        raise Failed(f"{work.what} {work.kind} ended with {ended.returncode}{why}:\n{ended.stdout[-3000:]}")
    return json.loads(work.answer_path.read_text())


def say(text: str) -> None:
    """To stderr, where it is no part of the table."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def of(base: Work, entry: Entry, what: str, steps: int = 1) -> Work:
    return replace(base, what=what, kind=entry.kind, options=entry.options, steps=steps)


def check(base: Work, entries: Sequence[Entry]) -> None:
    """Notes what every contender predicts before its first step, and compares it."""
    for entry in entries:
        if entry.left_out is None:
            entry.check = answered(of(base, entry, "check"))
            entry.left_out = entry.check.get("left_out")
        if entry.left_out is not None:
            say(f"{entry.name}: left out: {entry.left_out}")
            continue
        found = entry.check
        say(
            f"{entry.name}: loss {found['loss']:.6f}, prediction off by {found['difference']:.1e}, "
            f"{found['layers']} layers, {found['numbers']:,} numbers"
        )
    compare(base, [entry for entry in entries if entry.left_out is None])


def compare(base: Work, racing: Sequence[Entry]) -> None:
    """Failed where a loss or prediction is not the first one's."""
    for entry in racing:
        loss, first = entry.check["loss"], racing[0].check["loss"]
        is_near = abs(loss - first) <= TOLERANCES[base.dtype] * abs(first)
        if not is_near or not entry.check["difference"] <= FARTHEST[base.dtype]:
            raise Failed(f"{entry.name} computes something else than {racing[0].name}: loss {loss}, not {first}")
        if entry.check["layers"] != racing[0].check["layers"]:
            say(f"{entry.name} adapts {entry.check['layers']} layers, {racing[0].name} {racing[0].check['layers']}")


def race(base: Work, entries: Sequence[Entry], rounds: int, steps: int) -> Iterator[float]:
    """Every contender's turn, round by round; yields each round's peak in FLOP/s. Who fails is out from then on."""
    for number in range(1, rounds + 1):
        yield answered(replace(base, what="peak"))["peak_flops"]
        for entry in entries:
            if entry.left_out is not None:
                continue
            try:
                turn = answered(of(base, entry, "time", steps))
            except Failed as error:
                entry.left_out = str(error)
                say(f"{entry.name}: {error}")
                continue
            entry.turns.append(turn)
            seconds = " ".join(f"{second:.2f}" for second in turn["seconds"])
            say(f"round {number}, {entry.name}: first step {turn['first_step']:.1f} s, then {seconds}")


def reason_to_leave_out(entry: Entry, asked: argparse.Namespace) -> str | None:
    """Known before anything runs."""
    if entry.kind != "comfyui":
        return None
    missing = [name for name in ("COMFYUI_PATH", "COMFYUI_PYTHON") if not os.environ.get(name)]
    if missing:
        return f"{' and '.join(missing)} not set"
    if asked.layers != "all" and asked.contenders is None:
        return "it adapts every layer: --layers all, or name it in --contenders"
    return None


def commit() -> str | None:
    """Of the checkout that this file is in."""
    try:
        return subprocess.check_output(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """ValueError never: argparse ends the program on what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(RESOLUTIONS), default="sd15")
    parser.add_argument("--resolution", type=int, help="side of the pictures in pixels; sd15: 512, small: 64")
    parser.add_argument("--algorithm", choices=("LoRA", "LoHa", "LoKr", "OFT", "DoRA"), default="LoRA")
    parser.add_argument("--layers", choices=("attention", "all"), default="attention")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--contenders", nargs="+", metavar="NAME[:OPTION,...]", help=f"default: {' '.join(DEFAULTS)}")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before these, the first one included")
    parser.add_argument("--threads", type=int, help="of every process; none: torch's own choice")
    parser.add_argument("--folder", type=Path, help="for the model and data; none: the system's for temporary files")
    parser.add_argument("--json", type=Path, help="file to write everything to")
    asked = parser.parse_args(words)
    asked.resolution = asked.resolution or RESOLUTIONS[asked.size]
    if asked.resolution % MULTIPLES[asked.size]:
        parser.error(f"--resolution must be a multiple of {MULTIPLES[asked.size]}, got {asked.resolution}")
    strange = [name for name in asked.contenders or () if name.partition(":")[0] not in CONTENDERS]
    if strange:
        parser.error(
            f"--contenders must be among {', '.join(CONTENDERS)}, with options after a colon, got {strange[0]}"
        )
    if min(asked.rounds, asked.steps, asked.warmup, asked.rank, asked.batch) < 1:
        parser.error("--rounds, --steps, --warmup, --rank and --batch must be at least 1")
    return asked


def measured(asked: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Everything, as --json writes it."""
    entries = [Entry(name) for name in asked.contenders or DEFAULTS]
    for entry in entries:
        entry.left_out = reason_to_leave_out(entry, asked)
    base = Work(
        "make", folder, asked.size, asked.resolution, asked.dtype, layers=asked.layers, algorithm=asked.algorithm,
        rank=asked.rank, batch=asked.batch, threads=asked.threads,
    )  # fmt: skip
    say(f"making the model: {asked.size}, {asked.resolution} px, {asked.dtype}")
    made = answered(base)
    check(base, entries)
    peaks = list(race(base, entries, asked.rounds, asked.warmup + asked.steps))
    return {
        "machine": machine() | {"threads": made["threads"]},
        "settings": {k: v for k, v in vars(asked).items() if k not in ("json", "folder", "contenders")},
        "commit": commit(),
        "versions": versions(made, entries),
        "weights": made["weights"],
        "flops": made["flops"],
        "peak_flops": peaks,
        "contenders": [result(entry, asked.warmup) for entry in entries],
    }


def versions(made: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, str]:
    """Of all packages that count, ComfyUI's own torch included."""
    found = {**made["versions"], "torch": made["torch"]}
    for entry in entries:
        if entry.kind == "comfyui" and "versions" in entry.check:
            found |= {**entry.check["versions"], "ComfyUI's torch": entry.check["torch"]}
    return found


def result(entry: Entry, warmup: int) -> dict[str, Any]:
    """A contender's part of the JSON; each turn's seconds without the warm-up."""
    turns = [
        {**turn, "warmup": turn["seconds"][: warmup - 1], "seconds": turn["seconds"][warmup - 1 :]}
        for turn in entry.turns
    ]
    known = ("loss", "difference", "layers", "numbers")
    checked = {key: entry.check[key] for key in known if key in entry.check}
    return {"name": entry.name, "left_out": entry.left_out, **checked, "turns": turns}


def main(words: Sequence[str] | None = None) -> None:
    asked = arguments(words)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        try:
            found = measured(asked, folder)
        except Failed as error:
            sys.exit(str(error))
    lines = Line.all_of(found)
    found["lines"] = [vars(line) for line in lines]
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found, lines))


if __name__ == "__main__":
    main()
