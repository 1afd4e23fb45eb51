"""What families share: texts of several lengths, and sizes that divide into tokens."""

from typing import Any

import pytest
import torch
from tiny import TINY, made

from lorasmith.models.load import Family, load_model
from lorasmith.types import Cond

masking = pytest.mark.parametrize("name", ["Lumina2Pipeline", "ZImagePipeline"])


def texts_of(family: Family, length: int) -> Cond:
    widths: Any = family.denoiser.nets["transformer"].config
    return {"text": torch.randn(2, length, widths["cap_feat_dim"], generator=torch.Generator().manual_seed(0))}


@masking
@torch.no_grad()
def test_tokens_outside_the_mask_are_not_read_and_without_one_all_are(name: str) -> None:
    family, t = load_model(made(name)), torch.tensor([0.3, 0.8])
    x_t = torch.randn(2, *TINY[name].latent, generator=torch.Generator().manual_seed(1))
    whole = texts_of(family, 40)
    part = {"text": whole["text"][:, :30]}
    mask = (torch.arange(40) < 30).float().expand(2, 40)
    expected = family.denoiser.predict(x_t, t, part)
    torch.testing.assert_close(family.denoiser.predict(x_t, t, whole | {"mask": mask}), expected)
    assert not torch.allclose(family.denoiser.predict(x_t, t, whole), expected, atol=1e-3)


@masking
def test_odd_sides_are_refused(name: str) -> None:
    family = load_model(made(name))
    with pytest.raises(ValueError, match=r"latents must have even sides for this model, got \[5, 4\]"):
        family.denoiser.predict(torch.randn(2, 4, 5, 4), torch.tensor([0.3, 0.8]), texts_of(family, 3))
