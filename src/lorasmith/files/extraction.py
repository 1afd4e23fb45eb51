"""A LoRA of the difference between two models: each weight's nearest one of a rank; norms and biases as they are."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from lorasmith import __version__
from lorasmith.files.models import Model, Place, place_of
from lorasmith.files.outputs import Shown, derived, network_dim, plain, refuse_output
from lorasmith.files.truncation import Cut, Decomposition, Losses
from lorasmith.header import Header
from lorasmith.layouts import DOWN, OFFSETS, UP
from lorasmith.looks import model_family
from lorasmith.tensor_file import Named, TensorFile, write_streamed

log = logging.getLogger(__name__)

OUTSIDE = ("vae", "ema", "image_encoder", "safety_checker")
"""The parts that no LoRA changes."""
TABLE = re.compile(r"embed(ding|dings|_tokens)?$|(^|\.)shared$")
"""Modules whose weight is a table, which is looked up, not multiplied by."""
PARTS = {parameter: part for part, parameter in OFFSETS.items()}
Key = tuple[str, str]  # the part of a folder ("" in a single file), and the tensor's name


def extract(
    base: Path, tuned: Path, output: Path, cut: Cut, *, dtype: torch.dtype, overwrite: bool = False,
    shown: Shown = plain,
) -> Losses:  # fmt: skip
    """Writes what a model has learnt as a LoRA for the model that it comes from; tensors that are alike are left out.

    ValueError where they are not the same kind of model, differ in what a LoRA cannot hold, or do not differ.
    """
    refuse_output(output, overwrite=overwrite)
    models = Model.opened(base), Model.opened(tuned)
    keys = _compared(*models)
    _warn_of_what_is_outside(*models)
    losses, num_written = Losses(), 0

    def tensors() -> Iterator[Named]:
        nonlocal num_written
        with ExitStack() as stack:
            files = [{header.path: stack.enter_context(TensorFile(header)) for _, header in m.files} for m in models]
            by_text = {f"{part} {key}": (part, key) for part, key in keys}
            for text in shown(sorted(by_text)):
                part, key = by_text[text]
                one, other = keys[part, key]
                pair = files[0][one.path].tensor(key), files[1][other.path].tensor(key)
                for named in _difference(models[0], place_of(part, key), key, pair, cut, dtype, losses):
                    num_written += 1
                    yield named
        if not num_written:
            raise ValueError(f"{base} and {tuned} must differ in a weight, but all their tensors are equal")

    write_streamed(output, tensors(), lambda: _metadata(models, cut, losses))
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
    """{(part, name): the first file that holds it} of what a LoRA may change."""
    found: dict[Key, Header] = {}
    for part, header in model.files:
        for key in header.shapes:
            if place_of(part, key).part not in OUTSIDE:
                found.setdefault((part, key), header)
    return found


def _compared(base: Model, tuned: Model) -> Mapping[Key, tuple[Header, Header]]:
    """The tensors of both, by their files; ValueError where one lacks some, or their shapes differ."""
    one, other = _tensors(base), _tensors(tuned)
    for missing, has, lacks in ((one.keys() - other.keys(), base, tuned), (other.keys() - one.keys(), tuned, base)):
        if missing:
            _, key = min(missing)
            families = [model_family(key for _, key in _tensors(model)) for model in (base, tuned)]
            raise ValueError(
                f"the models must hold the same tensors, but {lacks.path} lacks {len(missing)} of {has.path}, such as "
                f"{key} (they look like {families[0]} and {families[1]})"
            )
    for key, header in one.items():
        shapes = [list(h.shapes[key[1]]) for h in (header, other[key])]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{key[1]} must be of one shape in both models, got {shapes[0]} and {shapes[1]}")
    return {key: (header, other[key]) for key, header in one.items()}


def _warn_of_what_is_outside(base: Model, tuned: Model) -> None:
    """Says which parts differ that a LoRA leaves as they are in the base."""
    others = {(part, key): header for part, header in tuned.files for key in header.shapes}
    differing = set()
    for part, header in base.files:
        with TensorFile(header) as file:
            for key in header.shapes:
                place = place_of(part, key)
                if place.part not in OUTSIDE or place.part in differing:
                    continue
                other = others.get((part, key))
                if other is None or other.num_bytes(key) != header.num_bytes(key):
                    differing.add(place.part)
                    continue
                with TensorFile(other) as twin:
                    if any(a != b for a, b in zip(file.pieces(key), twin.pieces(key), strict=True)):
                        differing.add(place.part)
    for name in sorted(differing):
        log.warning("%s has another %s than %s: a LoRA cannot hold that, it is left out", tuned.path, name, base.path)


def _difference(
    base: Model, place: Place, key: str, tensors: tuple[Tensor, Tensor], cut: Cut, dtype: torch.dtype, losses: Losses
) -> Iterator[Named]:
    """The tensors of a LoRA that lead from the one to the other; none where they are equal."""
    if torch.equal(*tensors):
        return
    before, after = (tensor.double() for tensor in tensors)
    delta = after - before
    if not delta.isfinite().all():
        raise ValueError(f"{key} must be finite in both models, got NaN or infinity")
    if not delta.any():  # of other dtypes
        return
    parameter = key.rpartition(".")[2]
    if parameter not in PARTS:
        raise ValueError(f"{key} differs, which a LoRA cannot hold: it changes weights and biases alone")
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
