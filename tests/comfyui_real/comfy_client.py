"""A client of ComfyUI's server: HTTP and web socket, with the standard library alone."""

import base64
import json
import os
import socket
import struct
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
OnProgress = Callable[[str, float], None]
ENDS = ("execution_success", "execution_error", "execution_interrupted")


class WebSocket:
    """A connection to ws://127.0.0.1:PORT/PATH."""

    def __init__(self, port: int, path: str, timeout: float) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = (
            f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Upgrade: websocket", "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", "",
        )  # fmt: skip
        self.socket.sendall("\r\n".join(lines).encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self._exactly(1)
        assert head.startswith(b"HTTP/1.1 101"), head

    def _exactly(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            part = self.socket.recv(size - len(found))
            if not part:
                raise ConnectionError("the server closed the connection")
            found += part
        return found

    def send(self, content: bytes, opcode: int = TEXT) -> None:
        """A frame of fewer than 126 bytes, masked as clients must."""
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(content))
        self.socket.sendall(bytes([0x80 | opcode, 0x80 | len(content)]) + mask + masked)

    def _frame(self) -> tuple[bool, int, bytes]:
        first, size = self._exactly(2)
        if size == 126:
            (size,) = struct.unpack(">H", self._exactly(2))
        elif size == 127:
            (size,) = struct.unpack(">Q", self._exactly(8))
        return bool(first & 0x80), first & 0x0F, self._exactly(size)

    def receive(self) -> str | bytes:
        """The next message, whole; pings are answered on the way."""
        kind, content = 0, b""
        while True:
            is_last, opcode, part = self._frame()
            if opcode == PING:
                self.send(part, PONG)
            elif opcode == CLOSE:
                raise ConnectionError("the server closed the connection")
            elif opcode != PONG:
                kind, content = opcode or kind, content + part
                if is_last:
                    return content.decode() if kind == TEXT else content

    def close(self) -> None:
        self.socket.close()


@dataclass
class Ended:
    """How a prompt ended, and what was said on the way."""

    event: str
    data: dict[str, Any]
    outputs: dict[str, Any]
    progress: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # of each node
    pictures: list[bytes] = field(default_factory=list)


class Client:
    """Posts prompts and waits for their end."""

    def __init__(self, port: int, timeout: float = 120.0) -> None:
        self.port, self.timeout = port, timeout

    def call(self, path: str, body: Any = None) -> Any:
        """GET, or POST of a body as JSON; the answer's JSON, None where there is none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            raise ValueError(error.read().decode()) from error
        return json.loads(content) if content else None

    def run(self, prompt: dict[str, Any], on_progress: OnProgress = lambda node, value: None) -> Ended:
        """Posts a prompt, calls back with each node's progress, and waits for its end; ValueError if it is refused."""
        client_id = uuid.uuid4().hex
        web_socket = WebSocket(self.port, f"/ws?clientId={client_id}", self.timeout)
        try:
            flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
            web_socket.send(json.dumps(flags).encode())
            posted = self.call("/prompt", {"prompt": prompt, "client_id": client_id})
            if posted.get("node_errors"):  # other outputs would run without those that it refuses
                raise ValueError(json.dumps(posted["node_errors"]))
            return self._followed(web_socket, posted["prompt_id"], on_progress)
        finally:
            web_socket.close()

    def _followed(self, web_socket: WebSocket, prompt_id: str, on_progress: OnProgress) -> Ended:
        ended = Ended("", {}, {})
        while not ended.event:
            message = web_socket.receive()
            if isinstance(message, bytes):
                ended.pictures.append(message)
                continue
            event = json.loads(message)
            data = event.get("data", {})
            if data.get("prompt_id") != prompt_id:
                continue
            if event["type"] == "progress_state":
                for node, state in data["nodes"].items():
                    ended.progress.setdefault(node, []).append((state["value"], state["max"]))
                    on_progress(node, state["value"])
            if event["type"] == "executed":
                ended.outputs[data["node"]] = data["output"]
            if event["type"] in ENDS:
                ended.event, ended.data = event["type"], data
        return ended
