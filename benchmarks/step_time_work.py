"""What one process of step_time.py is asked and answers; it runs under lorasmith's Python and under ComfyUI's.

B batch, N samples, h w latent height and width, L tokens, D width.
"""

import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

ATTENTION = r"\.to_(q|k|v|out\.0)$"  # what diffusers' own script adapts
LEARNING_RATE = 1e-4
ONE_GB = 1e9


class LeftOut(Exception):
    """A contender that cannot do what is asked: it is left out, with this reason."""


@dataclass(frozen=True)
class Work:
    """One process's work."""

    what: str  # "make", "peak", "check" or "time"
    folder: str  # of the model, the data and the answers
    size: str
    resolution: int  # in pixels, an eighth of which is the latents' side
    dtype: str  # "bf16" or "fp32"
    layers: str  # "attention" or "all"
    algorithm: str
    rank: int
    batch: int
    threads: int | None
    steps: int = 1
    kind: str = ""  # of contender
    options: dict[str, str] = field(default_factory=dict)  # the contender's own

    @property
    def model_path(self) -> Path:
        return Path(self.folder, "unet.safetensors")

    @property
    def data_path(self) -> Path:
        return Path(self.folder, "data.safetensors")

    @property
    def reference_path(self) -> Path:
        """The first contender's prediction."""
        return Path(self.folder, "reference.safetensors")

    @property
    def answer_path(self) -> Path:
        return Path(self.folder, "answer.json")

    def flag(self, name: str) -> bool:
        """Whether an option is on: given alone, or as true."""
        return self.options.get(name, "false") == "true"

    def refuse_other_options(self, *known: str) -> None:
        """ValueError that names an option which this kind of contender does not have."""
        for name, value in self.options.items():
            if name not in known or value not in ("true", "false"):
                raise ValueError(f"an option of {self.kind} must be one of {', '.join(known)}, got {name}={value}")

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Work":
        return cls(**json.loads(path.read_text()))


class Contender(Protocol):
    """A trainer with new adapters on the net."""

    def layers_and_numbers(self) -> tuple[int, int]:
        """How many layers have an adapter, and how many numbers are trained; known after `prediction`."""
        ...

    def prediction(self, x_t: Any, t: Any, text: Any) -> Any:
        """x_t [1,4,h,w], t [1], text [1,L,D] -> the adapted net's noise [1,4,h,w], float32."""
        ...

    def train(self, on_step: Callable[[], None]) -> None:
        """All steps of the work, each with all that this trainer does in one; `on_step` is called after each."""
        ...


def answer(work: Work, load: Callable[[], Any], build: Callable[[Any], Contender]) -> dict[str, Any]:
    """Does the work with a contender: `load` reads the plain net, `build` puts adapters on it.

    All that the contender needs must be imported already, for the memory's sake.
    """
    imported = resident()
    net = load()
    loaded, ready = resident(), time.perf_counter()
    contender = build(net)
    if work.what == "check":
        return _checked(work, contender)
    stamps: list[float] = []
    before = processor_seconds()
    contender.train(lambda: stamps.append(time.perf_counter()))
    wall, all_cores, own = (now - then for then, now in zip(before, processor_seconds(), strict=True))
    assert len(stamps) == work.steps, f"{len(stamps)} steps of {work.steps}"
    seconds = [after - before for before, after in zip([ready, *stamps], stamps, strict=False)]
    memory = {"imported": imported, "loaded": loaded, "peak": peak(), "above_imports": peak() - imported}
    busy_elsewhere = max(0.0, all_cores - own) / wall
    return {"first_step": seconds[0], "seconds": seconds[1:], "memory": memory, "busy_elsewhere": busy_elsewhere}


def _checked(work: Work, contender: Contender) -> dict[str, Any]:
    """The loss on the fixed sample, and how far the prediction is from the first contender's."""
    from safetensors.torch import load_file, save_file

    data = load_file(work.data_path)
    pred = contender.prediction(data["x_t"], data["t"], data["text"][:1]).detach().float().contiguous()
    if not work.reference_path.exists():
        save_file({"pred": pred}, work.reference_path)
    reference = load_file(work.reference_path)["pred"]
    layers, numbers = contender.layers_and_numbers()
    return {
        "loss": float((pred - data["eps"]).square().mean()),
        "difference": float((pred - reference).norm() / reference.norm()),
        "layers": layers,
        "numbers": numbers,
    }


def resident() -> float:
    """What this process holds in memory now, in GB; where only the most so far is known, that."""
    return _status("VmRSS:") if sys.platform == "linux" else peak()


def peak() -> float:
    """The most that this process ever held in memory, in GB.

    On Linux not by getrusage, which begins with what the process that started this one held.
    """
    if sys.platform == "linux":
        return _status("VmHWM:")
    usage: Any = importlib.import_module("resource")
    bytes_a_unit = 1 if sys.platform == "darwin" else 1024
    return usage.getrusage(usage.RUSAGE_SELF).ru_maxrss * bytes_a_unit / ONE_GB


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / ONE_GB


def processor_seconds() -> tuple[float, float, float]:
    """Now, the seconds that all cores were busy for, and those for this process; the last twice where only it is known.

    What all cores did beyond this process is another program's, which the times of steps suffer from.
    """
    own, stat = time.process_time(), Path("/proc/stat")
    if not stat.exists():
        return time.perf_counter(), own, own
    user, nice, system, _, _, *others = (int(part) for part in stat.read_text().splitlines()[0].split()[1:9])
    return time.perf_counter(), (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK"), own


def machine() -> dict[str, Any]:
    """The processor, its cores that this process may use, and the system."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {"processor": name, "cores": cores, "system": platform.platform(), "python": platform.python_version()}


def main_of(answers: Callable[[Work], dict[str, Any]]) -> None:
    """Reads the work that the command line names, and writes the answer whole."""
    import torch

    work = Work.read(Path(sys.argv[1]))
    if work.threads:
        torch.set_num_threads(work.threads)
    try:
        found = answers(work)
    except (LeftOut, NotImplementedError) as reason:
        found = {"left_out": str(reason).splitlines()[0]}
    found |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    work.answer_path.write_text(json.dumps(found))
