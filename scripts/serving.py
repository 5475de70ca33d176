"""A real ``vllm serve`` of the bundled model as a child process, for the demo and the benches."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_kvpress.testbed import MODEL_NAME, model_path

# What can be read of the engine's metrics.
POOL_BLOCKS = r'cache_config_info{.*\bnum_gpu_blocks="(\d+)"'
POOL_USAGE = r"^vllm:kv_cache_usage_perc(?:{.*})? (\S+)$"
RUNNING = r"^vllm:num_requests_running(?:{.*})? (\S+)$"
PREEMPTIONS = r"^vllm:num_preemptions_total(?:{.*})? (\S+)$"

REQUEST_SECONDS = 600.0
START_SECONDS = 600.0
HEARTBEAT_SECONDS = 15.0
END_OF_TEXT = "</s>"

console = Console(width=None if sys.stdout.isatty() else 130)


class ServingError(Exception):
    """A server did not do its work; the message says why."""


@contextmanager
def progress(title: str) -> Iterator[None]:
    """Show a spinner and the elapsed time; without a terminal, a line now and then."""
    started = time.monotonic()
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            console.print(f"{title} ... {time.monotonic() - started:.0f} s", markup=False)

    if not console.is_terminal:
        threading.Thread(target=beat, daemon=True).start()
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    try:
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as bar:
            bar.add_task(title, total=None)
            yield
    finally:
        done.set()
    console.print(f"{title}: {time.monotonic() - started:.0f} s", markup=False)


class Server:
    """A ``vllm serve`` of the bundled model, started on entry and ended on exit."""

    def __init__(self, policy: str | None, options: Sequence[str]) -> None:
        """Prepare a server; ``options`` are further arguments of ``vllm serve``."""
        self.title = "stock vLLM" if policy is None else f"vLLM with {policy}"
        self.url = f"http://127.0.0.1:{free_port()}"
        self._log = tempfile.NamedTemporaryFile(suffix=".log", prefix="demo-", delete=False)  # noqa: SIM115 - outlives this call
        self._command = serve_command(policy, self.url, options)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        with progress(f"starting {self.title}"):
            self._process = subprocess.Popen(
                self._command, env=serve_environment(), stdout=self._log, stderr=subprocess.STDOUT
            )
            try:
                self._wait_until_ready(self._process)
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *failure: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()
        error = failure[1] if failure else None
        if isinstance(error, OSError):
            raise ServingError(f"{self.title} failed: {error}\n{self.log_tail()}") from error
        if failure and error is None:
            Path(self._log.name).unlink()

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServingError(f"{self.title} did not start; its log ends:\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise ServingError(
            f"{self.title} was not ready in {START_SECONDS:.0f} s:\n{self.log_tail()}"
        )

    def log_tail(self, lines: int = 40) -> str:
        """Return the end of the server's log."""
        text = Path(self._log.name).read_text(errors="replace")
        return "\n".join([*text.splitlines()[-lines:], f"(whole log: {self._log.name})"])

    def metric(self, pattern: str) -> float:
        """Return the first number that a pattern finds in the engine's metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            found = re.search(pattern, response.read().decode(), re.MULTILINE)
        if found is None:
            raise ServingError(f"the engine reports no metric like {pattern}")
        return float(found.group(1))

    def chat(
        self, message: str, *, max_tokens: int, on_token: Callable[[int], None] | None = None
    ) -> tuple[str, list[float]]:
        """Send one chat request; return its text and the time of arrival of each piece.

        With ``on_token``, called with each piece's number, generation goes on past the end of the
        text, so that the request holds its memory for ``max_tokens`` tokens.
        """
        hold = on_token is not None
        body: dict[str, Any] = {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": message}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": hold,
            "skip_special_tokens": not hold,
        }
        url, headers = f"{self.url}/v1/chat/completions", {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        pieces: list[str] = []
        times: list[float] = []
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
            for piece in stream_pieces(response):
                pieces.append(piece)
                times.append(time.monotonic())
                if on_token is not None:
                    on_token(len(pieces))
        return "".join(pieces).partition(END_OF_TEXT)[0].strip(), times


def stream_pieces(lines: Any) -> Iterator[str]:
    """Yield the pieces of text of a streamed chat response."""
    for line in lines:
        data = line.decode().strip().removeprefix("data:").strip()
        if data.startswith("{"):
            event = json.loads(data)
            if "error" in event:
                raise ServingError(f"the server answered: {event['error']}")
            for choice in event["choices"]:
                if piece := choice["delta"].get("content"):
                    yield piece


def free_port() -> int:
    """Return a TCP port that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve_command(policy: str | None, url: str, options: Sequence[str]) -> list[str]:
    """Return the command line of a server; the policy is all that a pair of servers differs in."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_path())]
    command += ["--served-model-name", MODEL_NAME, "--host", "127.0.0.1"]
    command += ["--port", url.rpartition(":")[2], *options]
    return command if policy is None else [*command, "--kv-policy", policy]


def serve_environment() -> dict[str, str]:
    """Return the environment of a server: no policy from outside, nothing from the network."""
    dropped = ("VLLM_KV_POLICY", "VLLM_CPU_KVCACHE_SPACE")  # the latter overrides the pool's size
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    return environment | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
