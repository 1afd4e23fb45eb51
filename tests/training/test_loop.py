"""The loop: equal to a plain torch and PEFT loop, however a group is cut, on two kinds of model; what it refuses."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import peft
import pytest
import torch
from diffusers import DDPMScheduler
from tiers import table
from torch import Tensor

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.lora import LoRAAdapter
from lorasmith.adapters.targets import Targets
from lorasmith.config.schema import Config
from lorasmith.data.dataset import Dataset, batch_of
from lorasmith.diffusion.timesteps import LogitNormal
from lorasmith.diffusion.validation import held_out_losses
from lorasmith.models.families.sd import StableDiffusion
from lorasmith.optim.optimizers import SGD, OptimizerName
from lorasmith.optim.schedules import Linear
from lorasmith.prepare.share import shared_copy
from lorasmith.rng import Purpose, normal, uniform
from lorasmith.training.loop import NonFiniteError, train
from lorasmith.training.objective import noised, sample_losses
from lorasmith.training.state import State
from lorasmith.types import Cached, Cond, Denoiser, Step

FLOW_TARGETS = Targets(preset="all", exclude=(r"blocks\.1\.attn\.add_q_proj",))


def samples_of(latents: Tensor, *conds: Cond) -> list[Cached]:
    return [Cached(f"s{i}", latent, cond) for i, (latent, cond) in enumerate(zip(latents, conds, strict=True))]


def flow_samples(num: int = 6) -> list[Cached]:
    generator = torch.Generator().manual_seed(0)
    return [
        Cached(
            f"s{i}", torch.randn(4, 8, 8, generator=generator),
            {"text": torch.randn(5, 16, generator=generator), "pooled": torch.randn(8, generator=generator)},
        )
        for i in range(num)
    ]  # fmt: skip


def training(
    denoiser: Denoiser, adapters: AdapterSet, dataset: Dataset, config: Config, *, steps: int, done: int = 0,
    first: int = 0,
) -> Iterator[Step]:  # fmt: skip
    """The loop, from a new state on."""
    state = State(adapters, config, is_fp16=False, group=first)
    return train(denoiser, adapters, dataset, config.model_copy(update={"steps": steps}), state=state, done=done)


def run(
    denoiser: Denoiser, samples: Sequence[Cached], config: Config, *, steps: int, done: int = 0,
    first: int = 0, adapters: AdapterSet | None = None,
) -> tuple[AdapterSet, list[Step]]:  # fmt: skip
    """Trains on a float32 copy."""
    dataset = Dataset.of(samples, [1] * len(samples), seed=config.seed, group_size=config.group_size)
    copy = shared_copy(denoiser, torch.device("cpu"), torch.float32)
    adapters = adapters or AdapterSet.new(copy, config.adapter, config.targets, config.seed)
    with attached(copy, adapters):
        return adapters, list(training(copy, adapters, dataset, config, steps=steps, done=done, first=first))


def weights(adapters: AdapterSet) -> list[Tensor]:
    return [p.detach() for p in adapters.parameters()]


def test_a_run_equals_peft_with_a_plain_loop(family: StableDiffusion, latents: Tensor, texts: Tensor) -> None:
    """The same initial weights, noise, times and AdamW: losses and final weights agree."""
    config = Config(batch_size=2, learning_rate=1e-3, adapter=LoRA(rank=4), seed=5, targets=Targets(preset="attention"))
    samples = samples_of(latents, *({"text": text} for text in texts))
    adapters, steps = run(family.denoiser, samples, config, steps=4)

    unet: Any = shared_copy(family.denoiser, torch.device("cpu"), torch.float32).unet
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    named = dict(unet.named_parameters())
    fresh = AdapterSet.new(family.denoiser, config.adapter, config.targets, 5)
    pairs = []
    for path, adapter in fresh.adapters.items():
        assert isinstance(adapter, LoRAAdapter)
        module = path.removeprefix("unet.")
        pairs += [(named[f"{module}.lora_A.default.weight"], adapter.down)]
        pairs += [(named[f"{module}.lora_B.default.weight"], adapter.up)]
    for theirs, ours in pairs:
        theirs.data.copy_(ours.data)
    optimizer = torch.optim.AdamW([theirs for theirs, _ in pairs], lr=1e-3, weight_decay=0.01)
    scheduler: Any = DDPMScheduler.from_config(dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
    dataset = Dataset.of(samples, [1] * 4, seed=5, group_size=2)
    for index, step in enumerate(steps):
        batch = dataset.group_at(index)
        eps = torch.stack([normal(5, Purpose.NOISE, n, (4, 16, 16)) for n in batch.numbers])
        t = torch.cat([uniform(5, Purpose.TIME, n, (1,)) * 1000 for n in batch.numbers]).long()
        pred = unet(scheduler.add_noise(batch.x0, eps, t), t, batch.cond["text"]).sample
        loss = torch.nn.functional.mse_loss(pred, eps)
        loss.backward()
        assert step.loss == pytest.approx(loss.item(), rel=1e-5)
        norm = torch.nn.utils.clip_grad_norm_([theirs for theirs, _ in pairs], 1.0)
        assert step.grad_norm == pytest.approx(norm.item(), rel=1e-3)
        optimizer.step()
        optimizer.zero_grad()
    ours = {id(w): w for w in weights(adapters)}
    for (theirs, _), trained in zip(pairs, ours.values(), strict=True):
        torch.testing.assert_close(theirs.data, trained, atol=2e-5, rtol=0)


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e3])
def test_gradients_are_clipped_by_their_common_length(limit: float, flow_denoiser: Any) -> None:
    """A step of SGD at a rate of 1 moves the weights by the gradient."""
    config = Config(optimizer=SGD(), learning_rate=1.0, max_grad_norm=limit, adapter=LoRA(rank=2), targets=FLOW_TARGETS)
    before = weights(AdapterSet.new(flow_denoiser, config.adapter, config.targets, config.seed))
    adapters, (step,) = run(flow_denoiser, flow_samples(), config, steps=1)
    moved = torch.cat([(new - old).flatten() for new, old in zip(weights(adapters), before, strict=True)]).norm()
    assert 1e-3 < step.grad_norm < 1e3
    assert moved.item() == pytest.approx(limit if limit == 1e-3 else step.grad_norm, rel=1e-3)


def test_a_group_is_one_however_it_is_cut(flow_denoiser: Any) -> None:
    """4 at once, 2 x 2 and 1 x 4: the same draws and losses, weights equal to rounding; in float64 to 1e-9."""
    flow_denoiser.transformer.double()
    results = []
    for batch_size in (4, 2, 1):
        config = Config(
            batch_size=batch_size, grad_accumulation_steps=4 // batch_size, targets=FLOW_TARGETS, optimizer=SGD(),
            learning_rate=0.5, max_grad_norm=0.01,
        )  # fmt: skip
        copy = shared_copy(flow_denoiser)
        adapters = AdapterSet.new(copy, config.adapter, config.targets, 0).to(torch.device("cpu"), torch.float64)
        dataset = Dataset.of(flow_samples(), [1] * 6, seed=0, group_size=4)
        with attached(copy, adapters):
            steps = list(training(copy, adapters, dataset, config, steps=5))
        results.append((weights(adapters), [step.loss for step in steps]))
    for other, losses in results[1:]:
        assert losses == pytest.approx(results[0][1], rel=1e-6)
        for a, b in zip(results[0][0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def fall(denoiser: Denoiser, samples: Sequence[Cached], config: Config, steps: int) -> float:
    """The loss on the trained samples under fixed noise, after training as a share of before."""
    adapters, _ = run(denoiser, samples, config, steps=steps)
    before = held_out_losses(denoiser, samples).mean()
    with attached(denoiser, adapters):
        return float(held_out_losses(denoiser, samples).mean() / before)


def test_a_flow_model_learns_through_the_same_seam(flow_denoiser: Any) -> None:
    config = Config(batch_size=2, learning_rate=1e-2, targets=FLOW_TARGETS, times=LogitNormal())
    assert fall(flow_denoiser, flow_samples(2), config, 60) < 0.85


def test_the_flow_target_is_the_papers(flow_denoiser: Any) -> None:
    batch = Dataset.of(flow_samples(2), [1, 1], seed=0, group_size=2).group_at(0)
    x_t, t, target = noised(flow_denoiser, batch, Config())
    eps = torch.stack([normal(0, Purpose.NOISE, n, (4, 8, 8)) for n in batch.numbers])
    torch.testing.assert_close(target, eps - batch.x0)
    torch.testing.assert_close(x_t, (1 - t.view(-1, 1, 1, 1)) * batch.x0 + t.view(-1, 1, 1, 1) * eps)


def test_the_loss_of_clean_latents_is_the_targets_times_a_squared_factor(
    family: StableDiffusion, flow_denoiser: Any, latents: Tensor, texts: Tensor
) -> None:
    """The factor of a net's output in the x0 that it implies: t of a flow, sqrt(1 / snr) of predicted noise."""
    noise = samples_of(latents, *({"text": text} for text in texts))
    for denoiser, samples in ((flow_denoiser, flow_samples(4)), (family.denoiser, noise)):
        batch = batch_of(samples, (0, 1, 2, 3))
        t = noised(denoiser, batch, Config())[1]
        with torch.no_grad():
            native, clean = (sample_losses(denoiser, batch, Config(loss_space=space)) for space in ("native", "x0"))
        factor = t if denoiser is flow_denoiser else denoiser.process.snr(t).rsqrt()
        torch.testing.assert_close(clean, factor**2 * native, rtol=1e-4, atol=0)


def test_an_adapter_that_cannot_learn_is_named(flow_denoiser: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The last block of such a transformer throws its context away, and with it what its query would learn."""
    run(flow_denoiser, flow_samples(1), Config(targets=FLOW_TARGETS), steps=1)
    assert not caplog.text
    run(flow_denoiser, flow_samples(1), Config(targets=Targets(preset="all")), steps=1)
    assert "adapters (transformer.transformer_blocks.1.attn.add_q_proj) got a gradient of zero" in caplog.text


OPTIMIZERS, LOSSES = get_args(OptimizerName), ("MSE", "L1", "Huber", "SmoothL1")
EACH = zip(OPTIMIZERS, itertools.cycle(LOSSES), strict=False)


@table(("optimizer", "loss"), itertools.product(OPTIMIZERS, LOSSES), quick=[*EACH])
def test_every_optimizer_and_loss_learns(flow_denoiser: Any, optimizer: Any, loss: Any) -> None:
    rate = {"SGD": 1.0, "RMSprop": 3e-3}.get(optimizer, 1e-2)
    config = Config(
        batch_size=2, learning_rate=rate, optimizer=optimizer, loss=loss, targets=FLOW_TARGETS, max_grad_norm=0
    )
    assert fall(flow_denoiser, flow_samples(2), config, 30) < 0.98


def test_continuing_goes_on_with_the_numbers(flow_denoiser: Any) -> None:
    """SGD has no state: 2 steps and 3 more are 5."""
    config = Config(batch_size=2, optimizer=SGD(), learning_rate=0.5, targets=FLOW_TARGETS)
    whole, steps = run(flow_denoiser, flow_samples(), config, steps=5)
    half, first = run(flow_denoiser, flow_samples(), config, steps=2)
    again, rest = run(flow_denoiser, flow_samples(), config, steps=3, done=2, first=2, adapters=half)
    assert [s.step for s in (*first, *rest)] == [s.step for s in steps] == [1, 2, 3, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_clipping_and_schedule(flow_denoiser: Any) -> None:
    config = Config(optimizer=SGD(), learning_rate=0.5, max_grad_norm=1e-3, targets=FLOW_TARGETS, schedule=Linear())
    adapters, steps = run(flow_denoiser, flow_samples(), config, steps=2)
    assert [step.lr for step in steps] == [0.5, 0.25] and all(step.grad_norm > 1e-3 for step in steps)
    start = AdapterSet.new(flow_denoiser, config.adapter, config.targets, 0)
    moved = torch.cat([(a - b).flatten() for a, b in zip(weights(adapters), weights(start), strict=True)])
    assert float(moved.norm()) <= 0.75e-3 * 1.001


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(flow_denoiser: Any) -> None:
    config = Config(targets=FLOW_TARGETS, batch_size=2)
    samples = flow_samples(2)
    samples[1].latent[0, 0, 0] = 3e38
    dataset = Dataset.of(samples, [1, 1], seed=0, group_size=2)
    adapters = AdapterSet.new(flow_denoiser, config.adapter, config.targets, 0)
    before = [w.clone() for w in weights(adapters)]
    with (
        attached(flow_denoiser, adapters),
        pytest.raises(NonFiniteError, match=r"3 times in a row: sample s1 \(number \d, t .*\): the output of "),
    ):
        list(training(flow_denoiser, adapters, dataset, config, steps=1))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(adapters), strict=True))


def test_no_mode_is_open_between_steps(flow_denoiser: Any) -> None:
    config = Config(targets=FLOW_TARGETS)
    dataset = Dataset.of(flow_samples(), [1] * 6, seed=0, group_size=1)
    adapters = AdapterSet.new(flow_denoiser, config.adapter, config.targets, 0)
    with attached(flow_denoiser, adapters), torch.inference_mode():
        for step in itertools.islice(training(flow_denoiser, adapters, dataset, config, steps=9), 2):
            assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled() and step.loss > 0
    with attached(flow_denoiser, adapters):
        next(training(flow_denoiser, adapters, dataset, config, steps=1))
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.slow
@pytest.mark.parametrize("net_dtype", [torch.bfloat16, torch.float32])
def test_bf16_adapters_learn_as_well_as_fp32_ones(flow_denoiser: Any, net_dtype: torch.dtype) -> None:
    """Their first prediction is the net's own, and with fp32 masters small steps add up."""
    config = Config(batch_size=2, learning_rate=3e-4, targets=FLOW_TARGETS)
    samples = flow_samples(2)
    dataset = Dataset.of(samples, [1, 1], seed=0, group_size=2)
    losses = {}
    for lora_dtype in (torch.bfloat16, torch.float32):
        copy = shared_copy(flow_denoiser, torch.device("cpu"), net_dtype)
        before = held_out_losses(copy, samples)
        adapters = AdapterSet.new(copy, config.adapter, config.targets, 0).to(torch.device("cpu"), lora_dtype)
        with attached(copy, adapters):
            assert torch.equal(held_out_losses(copy, samples), before)
            for _ in training(copy, adapters, dataset, config, steps=60):
                pass
            losses[lora_dtype] = float((held_out_losses(copy, samples) / before).mean())
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], abs=0.01)
    assert losses[torch.bfloat16] < 0.98


def test_an_optimizer_that_lacks_a_weight_is_refused_whole(flow_denoiser: Any) -> None:
    config = Config(adapter=LoRA(rank=2), targets=FLOW_TARGETS)
    adapters = AdapterSet.new(flow_denoiser, config.adapter, config.targets, config.seed)
    state = State(adapters, config, is_fp16=False)
    state.masters.vector.grad = torch.ones_like(state.masters.vector)
    state.step(lambda rate: rate)
    tensors = {key: tensor.clone() for key, tensor in state.tensors().items()}
    lacking = next(key for key in tensors if key.endswith("/exp_avg"))
    name = lacking.removeprefix("optimizer/").removesuffix("/exp_avg")
    state.step(lambda rate: rate)
    before = state.masters.vector.detach().clone()
    with pytest.raises(
        ValueError, match=f"^its optimizer must keep exp_avg .* not so of 1, such as {re.escape(name)}$"
    ):
        state.load({key: tensor for key, tensor in tensors.items() if key != lacking}, state.numbers())
    with pytest.raises(ValueError, match=f"must keep exp_avg of each weight, not so of 1, such as {re.escape(name)}$"):
        state.load({**tensors, lacking: tensors[lacking][:1]}, state.numbers())
    assert state.is_sound and torch.equal(state.masters.vector, before)
    state.load(tensors, state.numbers())
    assert not torch.equal(state.masters.vector, before)
    torch.testing.assert_close(dict(state.tensors()), tensors, rtol=0, atol=0)
