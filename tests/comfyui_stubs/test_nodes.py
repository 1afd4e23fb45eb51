"""The nodes: inputs and outputs, lists and single values, cancelling and resuming, what is refused, files and plots."""

import asyncio
import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import stand_ins
import torch
from PIL import Image
from stand_ins import entry, latents

from lorasmith.adapters.algorithms import AlgorithmName
from lorasmith.formats import lora_file
from lorasmith.optim.optimizers import OptimizerName

PACK = Path(__file__).parents[2] / "comfyui"
CONTRACT = [
    ("model", "ModelInput", {}),
    ("latents", "LatentInput", {}),
    ("positive", "ConditioningInput", {}),
    ("batch_size", "IntInput", {"default": 1, "min": 1, "max": 10000}),
    ("grad_accumulation_steps", "IntInput", {"default": 1, "min": 1, "max": 1024}),
    ("steps", "IntInput", {"default": 16, "min": 1, "max": 100000}),
    ("learning_rate", "FloatInput", {"default": 0.0005, "min": 0.0000001, "max": 1.0}),
    ("rank", "IntInput", {"default": 8, "min": 1, "max": 128}),
    ("optimizer", "ComboInput", {"default": "AdamW", "options": list(get_args(OptimizerName))}),
    ("loss_function", "ComboInput", {"default": "MSE", "options": ["MSE", "L1", "Huber", "SmoothL1"]}),
    ("seed", "IntInput", {"default": 0, "min": 0, "max": 18446744073709551615}),
    ("training_dtype", "ComboInput", {"default": "bf16", "options": ["bf16", "fp32", "none"]}),
    ("lora_dtype", "ComboInput", {"default": "bf16", "options": ["bf16", "fp32"]}),
    ("algorithm", "ComboInput", {"default": "LoRA", "options": list(get_args(AlgorithmName))}),
    ("gradient_checkpointing", "BooleanInput", {"default": True}),
    ("existing_lora", "ComboInput", {"default": "[None]", "options": ["[None]"]}),
]
QUICK = {
    "batch_size": 2, "grad_accumulation_steps": 1, "steps": 6, "learning_rate": 0.01, "rank": 2, "optimizer": "AdamW",
    "loss_function": "MSE", "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32", "algorithm": "LoRA",
    "gradient_checkpointing": False, "existing_lora": "[None]",
}  # fmt: skip


@pytest.fixture(autouse=True)
def manager(modules: Any, folders: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = modules["comfy.model_management"]
    monkeypatch.setattr(found, "progress", [])
    monkeypatch.setattr(found, "interrupt_at", None)
    return found


def trained(patcher: Any, some: list[Any], positive: list[Any], **values: Any) -> tuple[Any, ...]:
    """The node's four outputs; every input comes as a list."""
    from pack.nodes import LorasmithTrainLora

    listed = {name: [value] for name, value in {**QUICK, **values}.items()}
    return LorasmithTrainLora.execute([patcher], some, positive, **listed).args


def entries(num: int) -> list[Any]:
    return [entry(number) for number in range(num)]


def equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_inputs_are_the_contracts(folders: Path) -> None:
    from pack.nodes import LorasmithTrainLora

    schema = LorasmithTrainLora.define_schema()
    for (name, kind, rules), widget in zip(CONTRACT, schema.inputs, strict=False):
        assert (widget.id, type(widget).__name__) == (name, kind)
        assert {key: widget.declared[key] for key in rules} == rules
        assert not widget.declared.get("optional")
    further = {widget.id: widget.declared for widget in schema.inputs[len(CONTRACT) :]}
    assert all(declared["optional"] and declared["tooltip"] for declared in further.values())
    wanted = "bucket_mode resume alpha targets_preset loss_space times max_grad_norm checkpoint_depth save_every"
    assert set(wanted.split()) <= further.keys()
    outputs = [(type(o).__name__, o.declared["display_name"]) for o in schema.outputs]
    kinds = ("ModelOutput", "LoraModelOutput", "LossMapOutput", "IntOutput")
    assert outputs == list(zip(kinds, ("model_with_lora", "lora", "loss", "steps"), strict=True))


def test_the_inputs_of_every_node_are_those_of_its_texts(folders: Path) -> None:
    """In the order in which ComfyUI shows them: the required ones first."""
    from pack import LorasmithExtension

    nodes = [node.define_schema() for node in asyncio.run(LorasmithExtension().get_node_list())]
    inputs = {
        node.node_id: [w.id for w in sorted(node.inputs, key=lambda w: w.declared.get("optional", False))]
        for node in nodes
    }
    texts = json.loads((PACK / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert inputs == {node: list(parts["inputs"]) for node, parts in texts.items()}


def test_single_values_and_lists_are_the_same(patcher: Any) -> None:
    batch, one_by_one = latents(4), [{"samples": x[None]} for x in latents(4)["samples"]]
    whole = trained(patcher, [batch], [entries(4)])
    for some, positive in ((one_by_one, [[e] for e in entries(4)]), (one_by_one, [entries(4)])):
        other = trained(patcher, some, positive)
        assert equal(other[1], whole[1]) and other[2] == whole[2]
    assert len(whole[2]["loss"]) == whole[3] == 6 and whole[0].loras == [(whole[1], 1.0)] and not patcher.loras
    assert {key.split(".")[0] for key in whole[1]} == {"diffusion_model"}


def test_several_sizes_and_one_caption_for_all(patcher: Any) -> None:
    some = [latents(2), latents(3, 4, 6)]
    buckets = trained(patcher, some, [entries(2), entries(5)[2:]], bucket_mode=True)
    flat = trained(patcher, some, [[e] for e in entries(5)])
    assert equal(buckets[1], flat[1])
    assert len(trained(patcher, some, [[entry(0)]], bucket_mode=True)[2]["loss"]) == 6


def test_latents_are_scaled_once(patcher: Any) -> None:
    from pack.conditioning import prepared

    samples, _ = prepared(patcher.model, [latents(2)], [entries(2)], are_buckets=True)
    assert all(map(torch.equal, (s.latent for s in samples), latents(2)["samples"] * stand_ins.SCALE))


@pytest.mark.slow
def test_settings_reach_the_training(patcher: Any) -> None:
    plain = trained(patcher, [latents(4)], [entries(4)])[1]
    for values in (
        {"alpha": 1.0}, {"loss_space": "x0"}, {"times": "logit_normal"}, {"max_grad_norm": 0.01, "optimizer": "SGD"},
        {"targets_include": "text\n"}, {"targets_exclude": "blocks.0"}, {"schedule": "cosine", "schedule_warmup": 2},
        {"optimizer": "SGD", "optimizer_momentum": 0.9}, {"loss_function": "Huber", "loss_delta": 0.1},
        {"algorithm": "LoKr", "factor": 2}, {"seed": 2**64 - 1},
    ):  # fmt: skip
        assert not equal(trained(patcher, [latents(4)], [entries(4)], **values)[1], plain), values


@pytest.mark.slow
def test_a_cancelled_prompt_goes_on_and_ends_in_the_same_lora(patcher: Any, folders: Path, manager: Any) -> None:
    whole = trained(patcher, [latents(4)], [entries(4)])
    assert [value for value, *_ in manager.progress] == [1, 2, 3, 4, 5, 6]
    assert isinstance(manager.progress[0][2], Image.Image)
    checkpoints = folders / "output" / "lorasmith" / "checkpoints"
    manager.progress.clear()
    for at in (2, 3):
        manager.interrupt_at = at
        with pytest.raises(stand_ins.Interrupted):
            trained(patcher, [latents(4)], [entries(4)])
        assert [path.name for path in checkpoints.rglob("*.safetensors")]
    manager.interrupt_at = None
    manager.progress.clear()
    assert trained(patcher, [latents(4)], [entries(4)], learning_rate=0.02)[3] == 6 and len(manager.progress) == 6
    manager.progress.clear()
    again = trained(patcher, [latents(4)], [entries(4)])
    assert equal(again[1], whole[1]) and again[2] == whole[2] and again[1].metadata == whole[1].metadata
    assert 0 < len(manager.progress) < 4 and not list(checkpoints.iterdir())


def test_without_resuming_it_begins_anew(patcher: Any, manager: Any) -> None:
    manager.interrupt_at = 3
    with pytest.raises(stand_ins.Interrupted):
        trained(patcher, [latents(4)], [entries(4)])
    manager.interrupt_at = None
    manager.progress.clear()
    trained(patcher, [latents(4)], [entries(4)], resume=False)
    assert len(manager.progress) == 6


@pytest.mark.parametrize(
    ("some", "positive", "message"),
    [
        ([latents(3)], [entries(2)], "positive must have one conditioning for each latent or one for all, got 2 .* 3"),
        ([latents(1)], [[entry(0, hooks=1)]], r"positive\[0\] must have no hooks"),
        ([{"samples": latents(1)["samples"][:, :3]}], [entries(1)], "latents must have the model's 4 channels, got 3"),
        ([latents(1)], [["a cat"]], r"positive\[0\] must be \[tensor, dict\], got str"),
        ([{"samples": latents(2)["samples"] * math.nan}], [entries(2)], "sample 0: latent must be finite, got NaN"),
        ([{}], [entries(1)], "must be a tensor"),
    ],
)
def test_bad_input_is_one_line(patcher: Any, some: Any, positive: Any, message: str, folders: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trained(patcher, some, positive)
    assert not list((folders / "output").iterdir())


def test_memory_that_runs_out_says_what_to_change(patcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> None:
        raise MemoryError("out of memory")

    monkeypatch.setattr("lorasmith.training.loop.sample_losses", failing)
    with pytest.raises(RuntimeError, match="^out of memory: turn on memory_ladder or gradient_checkpointing and queue"):
        trained(patcher, [latents(2)], [entries(2)])


def test_a_lora_goes_on_under_any_of_comfyuis_names(patcher: Any, folders: Path) -> None:
    first = trained(patcher, [latents(4)], [entries(4)], steps=2)
    for number, prefix in enumerate(("diffusion_model.", "lora_unet_", "other.")):
        state = {key.replace("diffusion_model.", prefix): tensor for key, tensor in first[1].items()}
        lora_file.write(folders / "loras" / f"{number}.safetensors", state, first[1].metadata)
    second = [trained(patcher, [latents(4)], [entries(4)], existing_lora=f"{n}.safetensors", steps=3) for n in range(3)]
    assert (
        {steps for *_, steps in second} == {5}
        and equal(second[0][1], second[1][1])
        and equal(second[0][1], second[2][1])
    )


def test_a_file_has_the_name_and_the_metadata(patcher: Any, folders: Path) -> None:
    from pack.nodes import LorasmithSaveLora

    lora = trained(patcher, [latents(4)], [entries(4)])[1]
    for _ in range(2):
        LorasmithSaveLora.execute(lora, "loras/cats", steps=6)
    LorasmithSaveLora.execute(dict(lora), "loras/cats")
    names = ["cats_00001_.safetensors", "cats_6_steps_00001_.safetensors", "cats_6_steps_00002_.safetensors"]
    assert sorted(path.name for path in (folders / "output" / "loras").iterdir()) == names
    state, metadata = lora_file.read(folders / "output" / "loras" / names[1])
    assert equal(state, dict(lora)) and metadata["ss_steps"] == "6" and metadata["lorasmith.algorithm"] == "LoRA"


@pytest.mark.parametrize("prefix", ["../cats", "/etc/cats", "loras/../../cats", "", " "])
def test_names_stay_in_the_output_folder(patcher: Any, folders: Path, prefix: str) -> None:
    from pack.nodes import LorasmithLossGraph, LorasmithSaveLora

    for call in (LorasmithSaveLora.execute, lambda lora, name: LorasmithLossGraph.execute({"loss": [1.0]}, name)):
        with pytest.raises(ValueError, match="^a name must stay inside output, got"):
            call({"diffusion_model.a.alpha": torch.tensor(1.0)}, prefix)
    assert not list((folders / "output").iterdir()) and {p.name for p in folders.iterdir()} == {
        "input",
        "output",
        "loras",
    }


@pytest.mark.parametrize(
    "losses", [[], [0.5], [math.nan], [math.inf, 1.0, math.nan], [1 / n for n in range(1, 100_001)]]
)
def test_any_losses_have_a_plot(folders: Path, losses: list[float]) -> None:
    from pack.nodes import LorasmithLossGraph

    (image,) = LorasmithLossGraph.execute({"loss": losses}, "plots/cats").args
    assert image.shape == (1, 600, 1000, 3) and 0 <= image.min() < image.max() <= 1
    assert Image.open(folders / "output" / "plots" / "cats_00001_.png").size == (1000, 600)


def test_a_lora_that_does_not_fit_is_refused(patcher: Any) -> None:
    from pack.nodes import LorasmithLoadLora

    lora = trained(patcher, [latents(4)], [entries(4)])[1]
    assert LorasmithLoadLora.execute(patcher, lora, 0.5).args[0].loras == [(lora, 0.5)]
    other = {key.replace("blocks.0", "blocks.7"): tensor for key, tensor in lora.items()}
    num = sum("blocks.0" in key for key in lora)
    with pytest.raises(
        ValueError, match=f"lora must fit the model, but {num} of its {len(lora)} keys do not: diffusion"
    ):
        LorasmithLoadLora.execute(patcher, other, 1.0)
