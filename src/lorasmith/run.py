"""One run with a folder of its own: config -> model and samples -> job -> steps, LoRA file, report."""

import logging
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorasmith import lorafile
from lorasmith.attach import attached
from lorasmith.checkpoints import CheckpointFolder
from lorasmith.config import MAX_STEPS, Config, Sampling
from lorasmith.data.cache import Dataset, encoded
from lorasmith.data.folder import examples
from lorasmith.data.tags import tag_frequency
from lorasmith.devices import best_device, compute_dtype, model_dtype
from lorasmith.families import Family, opened
from lorasmith.job import Job
from lorasmith.keeping import Keeper
from lorasmith.loading import adapters_from
from lorasmith.memory import shared_copy
from lorasmith.pace import counted
from lorasmith.plots import save_loss_plot
from lorasmith.progress import SILENT, Progress, tracked
from lorasmith.report import save_comparison, save_page
from lorasmith.run_folder import RunFolder, chosen_folder
from lorasmith.sampling import picture_of
from lorasmith.settings import toml_of
from lorasmith.step_log import StepLog, TensorBoardLog
from lorasmith.types import Cached, Codec, Denoiser, Example, Step
from lorasmith.validation import Measured, held_out_losses
from lorasmith.whole import errors_name
from lorasmith.world import ALONE, World

log = logging.getLogger(__name__)

VIEWS = 100
NUM_PROMPTS = 4


@contextmanager
def opened_run(
    config: Config, *, is_resuming: bool = False, folder: Path | None = None, world: World = ALONE,
    progress: Progress = SILENT,
) -> Iterator["Run"]:  # fmt: skip
    """Loads the model, encodes the data, and makes the run folder or takes up the one that is there.

    folder: the run folder to resume in, where it is known. ValueError on bad input, and then nothing is written. A new
    folder is taken away again where an error comes before the first step is done.
    """
    if config.model is None or config.data.folder is None:
        raise ValueError(f"{'model' if config.model is None else 'data.folder'} must be set: there is no default")
    held = RunFolder(folder or chosen_folder(config, is_resuming=is_resuming)) if world.is_first else None
    with held.held() if held else nullcontext(), closing(Run.of(config, held, world, progress)) as run:
        run.begin()
        yield run


@dataclass
class Run:
    """A job with pictures to draw and losses to measure; the first process writes of it into its folder."""

    job: Job
    codec: Codec
    captions: Sequence[str]
    measured: dict[str, list[Cached]]  # what is measured before and after: {"validation": samples, "drift": samples}
    folder: RunFolder | None  # of the first process alone, as are the logs
    keeper: Keeper
    progress: Progress
    tensorboard: TensorBoardLog | None = None

    @classmethod
    def of(cls, config: Config, folder: RunFolder | None, world: World, progress: Progress = SILENT) -> "Run":
        """Writes nothing."""
        assert config.model is not None and config.data.folder is not None
        found = examples(config.data.folder, config.data.caption_lines)
        measured = {
            name: examples(path, config.data.caption_lines)
            for name, path in (("validation", config.data.held_out), ("drift", config.data.drift))
            if path is not None
        }
        with progress.stage("loading the model", 2) as advance:
            family = opened(config.model, config.encoders, with_texts=config.text_encoder.train)
            device = _device(config, world)
            advance(1)
            codec = family.codec(device)
            advance(1)
        resolution = config.data.resolution or codec.resolution
        config = _resolved(config, found, resolution, world)
        samples = list(tracked(encoded(found, codec, resolution), "encoding pictures", progress, len(found)))
        dataset = Dataset.of(
            samples,
            [example.repeats for example in found],
            seed=config.seed,
            group_size=config.group_size * world.size,
        )
        metadata = {**_base_metadata(family, config), "ss_tag_frequency": tag_frequency(found)}
        job = Job.of(family.denoiser, dataset, config, device=device, metadata=metadata, world=world)
        encoded_measured = {
            name: list(tracked(encoded(these, codec, resolution), f"encoding {name} pictures", progress, len(these)))
            for name, these in measured.items()
        }
        path = folder.checkpoints_path if folder else Path()
        made_again = folder.made_again if folder else lambda: False
        keeper = Keeper(job, CheckpointFolder.of(path, config), made_again, progress=progress)
        return cls(job, codec, [example.caption for example in found], encoded_measured, folder, keeper, progress)

    def begin(self) -> None:
        """Goes on from the newest sound checkpoint, if there is one, and makes the folder's files ready."""
        is_resumed = self.keeper.resumed()
        if self.folder is None:
            return
        if is_resumed:
            log.info("resuming %s after step %d of %d", self.folder.path, self.num_done, self.num_steps)
        elif not self.folder.is_new:
            log.info("%s holds no checkpoint to resume from: starting with step 1", self.folder.path)
        self.folder.begin(toml_of(self.job.config))
        self.keeper.log = StepLog.opened(self.folder.steps_path, self.job.state.steps(self.job.done))
        if self.job.config.tensorboard:
            self.tensorboard = TensorBoardLog(self.folder.path / "tensorboard", self.job.steps_in_all)

    def close(self) -> None:
        for opened_log in (self.keeper.log, self.tensorboard):
            if opened_log is not None:
                opened_log.close()

    def steps(self, stop: threading.Event | None = None) -> Generator[Step, None, None]:
        """Trains to the end, or until `stop` is set in one of the processes; all that is due in between is done."""
        every = self.job.config.sampling.every
        with closing(self.keeper.steps(stop)) as steps:
            for step in steps:
                self.keeper.restored()
                if self.tensorboard is not None:
                    self.tensorboard.append(step)
                if every is not None and self.num_done % every == 0:
                    self._draw_on_the_way()
                yield step

    @property
    def num_done(self) -> int:
        """Optimizer steps completed, those before an interruption included."""
        return self.job.state.counters.step

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

    def save(self) -> list[Path]:
        """Writes the LoRA of the last sound step, and what each expert has of it; returns the paths, the whole's first.

        Nothing where there is no such step. OSError that names the file where it cannot be written.
        """
        if not self.job.state.is_sound and not self.keeper.resumed():
            return []
        if self.folder is None or not self.num_done:
            return []
        self.keeper.restored()
        title = {"modelspec.title": self.title}
        paths = [self.folder.lora_path]
        lorafile.write(paths[0], self.job.lora(), {**self.job.file_metadata(), **title})
        for expert, lora, metadata in self.job.loras_of_experts():
            paths.append(self.folder.expert_path(expert.name))
            lorafile.write(paths[-1], lora, {**metadata, **title})
        return paths

    def finish(self) -> list[tuple[str, str]]:
        """Draws and measures without and with the LoRA, writes plots and page; returns the summary, label and text.

        Of several processes all must call this where the model is sharded.
        """
        if self.folder is None and not self.job.config.sharded:
            return []
        drawn, measured = [("without LoRA", self._draw())], [self._measure()]
        with attached(self.job.denoiser, self.job.adapters):
            drawn.append(("with LoRA", self._draw()))
            measured.append(self._measure())
        if self.folder is None or self.keeper.log is None:
            return []
        if self.keeper.restored():
            self.save()
        path, steps = self.folder.path, self.keeper.log.steps
        save_loss_plot(steps, path / "loss.png")
        shown = []
        if self.prompts:
            save_comparison(drawn, self.prompts, path / "before_after.png")
            shown.append(("Before and after", path / "before_after.png"))
        summary = self.summary(steps, *measured)
        save_page(path / "report.html", path.name, summary, shown, toml_of(self.job.config), steps=steps)
        return summary

    def summary(
        self, steps: Sequence[Step], before: dict[str, Tensor], after: dict[str, Tensor]
    ) -> list[tuple[str, str]]:
        """What the run did: label and text."""
        job = self.job
        trained = sum(p.numel() for p in job.adapters.parameters())
        rows = [
            ("steps", f"{self.num_done} of {self.num_steps}, {counted(job.dataset.order.group_size, 'sample')} each"),
            ("pictures", str(len(job.dataset.samples))),
            (
                "adapters",
                f"{'+'.join(job.adapters.algorithms)} on {counted(len(job.adapters.adapters), 'layer')}, "
                f"{counted(trained, 'trainable parameter')}",
            ),
            ("training time", f"{sum(step.seconds for step in steps):.0f} s"),
        ]
        if self.folder is not None and job.trained_experts:
            paths = [self.folder.expert_path(expert.name) for expert in job.trained_experts]
            rows.append(("files of experts", ", ".join(path.name for path in paths)))
        for name in before:
            change = Measured.of(after[name] - before[name])
            values = f"{Measured.of(before[name])} before, {Measured.of(after[name])} after: {change:+}"
            rows.append((f"{name} loss", values))
        return rows

    @property
    def prompts(self) -> Sequence[str]:
        chosen = self.job.config.sampling.prompts
        return tuple(dict.fromkeys(self.captions))[:NUM_PROMPTS] if chosen is None else chosen

    def _draw_on_the_way(self) -> None:
        """Draws with the LoRA as it is, into samples/."""
        if not self.prompts or (self.folder is None and not self.job.config.sharded):
            return
        drawn = self._draw()
        if self.folder is not None:
            self.keeper.restored()
            path = self.folder.samples_path / f"step-{self.num_done:07d}.png"
            with errors_name(path.parent):
                path.parent.mkdir(exist_ok=True)
            save_comparison([(f"step {self.num_done}", drawn)], self.prompts, path)
            self.progress.wrote("sample", path)

    def _draw(self) -> list[Image.Image]:
        return pictures(self.job.denoiser, self.codec, self.prompts, self.job.config.sampling, self.progress)

    def _measure(self) -> dict[str, Tensor]:
        return {name: held_out_losses(self.job.denoiser, samples) for name, samples in self.measured.items()}


def pictures(
    denoiser: Denoiser, codec: Codec, prompts: Sequence[str], sampling: Sampling, progress: Progress
) -> list[Image.Image]:
    """A picture for each prompt, numbered in that order, at the model's own resolution."""
    side = codec.resolution
    return [
        _as_image(
            picture_of(
                denoiser, codec, prompt, size=(side, side), seed=sampling.seed, number=number, steps=sampling.steps,
                guidance=sampling.guidance,
            )
        )
        for number, prompt in enumerate(tracked(prompts, "generating samples", progress, len(prompts)))
    ]  # fmt: skip


def draw_comparison(config: Config, lora: Path | None, output: Path, *, progress: Progress = SILENT) -> None:
    """Draws the sampling prompts without and, where there is one, with the LoRA, into one labelled picture."""
    assert config.model is not None and config.sampling.prompts
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"output must be a file in a folder that exists, got {output}")
    with progress.stage("loading the model"):
        family = opened(config.model, config.encoders, with_texts=config.text_encoder.train)
    device = _device(config, ALONE)
    adapters = None
    if lora is not None:
        state, metadata = lorafile.read(lora)
        adapters = adapters_from(state, family.denoiser, metadata, ignore_unknown=config.ignore_unknown)
    denoiser = shared_copy(family.denoiser, device, model_dtype(config.training_dtype, device))
    codec = family.codec(device)
    rows = [("without LoRA", pictures(denoiser, codec, config.sampling.prompts, config.sampling, progress))]
    if adapters is not None:
        adapters.to(device, compute_dtype(config.lora_dtype, device))
        with attached(denoiser, adapters):
            rows.append(("with LoRA", pictures(denoiser, codec, config.sampling.prompts, config.sampling, progress)))
    save_comparison(rows, config.sampling.prompts, output)


def _device(config: Config, world: World) -> torch.device:
    """The device asked for; of several processes, each has the GPU of its own number."""
    name = best_device().type if config.device == "auto" else config.device
    try:
        if world.size > 1 and name in ("cuda", "mps"):
            name = f"{name}:{world.local_rank}"
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # either, where torch was built without the device
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"device must be one that this machine has, got {config.device}: {reason}") from error


def _as_image(pixels: Tensor) -> Image.Image:
    """pixels [3,H,W] in -1 to 1 -> picture; NaN, where a run went wrong, is grey."""
    return Image.fromarray(((pixels.nan_to_num(0) + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8))


def _resolved(config: Config, found: Sequence[Example], resolution: int, world: World) -> Config:
    """The config with everything set that follows from the data."""
    views = VIEWS * sum(example.repeats for example in found)
    steps = config.steps or min(MAX_STEPS, max(1, round(views / (config.group_size * world.size))))
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
