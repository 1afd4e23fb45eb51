"""Two hosts that share no folder, as two network namespaces: what they train is what two processes of one host do."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import two_processes
from commands import TINY, made
from two_processes import ended, torchrun

ARGUMENTS = ("train", "cats", *TINY, "--steps", "6", "--checkpoints.steps", "2", "--targets.preset", "attention")


@dataclass(frozen=True)
class Host:
    """A network namespace with one end of a cable."""

    name: str  # of the namespace and of the interface in it
    address: str

    @property
    def start(self) -> tuple[str, ...]:
        """What a command in it begins with."""
        return ("ip", "netns", "exec", self.name, "env", f"GLOO_SOCKET_IFNAME={self.name}")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


def connect(first: Host, second: Host) -> None:
    for host in (first, second):
        ip("netns", "add", host.name)
    cable = ("type", "veth", "peer", "name", second.name, "netns", second.name)
    ip("link", "add", first.name, "netns", first.name, *cable)
    for host in (first, second):
        ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.name)
        for interface in ("lo", host.name):
            ip("-n", host.name, "link", "set", interface, "up")
        ip("netns", "exec", host.name, "true")


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them, which are gone afterwards."""
    if not shutil.which("ip"):
        pytest.skip("needs ip, of iproute2")
    first, second = Host(f"ls{os.getpid()}a", "10.77.0.1"), Host(f"ls{os.getpid()}b", "10.77.0.2")
    try:
        try:
            connect(first, second)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs network namespaces: {error.stderr.decode().strip()}")
        yield first, second
    finally:
        for host in (first, second):
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, timeout=10)


def launched(hosts: tuple[Host, Host], folders: list[Path]) -> list[subprocess.Popen[str]]:
    """The same run on each host, of which the second one's process dies once."""
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:29500", "--max-restarts", "1")
    found = []
    for is_meeting_place, host, folder in zip((1, 0), hosts, folders, strict=True):
        place = ("--local-addr", host.address, "--rdzv-conf", f"is_host={is_meeting_place}")
        options = ("--nnodes", "2", "--nproc-per-node", "1", *meeting, *place)
        found.append(torchrun(folder, two_processes.__file__, "dying", *ARGUMENTS, start=host.start, options=options))
    return found


@pytest.mark.processes
@pytest.mark.timeout(400)  # on a machine that is busy
def test_two_hosts_train_as_one_does_though_a_process_dies(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """The second host has no run folder; its process is killed, and the checkpoint comes from the first host."""
    alone = made(tmp_path / "one" / "cats", "a cat", "a black cat").parent
    (whole,) = ended(torchrun(alone, "-m", "lorasmith", *ARGUMENTS))
    assert whole.code == 0, whole.err

    folders = [made(tmp_path / name / "cats", "a cat", "a black cat").parent for name in ("two", "three")]
    first, second = ended(*launched(hosts, folders))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.err.count("resuming runs/cats after step 3 of 6") == 1, first.err
    assert "run folder: runs/cats\n" in first.out
    assert all(line.startswith("[Gloo]") for line in second.out.splitlines()), second.out  # torch 2.10's own lines
    assert [path.name for path in folders[1].iterdir()] == ["cats"]
    runs = [folder / "runs" / "cats" for folder in (folders[0], alone)]
    assert len({(run / "lora.safetensors").read_bytes() for run in runs}) == 1
    settings = [(run / "run.toml").read_text("utf-8").replace(str(run.parents[1]), "") for run in runs]
    assert settings[0] == settings[1]
