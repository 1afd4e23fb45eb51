"""Text encoders that are trained: as PEFT trains them, files that diffusers draws with, exact resuming."""

from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from commands import made as pictures
from diffusers import DDIMScheduler
from tiny import PROMPTS, adapters_of, made
from torch import Tensor

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import Algorithm, DoRA, LoHa, LoRA
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets
from lorasmith.api import train_lora
from lorasmith.config.schema import Config, TextEncoder
from lorasmith.config.values import configured
from lorasmith.data.dataset import Dataset, batch_of
from lorasmith.demo import BASE
from lorasmith.diffusion.sampling import pictures_of
from lorasmith.diffusion.validation import held_out_losses
from lorasmith.formats import lora_file
from lorasmith.formats.read import adapters_from
from lorasmith.formats.write import in_layout, metadata_of
from lorasmith.models.load import load_model
from lorasmith.prepare.activation_checkpointing import checkpointed
from lorasmith.prepare.share import shared_copy
from lorasmith.rng import Purpose, normal
from lorasmith.runs.checks import checked
from lorasmith.runs.run import opened_run
from lorasmith.training.job import Job
from lorasmith.training.objective import noised, sample_losses
from lorasmith.training.state import OWN_RATE
from lorasmith.types import Cached, LayoutName

CPU = torch.device("cpu")
XL = "StableDiffusionXLPipeline"
TRAINED = TextEncoder(train=True)
CLIP_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
models = pytest.mark.parametrize("model", ["demo", XL])


def source(model: str) -> Any:
    return BASE if model == "demo" else made(model)


def samples_of(family: Any, shape: tuple[int, ...]) -> list[Cached]:
    codec = family.codec(CPU)
    with torch.no_grad():
        conds = [{k: v[0] for k, v in codec.encode_texts([prompt]).items()} for prompt in PROMPTS]
    latents = [normal(1, Purpose.NOISE, number, shape) for number in range(len(PROMPTS))]
    return [Cached(*sample) for sample in zip(PROMPTS, latents, conds, strict=True)]


@models
def test_tokens_predict_what_their_encoding_predicts(model: str) -> None:
    """The denoiser that encodes, beside the codec's own encoding and, for SDXL, that of diffusers."""
    family, plain = load_model(source(model), with_texts=True), load_model(source(model))
    tokens, encoded = (f.codec(CPU).encode_texts(list(PROMPTS)) for f in (family, plain))
    assert all(ids.dtype == torch.int64 for ids in tokens.values())
    x_t, t = torch.randn(4, 4, 16, 16), torch.tensor([1, 300, 600, 999])
    denoisers: Any = [shared_copy(f.denoiser, CPU, torch.float32) for f in (family, plain)]
    with torch.no_grad():
        ours, theirs = (d.predict(x_t, t, cond) for d, cond in zip(denoisers, (tokens, encoded), strict=True))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if model == XL:
        text, _, pooled, _ = made(XL).encode_prompt(list(PROMPTS), device=CPU, do_classifier_free_guidance=False)
        torch.testing.assert_close(encoded, {"text": text, "pooled": pooled})


@pytest.mark.slow
@models
def test_gradients_reach_every_adapter_and_checkpointing_keeps_them(model: str) -> None:
    family = load_model(source(model), with_texts=True)
    denoiser = shared_copy(family.denoiser, CPU, torch.float32)
    batch = batch_of(samples_of(family, (4, 16, 16)), (0, 1, 2, 3))
    found = []
    for depth in (None, 2):
        adapters = adapters_of(denoiser)
        with attached(denoiser, adapters):
            if depth is None:
                sample_losses(denoiser, batch, Config()).sum().backward()
            else:
                with checkpointed(denoiser, depth):
                    sample_losses(denoiser, batch, Config()).sum().backward()
        grads: list[Any] = [parameter.grad for parameter in adapters.parameters()]
        assert all(grad is not None and grad.any() for grad in grads)
        assert any(path.startswith("text_encoder.") for path in adapters.adapters)
        found.append(grads)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_the_layer_that_sdxl_does_not_read_gets_no_adapter() -> None:
    denoiser: Any = load_model(made(XL), with_texts=True).denoiser
    paths = adapters_of(denoiser).adapters
    layers = {path.split(".")[3] for path in paths if path.startswith("text_encoder.")}
    assert layers == {"0", "1"}  # of three
    assert {path.split(".")[4] for path in paths if path.startswith("text_encoder_2.text_model")} == {"0", "1", "2"}


def peft_pairs(net: Any, name: str, layers: list[str], adapters: AdapterSet) -> list[tuple[Tensor, Tensor]]:
    """PEFT's adapters on a net, with our first weights, beside ours."""
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=2, target_modules=layers), net)
    named = dict(net.named_parameters())
    pairs = []
    for path, adapter in adapters.adapters.items():
        if path.startswith(f"{name}."):
            ours: Any = adapter
            module = path.removeprefix(f"{name}.")
            pairs += [(named[f"{module}.lora_A.default.weight"], ours.down)]
            pairs += [(named[f"{module}.lora_B.default.weight"], ours.up)]
    for theirs, ours in pairs:
        theirs.data.copy_(ours.data)
    return pairs


def test_a_run_equals_peft_on_unet_and_text_encoder_with_rates_of_their_own() -> None:
    """The same first weights, noise, times, and AdamW with two rates: losses and weights agree."""
    config = Config(
        steps=4, batch_size=2, learning_rate=1e-3, max_grad_norm=0, adapter=LoRA(rank=2), pack="none",
        text_encoder=TextEncoder(train=True, learning_rate=4e-3), training_dtype="fp32", lora_dtype="fp32",
        targets=Targets(preset="attention"),
    )  # fmt: skip
    family: Any = load_model(BASE, with_texts=True)
    dataset = Dataset.of(samples_of(family, (4, 16, 16)), [1] * 4, seed=0, group_size=2)
    job = Job.of(family.denoiser, dataset, config, device=CPU)
    pipe = family.pipeline(shared_copy(family.denoiser, CPU, torch.float32))
    first = AdapterSet.new(family.denoiser, config.adapter, config.targets, 0)
    unet_pairs = peft_pairs(pipe.unet, "unet", ["to_q", "to_k", "to_v", "to_out.0"], first)
    text_pairs = peft_pairs(pipe.text_encoder, "text_encoder", CLIP_LAYERS[:4], first)
    assert unet_pairs and text_pairs
    optimizer = torch.optim.AdamW(
        [
            {"params": [theirs for theirs, _ in unet_pairs], "lr": 1e-3},
            {"params": [theirs for theirs, _ in text_pairs], "lr": 4e-3},
        ],
        weight_decay=0.01,
    )
    losses = []
    for index in range(4):
        batch = dataset.group_at(index)
        x_t, t, target = noised(family.denoiser, batch, config)
        pred = pipe.unet(x_t, t, pipe.text_encoder(batch.cond["ids"]).last_hidden_state).sample
        loss = torch.nn.functional.mse_loss(pred, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [step.loss for step in job.steps()] == pytest.approx(losses, rel=1e-4)
    trained = [p.detach() for p in job.adapters.parameters()]
    for (theirs, _), ours in zip(unet_pairs + text_pairs, trained, strict=True):
        torch.testing.assert_close(theirs.data, ours, atol=5e-5, rtol=0)
    (trained_by,) = job.state.optimizers
    assert {group["lr"] for group in trained_by.param_groups} == {1e-3, 4e-3}


@pytest.mark.slow
@models
def test_equal_rates_make_one_group_and_the_weights_that_two_equal_groups_make(model: str) -> None:
    shape = (4, 16, 16)
    found = []
    for rate in (None, 2e-3):
        config = Config(
            steps=3, learning_rate=1e-3, text_encoder=TextEncoder(train=True, learning_rate=rate), adapter=LoRA(rank=2)
        )
        family: Any = load_model(source(model), with_texts=True)
        dataset = Dataset.of(samples_of(family, shape), [1] * 4, seed=0, group_size=1)
        job = Job.of(family.denoiser, dataset, config, device=CPU)
        (trained_by,) = job.state.optimizers
        for group in trained_by.param_groups:
            group[OWN_RATE] = 1e-3
        assert len(trained_by.param_groups) == (1 if rate is None else 2)
        list(job.steps())
        found.append(job.state.masters.vector.detach())
    assert torch.equal(*found)


@pytest.mark.slow
@models
@pytest.mark.parametrize("rate", [None, 2e-3])
def test_resuming_is_exact(model: str, rate: float | None) -> None:
    config = Config(
        steps=4, learning_rate=1e-3, text_encoder=TextEncoder(train=True, learning_rate=rate), adapter=LoRA(rank=2)
    )
    family: Any = load_model(source(model), with_texts=True)
    dataset = Dataset.of(samples_of(family, (4, 16, 16)), [1] * 4, seed=0, group_size=1)

    def job() -> Job:
        return Job.of(family.denoiser, dataset, config, device=CPU)

    whole, broken, resumed = job(), job(), job()
    list(whole.steps())
    for step in broken.steps():
        if step.step == 2:
            checkpoint = broken.checkpoint()
            resumed.resume(checkpoint)
            break
    list(resumed.steps())
    torch.testing.assert_close(resumed.lora(), whole.lora(), rtol=0, atol=0)
    torch.testing.assert_close(dict(resumed.state.tensors()), dict(whole.state.tensors()), rtol=0, atol=0)


@pytest.mark.slow
@models
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_diffusers_draws_the_same_with_the_file(model: str, layout: LayoutName, tmp_path: Path) -> None:
    family: Any = load_model(source(model), with_texts=True)
    denoiser, codec = shared_copy(family.denoiser, CPU, torch.float32), family.codec(CPU)
    adapters = adapters_of(denoiser, Targets(exclude=(r"text_projection",)))
    path = tmp_path / "lora.safetensors"
    state = in_layout(adapters, denoiser, torch.float32, layout)
    lora_file.write(path, state, {})
    assert any(".lora_A." in key for key in state) == (layout == "diffusers") != any(".alpha" in key for key in state)
    prefixes = {key.split("text_model")[0][:-1] for key in state if "text_model" in key}
    kohya, diffusers = ("lora_te", "lora_te1", "lora_te2"), ("text_encoder", "text_encoder", "text_encoder_2")
    names = diffusers if layout == "diffusers" else kohya
    assert prefixes == set(names[:1] if model == "demo" else names[1:])

    def drawn_with(net: str) -> Tensor:
        chosen = AdapterSet({path: a for path, a in adapters.adapters.items() if path.startswith(net)})
        with attached(denoiser, chosen):
            return next(pictures_of(denoiser, codec, {1: "a cat"}, size=(32, 32), seed=3, steps=4, guidance=3.0))

    with_lora, with_unet = drawn_with(""), drawn_with("unet.")
    pipe = load_model(source(model)).pipeline(load_model(source(model)).denoiser).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    noise = normal(3, Purpose.PICTURE, 1, codec.latent_shape((32, 32)))[None]
    ours: dict[str, Any] = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    pipe.scheduler = DDIMScheduler.from_config(dict(pipe.scheduler.config) | ours)
    theirs = pipe(
        "a cat", negative_prompt="", latents=noise, num_inference_steps=4, guidance_scale=3.0, height=32, width=32,
        output_type="pt",
    ).images[0]  # fmt: skip
    torch.testing.assert_close((with_lora + 1) / 2, theirs, atol=2e-3, rtol=0)
    assert (with_lora - with_unet).abs().max() > 0.01


@models
@pytest.mark.parametrize("algorithm", [LoRA(rank=2), LoHa(rank=2), DoRA(rank=2)], ids=str)
def test_every_layout_holds_text_encoders(model: str, algorithm: Algorithm) -> None:
    family: Any = load_model(source(model), with_texts=True)
    adapters = AdapterSet.new(family.denoiser, algorithm, Targets(), 0)
    expected = adapters.file_state(family.denoiser, torch.float32)
    layouts: tuple[LayoutName, ...] = get_args(LayoutName)
    for layout in layouts if algorithm.name != "LoHa" else ("kohya", "comfyui", "lycoris"):
        state = in_layout(adapters, family.denoiser, torch.float32, layout)
        again = adapters_from(state, family.denoiser, metadata_of(adapters, family.denoiser, layout))
        torch.testing.assert_close(again.file_state(family.denoiser, torch.float32), expected, rtol=1e-5, atol=1e-6)


@models
def test_files_round_trip_under_all_names(model: str) -> None:
    """Kohya's names, diffusers' with and without `text_model.`; without texts all of them are refused."""
    family: Any = load_model(source(model), with_texts=True)
    adapters = adapters_of(family.denoiser)
    state = adapters.file_state(family.denoiser, torch.float32)
    names = {family.denoiser.file_key(path): path for path in adapters.adapters}
    spellings: list[dict[str, Tensor]] = [state, {}, {}]
    for key, tensor in state.items():
        layer, _, part = key.partition(".")
        spellings[1][f"{names[layer]}.{part}"] = tensor
        module = names[layer]
        if module.startswith("text_encoder") and "text_model" not in module and "text_projection" not in module:
            module = module.replace(".", ".text_model.", 1)
        spellings[2][f"{module}.{part}"] = tensor
    for spelt in spellings:
        read = adapters_from(spelt, family.denoiser)
        torch.testing.assert_close(read.file_state(family.denoiser, torch.float32), state, rtol=0, atol=0)
    plain = load_model(source(model)).denoiser
    with pytest.raises(ValueError, match=r"lora_te1?_text_model\S+ \(alpha, .*the model has no such layer"):
        adapters_from({key: tensor for key, tensor in state.items() if "lora_te" in key}, plain)


@pytest.mark.slow
@models
def test_a_contract_run_returns_a_pipeline_with_what_both_learned(model: str, latents: Tensor) -> None:
    result = train_lora(
        source(model), latents, list(PROMPTS), steps=3, rank=2, learning_rate=0.01, training_dtype="fp32",
        lora_dtype="fp32", text_encoder=TRAINED,
    )  # fmt: skip
    ids = torch.tensor([[1, 2, 3, 4]])
    texts = [p.text_encoder(ids, output_hidden_states=True).hidden_states[-2] for p in (
        result.model_with_lora, load_model(source(model)).pipeline(load_model(source(model)).denoiser)
    )]  # fmt: skip
    assert (texts[0] - texts[1]).abs().max() > 1e-4
    assert any(key.startswith("lora_te") for key in result.lora) and any("lora_unet" in key for key in result.lora)


@pytest.mark.slow
def test_the_held_out_measure_uses_the_trained_encoder() -> None:
    family: Any = load_model(BASE, with_texts=True)
    samples = samples_of(family, (4, 16, 16))
    adapters = adapters_of(family.denoiser, Targets(exclude=(r"^unet\.",)))
    before = held_out_losses(family.denoiser, samples)
    with attached(family.denoiser, adapters):
        assert (held_out_losses(family.denoiser, samples) - before).abs().min() > 1e-5


def test_what_cannot_be_is_refused(latents: Tensor, texts: Tensor, flow_denoiser: Any) -> None:
    with pytest.raises(ValueError, match="positive must be captions where text encoders are trained, got text without"):
        train_lora(BASE, latents, list(texts), steps=1, text_encoder=TRAINED)
    with pytest.raises(ValueError, match="text_encoder.train must be false for this model"):
        load_model(made("ChromaPipeline"), with_texts=True)
    with pytest.raises(ValueError, match="text_encoder.train must be false where model is a Denoiser"):
        train_lora(flow_denoiser, latents, list(texts), steps=1, text_encoder=TRAINED)
    with pytest.raises(ValueError, match="text_encoder.train must be true where text_encoder.learning_rate is set"):
        train_lora(BASE, latents, ["a cat"], steps=1, text_encoder=TextEncoder(learning_rate=0.1))
    pipe = made(XL)
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="must hold text_encoder where text_encoder.train or a LoRA adapts it"):
        load_model(pipe, with_texts=True)


@pytest.mark.slow
def test_a_run_measures_draws_resumes_and_goes_on_from_its_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the config: the held-out loss, pictures on the way, checkpoints, and the file as existing_lora."""
    folder = str(pictures(tmp_path / "cats", "a cat", "a black cat"))
    held_out = str(pictures(tmp_path / "dogs", *["a dog"] * 4))
    values: dict[str, Any] = {
        "model": str(BASE), "device": "cpu", "data": {"folder": folder, "held_out": held_out},
        "sampling": {"steps": 1, "prompts": ["a cat"], "every": 1}, "steps": 2, "learning_rate": 1e-3,
        "text_encoder": {"train": True, "learning_rate": 5e-3}, "output": str(tmp_path / "run"),
        "checkpoints": {"steps": 1}, "training_dtype": "fp32", "lora_dtype": "fp32",
    }  # fmt: skip
    with opened_run(checked(configured(values))) as run:
        list(run.steps())
        (path,) = run.save()
        summary = dict(run.finish())
    assert "validation loss" in summary
    state, metadata = lora_file.read(path)
    assert metadata["ss_text_encoder_lr"] == "0.005" and any(key.startswith("lora_te_") for key in state)
    changed = [("steps", 3), ("existing_lora", str(path)), ("output", str(tmp_path / "next"))]
    with opened_run(checked(configured(values | {"steps": 3}), is_resuming=True)) as run:
        assert run.num_done == 2 and [step.step for step in run.steps()] == [3]
    with opened_run(checked(configured(values | dict(changed)))) as run:
        assert run.job.done == 2 and len(run.job.state.leaves) == 2
        assert next(iter(run.steps())).step == 3
    without = {key: value for key, value in values.items() if key != "text_encoder"} | dict(changed)
    with opened_run(checked(configured(without | {"output": str(tmp_path / "other")}))) as run:
        assert run.job.config.text_encoder.train and len(run.job.state.leaves) == 1
        assert any(path.startswith("text_encoder.") for path in run.job.adapters.adapters)
        list(run.steps())
        assert any(key.startswith("lora_te_") for key in run.job.lora())
    assert "text_encoder.train: on, as existing_lora holds layers of text encoders" in caplog.text
    lora_file.write(path, {key: t for key, t in state.items() if "lora_te" not in key}, metadata)
    with opened_run(checked(configured(values | dict(changed) | {"output": str(tmp_path / "another")}))):
        pass
    assert "text_encoder.train: the LoRA's own layers hold, none of which is one of a text encoder" in caplog.text


def test_a_checkpoint_from_before_the_setting_is_read_without_a_change_told(caplog: pytest.LogCaptureFixture) -> None:
    family: Any = load_model(BASE)
    dataset = Dataset.of(samples_of(family, (4, 16, 16)), [1] * 4, seed=0, group_size=1)
    job, resumed = (Job.of(family.denoiser, dataset, Config(steps=2), device=CPU) for _ in range(2))
    next(iter(job.steps()))
    checkpoint = job.checkpoint()
    assert isinstance(checkpoint.config, dict)
    assert checkpoint.config.pop("text_encoder") == {"train": False, "learning_rate": None}
    with caplog.at_level("INFO", "lorasmith"):
        resumed.resume(checkpoint)
    assert "changed since" not in caplog.text
