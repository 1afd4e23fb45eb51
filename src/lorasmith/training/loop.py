"""The loop: groups of samples in, optimizer steps out. It knows a Denoiser, not a model.

G samples in a group, P processes that share it, B in a micro-batch.
"""

import gc
import logging
import math
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Protocol

import torch

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.config.schema import Config
from lorasmith.devices import device_of
from lorasmith.distributed.process_group import ALONE, World
from lorasmith.errors import is_out_of_memory
from lorasmith.ops.cpu.attention import fast_attention
from lorasmith.ops.cpu.build import library
from lorasmith.optim.master_weights import Masters, norm
from lorasmith.prepare.activation_checkpointing import checkpointed
from lorasmith.prepare.allocator import freed_memory_kept
from lorasmith.prepare.fuse_modules import fused
from lorasmith.training.nonfinite import origin_of_non_finite
from lorasmith.training.objective import sample_losses
from lorasmith.training.state import Counters, State
from lorasmith.types import Batch, Denoiser, Step

log = logging.getLogger(__name__)


class NonFiniteError(ArithmeticError):
    """Losses, gradients or weights were NaN or infinite, more often than the config allows."""


class Groups(Protocol):
    """The source of the loop's samples."""

    def group_at(self, step: int) -> Batch:
        """The samples of step `step`, counted from 0: a pure function."""
        ...


def train(
    denoiser: Denoiser,
    adapters: AdapterSet,
    groups: Groups,
    config: Config,
    *,
    state: State,
    done: int = 0,
    world: World = ALONE,
    stop: threading.Event | None = None,
) -> Generator[Step, None, None]:
    """Trains the adapters attached to the denoiser, starting at the state's step; yields after each optimizer step.

    Yielded steps include the `done` steps of a continued LoRA. Ends early, after the same step in all processes, once
    `stop` is set in one of them. Between steps the state is consistent: it may be saved, or replaced by a loaded one.
    """
    assert config.steps is not None
    counters, masters = state.counters, state.masters
    device = device_of(denoiser)
    unseen = adapters.nets if counters.step == 0 else set()  # nets whose adapters have not run yet
    is_checkpointed, is_stopping = False, False
    began = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(freed_memory_kept(device))
        stack.callback(masters.release)
        if config.native_kernels:
            stack.enter_context(fused(denoiser))
        while counters.step < config.steps and not is_stopping:
            if counters.checkpointing and not is_checkpointed:
                stack.enter_context(checkpointed(denoiser, config.checkpoint_depth))
                is_checkpointed = True
            adapters.ran.clear()
            watched = masters.reached() if unseen else nullcontext(set())
            with _computing(device, config), watched as reached:
                group = groups.group_at(counters.group)
                losses, is_short = _gradients(denoiser, masters, group, config, state=state, world=world)
            if unseen and not is_short:
                unseen -= adapters.refuse_unused(masters.gradients(reached), unseen, denoiser)
            losses, is_short, is_stopping = _exchanged(masters, losses, is_short, stop, world)
            if is_short:
                _go_down_the_ladder(state)
                continue
            masters.scale(1 / state.scale.value)
            is_finite = math.isfinite(sum(losses))
            if is_finite and state.scale.overflowed(masters):
                continue  # with the same group at half the scale: no group is skipped
            grad_norm = norm(masters.gradient())
            if not (is_finite and math.isfinite(grad_norm)):
                _leave_out(denoiser, adapters, group, config, state=state, losses=losses)
                continue
            loss, lr = sum(losses) / len(losses), _rate(config.learning_rate, config, counters)
            _update(state, config, loss=loss, grad_norm=grad_norm, lr=lr)
            yield Step(done + counters.step, loss, lr, grad_norm, time.perf_counter() - began)
            began = time.perf_counter()
    if unseen and not any(grad_norm for _, _, grad_norm in state.record):
        raise ValueError(f"no adapter ran in {counters.step} steps: no sample went to {' or '.join(sorted(unseen))}")


def has_native_kernels(config: Config, device: torch.device) -> bool:
    """Whether kernels in C do a part of the work there."""
    return config.native_kernels and device.type == "cpu" and library() is not None


@contextmanager
def native_kernels(denoiser: Denoiser, config: Config) -> Iterator[None]:
    """Passes without gradients use the kernels in C too as long as this is open, where training does."""
    device = device_of(denoiser)
    if not has_native_kernels(config, device):
        yield
        return
    with freed_memory_kept(device), fused(denoiser), fast_attention():
        yield


@contextmanager
def _computing(device: torch.device, config: Config) -> Iterator[None]:
    """What forward and backward passes run in, whatever the caller is in."""
    kernels = fast_attention() if has_native_kernels(config, device) else nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), kernels:
        yield


def _gradients(
    denoiser: Denoiser, masters: Masters, group: Batch, config: Config, *, state: State, world: World
) -> tuple[list[float], bool]:
    """Gives the masters this process's part of the gradient of the group's mean loss, times the scale.

    Returns the samples' losses [G], zeros for other processes' samples, and whether memory ran out on the way.
    Micro-batches add up in fp32, so that the gradient is the same however the group is cut.
    """
    masters.clear()
    share = world.share(len(group))
    losses = [0.0] * len(group)
    try:
        for start in range(share.start, share.stop, state.counters.batch_size):
            stop = min(start + state.counters.batch_size, share.stop)
            part_losses = sample_losses(denoiser, group.part(start, stop), config)
            if part_losses.requires_grad:  # not where all of them went to nets without adapters
                (part_losses.sum() * (state.scale.value / len(group))).backward()
            masters.take_gradients()
            losses[start:stop] = part_losses.tolist()
    except (RuntimeError, MemoryError) as error:
        if not config.memory_ladder or not is_out_of_memory(error):
            raise
        masters.clear()
        return losses, True
    return losses, False


def _exchanged(
    masters: Masters, losses: list[float], is_short: bool, stop: threading.Event | None, world: World
) -> tuple[list[float], bool, bool]:
    """Adds up gradients and losses over the processes, and tells whether one is short of memory, or is to stop.

    All of it travels in one flat buffer: the gradients, G losses, each a zero in all processes but one, and two flags.
    """
    is_stopping = stop is not None and stop.is_set()
    if world.size == 1:
        return losses, is_short, is_stopping
    told = torch.tensor([*losses, float(is_short), float(is_stopping)])
    flat = torch.cat([masters.gradient(), told.to(masters.vector)])
    world.add_up(flat)
    size = len(flat) - len(told)
    masters.vector.grad = flat[:size]
    *losses, num_short, num_stopping = flat[size:].tolist()
    return losses, num_short > 0, num_stopping > 0


def _go_down_the_ladder(state: State) -> None:
    """The next rung after running out of memory; the group and its draws stay. MemoryError after the last one."""
    gc.collect()  # activations of what failed hang in cycles
    counters = state.counters
    if not counters.checkpointing:
        counters.checkpointing = True
        log.warning("out of memory: continuing with gradient_checkpointing")
    elif counters.batch_size > 1:
        counters.batch_size = (counters.batch_size + 1) // 2
        log.warning("out of memory: continuing with batches of %d", counters.batch_size)
    else:
        raise MemoryError("out of memory, even with gradient_checkpointing and batches of 1: use smaller images")


def _leave_out(
    denoiser: Denoiser, adapters: AdapterSet, group: Batch, config: Config, *, state: State, losses: list[float]
) -> None:
    """Tells where numbers stopped being finite; NonFiniteError where that was once too often in a row."""
    counters = state.counters
    bad = [place for place, loss in enumerate(losses) if not math.isfinite(loss)]
    suspects = group if not bad else group.part(bad[0], bad[0] + 1)
    scale = state.scale.value * len(suspects) / len(group)
    origin = origin_of_non_finite(denoiser, adapters, suspects, config, scale)
    counters.group += 1
    counters.skipped += 1
    state.scale.restore()
    log.warning("step %d: %s; the update is left out", counters.step + 1, origin)
    if counters.skipped == config.non_finite.limit:
        counters.skipped = 0  # for a run that resumes here
        cause = f"; learning_rate is most likely too high, got {config.learning_rate:g}" if counters.step else ""
        raise NonFiniteError(f"not finite {config.non_finite.limit} times in a row: {origin}{cause}")


def _rate(rate: float, config: Config, counters: Counters) -> float:
    """What is left of a rate in the step to come."""
    assert config.steps is not None
    return rate * counters.rate * config.schedule.factor(counters.step, config.steps)


def _update(state: State, config: Config, *, loss: float, grad_norm: float, lr: float) -> None:
    """One step of the optimizer, on gradients scaled together down to max_grad_norm (0: as they are)."""
    masters, max_norm = state.masters, config.max_grad_norm
    if max_norm:
        masters.scale(min(1.0, max_norm / (grad_norm + 1e-6)))  # as torch's own clipping has it
    state.is_sound = False
    state.step(lambda rate: _rate(rate, config, state.counters))
    state.counters.step += 1
    state.counters.group += 1
    state.counters.skipped = 0
    state.record.append((loss, lr, grad_norm))
    masters.forget()
    if not math.isfinite(norm(masters.vector)):
        raise NonFiniteError(
            f"the weights of step {state.counters.step} are not finite: learning_rate is too high, got {lr:g}"
        )
    masters.write()
    state.is_sound = True
