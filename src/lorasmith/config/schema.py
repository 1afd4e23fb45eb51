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

    folder: UserPath | None = Field(default=None, description="folder of pictures with captions beside them")
    held_out: UserPath | None = Field(
        default=None,
        description="pictures that are never trained on: the validation loss is measured on them before and after",
    )
    drift: UserPath | None = Field(
        default=None,
        description="pictures of what the model must not forget: their loss is measured before and after",
    )
    resolution: int | None = Field(
        default=None,
        ge=16,
        le=8192,
        description="side in pixels of a square picture of the same area; none: the model's own",
    )
    caption_lines: CaptionLines = Field(
        default="join", description="of a caption file of several lines: join all into one caption, or read the first"
    )


class Sampling(Component):
    """The images generated before and after training."""

    prompts: tuple[str, ...] | None = Field(
        default=None, description="prompts to generate; none: the first captions; []: no images"
    )
    steps: int = Field(default=25, ge=1, le=1000, description="denoising steps per image")
    guidance: float = Field(
        default=5.0, ge=0, le=100, allow_inf_nan=False, description="classifier-free guidance; 1: none"
    )
    seed: int = Field(default=0, ge=0, le=SEED_MAX, description="seed of the noise that images start from")
    every: Steps | None = Field(default=None, description="also generate every N steps; none: only before and after")


class Checkpoints(Component):
    """The checkpoints that an interrupted run resumes from."""

    steps: Steps | None = Field(default=None, description="write one every N steps; none: only every so many minutes")
    minutes: float = Field(
        default=5.0,
        ge=0,
        le=10_000,
        allow_inf_nan=False,
        description="write one every N minutes, spending at most 1 % of the time on these; 0: only every so many steps",
    )
    keep: int = Field(default=2, ge=1, le=1000, description="how many of the newest are kept")


class NonFinite(Component):
    """What follows a loss or gradient that is NaN or infinite: its group of samples is left out, and told of."""

    limit: int = Field(default=3, ge=1, le=1000, description="groups left out in a row at which the run stops")
    returns: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="how often the run goes back to its last checkpoint by steps instead of stopping",
    )
    rate_factor: float = Field(
        default=0.5,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="what the learning rate is multiplied by each time the run goes back",
    )


class TextEncoder(Component):
    """The text encoders, as far as they are trained."""

    train: bool = Field(
        default=False, description="adapt the text encoders too (all Stable Diffusion, Flux.1); captions stay texts"
    )
    learning_rate: float | None = Field(
        default=None, ge=1e-7, le=1.0, allow_inf_nan=False, description="their own rate; none: learning_rate"
    )


class Config(Component):
    """A run. Where Python hands over the model or the data itself, `model` and `data` stay empty."""

    model: str | None = Field(
        default=None, description="base model: a diffusers folder, a single-file checkpoint or a hub id"
    )
    encoders: str | None = Field(
        default=None,
        description="for a single file: the diffusers folder or hub id of what it lacks, such as its text encoders",
    )
    data: Data = Data()
    output: UserPath | None = Field(
        default=None, description="run folder to make; none: runs/<folder's name>, numbered if taken"
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N"
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads; none: one for each core, or what OMP_NUM_THREADS says"
    )
    seed: int = Field(
        default=0, ge=0, le=SEED_MAX, description="seed of initialisation, sample order, timesteps and noise"
    )
    existing_lora: UserPath | None = Field(
        default=None, description="LoRA file to continue training; its algorithm, rank and alpha are kept"
    )
    ignore_unknown: bool = Field(
        default=False, description="leave out layers of existing_lora that the model does not have, instead of stopping"
    )
    file_layout: LayoutName | None = Field(
        default=None, description="program whose key names the LoRA file uses; none: those that most programs read"
    )
    steps: Steps | None = Field(default=None, description="optimizer steps; none: 100 passes over the pictures")
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
        default="bf16", description="dtype the model computes in; none: its own, with scaled losses where that is fp16"
    )
    lora_dtype: DtypeName = Field(default="bf16", description="dtype of the adapters, in compute and in the file")
    gradient_checkpointing: bool = Field(
        default=True, description="recompute activations in the backward pass, to save memory"
    )
    checkpoint_depth: int = Field(
        default=2, ge=1, le=5, description="which blocks are recomputed: 1 the outermost, 5 the innermost"
    )
    offloading: bool = Field(default=False, description="leave the blocks' weights on the CPU when training elsewhere")
    quantized_backward: bool = Field(
        default=False, description="compute gradients through linear layers as int8 products, with a few percent error"
    )
    base_dtype: BaseDtypeName = Field(
        default="none", description="keep the frozen weights of linear layers in 8 or 4 bits to save memory"
    )
    pack: Literal["none", "conv", "all"] = Field(
        default="all",
        description="which frozen layers are repacked for the processor: faster, but takes more memory",
    )
    native_kernels: bool = Field(
        default=True, description="use kernels in C where the processor supports them and a compiler is installed"
    )
    memory_ladder: bool = Field(
        default=False,
        description="where memory runs out, checkpoint activations, then halve batch_size, instead of stopping",
    )
    sharded: bool = Field(default=False, description="shard the model's weights over the processes (FSDP2)")
    adapter: Algorithm = LoRA()
    targets: Targets = Targets()
    text_encoder: TextEncoder = TextEncoder()
    optimizer: Optimizer = Field(default=AdamW(), description="how gradients become steps")
    schedule: Schedule = Field(default=Constant(), description="how the learning rate changes over the steps")
    loss: Loss = Field(default=MSE(), description="distance of prediction and target")
    loss_space: Literal["native", "x0"] = Field(
        default="native",
        description="what is compared: the model's own target (noise, velocity), or the clean latents it implies",
    )
    times: Times = Field(default=Uniform(), description="distribution of the noise levels (timesteps)")
    sampling: Sampling = Sampling()
    checkpoints: Checkpoints = Checkpoints()
    non_finite: NonFinite = NonFinite()
    tensorboard: bool = Field(default=False, description="log to TensorBoard as well, in the run folder")

    @property
    def group_size(self) -> int:
        """Samples an optimizer step and process."""
        return self.batch_size * self.grad_accumulation_steps

    def rate_of(self, path: str) -> float:
        """The optimizer's rate for the adapter on this layer."""
        own = self.text_encoder.learning_rate if path.startswith(TEXT_NETS) else None
        return self.learning_rate if own is None else own
