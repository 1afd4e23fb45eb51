"""The one schema of a run: every setting with its range, its default and its help."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lorasmith.adapters.algorithms import Algorithm, LoRA
from lorasmith.adapters.targets import TEXT_NETS, Targets
from lorasmith.component import Component
from lorasmith.data.listing import CaptionLines
from lorasmith.diffusion.losses import MSE, Loss
from lorasmith.diffusion.timesteps import Times, Uniform
from lorasmith.optim.optimizers import AdamW, Optimizer
from lorasmith.optim.schedules import Constant, Schedule
from lorasmith.types import BaseDtypeName, DtypeName, LayoutName, TrainingDtypeName

MAX_STEPS = 100_000
SEED_MAX = 2**64 - 1
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]


class Data(Component):
    """The pictures."""

    folder: UserPath | None = Field(default=None, description="folder of pictures and their captions")
    held_out: UserPath | None = Field(
        default=None,
        description="validation pictures, never trained on: their loss is measured before and after training",
    )
    drift: UserPath | None = Field(
        default=None,
        description="pictures of what the model must not forget: their loss is measured before and after training",
    )
    resolution: int | None = Field(
        default=None,
        ge=16,
        le=8192,
        description="training resolution, as the side in pixels of a square of the same area; none: the model's own",
    )
    caption_lines: CaptionLines = Field(
        default="join",
        description="caption files with several lines: join the lines into one caption, or use only the first",
    )


class Sampling(Component):
    """The images generated before and after training."""

    prompts: tuple[str, ...] | None = Field(
        default=None, description="sample prompts; none: the first captions; []: no images"
    )
    steps: int = Field(default=25, ge=1, le=1000, description="denoising steps per image")
    guidance: float = Field(
        default=5.0, ge=0, le=100, allow_inf_nan=False, description="classifier-free guidance; 1: none"
    )
    seed: int = Field(default=0, ge=0, le=SEED_MAX, description="seed of the initial noise")
    every: Steps | None = Field(
        default=None, description="also generate every N steps during training; none: only before and after"
    )


class Checkpoints(Component):
    """The checkpoints that an interrupted run resumes from."""

    steps: Steps | None = Field(default=None, description="write one every N steps; none: only by time")
    minutes: float = Field(
        default=5.0,
        ge=0,
        le=10_000,
        allow_inf_nan=False,
        description="write one every N minutes, using at most 1 % of the training time; 0: only by steps",
    )
    keep: int = Field(default=2, ge=1, le=1000, description="how many to keep, newest first")


class NonFinite(Component):
    """Handling of NaN or infinite losses and gradients: the batch is skipped with a warning."""

    limit: int = Field(default=3, ge=1, le=1000, description="consecutive skipped batches after which the run stops")
    returns: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="how often the run rolls back to its last checkpoint by steps instead of stopping",
    )
    rate_factor: float = Field(
        default=0.5,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="factor applied to the learning rate at each rollback",
    )


class TextEncoder(Component):
    """Training of the text encoders."""

    train: bool = Field(
        default=False,
        description="also train the text encoders (all Stable Diffusion, Flux.1); captions are encoded in every step",
    )
    learning_rate: float | None = Field(
        default=None,
        ge=1e-7,
        le=1.0,
        allow_inf_nan=False,
        description="learning rate of the text encoders; none: learning_rate",
    )


class Config(Component):
    """A run. Where Python hands over the model or the data itself, `model` and `data` stay empty."""

    model: str | None = Field(
        default=None, description="base model: a diffusers folder, a single-file checkpoint or a hub id"
    )
    encoders: str | None = Field(
        default=None,
        description="for a single file: diffusers folder or hub id with the components it lacks, such as text encoders",
    )
    data: Data = Data()
    output: UserPath | None = Field(
        default=None, description="run folder to create; none: runs/<name of the data folder>, numbered if it exists"
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N"
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads; none: OMP_NUM_THREADS, or one per core"
    )
    seed: int = Field(
        default=0, ge=0, le=SEED_MAX, description="seed of initialisation, sample order, timesteps and noise"
    )
    existing_lora: UserPath | None = Field(
        default=None, description="LoRA file to continue training; its algorithm, rank and alpha are kept"
    )
    ignore_unknown: bool = Field(
        default=False, description="skip layers of existing_lora that the model does not have, instead of stopping"
    )
    file_layout: LayoutName | None = Field(
        default=None, description="program whose key names the LoRA file uses; none: the names that most programs read"
    )
    steps: Steps | None = Field(default=None, description="optimizer steps; none: 100 epochs")
    batch_size: int = Field(default=1, ge=1, le=10_000, description="images per forward pass")
    grad_accumulation_steps: int = Field(default=1, ge=1, le=1024, description="forward passes per optimizer step")
    learning_rate: float = Field(
        default=5e-4, ge=1e-7, le=1.0, allow_inf_nan=False, description="learning rate of the optimizer"
    )
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        le=1e6,
        allow_inf_nan=False,
        description="gradient clipping norm; 0: off",
    )
    training_dtype: TrainingDtypeName = Field(
        default="bf16", description="dtype the model computes in; none: its own, with loss scaling if that is fp16"
    )
    lora_dtype: DtypeName = Field(default="bf16", description="dtype of the adapters, in compute and in the file")
    gradient_checkpointing: bool = Field(
        default=True, description="recompute activations in the backward pass, to save memory"
    )
    checkpoint_depth: int = Field(
        default=2, ge=1, le=5, description="which blocks are recomputed: 1 the outermost, 5 the innermost"
    )
    offloading: bool = Field(
        default=False, description="keep the blocks' weights on the CPU while another device trains"
    )
    quantized_backward: bool = Field(
        default=False, description="compute gradients through linear layers in int8, with a few percent error"
    )
    base_dtype: BaseDtypeName = Field(
        default="none", description="keep the frozen weights of linear layers in 8 or 4 bits to save memory"
    )
    pack: Literal["none", "conv", "all"] = Field(
        default="all",
        description="which frozen layers are prepacked for the CPU: faster, but uses more memory",
    )
    native_kernels: bool = Field(
        default=True, description="use C kernels if the CPU supports them and a compiler is installed"
    )
    memory_ladder: bool = Field(
        default=False,
        description="when memory runs out, turn on gradient checkpointing, then halve batch_size, instead of stopping",
    )
    sharded: bool = Field(default=False, description="shard the model's weights over the processes (FSDP2)")
    adapter: Algorithm = LoRA()
    targets: Targets = Targets()
    text_encoder: TextEncoder = TextEncoder()
    optimizer: Optimizer = Field(default=AdamW(), description="the optimizer")
    schedule: Schedule = Field(default=Constant(), description="learning-rate schedule")
    loss: Loss = Field(default=MSE(), description="the loss function")
    loss_space: Literal["native", "x0"] = Field(
        default="native",
        description="space of the loss: the model's own target (noise, velocity), or the clean latents it implies",
    )
    times: Times = Field(default=Uniform(), description="distribution of the noise levels (timesteps)")
    sampling: Sampling = Sampling()
    checkpoints: Checkpoints = Checkpoints()
    non_finite: NonFinite = NonFinite()
    tensorboard: bool = Field(default=False, description="also write TensorBoard logs to the run folder")

    @property
    def group_size(self) -> int:
        """Samples an optimizer step and process."""
        return self.batch_size * self.grad_accumulation_steps

    def rate_of(self, path: str) -> float:
        """The optimizer's rate for the adapter on this layer."""
        own = self.text_encoder.learning_rate if path.startswith(TEXT_NETS) else None
        return self.learning_rate if own is None else own
