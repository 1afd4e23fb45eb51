"""lorasmith, as step_time.py has it train. N samples, h w latent height and width, L tokens, D width."""

from collections.abc import Callable

import torch
from safetensors.torch import load_file
from step_time_work import ATTENTION, LEARNING_RATE, LeftOut, Work, answer, main_of
from torch import Tensor

from lorasmith.adapters.hooks import attached
from lorasmith.config.arguments import parsed
from lorasmith.config.settings import settings
from lorasmith.config.values import configured, merged
from lorasmith.data.dataset import Dataset
from lorasmith.models.load import Family, load_model
from lorasmith.training.job import Job
from lorasmith.types import Cached


class Lorasmith:
    """A Job, as every face of lorasmith runs it; options are settings of its schema."""

    def __init__(self, family: Family, work: Work) -> None:
        if work.algorithm not in settings()["adapter"].options:
            raise LeftOut(f"lorasmith has no {work.algorithm}")
        targets = {"preset": "all"} if work.layers == "all" else {"preset": "none", "include": [ATTENTION]}
        base = {
            "steps": work.steps, "batch_size": work.batch, "learning_rate": LEARNING_RATE, "targets": targets,
            "training_dtype": work.dtype, "lora_dtype": work.dtype, "gradient_checkpointing": False,
            "adapter": {"name": work.algorithm, "rank": work.rank},
        }  # fmt: skip
        others, own = parsed([f"--{key}={value}" for key, value in work.options.items()])
        assert not others
        config, data = configured(merged(base, own)), load_file(work.data_path)
        pairs = zip(data["latents"], data["text"], strict=True)
        samples = [Cached(str(number), latent, {"text": text}) for number, (latent, text) in enumerate(pairs)]
        dataset = Dataset.of(samples, [1] * len(samples), seed=config.seed, group_size=config.group_size)
        self.job = Job.of(family.denoiser, dataset, config, device=torch.device("cpu"))

    def layers_and_numbers(self) -> tuple[int, int]:
        adapters = self.job.adapters
        return len(adapters.adapters), sum(p.numel() for p in adapters.parameters())

    def prediction(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with attached(self.job.denoiser, self.job.adapters), torch.no_grad():
            return self.job.denoiser.predict(x_t, t, {"text": text})

    def train(self, on_step: Callable[[], None]) -> None:
        for _ in self.job.steps():
            on_step()


if __name__ == "__main__":
    main_of(lambda work: answer(work, lambda: load_model(work.model_path), lambda family: Lorasmith(family, work)))
