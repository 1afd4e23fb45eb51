"""The pack beside a real ComfyUI, without its server: each check of checks_*.py runs in ComfyUI's own interpreter."""

import ast
import json
import subprocess
from collections.abc import Iterator

import pytest
from real_comfyui import HERE, environment, interpreter, skip_without
from tiny_nets import NETS

KINDS = ("sd1", "sd2", "sdxl", "sd3", "flux")
ARGUMENTS = {"kind": KINDS, "family": ("sd1", "sdxl", "sd3", "flux"), "named": tuple(NETS)}
"""What a check may take: each kind of model, each family whose layers have names of their own, or each with files."""
skip_without()
SECONDS = 1800  # the checks need about 200 of CPU time; a busy machine takes several times as long
pytestmark = pytest.mark.timeout(SECONDS + 20)


def checks() -> Iterator[str]:
    """MODULE.FUNCTION, or MODULE.FUNCTION[KIND] of those that take one; nothing is imported."""
    for path in sorted(HERE.glob("checks_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("check_"):
                kinds = [f"[{kind}]" for argument in node.args.args for kind in ARGUMENTS[argument.arg]] or [""]
                yield from (f"{path.stem}.{node.name}{kind}" for kind in kinds)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """{check: what went wrong}, of all checks in one process."""
    command = [interpreter(), str(HERE / "in_process.py"), *checks()]
    ended = subprocess.run(command, env=environment(), capture_output=True, encoding="utf-8", timeout=SECONDS)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", list(checks()))
def test_check(name: str, outcomes: dict[str, str]) -> None:
    assert not outcomes[name], outcomes[name]


def test_kinds_are_those_of_the_tiny_models(outcomes: dict[str, str]) -> None:
    assert f"KINDS = {KINDS}".replace("'", '"') in (HERE / "tiny_models.py").read_text(encoding="utf-8")
    assert len(outcomes) > 100
