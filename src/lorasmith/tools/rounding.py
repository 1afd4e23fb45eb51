"""What becomes of a change of weights when it is stored in few bits."""

import logging
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorasmith.models.checkpoints.scaled import StoredWeight

log = logging.getLogger(__name__)

NOTABLE = 0.1  # a relative error that is worth a line


@dataclass
class Rounding:
    """Adds up what changes, and what is lost of it."""

    num_weights: int = 0
    num_changed: int = 0  # whose stored numbers are others
    wanted: float = 0.0  # the squared norm of the change
    missed: float = 0.0  # that of what its rounding adds
    dtypes: Counter[torch.dtype] = field(default_factory=Counter)

    def stored(self, before: StoredWeight, value: Tensor) -> StoredWeight:
        """A weight that takes this value [n_out, …], float32."""
        after = before.holding(value)
        self.num_weights += 1
        self.num_changed += not before.equals(after)
        self.wanted += before.squared_distance(value)
        self.missed += after.squared_distance(value)
        self.dtypes[before.numbers.dtype] += 1
        return after

    def tell(self) -> None:
        """A line where much is lost, or nothing has changed."""
        if not self.wanted:
            log.warning("no weight has changed: what is added is zero")
            return
        error, dtypes = (
            (self.missed / self.wanted) ** 0.5,
            ", ".join(str(d).removeprefix("torch.") for d in self.dtypes),
        )
        if not self.num_changed:
            log.warning(
                "no weight has changed: all of the LoRA is lost to rounding, as its changes are too small for %s",
                dtypes,
            )
        elif error > NOTABLE:
            same = self.num_weights - self.num_changed
            log.warning(
                "rounding to %s adds an error of %.0f %% of the change itself%s: "
                "a model in more bits, or the LoRA beside the model, keeps it",
                dtypes, 100 * error, f", and {same} of {self.num_weights} weights stay as they were" if same else "",
            )  # fmt: skip
