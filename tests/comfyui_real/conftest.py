"""Makes the helpers of this folder importable, whose name is also the pack's, and runs ComfyUI's server."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parent))

from comfy_client import Client  # noqa: E402
from real_comfyui import HERE, ROOT, comfyui_path, environment, interpreter  # noqa: E402

SECONDS_TO_START = 120
PICTURES = ((128, 64), (64, 64), (64, 64))  # sides in pixels


@dataclass(frozen=True)
class Server:
    """A running ComfyUI and its folders."""

    client: Client
    base: Path
    log_path: Path

    @property
    def output(self) -> Path:
        return self.base / "output"

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def checkpoints(self) -> list[Path]:
        return sorted((self.output / "lorasmith" / "checkpoints").glob("*/step-*.safetensors"))


def filled(base: Path) -> Path:
    """A base directory with the pack, the nodes for tests and pictures with captions."""
    nodes = base / "custom_nodes"
    copytree(ROOT / "comfyui", nodes / "lorasmith", ignore=ignore_patterns("__pycache__"))
    copytree(HERE / "tiny_nodes", nodes / "tiny_nodes", ignore=ignore_patterns("__pycache__"))
    copy(HERE / "tiny_models.py", nodes / "tiny_nodes")
    pictures = base / "input" / "pictures"
    for folder in (pictures, base / "output", base / "models" / "loras", base / "models" / "checkpoints"):
        folder.mkdir(parents=True)
    for number, size in enumerate(PICTURES):
        Image.new("RGB", size, (80 * number, 40, 200)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    return base


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(client: Client, process: subprocess.Popen[bytes], log_path: Path) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end and process.poll() is None:
        try:
            client.call("/system_stats")
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"ComfyUI did not start: {log_path.read_text(errors='replace')[-3000:]}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Started once, on the loopback interface alone; ended by its own handle."""
    base, port = filled(tmp_path_factory.mktemp("comfyui")), free_port()
    log_path, client = base / "server.log", Client(port)
    command = [
        interpreter(), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--disable-api-nodes",
        "--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--disable-auto-launch",
    ]  # fmt: skip
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=comfyui_path(), env=environment(), stdout=log, stderr=log)
        try:
            wait_for(client, process, log_path)
            yield Server(client, base, log_path)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)
