"""PEFT and LyCORIS in the loop of diffusers' own LoRA script, as step_time.py has them train.

B batch, h w latent height and width, L tokens, D width.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from lycoris import LycorisNetwork, create_lycoris
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from step_time_work import ATTENTION, LEARNING_RATE, Contender, LeftOut, Work, answer, main_of
from torch import Tensor, nn

from lorasmith.adapters.targets import adaptable_layers
from lorasmith.devices import DTYPES
from lorasmith.models.checkpoints.ldm_configs import BETAS
from lorasmith.models.load import Family, load_model

LYCORIS_NAMES = {"LoRA": "lora", "DoRA": "lora", "LoHa": "loha", "LoKr": "lokr", "OFT": "diag-oft"}


class Script:
    """The loop of diffusers' train_text_to_image_lora.py, from latents and conditioning on; what two contenders share.

    Without option bf16 the adapters are fp32 and the net runs under autocast, as in that script with bf16.
    """

    OPTIONS = ("channels_last", "bf16", "checkpointing")

    def __init__(self, unet: UNet2DConditionModel, adapters: Iterable[nn.Parameter], work: Work) -> None:
        self.unet, self.work, self.adapters = unet, work, list(adapters)
        self.dtype = DTYPES[work.dtype]
        self.is_autocast = work.dtype == "bf16" and not work.flag("bf16")
        self.layout = torch.channels_last if work.flag("channels_last") else torch.contiguous_format
        unet.to(memory_format=self.layout)  # pyright: ignore[reportCallIssue]
        unet.train()
        if work.flag("checkpointing"):
            unet.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(self.adapters, lr=LEARNING_RATE, weight_decay=1e-2)
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        self.scheduler: Any = DDPMScheduler(**BETAS)

    def predicted(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """x_t [B,4,h,w], t [B], text [B,L,D] -> noise [B,4,h,w], float32."""
        x_t = x_t.to(self.dtype, memory_format=self.layout)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.is_autocast):
            return self.unet(x_t, t, text.to(self.dtype), return_dict=False)[0].float()

    def prediction(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with torch.no_grad():
            return self.predicted(x_t, t, text)

    def train(self, on_step: Callable[[], None]) -> None:
        data, size = load_file(self.work.data_path), self.work.batch
        latents, texts = data["latents"].to(self.dtype), data["text"].to(self.dtype)
        for step in range(self.work.steps):
            chosen = [(step * size + place) % len(latents) for place in range(size)]
            x0, text = latents[chosen], texts[chosen]
            eps = torch.randn_like(x0)
            t = torch.randint(0, self.scheduler.config.num_train_timesteps, (size,))
            pred = self.predicted(self.scheduler.add_noise(x0, eps, t), t, text)
            loss = nn.functional.mse_loss(pred, eps.float())
            loss.backward()
            nn.utils.clip_grad_norm_(self.adapters, 1.0)
            self.optimizer.step()
            self.rate.step()
            self.optimizer.zero_grad()
            loss.item()
            on_step()


class Peft(Script):
    """PEFT's adapters, put on by diffusers."""

    def __init__(self, family: Family, work: Work) -> None:
        work.refuse_other_options(*self.OPTIONS)
        if work.algorithm == "OFT" and work.layers == "all":  # as of 0.21, where outputs of 3 x 3 kernels change
            raise LeftOut("PEFT's OFT on convolutions does not begin as the identity")
        unet: Any = family.denoiser.nets["unet"].requires_grad_(False)
        unet.add_adapter(_peft_config(unet, work))
        cast_training_params(unet, dtype=DTYPES[work.dtype] if work.flag("bf16") else torch.float32)
        super().__init__(unet, (p for p in unet.parameters() if p.requires_grad), work)

    def layers_and_numbers(self) -> tuple[int, int]:
        layers = sum(isinstance(module, BaseTunerLayer) for module in self.unet.modules())
        return layers, sum(p.numel() for p in self.adapters)


def _peft_config(unet: nn.Module, work: Work) -> PeftConfig:
    """The same rank and scale as the others'; LoRA as diffusers' script has it."""
    paths = [path.removeprefix(".") for path in adaptable_layers({"": unet})]
    names = paths if work.layers == "all" else [path for path in paths if re.search(ATTENTION, path)]
    match work.algorithm:
        case "LoRA" | "DoRA":
            return LoraConfig(
                r=work.rank, lora_alpha=work.rank, init_lora_weights="gaussian", target_modules=names,
                use_dora=work.algorithm == "DoRA",
            )  # fmt: skip
        case "LoHa":
            return LoHaConfig(r=work.rank, alpha=work.rank, target_modules=names)
        case "LoKr":
            return LoKrConfig(r=work.rank, alpha=work.rank, target_modules=names)
        case _:
            return OFTConfig(r=0, oft_block_size=work.rank, target_modules=names)


class Lycoris(Script):
    """LyCORIS's wrapper, under the same loop; option bypass adds to outputs instead of building weights."""

    def __init__(self, family: Family, work: Work) -> None:
        work.refuse_other_options(*self.OPTIONS, "bypass")
        unet: Any = family.denoiser.nets["unet"].requires_grad_(False)
        names = [".*"] if work.layers == "all" else [f".*{ATTENTION}"]
        LycorisNetwork.apply_preset({"enable_conv": True, "target_module": [], "target_name": names})
        self.network: Any = create_lycoris(
            unet, 1.0, linear_dim=work.rank, linear_alpha=work.rank, algo=LYCORIS_NAMES[work.algorithm],
            dora_wd=work.algorithm == "DoRA", bypass_mode=work.flag("bypass"),
        )  # fmt: skip
        self.network.apply_to()
        self.network.to(DTYPES[work.dtype] if work.flag("bf16") else torch.float32)
        self.network.train()
        super().__init__(unet, (p for p in self.network.parameters() if p.requires_grad), work)

    def layers_and_numbers(self) -> tuple[int, int]:
        return len(self.network.loras), sum(p.numel() for p in self.adapters)


KINDS: dict[str, Callable[[Family, Work], Contender]] = {"peft": Peft, "lycoris": Lycoris}

if __name__ == "__main__":
    main_of(
        lambda work: answer(work, lambda: load_model(work.model_path), lambda family: KINDS[work.kind](family, work))
    )
