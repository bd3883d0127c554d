"""A small blocking client of the filter's control socket (docs/control-protocol.md), for lab and tests."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class ControlError(Exception):
    """The filter refused a command: ``kind`` is the protocol's error class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Control:
    """One connection; ``timeout_s`` bounds the connection and each answer."""

    def __init__(self, path: Path, *, timeout_s: float = 15.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()  # or the garbage collector warns of it, in some later test
            raise
        self._lines = self._socket.makefile("rb")
        self._last_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def call(self, command: str, **arguments: Any) -> Any:
        """The command's ``ok`` value.

        :raises ControlError: it was refused.
        """
        self._last_id += 1
        request = {"id": self._last_id, "cmd": command, **arguments}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        line = self._lines.readline()
        if not line:
            raise ConnectionError("the filter closed its control socket")
        answer = json.loads(line)
        if answer.get("id") != self._last_id:
            raise ConnectionError(f"answer {answer.get('id')} to request {self._last_id}")
        if "error" in answer:
            raise ControlError(answer["error"]["class"], answer["error"]["message"])
        return answer["ok"]

    def wait_for_state(self, state: str, *, timeout_s: float) -> dict[str, Any]:
        """The first status in ``state``; TimeoutError names the last one seen."""
        deadline = time.monotonic() + timeout_s
        while True:
            status: dict[str, Any] = self.call("status")
            if status["state"] == state:
                return status
            if time.monotonic() > deadline:
                raise TimeoutError(f"{state} not reached: {status['state']} ({status['reason']})")
            time.sleep(0.02)
