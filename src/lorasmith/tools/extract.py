"""A LoRA of the difference between two models: each weight's nearest one of a rank; norms and biases as they are."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from lorasmith import __version__
from lorasmith.adapters.parts import OFFSETS
from lorasmith.formats.detect import model_family
from lorasmith.formats.keys import DOWN, UP
from lorasmith.formats.read import listed
from lorasmith.reporting.pace import counted
from lorasmith.reporting.progress import SILENT, Progress, tracked
from lorasmith.storage.safetensors import Named, TensorFile, write_streamed
from lorasmith.storage.safetensors_header import Header
from lorasmith.tools.model_files import Model, Place, held_in, part_of
from lorasmith.tools.outputs import derived, network_dim, refuse_output
from lorasmith.tools.svd import Cut, Decomposition, Losses

log = logging.getLogger(__name__)

OUTSIDE = ("vae", "ema", "image_encoder", "safety_checker")
"""The parts that no LoRA changes."""
TABLE = re.compile(r"embed(ding|dings|_tokens)?$|(^|\.)shared$")
"""Modules whose weight is a table, which is looked up, not multiplied by."""
PARTS = {parameter: part for part, parameter in OFFSETS.items()}
Key = tuple[str, str]  # the part of a folder ("" in a single file), and the tensor's name


def extract(
    base: Path, tuned: Path, output: Path, cut: Cut, *, dtype: torch.dtype, overwrite: bool = False,
    progress: Progress = SILENT,
) -> Losses:  # fmt: skip
    """Writes what a model has learnt as a LoRA for the model that it comes from; tensors that are alike are left out.

    ValueError where they are not the same kind of model, differ in what a LoRA cannot hold, or do not differ.
    """
    refuse_output(output, overwrite=overwrite)
    models = Model.opened(base), Model.opened(tuned)
    keys = _compared(*models)
    _warn_of_what_is_outside(*models)
    losses, num_written, left_out = Losses(), 0, list[str]()

    def tensors() -> Iterator[Named]:
        nonlocal num_written
        with ExitStack() as stack:
            files = [{header.path: stack.enter_context(TensorFile(header)) for _, header in m.files} for m in models]
            by_text = {f"{part} {key}": (part, key) for part, key in keys}
            for text in tracked(sorted(by_text), "extracting", progress, len(by_text)):
                part, key = by_text[text]
                one, other = keys[part, key]
                before, after = models[0].read(files[0][one.path], key), models[1].read(files[1][other.path], key)
                for place, parameter in held_in(part, key):
                    pair = place.within(before.value), place.within(after.value)
                    if not _differ(key, *pair):
                        continue
                    if parameter not in PARTS or place.is_transposed:
                        left_out.append(key)
                        continue
                    for named in _difference(models[0], place, parameter, pair, cut, dtype, losses):
                        num_written += 1
                        yield named
        if not num_written:
            raise ValueError(f"{base} and {tuned} must differ in a weight or bias of a layer, but they do not")

    write_streamed(output, tensors(), lambda: _metadata(models, cut, losses))
    if left_out:
        log.warning("left out, as a LoRA cannot hold what %s has learnt in %s", tuned, _counted(left_out))
    return losses


def _metadata(models: tuple[Model, Model], cut: Cut, losses: Losses) -> dict[str, str]:
    base, tuned = (model.path.name for model in models)
    return {
        **derived({}, f"extract from {tuned} over {base} to {cut}, relative error {losses.overall:.3g}"),
        **network_dim(losses.ranks.values()),
        "lorasmith.version": __version__,
        "lorasmith.algorithm": "LoRA",
        "modelspec.sai_model_spec": "1.0.1",
        "ss_network_module": "networks.lora",
        "ss_network_alpha": network_dim(losses.ranks.values())["ss_network_dim"],
        "ss_sd_model_name": base,
    }


def _tensors(model: Model) -> dict[Key, Header]:
    """{(part, name): the first file that holds it} of weights; ValueError where those of a part cannot be read."""
    found: dict[Key, Header] = {}
    for part, header in model.files:
        quantised = model.quantised[header.path]
        if part not in OUTSIDE:
            quantised.check(header.path)
        for key in header.shapes.keys() - quantised.beside:
            found.setdefault((part, key), header)
    return found


def _compared(base: Model, tuned: Model) -> Mapping[Key, tuple[Header, Header]]:
    """The tensors of both that a LoRA may change, by their files; ValueError where one lacks a layer of the other.

    Parts that only one of them has, and tensors that are no weights of layers, are left out, and logged.
    """
    one, other = _tensors(base), _tensors(tuned)
    common = {part_of(*key) for key in one if _is_layer_s(*key)} & {part_of(*key) for key in other if _is_layer_s(*key)}
    for found, missing, has, lacks in ((one, one.keys() - other.keys(), base, tuned),
                                       (other, other.keys() - one.keys(), tuned, base)):  # fmt: skip
        for part in sorted({part_of(*key) for key in found if _is_layer_s(*key)} - common):
            log.warning("left out, as only %s holds it: %s", has.path, part or "its denoising net")
        layers = sorted(key for part, key in missing if _is_layer_s(part, key) and part_of(part, key) in common)
        if layers or not common:
            families = [model_family(key for _, key in keys) for keys in (one, other)]
            raise ValueError(
                f"the models must hold the same tensors, but {lacks.path} lacks {len(layers or missing)} of "
                f"{has.path}, such as {min(layers) if layers else min(missing)[1]} (they look like {families[0]} "
                f"and {families[1]})"
            )
        others = [key for part, key in missing if not _is_layer_s(part, key)]
        if others:
            log.warning("left out, as only %s holds %s", has.path, _counted(others))
    pairs = {key: (header, other[key]) for key, header in one.items() if key in other and part_of(*key) not in OUTSIDE}
    return {key: pair for key, pair in pairs.items() if _are_of_one_shape(key, *pair)}


def _is_layer_s(part: str, key: str) -> bool:
    """Whether a tensor is a weight or bias of a layer, which both must have; some CLIPs have no projection."""
    return any(
        parameter in PARTS and not (place.text and place.text.module == "text_projection")
        for place, parameter in held_in(part, key)
    )


def _are_of_one_shape(key: Key, *headers: Header) -> bool:
    """ValueError where the shapes of a layer's weight differ."""
    shapes = [list(header.shapes[key[1]]) for header in headers]
    if shapes[0] != shapes[1] and _is_layer_s(*key):
        raise ValueError(f"{key[1]} must be of one shape in both models, got {shapes[0]} and {shapes[1]}")
    return shapes[0] == shapes[1]


def _counted(keys: Sequence[str]) -> str:
    """How many tensors, and which."""
    return f"{counted(len(keys), 'tensor')}: {listed(sorted(keys))}"


def _warn_of_what_is_outside(base: Model, tuned: Model) -> None:
    """Says which parts differ that a LoRA leaves as they are in the base."""
    others = {(part, key): header for part, header in tuned.files for key in header.shapes}
    differing = set()
    for part, header in base.files:
        with TensorFile(header) as file:
            for key in header.shapes:
                name, other = part_of(part, key), others.get((part, key))
                if name not in OUTSIDE or name in differing or other is None:
                    continue
                if other.num_bytes(key) != header.num_bytes(key):
                    differing.add(name)
                    continue
                with TensorFile(other) as twin:
                    if any(a != b for a, b in zip(file.pieces(key), twin.pieces(key), strict=True)):
                        differing.add(name)
    for name in sorted(differing):
        log.warning("%s has another %s than %s: a LoRA cannot hold that, it is left out", tuned.path, name, base.path)


def _differ(key: str, before: Tensor, after: Tensor) -> bool:
    """ValueError where either is not finite."""
    if before.dtype == after.dtype and torch.equal(before, after):
        return False
    if not (before.double().isfinite().all() and after.double().isfinite().all()):
        raise ValueError(f"{key} must be finite in both models, got NaN or infinity")
    return not torch.equal(before.double(), after.double())  # where only the dtypes differ


def _difference(
    base: Model, place: Place, parameter: str, tensors: tuple[Tensor, Tensor], cut: Cut, dtype: torch.dtype,
    losses: Losses,
) -> Iterator[Named]:  # fmt: skip
    """The tensors of a LoRA that lead from the one to the other."""
    before, after = (tensor.double() for tensor in tensors)
    delta = after - before
    name = base.lora_name(place)
    if parameter == "bias" or delta.ndim < 2 or TABLE.search(place.stem):
        yield f"{name}.{PARTS[parameter]}", delta.to(dtype)
        return
    whole = Decomposition.of_matrix(delta.flatten(1))
    rank = cut.kept(whole.values)
    up, down = (factor.to(dtype) for factor in whole.factors(rank))
    error = delta.flatten(1) - up.double() @ down.double()
    losses.add(name, rank, float(error.square().sum()), float(delta.square().sum()))
    ones = [1] * (delta.ndim - 2)
    yield f"{name}.{UP}", up.view(-1, rank, *ones)
    yield f"{name}.{DOWN}", down.view(rank, *delta.shape[1:])
    yield f"{name}.alpha", torch.tensor(float(rank), dtype=torch.float32)
