"""One run with a folder of its own: config -> model and samples -> job -> steps, LoRA file, report."""

import dataclasses
import json
import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorasmith import lorafile
from lorasmith.attach import attached
from lorasmith.config import MAX_STEPS, Config, Sampling
from lorasmith.data.cache import Dataset, encoded
from lorasmith.data.folder import examples
from lorasmith.devices import best_device, compute_dtype, model_dtype
from lorasmith.families import Family, opened
from lorasmith.job import Job
from lorasmith.loading import adapters_from
from lorasmith.memory import shared_copy
from lorasmith.plots import save_loss_plot
from lorasmith.report import save_comparison, save_page
from lorasmith.sampling import picture_of
from lorasmith.settings import toml_of
from lorasmith.types import Cached, Codec, Denoiser, Example, Step
from lorasmith.validation import Measured, held_out_losses
from lorasmith.whole import write_whole

VIEWS = 100
NUM_PROMPTS = 4


@dataclass
class Run:
    """A run with a folder of its own: opened, begun, stepped, finished."""

    job: Job
    codec: Codec
    captions: Sequence[str]
    measured: dict[str, list[Cached]]  # what is measured before and after: {"held-out": samples, "drift": samples}
    folder: Path
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    drawn: list[tuple[str, list[Image.Image]]] = field(default_factory=list)
    taken: list[Step] = field(default_factory=list)

    @classmethod
    def opened(cls, config: Config) -> "Run":
        """Loads the model and encodes the data; ValueError on bad input. Writes nothing."""
        if config.model is None or config.data.folder is None:
            raise ValueError(f"{'model' if config.model is None else 'data.folder'} must be set: there is no default")
        if config.output is not None and config.output.exists():
            raise ValueError(f"output must be a folder that does not exist yet, got {config.output}")
        found = examples(config.data.folder)
        folder = config.output or free_folder(config.data.folder.resolve().name)
        if folder.resolve().is_relative_to(config.data.folder.resolve()):
            raise ValueError(f"output must be outside the picture folder, lest its plots be trained on, got {folder}")
        measured = {
            name: examples(folder)
            for name, folder in (("held-out", config.data.held_out), ("drift", config.data.drift))
            if folder is not None
        }
        family = opened(config.model)
        device = _device(config)
        codec = family.codec(device)
        resolution = config.data.resolution or codec.resolution
        config = _resolved(config, found, resolution)
        samples = list(encoded(found, codec, resolution))
        dataset = Dataset.of(
            samples, [example.repeats for example in found], seed=config.seed, group_size=config.group_size
        )
        job = Job.of(family.denoiser, dataset, config, device=device, metadata=_base_metadata(family, config))
        encoded_measured = {name: list(encoded(these, codec, resolution)) for name, these in measured.items()}
        return cls(job, codec, [example.caption for example in found], encoded_measured, folder)

    def begin(self) -> None:
        """Makes the run folder with run.toml, then draws and measures without the LoRA."""
        self.folder.mkdir(parents=True)
        with self.kept_once_trained():
            write_whole(self.folder / "run.toml", toml_of(self.job.config).encode())
            self.drawn.append(("without LoRA", self._draw()))
            self.before = self._measure()

    @contextmanager
    def kept_once_trained(self) -> Iterator[None]:
        """Takes the run folder away again where an error or Ctrl-C comes before the first step is done."""
        try:
            yield
        except BaseException:
            if not self.taken:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def steps(self) -> Generator[Step, None, None]:
        """Trains; every step is a line of steps.jsonl before it is yielded."""
        with (self.folder / "steps.jsonl").open("w", encoding="utf-8") as file:
            for step in self.job.steps():
                self.taken.append(step)
                file.write(json.dumps(dataclasses.asdict(step)) + "\n")
                file.flush()
                yield step

    @property
    def num_steps(self) -> int:
        assert self.job.config.steps is not None
        return self.job.config.steps

    @property
    def title(self) -> str:
        """The run folder's name without the number that tells equal runs apart, so that their files are equal."""
        config = self.job.config
        assert config.data.folder is not None
        name = (config.output or config.data.folder.resolve()).name
        return name.encode(errors="replace").decode()  # folders may have names that no text file can hold

    @property
    def lora_path(self) -> Path:
        return self.folder / "lora.safetensors"

    def save(self) -> None:
        """Writes the LoRA as the last step left it; OSError that names the file where it cannot be written."""
        num_steps = self.taken[-1].step if self.taken else self.job.done
        metadata = {**self.job.file_metadata(num_steps), "modelspec.title": self.title}
        lorafile.write(self.lora_path, self.job.lora(), metadata)

    def finish(self) -> list[tuple[str, str]]:
        """Draws and measures with the LoRA and writes the plots and the page; returns the summary, label and text."""
        with attached(self.job.denoiser, self.job.adapters):
            self.drawn.append(("with LoRA", self._draw()))
            self.after = self._measure()
        save_loss_plot(self.taken, self.folder / "loss.png")
        shown = [("Loss", self.folder / "loss.png")]
        if self.prompts:
            save_comparison(self.drawn, self.prompts, self.folder / "before_after.png")
            shown.insert(0, ("Before and after", self.folder / "before_after.png"))
        summary = self.summary()
        save_page(
            self.folder / "report.html", self.folder.name, summary, shown, toml_of(self.job.config), steps=self.taken
        )
        return summary

    def summary(self) -> list[tuple[str, str]]:
        """What the run did: label and text."""
        config, adapters = self.job.config, self.job.adapters
        trained = sum(p.numel() for p in adapters.parameters())
        rows = [
            ("steps", f"{len(self.taken)} of {config.steps}, {config.group_size} samples each"),
            ("pictures", str(len(self.job.dataset.samples))),
            ("adapters", f"{'+'.join(adapters.algorithms)} on {len(adapters.adapters)} layers, {trained:,} numbers"),
            ("training time", f"{sum(step.seconds for step in self.taken):.0f} s"),
        ]
        for name, before in self.before.items():
            after = self.after[name]
            change = Measured.of(after - before)
            rows.append((f"{name} loss", f"{Measured.of(before)} before, {Measured.of(after)} after: {change:+}"))
        return rows

    @property
    def prompts(self) -> Sequence[str]:
        chosen = self.job.config.sampling.prompts
        return tuple(dict.fromkeys(self.captions))[:NUM_PROMPTS] if chosen is None else chosen

    def _draw(self) -> list[Image.Image]:
        return pictures(self.job.denoiser, self.codec, self.prompts, self.job.config.sampling)

    def _measure(self) -> dict[str, Tensor]:
        return {name: held_out_losses(self.job.denoiser, samples) for name, samples in self.measured.items()}


def pictures(denoiser: Denoiser, codec: Codec, prompts: Sequence[str], sampling: Sampling) -> list[Image.Image]:
    """A picture for each prompt, numbered in that order, at the model's own resolution."""
    side = codec.resolution
    return [
        _as_image(
            picture_of(
                denoiser, codec, prompt, size=(side, side), seed=sampling.seed, number=number, steps=sampling.steps,
                guidance=sampling.guidance,
            )
        )
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip


def draw_comparison(config: Config, lora: Path | None, output: Path) -> None:
    """Draws the sampling prompts without and, where there is one, with the LoRA, into one labelled picture."""
    assert config.model is not None and config.sampling.prompts
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"output must be a file in a folder that exists, got {output}")
    family, device = opened(config.model), _device(config)
    adapters = None if lora is None else adapters_from(lorafile.read(lora)[0], family.denoiser)
    denoiser = shared_copy(family.denoiser, device, model_dtype(config.training_dtype, device))
    codec = family.codec(device)
    rows = [("without LoRA", pictures(denoiser, codec, config.sampling.prompts, config.sampling))]
    if adapters is not None:
        adapters.to(device, compute_dtype(config.lora_dtype, device))
        with attached(denoiser, adapters):
            rows.append(("with LoRA", pictures(denoiser, codec, config.sampling.prompts, config.sampling)))
    save_comparison(rows, config.sampling.prompts, output)


def _device(config: Config) -> torch.device:
    if config.device == "auto":
        return best_device()
    try:
        return torch.empty(0, device=config.device).device
    except (RuntimeError, AssertionError) as error:  # either, where torch was built without the device
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"device must be one that this machine has, got {config.device}: {reason}") from error


def _as_image(pixels: Tensor) -> Image.Image:
    """pixels [3,H,W] in -1 to 1 -> picture; NaN, where a run went wrong, is grey."""
    return Image.fromarray(((pixels.nan_to_num(0) + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8))


def _resolved(config: Config, found: Sequence[Example], resolution: int) -> Config:
    """The config with everything set that follows from the data."""
    views = VIEWS * sum(example.repeats for example in found)
    steps = config.steps or min(MAX_STEPS, max(1, round(views / config.group_size)))
    data = config.data.model_copy(update={"resolution": resolution})
    return config.model_copy(update={"steps": steps, "data": data})


def _base_metadata(family: Family, config: Config) -> dict[str, str]:
    assert config.model is not None
    resolution = config.data.resolution
    return {
        **family.metadata(),
        "ss_sd_model_name": Path(config.model).name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "ss_resolution": f"({resolution}, {resolution})",
    }


def free_folder(name: str) -> Path:
    """runs/NAME or, where that is taken, runs/NAME-2 and so on."""
    candidates = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 10**6))
    return next(path for path in candidates if not path.exists())
