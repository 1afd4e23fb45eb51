"""One run with a folder of its own: request -> model and samples -> job -> steps, LoRA file, report."""

import logging
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lorasmith.adapters.hooks import attached
from lorasmith.config.schema import Config
from lorasmith.config.values import toml_of
from lorasmith.data.dataset import Dataset
from lorasmith.data.encode import encoded
from lorasmith.data.tags import tag_frequency
from lorasmith.diffusion.validation import Measured, held_out_losses
from lorasmith.formats import lora_file
from lorasmith.models.load import Family, bytes_to_load, load_model, located, with_adapted_texts
from lorasmith.models.meta import skeleton_for
from lorasmith.models.sources.reading import loading_shown
from lorasmith.reporting.comparison import save_comparison
from lorasmith.reporting.loss_plot import save_loss_plot
from lorasmith.reporting.pace import counted
from lorasmith.reporting.page import save_page
from lorasmith.reporting.progress import SILENT, Progress, tracked
from lorasmith.reporting.step_log import StepLog
from lorasmith.reporting.tensorboard import TensorBoardLog
from lorasmith.runs.checks import Request
from lorasmith.runs.generate import pictures
from lorasmith.runs.run_dir import RunFolder, usable_anywhere
from lorasmith.storage.atomic import errors_name
from lorasmith.storage.safetensors_header import Header
from lorasmith.tools.lazy_weights import with_stored_weights
from lorasmith.training.checkpoints import Checkpoint, CheckpointFolder
from lorasmith.training.job import Job
from lorasmith.training.loop import native_kernels
from lorasmith.training.plan import Plan, warn_of_idle_targets
from lorasmith.training.recovery import Keeper
from lorasmith.types import Cached, Codec, Encoding, Example, Step

log = logging.getLogger(__name__)

NUM_PROMPTS = 4
CPU = torch.device("cpu")


@contextmanager
def opened_run(request: Request, progress: Progress = SILENT) -> Iterator["Run"]:
    """Loads the model, encodes the data, and makes the run folder or takes up the one that is there.

    ValueError on bad input, and then nothing is written. A new folder is taken away again where an error comes before
    the first step is done.
    """
    held = None if request.folder is None else RunFolder(request.folder)
    with held.held() if held else nullcontext(), closing(Run.of(request, held, progress)) as run:
        run.begin()
        yield run


@dataclass
class Run:
    """A job with pictures to draw and losses to measure; the first process writes of it into its folder."""

    job: Job
    codec: Codec
    given: Config  # the job's, with paths as they were given
    captions: Sequence[str]
    measured: dict[str, list[Cached]]  # what is measured before and after: {"validation": samples, "drift": samples}
    folder: RunFolder | None  # of the first process alone, as are the logs
    keeper: Keeper
    progress: Progress
    tensorboard: TensorBoardLog | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # {"sampling" or "measuring": what it took so far}
    drawn: tuple[int, list[Image.Image]] = (0, [])  # what was generated last during training, and after which step

    @classmethod
    def of(cls, request: Request, folder: RunFolder | None, progress: Progress = SILENT) -> "Run":
        """In this order: what the model's layers decide, the model itself, its pictures. Writes nothing."""
        plan, checkpoint = _planned(request, folder)
        config, world = _with_threads(plan.config, checkpoint), request.world
        assert config.model is not None
        model, encoders = located(config.model, config.encoders, progress)
        with loading_shown(bytes_to_load(model, encoders), progress):
            family = load_model(model, encoders, with_texts=config.text_encoder.train)
            family = with_adapted_texts(family, plan.adapters.nets)
            codec = family.codec(plan.device)
        resolution = config.data.resolution or codec.resolution
        given = config.model_copy(update={"data": config.data.model_copy(update={"resolution": resolution})})
        plan = replace(plan, config=usable_anywhere(given))
        if plan.needs_weights:
            plan = Plan.of(family.denoiser, plan.config, home=CPU, device=plan.device, world=world)
        samples = _encoded(request.examples, codec, resolution, "encoding pictures", progress)
        measured = {
            name: _encoded(own, codec, resolution, f"encoding {name} pictures", progress)
            for name, own in request.measured.items()
        }
        dataset = Dataset.of(
            samples,
            [example.repeats for example in request.examples],
            seed=config.seed,
            group_size=config.group_size * world.size,
        )
        metadata = {**_base_metadata(family, given), "ss_tag_frequency": tag_frequency(request.examples)}
        job = Job.planned(plan, family.denoiser, dataset, metadata, progress=progress)
        path, made_again = (folder.checkpoints_path, folder.made_again) if folder else (Path(), lambda: False)
        keeper = Keeper(job, CheckpointFolder.of(path, config), made_again, progress=progress)
        run = cls(
            job, codec, given, [example.caption for example in request.examples], measured, folder, keeper, progress
        )  # fmt: skip
        if checkpoint is not None:
            job.resume(checkpoint)
        if folder is not None and not folder.is_new:
            run._tell_where_it_starts(is_resumed=checkpoint is not None)
        return run

    def _tell_where_it_starts(self, *, is_resumed: bool) -> None:
        assert self.folder is not None
        if is_resumed:
            log.info("resuming %s after step %d of %d", self.folder.path, self.num_done, self.num_steps)
        else:
            log.info("%s holds no checkpoint to resume from: starting with step 1", self.folder.path)

    def begin(self) -> None:
        """Makes the folder's files ready."""
        if self.folder is None:
            return
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
        lora_file.write(paths[0], self.job.lora(), {**self.job.file_metadata(), **title})
        for expert, lora, metadata in self.job.loras_of_experts():
            paths.append(self.folder.expert_path(expert.name))
            lora_file.write(paths[-1], lora, {**metadata, **title})
        return paths

    def finish(self) -> list[tuple[str, str]]:
        """Draws and measures without and with the LoRA, writes plots and page; returns the summary, label and text.

        Of several processes all must call this where the model is sharded.
        """
        if self.folder is None and not self.job.config.sharded:
            return []
        drawn, measured = [("without LoRA", self._draw())], [self._measure()]
        with attached(self.job.denoiser, self.job.adapters):
            step, pictures_there = self.drawn
            drawn.append(("with LoRA", pictures_there if step == self.num_done else self._draw()))
            measured.append(self._measure())
        if self.folder is None or self.keeper.log is None:
            return []
        if self.keeper.restored():
            self.save()
        path, shown = self.folder.path, []
        if self.prompts:
            save_comparison(drawn, self.prompts, path / "before_after.png")
            shown.append(("Before and after", path / "before_after.png"))
        return self._write_report(self.folder, self.keeper.log.steps, shown, *measured)

    def report_so_far(self) -> None:
        """Writes the report of a run that was stopped, without what would have to be generated or measured."""
        if self.folder is not None and self.keeper.log is not None and self.keeper.log.steps:
            with self.progress.stage("writing the report"):
                self._write_report(self.folder, self.keeper.log.steps, [], {}, {})

    def _write_report(
        self, folder: RunFolder, steps: Sequence[Step], shown: Sequence[tuple[str, Path]],
        before: dict[str, Tensor], after: dict[str, Tensor],
    ) -> list[tuple[str, str]]:  # fmt: skip
        """The loss plot and the page; returns the summary on it."""
        save_loss_plot(steps, folder.path / "loss.png")
        summary = self.summary(steps, before, after)
        config = toml_of(self.given, is_shared=True)
        save_page(folder.path / "report.html", folder.path.name, summary, shown, config, steps=steps)
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
            ("model", Path(str(job.config.model)).name),
            ("learning rate", f"{job.config.learning_rate:g}, {job.config.schedule.name}"),
            ("seed", str(job.config.seed)),
            (
                "adapters",
                f"{'+'.join(job.adapters.algorithms)} of rank {', '.join(map(str, job.adapters.ranks))} "
                f"on {counted(len(job.adapters.adapters), 'layer')}, {counted(trained, 'trainable parameter')}",
            ),
            ("training time", f"{sum(step.seconds for step in steps):.0f} s"),
            *((f"{what} time", f"{seconds:.0f} s") for what, seconds in self.seconds.items()),
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
        self.drawn = self.num_done, drawn
        if self.folder is not None:
            self.keeper.restored()
            path = self.folder.samples_path / f"step-{self.num_done:07d}.png"
            with errors_name(path.parent):
                path.parent.mkdir(exist_ok=True)
            save_comparison([(f"step {self.num_done}", drawn)], self.prompts, path)
            self.progress.wrote("sample", path)

    def _draw(self) -> list[Image.Image]:
        if not self.prompts:
            return []
        with self._timed("sampling"):
            return pictures(self.job.denoiser, self.codec, self.prompts, self.job.config, self.progress)

    def _measure(self) -> dict[str, Tensor]:
        if not self.measured:
            return {}
        with self._timed("measuring"), native_kernels(self.job.denoiser, self.job.config):
            return {name: self._losses(name, samples) for name, samples in self.measured.items()}

    def _losses(self, name: str, samples: Sequence[Cached]) -> Tensor:
        with self.progress.stage(f"measuring the {name} loss", len(samples)) as advance:
            return held_out_losses(self.job.denoiser, samples, advance)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began


def _planned(request: Request, folder: RunFolder | None) -> tuple[Plan, Checkpoint | None]:
    """The adapters for the model's layers, before weights are loaded, and the newest sound checkpoint to resume from.

    An existing LoRA that adapts text encoders goes on adapting them. ValueError where one of these does not fit.
    """
    config, world = request.config, request.world
    assert config.model is not None
    lora = None if config.existing_lora is None or config.ignore_unknown else Header.of(config.existing_lora)
    asked = config.text_encoder.train
    denoiser, path = skeleton_for(config.model, config.encoders, lora, with_texts=asked)
    if isinstance(denoiser, Encoding) and not asked:
        log.warning("text_encoder.train: on, as existing_lora holds layers of text encoders")
        config = config.model_copy(update={"text_encoder": config.text_encoder.model_copy(update={"train": True})})
    checkpoint = world.from_first(None if folder is None else _newest_checkpoint(folder, config))
    plan = Plan.of(with_stored_weights(denoiser, path), config, home=CPU, device=request.device, world=world)
    warn_of_idle_targets(denoiser, config)
    if checkpoint is not None:
        plan.refuse_misfit(checkpoint)
    return plan, checkpoint


def _newest_checkpoint(folder: RunFolder, config: Config) -> Checkpoint | None:
    """None in a folder that has nothing to lose; ValueError where a LoRA or checkpoints are there, but no sound one."""
    checkpoints = CheckpointFolder.of(folder.checkpoints_path, config)
    newest = checkpoints.newest()
    if newest is None:
        folder.refuse_to_lose(checkpoints.steps())
    return newest


def _with_threads(config: Config, checkpoint: Checkpoint | None) -> Config:
    """Sets the number of CPU threads: as asked for, else as before the interruption, as another gives other bits."""
    before = None if checkpoint is None else checkpoint.config.get("threads")
    torch.set_num_threads(config.threads or before or torch.get_num_threads())
    return config.model_copy(update={"threads": torch.get_num_threads()})


def _encoded(
    examples: Sequence[Example], codec: Codec, resolution: int, what: str, progress: Progress
) -> list[Cached]:  # fmt: skip
    return list(tracked(encoded(examples, codec, resolution), what, progress, len(examples)))


def _base_metadata(family: Family, config: Config) -> dict[str, str]:
    assert config.model is not None
    resolution = config.data.resolution
    return {
        **family.metadata(),
        "ss_sd_model_name": Path(config.model).name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "ss_resolution": f"({resolution}, {resolution})",
    }
