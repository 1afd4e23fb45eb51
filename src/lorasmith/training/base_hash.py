"""The hash of a base model, made in a thread while the training goes on."""

from concurrent.futures import ThreadPoolExecutor, wait

from lorasmith.formats import lora_file
from lorasmith.reporting.progress import Progress, megabytes
from lorasmith.types import Denoiser

INTERVAL = 0.25  # seconds between two looks at how far it has come


class BaseHash:
    """Begins at once."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._total = sum(value.nbytes for net in denoiser.nets.values() for value in net.state_dict().values())
        self._done = 0
        self._hash = ThreadPoolExecutor(1).submit(lora_file.base_hash, denoiser, self._advance)

    def result(self, progress: Progress) -> str:
        """Waits for it; that is shown."""
        if not self._hash.done():
            told = 0
            with megabytes("hashing the base model", self._total, progress) as advance:
                while not wait([self._hash], INTERVAL).done:
                    done = self._done
                    advance(done - told)
                    told = done
        return self._hash.result()

    def _advance(self, num_bytes: int) -> None:
        self._done += num_bytes
