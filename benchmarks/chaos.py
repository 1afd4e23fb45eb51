"""Kills training runs at any moment, resumes them, and compares their ends: `python benchmarks/chaos.py --kills 300`.

A trial draws settings and pictures, trains once in peace, then again in a process that is killed at a random moment of
its life and resumed, time after time, until it ends by itself. Now and then a SIGTERM or SIGINT asks it to stop first.
Both runs must leave the same: lora.safetensors and pictures byte for byte, steps.jsonl but for the seconds, and the
state in the last checkpoint. With `--every-write` a run is also killed after each single change it makes to the disk.

Processes and kills are real. To spare each process the seconds of its imports, it is forked from a server that has done
them (multiprocessing's forkserver; Windows has none, and there each is spawned and takes longer). It then calls
lorasmith.cli.main with a user's arguments, on one thread.
"""

import argparse
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from chaos_settings import SHORT, drawn_settings, make_pictures
from killing import KILL, PATIENCE, Blow, Ended, Processes, Runs, started

OWN = ("run.toml", "report.html")
PHASES = ("before the run folder", "before the first checkpoint", "between checkpoints", "while writing", "at the end")


@dataclass
class Trial:
    """Runs with the same settings, and what came of them."""

    runs: Runs
    settings: dict[str, Any]
    kills: Counter[str] = field(default_factory=Counter)  # by the phase that the run had reached
    stops: int = 0
    resumes: int = 0
    problems: list[str] = field(default_factory=list)

    def trained(self, name: str, *, blow: Blow | None = None, change: int = 0, by_toml: bool = False) -> Ended:
        """Trains into NAME/lora, where it goes on if it was there before; equal names make equal titles in files."""
        run = self.runs.folder / name / "lora"
        source = ["pictures", *(f"--{k}={v}" for k, v in self.settings.items()), f"--output={name}/lora"]
        if by_toml and (run / "run.toml").exists():
            source = [f"{name}/lora/run.toml"]
        is_resumed = run.exists()
        resume = ["--resume"] if is_resumed else []
        run.parent.mkdir(exist_ok=True)
        ended = self.runs.ended("train", *source, *resume, blow=blow, change=change)
        self.resumes += is_resumed
        if not ended.is_fair:
            self.problems.append(f"exit code {ended.code}, see {ended.log}")
        elif ended.code == -KILL:
            self.kills[self._phase(run, ended)] += 1
        elif ended.code:
            self.stops += 1
        return ended

    def compare(self, name: str, peaceful: str = "peaceful") -> None:
        """Notes where two runs left different things."""
        folder = self.runs.folder
        one, other = left_by(folder / peaceful / "lora"), left_by(folder / name / "lora")
        for key in sorted(one.keys() | other.keys()):
            if key not in one or key not in other or one[key] != other[key]:
                self.problems.append(f"{key} differs between {peaceful} and {name} in {folder}")

    def _phase(self, run: Path, ended: Ended) -> str:
        steps = {path.stem for path in run.glob("checkpoints/step-*.safetensors")}
        if not run.exists():
            return PHASES[0]
        if any(run.rglob(f".*.{ended.pid}.partial")):
            return PHASES[3]
        return PHASES[1] if not steps else PHASES[4] if f"step-{self.settings['steps']:07d}" in steps else PHASES[2]


def left_by(run: Path) -> dict[str, Any]:
    """{name: content} of what a run leaves, but for what is its own: its seconds, its folder, and its checkpoints.

    Of these it is the state in the last one that counts.
    """
    paths = {path.relative_to(run).as_posix(): path for path in sorted(run.rglob("*")) if path.is_file()}
    checkpoints = [name for name in paths if name.startswith("checkpoints/step-")]
    left = {name: path.read_bytes() for name, path in paths.items() if name not in checkpoints}
    steps = [json.loads(line) for line in left["steps.jsonl"].splitlines()] if "steps.jsonl" in left else []
    return {
        **left,
        **{name: "" for name in OWN if name in left},
        "steps.jsonl": [{key: value for key, value in step.items() if key != "seconds"} for step in steps],
        "the last checkpoint": state_in(paths[checkpoints[-1]]) if checkpoints else None,
    }


def state_in(checkpoint: Path) -> tuple[Any, bytes]:
    """The numbers and the tensors of a checkpoint."""
    content = checkpoint.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8:start])["__metadata__"]
    return json.loads(metadata["lorasmith.checkpoint"])["numbers"], content[start:]


def killed_at_random(runs: Runs, rng: random.Random, settings: dict[str, Any], most: int) -> Trial:
    """One trial, of at most so many blows."""
    trial = Trial(runs, settings)
    make_pictures(runs.folder / "pictures", rng)
    if rng.random() < 0.25:
        trial.trained("earlier")
        trial.settings["existing_lora"] = "earlier/lora/lora.safetensors"
    life = trial.trained("peaceful").seconds
    for _ in range(most):
        blow = Blow(
            rng.uniform(0, life),
            rng.choices((KILL, signal.SIGTERM, signal.SIGINT), (8, 1, 1))[0],
            rng.choice((PATIENCE, rng.uniform(0, 0.5))),
        )
        if trial.trained("killed", blow=blow, by_toml=rng.random() < 0.3).code == 0 or trial.problems:
            break
    else:
        trial.trained("killed")
    trial.compare("killed")
    return trial


def killed_at_changes(runs: Runs, first: int = 1, stride: int = 1) -> Trial:
    """Killed after its `first` change to the disk and every `stride`-th from there, each time in a run of its own.

    When it is resumed it is killed once more, after some change, and resumed again.
    """
    rng = random.Random(first)
    trial = Trial(runs, {**drawn_settings(rng, 0), **SHORT})
    make_pictures(runs.folder / "pictures", rng)
    trial.trained("peaceful")
    for change in itertools.count(first, stride):
        name = f"change-{change:03d}"
        is_over = trial.trained(name, change=change).code != -KILL
        if not is_over:
            trial.trained(name, change=rng.randint(1, change))
            trial.trained(name)
        trial.compare(name)
        if not trial.problems:
            shutil.rmtree(runs.folder / name)
        if is_over or trial.problems:
            return trial
    raise AssertionError  # the count does not end


def trials(
    processes: Processes, folder: Path, *, kills: int, most: int, seed: int = 0, workers: int = 1,
    changed: Mapping[str, Any] = MappingProxyType({}),
) -> list[Trial]:  # fmt: skip
    """As many trials as it takes for so many kills, of at most `most` blows each; some settings may be changed."""
    ended: list[Trial] = []
    numbers = itertools.count()

    def work() -> None:
        while sum(trial.kills.total() for trial in ended) < kills:
            number = next(numbers)
            rng, runs = random.Random(f"{seed} {number}"), Runs(processes, folder / f"trial-{number:04d}")
            trial = killed_at_random(runs, rng, {**drawn_settings(rng, number), **changed}, most)
            print(f"trial {number}: {trial.kills.total()} kills, {len(trial.problems)} problems", flush=True)
            ended.append(trial)

    with ThreadPoolExecutor(workers) as pool:
        for worker in [pool.submit(work) for _ in range(workers)]:
            worker.result()
    return ended


def show(ended: list[Trial], seconds: float) -> None:
    """Prints the summary."""
    kills = sum((trial.kills for trial in ended), Counter[str]())
    bad = [trial for trial in ended if trial.problems]
    rows = [
        ("trials", len(ended)),
        ("kills", kills.total()),
        *((f"  {phase}", kills[phase]) for phase in PHASES),
        ("stops", sum(trial.stops for trial in ended)),
        ("resumes", sum(trial.resumes for trial in ended)),
        ("trials with mismatches", len(bad)),
        ("seconds", round(seconds)),
    ]
    for name, number in rows:
        print(f"{name:32}{number:6}")
    for trial in bad:
        print(*trial.problems, json.dumps(trial.settings), sep="\n")


def command() -> int:
    """What the command line asks for; exit code 1 on a mismatch."""
    parser = argparse.ArgumentParser(description="Kills training runs and resumes them.")
    parser.add_argument("--kills", type=int, default=300, help="how many processes to kill at random moments")
    parser.add_argument("--most", type=int, default=10, help="the most signals that a trial gets")
    parser.add_argument("--seed", type=int, default=0, help="drives the settings; moments also depend on the machine")
    parser.add_argument("--workers", type=int, default=1, help="trials at a time")
    parser.add_argument("--every-write", action="store_true", help="kill after each change to the disk too")
    asked = parser.parse_args()
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="chaos-"))
    processes = started(folder / "server.log")
    ended = trials(processes, folder, kills=asked.kills, most=asked.most, seed=asked.seed, workers=asked.workers)
    if asked.every_write:
        ended.append(killed_at_changes(Runs(processes, folder / "changes")))
    show(ended, time.monotonic() - began)
    for trial in ended:
        if not trial.problems:
            shutil.rmtree(trial.runs.folder)
    if any(trial.problems for trial in ended):
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(command())
