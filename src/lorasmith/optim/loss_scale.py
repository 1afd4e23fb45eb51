"""The scale of fp16 losses."""

import math

from lorasmith.optim.master_weights import Masters, norm


class LossScale:
    """What losses are multiplied by so that fp16 gradients do not vanish (Micikevicius et al. 2018, section 3.2).

    A power of two, so that gradients which neither vanish nor overflow are the same at every scale.
    """

    START, LIMIT, PATIENCE = 2.0**16, 2.0**24, 2000

    def __init__(self, needed: bool) -> None:
        self.needed = needed
        self.value = self.START if needed else 1.0
        self.good = 0  # steps since the scale changed
        self.proven = self.value  # the scale of the last gradients that were finite

    def overflowed(self, masters: Masters) -> bool:
        """Whether their gradient is not finite and a lower scale can be tried: then it is taken away.

        At a scale of 1 there is none, and what is not finite is the caller's business.
        """
        if not self.needed:
            return False
        is_finite = math.isfinite(norm(masters.gradient()))
        if not is_finite and self.value > 1:
            self.value, self.good = self.value / 2, 0
            masters.clear()
            return True
        if is_finite:
            self.good += 1
            if self.good == self.PATIENCE:
                self.value, self.good = min(2 * self.value, self.LIMIT), 0
            self.proven = self.value
        return False

    def restore(self) -> None:
        """Gradients were not finite at any scale, which was not the scale's fault."""
        self.value = self.proven
