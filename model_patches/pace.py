"""How a run waits for its device: never within a chunk, and never further behind than Cancel allows."""

from __future__ import annotations

from collections import deque

import torch
from comfy.cli_args import args
from torch import Tensor

from ..diagonal_sampler.noise import allow_pinning, pinned_empty
from ..diagonal_sampler.sampler import Chunk, Forward

allow_pinning(not args.disable_pinned_memory)


def mark_behind(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event behind all that is queued on a stream by now."""
    event = torch.cuda.Event(blocking=True)  # what waits for it is to sleep, not to keep a core busy
    event.record(stream)
    return event


class Pace:
    """Keeps the host at most one forward ahead of a GPU.

    Nothing in a forward waits for the GPU, so that the host could queue several; Cancel would then stop the host only,
    and progress would count what is not done. One forward ahead is enough for the GPU never to wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events: deque[torch.cuda.Event] | None = deque() if device.type == "cuda" else None

    def wait(self) -> None:
        """Before a forward is queued: until the one before the last is done."""
        if self._events is not None and len(self._events) > 1:
            self._events.popleft().synchronize()

    def mark(self) -> None:
        """After a forward was queued."""
        if self._events is not None:
            self._events.append(mark_behind(torch.cuda.current_stream(self.device)))


class FiniteLook:
    """Looks at each finished chunk for NaN and infinite values: at once on a CPU, one forward later on a GPU.

    A look at once would leave a GPU idle until the host has queued the next forward. Which step it was is only asked
    if there is something to tell.
    """

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self._waiting: tuple[Chunk, list[tuple[Forward, Tensor]], Tensor, torch.cuda.Event | None] | None = None

    def look(self, chunk: Chunk, steps: list[tuple[Forward, Tensor]]) -> None:
        """A finished chunk, and the denoised of its steps.

        Raises:
            ValueError: on a CPU, as `settle`.
        """
        finite = torch.isfinite(chunk.latents).all()
        if finite.device.type != "cuda":
            self._waiting = (chunk, steps, finite, None)
            self.settle()
            return
        answer = pinned_empty((), torch.bool)
        # Without pinned memory it stays on the GPU until it is asked for, and is then behind what is queued by then.
        answer = finite if answer is None else answer.copy_(finite, non_blocking=True)
        self._waiting = (chunk, steps, answer, mark_behind(torch.cuda.current_stream(finite.device)))

    def settle(self) -> None:
        """Wait for the last look's answer; one that is bad stays, for whoever asks again.

        Raises:
            ValueError: the chunk is not finite; names the chunk and the step at which it began.
        """
        if self._waiting is None:
            return
        chunk, steps, answer, done = self._waiting
        if done is not None:
            done.synchronize()
        if answer:
            self._waiting = None
            return
        bad = next((at for at, denoised in steps if not torch.isfinite(denoised).all()), None)
        where = "" if bad is None else f", first at step {bad.step + 1} of {bad.steps} (sigma {bad.sigma:.3f})"
        raise ValueError(
            f"Chunk {chunk.index + 1} of {self.chunks} (latent frames {chunk.start_frame} to "
            f"{chunk.start_frame + chunk.latents.shape[2] - 1}) came out with NaN or infinite values{where}. Try "
            "weight_dtype bf16 in Diagonal Model Loader (default may be float16), a lower LoRA strength, or check the "
            "checkpoint."
        )
