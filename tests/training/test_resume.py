"""Resuming: a training that was broken off, anywhere and any number of times, ends bit for bit as one that was not."""

import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from flow_denoiser import FlowDenoiser
from tiers import table

from lorasmith import api
from lorasmith.adapters.targets import Targets
from lorasmith.config.schema import Checkpoints, NonFinite
from lorasmith.diffusion.process import Flow
from lorasmith.formats import lora_file
from lorasmith.optim.loss_scale import LossScale
from lorasmith.optim.optimizers import SGD, OptimizerName, RMSprop
from lorasmith.storage.hashing import digest
from lorasmith.training import loop
from lorasmith.training.checkpoints import CheckpointFolder, read
from lorasmith.training.loop import NonFiniteError
from lorasmith.types import Result

STEPS = 6
TARGETS = Targets(preset="none", include=(r"blocks\.0\.attn\.(to_q|to_v|to_out)",))
EVERY_STEP = Checkpoints(steps=1, keep=100)


class PowerCut(BaseException):
    """Ends a training, as Ctrl-C would."""


def inputs(num: int = 5, sizes: tuple[int, ...] = (8,)) -> dict[str, Any]:
    """Latents of these sides, in buckets where there are several, and their conditioning."""
    generator = torch.Generator().manual_seed(0)
    buckets = [torch.randn(num, 4, side, 8, generator=generator) for side in sizes]
    cond = [
        {"text": torch.randn(5, 16, generator=generator), "pooled": torch.randn(8, generator=generator)}
        for _ in range(num * len(sizes))
    ]
    return {"latents": buckets, "positive": cond, "bucket_mode": len(sizes) > 1}


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the training break off at its n-th loss from now on; 0: never. What was patched before stays so."""
    base: list[Callable[..., torch.Tensor]] = []

    def broken_at(number: int) -> None:
        base.extend([] if base else [loop.sample_losses])
        calls = 0

        def counted(*args: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == number:
                raise PowerCut
            return base[0](*args)

        monkeypatch.setattr(loop, "sample_losses", counted)

    return broken_at


@pytest.fixture
def train(flow_denoiser: FlowDenoiser) -> Callable[..., Result]:
    quick = {"steps": STEPS, "batch_size": 2, "rank": 2, "learning_rate": 0.01, "targets": TARGETS}
    return lambda **values: api.train_lora(flow_denoiser, **{**inputs(), **quick, **values})


Train = Callable[..., Result]
Breaking = Callable[[int], None]


def bytes_of(result: Result) -> str:
    return f"{digest(result.lora.items())} {result.loss} {result.steps}"


def interrupted(train: Train, breaking: Breaking, folder: Path, at: tuple[int, ...], **values: Any) -> Result:
    """Broken off at these losses, one after the other, and resumed each time."""
    for number in at:
        breaking(number)
        with pytest.raises(PowerCut):
            train(checkpoint_folder=folder, resume_from=folder, checkpoints=EVERY_STEP, **values)
    breaking(0)
    return train(checkpoint_folder=folder, resume_from=folder, checkpoints=EVERY_STEP, **values)


SETTINGS: list[dict[str, Any]] = [
    {"algorithm": algorithm, "optimizer": optimizer, "lora_dtype": lora_dtype}
    for algorithm in ("LoRA", "LoHa", "LoKr", "OFT", "DoRA")
    for optimizer in get_args(OptimizerName)
    for lora_dtype in ("bf16", "fp32")
] + [
    {"training_dtype": "fp32"}, {"training_dtype": "none"}, {"gradient_checkpointing": False},
    {"grad_accumulation_steps": 3}, {"batch_size": 7}, {"seed": 2**64 - 1}, {"loss_function": "Huber"}, {"alpha": 0.5},
    inputs(3, (8, 4, 6)), {**inputs(1, (8, 4)), "batch_size": 3},
]  # fmt: skip
QUICK = [*SETTINGS[2:40:9], SETTINGS[43], *SETTINGS[48:]]  # each algorithm and optimizer; accumulation; buckets


@table("values", SETTINGS, quick=QUICK, ids=lambda values: " ".join(map(str, values.values()))[:40])
def test_a_training_that_was_broken_off_ends_as_if_it_had_not_been(
    train: Train, breaking: Breaking, tmp_path: Path, values: dict[str, Any]
) -> None:
    whole = bytes_of(train(**values))
    assert bytes_of(interrupted(train, breaking, tmp_path, (1, 3, 2, 3), **values)) == whole


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.9), RMSprop(momentum=0.5)])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_momentum_and_schedule_are_kept(
    train: Train, breaking: Breaking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Any, schedule: str
) -> None:
    config_of, others = api.config_of, {"optimizer": optimizer, "schedule": schedule}
    monkeypatch.setattr(api, "config_of", lambda inputs: config_of({**inputs, **others}))
    assert bytes_of(interrupted(train, breaking, tmp_path, (3, 2))) == bytes_of(train())


def test_the_scale_of_fp16_losses_is_kept(
    train: Train, breaking: Breaking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flow_denoiser: FlowDenoiser
) -> None:
    """A scale that overflows at first and grows every other step: its value and its count matter."""
    flow_denoiser.transformer.half()
    monkeypatch.setattr(LossScale, "START", 2.0**40)
    monkeypatch.setattr(LossScale, "PATIENCE", 2)
    values = {"training_dtype": "none", "lora_dtype": "fp32"}
    whole = train(**values, checkpoint_folder=tmp_path / "a", checkpoints=EVERY_STEP)
    scales = [read(path).numbers["scale"] for path in sorted((tmp_path / "a").glob("*.safetensors"))]
    assert len({scale["value"] for scale in scales}) > 1 and {scale["good"] for scale in scales} == {0, 1}
    assert len({scale["proven"] for scale in scales}) > 1
    assert bytes_of(interrupted(train, breaking, tmp_path / "b", (20, 4), **values)) == bytes_of(whole)


def test_a_continued_lora_is_resumed(train: Train, breaking: Breaking, tmp_path: Path) -> None:
    path = tmp_path / "first.safetensors"
    lora_file.write(path, train(algorithm="LoHa", steps=2).lora, {"lorasmith.steps": "2", "lorasmith.samples": "4"})
    whole = train(existing_lora=path)
    assert whole.steps == STEPS + 2 and len(whole.loss["loss"]) == STEPS
    assert bytes_of(interrupted(train, breaking, tmp_path / "run", (4,), existing_lora=path)) == bytes_of(whole)


def test_more_steps_of_a_finished_training(train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    train(steps=4, checkpoint_folder=tmp_path)
    more = train(checkpoint_folder=tmp_path, resume_from=tmp_path)
    assert bytes_of(more) == bytes_of(train())
    assert "changed since the checkpoint, without effect on the weights: steps 4 -> 6" in caplog.text
    assert bytes_of(train(resume_from=tmp_path)) == bytes_of(more)  # nothing is left to do


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.02}, "learning_rate 0.01 -> 0.02"),
        ({"seed": 1}, r"seed 0 -> 1, first weights \w{12} -> \w{12}$"),
        ({"batch_size": 3}, "batch_size 2 -> 3, samples a step 4 -> 6"),
        ({"batch_size": 4, "grad_accumulation_steps": 1}, "batch_size 2 -> 4, grad_accumulation_steps 2 -> 1$"),
        ({"non_finite": NonFinite(limit=5)}, "non_finite.limit 3 -> 5$"),
        ({"memory_ladder": True}, "memory_ladder False -> True$"),
        (inputs(4), r"data \w{12} -> \w{12}$"),
    ],
)
def test_what_breaks_exactness_is_said(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture, values: dict[str, Any], message: str
) -> None:
    train(steps=STEPS, grad_accumulation_steps=2, checkpoint_folder=tmp_path, checkpoints=Checkpoints(steps=2, keep=9))
    caplog.clear()
    train(**{"grad_accumulation_steps": 2, "resume_from": tmp_path / "step-0000002.safetensors", **values})
    pattern = f"changed since the checkpoint, so that the result is not that of a run .* interrupted: {message}"
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert any(re.search(pattern, record.message) for record in caplog.records)


@pytest.mark.parametrize("what", ["process", "structure"])
def test_another_model_of_the_same_weights_is_noticed(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture, flow_denoiser: FlowDenoiser, what: str
) -> None:
    train(steps=2, checkpoint_folder=tmp_path)
    if what == "process":
        flow_denoiser = replace(flow_denoiser, process=Flow(shift=2.0))
    else:
        norm: Any = flow_denoiser.transformer.get_submodule("transformer_blocks.0.norm1.norm")
        norm.eps = 1e-3
    train_lora = {"steps": 4, "batch_size": 2, "rank": 2, "learning_rate": 0.01, "targets": TARGETS}
    api.train_lora(flow_denoiser, **{**inputs(), **train_lora, "resume_from": tmp_path})
    assert re.search(rf"never interrupted: {what} \w{{12}} -> \w{{12}}$", caplog.text, re.MULTILINE)


def test_a_source_that_is_not_there_costs_nothing(train: Train, tmp_path: Path) -> None:
    """Neither the checkpoints beside it, nor is a folder made."""
    train(checkpoint_folder=tmp_path, checkpoints=Checkpoints(steps=2, keep=9))
    before = sorted(tmp_path.iterdir())
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(ValueError, match="^resume_from must be a checkpoint or a folder that holds a sound one"):
            train(checkpoint_folder=folder, resume_from=tmp_path / "step-000004.safetensors")
        assert sorted(tmp_path.iterdir()) == before


def test_a_run_folder_is_the_source_of_its_own_checkpoints(train: Train, breaking: Breaking, tmp_path: Path) -> None:
    where = {"checkpoint_folder": tmp_path / "checkpoints", "resume_from": tmp_path}
    breaking(4)
    with pytest.raises(PowerCut):
        train(**where)
    breaking(0)
    assert bytes_of(train(**where)) == bytes_of(train())


def test_samples_are_not_drawn_twice_with_another_group(train: Train, tmp_path: Path) -> None:
    """2 steps of 4 samples are 8; with 3 a step, the first group whose draws are new begins with the ninth."""
    train(steps=2, grad_accumulation_steps=2, checkpoint_folder=tmp_path)
    train(steps=3, batch_size=3, checkpoint_folder=tmp_path, resume_from=tmp_path)
    assert read(tmp_path / "step-0000003.safetensors").numbers["counters"]["group"] == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 3}, "adapter.rank must be 2, as in the run that is resumed, got 3"),
        ({"algorithm": "LoHa"}, "adapter.name must be LoRA, as in the run that is resumed, got LoHa"),
        ({"targets": Targets(preset="attention")}, "cannot resume .*: it must hold the same adapters, but .*"),
        ({"steps": 3}, "steps must be at least the 6 of the checkpoint, got 3"),
        ({"optimizer": "Adam"}, "optimizer.name must be AdamW, as in the run that is resumed, got Adam"),
        (
            {"resume_from": "nowhere"},
            "resume_from must be a checkpoint or a folder that holds a sound one, got nowhere",
        ),
        (
            {"checkpoint_folder": None, "resume_from": "nowhere"},
            "resume_from must be a checkpoint or a folder that holds a sound one, got nowhere",
        ),
        ({"world": None}, "world must be what lorasmith.distributed.process_group.joined gives, got None"),
        ({"checkpoints": 0}, "checkpoints must be a table of settings, got 0"),
        ({"resume_from": 3}, "resume_from must be a path or None, got 3"),
        (
            {"checkpoint_folder": None, "resume_from": __file__},
            "checkpoint .*test_resume.py is not sound: it states no hash",
        ),
        ({"resume_from": None}, "checkpoint_folder must hold no checkpoints but those of resume_from, got "),
        ({"checkpoint_folder": __file__}, ".*test_resume.py"),
        ({"checkpoints": {"steps": 0}}, "checkpoints.steps must be 1 to 100000, got 0"),
        ({"non_finite": NonFinite(returns=1)}, "checkpoints.steps must be set where non_finite.returns is, got none"),
    ],
)
def test_what_cannot_be_resumed_is_refused(train: Train, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    train(checkpoint_folder=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises((ValueError, OSError), match=f"^{message}"):
        train(**{"checkpoint_folder": tmp_path, "resume_from": tmp_path, **values})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def planted(monkeypatch: pytest.MonkeyPatch, bad: Callable[[tuple[int, ...], float], bool]) -> list[tuple[int, ...]]:
    """Makes losses NaN where `bad` says so of their samples' numbers and the rate; returns the numbers seen."""
    losses, seen = loop.sample_losses, []

    def spoilt(denoiser: Any, batch: Any, config: Any) -> torch.Tensor:
        seen.append(batch.numbers)
        found = losses(denoiser, batch, config)
        return found * math.nan if bad(batch.numbers, config.learning_rate) else found

    monkeypatch.setattr(loop, "sample_losses", spoilt)
    return seen


def test_a_group_that_is_not_finite_is_left_out(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = planted(monkeypatch, lambda numbers, _: 4 in numbers)
    result = train(steps=3)
    assert seen == [(0, 1), (2, 3), (4, 5), (6, 7)] and len(result.loss["loss"]) == result.steps == 3
    assert all(map(math.isfinite, result.loss["loss"])) and "step 3: " in caplog.text
    assert all(tensor.isfinite().all() for tensor in result.lora.values())


def test_groups_left_out_before_an_interruption_stay_so(
    train: Train, breaking: Breaking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, lambda numbers, _: bool({2, 4, 10} & set(numbers)))
    assert bytes_of(interrupted(train, breaking, tmp_path, (4, 3))) == bytes_of(train())


def test_too_many_in_a_row_stop_the_run_where_it_can_be_resumed(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        planted(patch, lambda numbers, _: numbers[0] >= 6)
        with pytest.raises(NonFiniteError, match="^not finite 2 times in a row: "):
            train(checkpoint_folder=tmp_path, non_finite=NonFinite(limit=2))
    assert CheckpointFolder(tmp_path, Checkpoints()).steps() == [3]
    result = train(checkpoint_folder=tmp_path, resume_from=tmp_path)
    assert result.steps == STEPS and len(result.loss["loss"]) == STEPS


def test_groups_left_out_after_the_last_checkpoint_are_not_met_again(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, lambda numbers, _: 6 <= numbers[0] < 10)
    with pytest.raises(NonFiniteError):
        train(checkpoint_folder=tmp_path, non_finite=NonFinite(limit=2), checkpoints=EVERY_STEP)
    assert read(tmp_path / "step-0000003.safetensors").numbers["counters"]["group"] == 5
    assert train(checkpoint_folder=tmp_path, resume_from=tmp_path, non_finite=NonFinite(limit=2)).steps == STEPS


GOING_BACK = {"checkpoints": Checkpoints(steps=2, keep=1), "non_finite": NonFinite(limit=2, returns=2, rate_factor=0.5)}


def spoilt_until_lower(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Losses from the sixth sample on are NaN until the rate has been lowered; returns the rates of the updates."""
    rates: list[float] = []
    update = loop._update

    def noted(state: Any, *args: Any, lr: float, **kwargs: Any) -> None:
        rates.append(lr)
        update(state, *args, lr=lr, **kwargs)

    lowered = {"rate": 1.0}
    gradients = loop._gradients

    def watched(*args: Any, state: Any, **kwargs: Any) -> Any:
        lowered["rate"] = state.counters.rate
        return gradients(*args, state=state, **kwargs)

    planted(monkeypatch, lambda numbers, _: numbers[0] >= 6 and lowered["rate"] == 1.0)
    monkeypatch.setattr(loop, "_update", noted)
    monkeypatch.setattr(loop, "_gradients", watched)
    return rates


def test_going_back_lowers_the_rate(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    rates = spoilt_until_lower(monkeypatch)
    result = train(checkpoint_folder=tmp_path, **GOING_BACK)
    assert rates == [0.01] * 3 + [0.005] * 4 and result.steps == STEPS and len(result.loss["loss"]) == STEPS
    assert "back to step 2, the learning rate times 0.5" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 3])
def test_going_back_is_the_same_after_an_interruption(
    train: Train, breaking: Breaking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    spoilt_until_lower(monkeypatch)
    rules = {**GOING_BACK, "checkpoints": Checkpoints(steps=2, keep=keep)}
    whole = bytes_of(train(checkpoint_folder=tmp_path / "a", **rules))
    for number in range(1, 10):
        folder = tmp_path / str(number)
        breaking(number)
        with pytest.raises(PowerCut):
            train(checkpoint_folder=folder, **rules)
        breaking(0)
        assert bytes_of(train(checkpoint_folder=folder, resume_from=folder, **rules)) == whole


def test_stops_push_out_nothing_that_a_run_goes_back_to(
    train: Train, breaking: Breaking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad from step 4's checkpoint on, and from step 2's: only that of step 0 serves, three regular ones back."""
    planted(monkeypatch, lambda numbers, _: numbers[0] >= 10 or (seen.append(numbers) or len(seen) > 5))
    seen: list[Any] = []
    rules = {"checkpoints": Checkpoints(steps=2, keep=3), "non_finite": NonFinite(limit=1, returns=3)}
    with pytest.raises(NonFiniteError):
        train(checkpoint_folder=tmp_path / "a", **rules)
    breaking(4)
    seen.clear()
    with pytest.raises(PowerCut):
        train(checkpoint_folder=tmp_path / "b", **rules)
    breaking(0)
    with pytest.raises(NonFiniteError):
        train(checkpoint_folder=tmp_path / "b", resume_from=tmp_path / "b", **rules)
    counts = [CheckpointFolder(tmp_path / name, Checkpoints()).newest() for name in "ab"]
    assert [found.numbers["counters"]["returned_to"] for found in counts if found] == [0, 0]


def test_weights_that_overflow_are_never_kept(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer makes them infinite in the fourth step: the checkpoint of the third is the newest, and sound."""
    calls = []

    def exploding(optimizer: Any, *args: Any) -> None:
        calls.append(1)
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.data.add_(math.inf if len(calls) == 4 else 0.01)

    monkeypatch.setattr(torch.optim.SGD, "step", exploding)
    with pytest.raises(NonFiniteError, match="the weights of step 4 are not finite: learning_rate is too high"):
        train(checkpoint_folder=tmp_path, optimizer="SGD", checkpoints=Checkpoints(steps=1))
    assert CheckpointFolder(tmp_path, Checkpoints()).steps() == [2, 3]
    assert all(t.isfinite().all() for t in read(tmp_path / "step-0000003.safetensors").tensors.values())
