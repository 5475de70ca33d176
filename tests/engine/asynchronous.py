"""vLLM's asynchronous scheduler on CPU: streams and events become placeholders.

The CPU platform turns asynchronous scheduling off. Forced on, the real AsyncScheduler schedules a
step ahead, with two batches in flight; only their overlap in time is missing.
"""

from __future__ import annotations

import contextlib
from typing import Any

__all__ = ["force"]


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...


def force() -> None:
    """Makes every engine of this process schedule asynchronously."""
    import torch
    from vllm.platforms import current_platform

    torch.cuda.Stream = _Stream
    torch.cuda.Event = torch.Event = _Event
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.current_stream = lambda *args: _Stream()
    torch.cuda.set_stream = lambda stream: None
    platform = type(current_platform)
    check = platform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    platform.check_and_update_config = classmethod(check_and_update_config)
