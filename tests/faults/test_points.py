"""A run of six chunks broken off at each of its points: by cancel, and by NaN or Inf.

The points of diagonal 4-3-2 are 15 forwards, 6 decodes and 6 saves, numbered in this order. A fault is put in at the
model's own forward (ComfyUI's DIFFUSION_MODEL wrapper), around the decoder's submit and around the writer's write.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import comfy.model_management
import comfy.patcher_extension
import fault_rows
import pytest
import torch

FORWARDS, CHUNKS = 15, 6
STEPS = (4, 3, 2, 2, 2, 2)
FORMATS = ("mp4", "webm", "png")
ALLOWED_S, ALLOWED_BUSY_S = 0.25, 5.0
"""From the end of the forward that was under way to the end of the run: where all cases run, and where a few do, on
every change, for the machine may be busy then. That no forward begins is counted."""


def where(point: int) -> tuple[str, int]:
    """The kind of a point and its number within the kind."""
    for kind, count in (("forward", FORWARDS), ("decode", CHUNKS), ("save", CHUNKS)):
        if point < count:
            return kind, point
        point -= count
    raise ValueError(point)


def chunk_of(point: int) -> tuple[int, int]:
    """(chunk, step) of a point, both from 0; step -1 where it is no forward."""
    kind, number = where(point)
    if kind != "forward":
        return number, -1
    for chunk, steps in enumerate(STEPS):
        if number < steps:
            return chunk, number
        number -= steps
    raise ValueError(point)


class Faults:
    """Counts the points of a run and does something at one of them.

    Attributes:
        longest: seconds of the longest forward so far, of all runs.
        began, ended: when each forward of this run did.
    """

    def __init__(self, six_chunks, demo) -> None:
        self.six_chunks = six_chunks
        self.model = demo[0].clone()
        self.model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "faults", self._forward)
        self.longest = 0.0
        self.seen: list[str] = []
        self.began: list[float] = []
        self.ended: list[float] = []
        self.point: int | None = None
        self.act: Callable = lambda value: value

    @contextlib.contextmanager
    def at(self, point: int | None, act: Callable) -> Iterator[None]:
        """While it is open, `act` gets the value at this point (the forward's result, the latents to decode, the
        images to write) and gives what takes its place."""
        self.point, self.act, self.seen, self.began, self.ended = point, act, [], [], []
        decoder, writer = self.six_chunks.streaming.StreamDecoder, self.six_chunks.writer
        submit = decoder.submit
        writes = {kind: kind.write for kind in (writer.EncodedWriter, writer.PngWriter)}

        def new_submit(this, latents):
            handle = submit(this, latents)
            images = self._reached("decode", handle._images)
            handle._images = images
            return handle

        def new_write(kind):
            return lambda this, images: writes[kind](this, self._reached("save", images))

        decoder.submit = new_submit
        for kind in writes:
            kind.write = new_write(kind)
        try:
            yield
        finally:
            decoder.submit = submit
            for kind, write in writes.items():
                kind.write = write

    def _reached(self, kind: str, value):
        number = self.seen.count(kind)
        self.seen.append(kind)
        return self.act(value) if self.point is not None and where(self.point) == (kind, number) else value

    def _forward(self, executor, *args, **kwargs):
        self.began.append(time.perf_counter())
        result = executor(*args, **kwargs)
        self.ended.append(time.perf_counter())
        self.longest = max(self.longest, self.ended[-1] - self.began[-1])
        return self._reached("forward", result)


@pytest.fixture
def faults(six_chunks, demo) -> Faults:
    return Faults(six_chunks, demo)


@pytest.fixture
def sound(six_chunks, faults, content) -> dict:
    """What an undisturbed run leaves, by format; the points are counted on the way."""
    found = {}
    for format in FORMATS:
        with faults.at(None, lambda value: value):
            found[format] = content(six_chunks.run(f"sound_{format}", format, model=faults.model).path)
        assert [faults.seen.count(kind) for kind in ("forward", "decode", "save")] == [FORWARDS, CHUNKS, CHUNKS]
    return found


def video_of(output, prefix: str, format: str):
    return output / f"{prefix}_00001_{'' if format == 'png' else '.' + format}"


def clean(output, prefix: str) -> None:
    """Remove what a case made."""
    for path in sorted(output.glob(f"{prefix}_*")):
        if path.is_dir():
            for image in path.iterdir():
                image.unlink()
            path.rmdir()
        else:
            path.unlink()


def test_row_cancel(six_chunks, faults, sound, content, playable):
    began: list[float] = []
    points = [(point, format) for format in FORMATS for point in range(fault_rows.POINTS)]
    # A few cases are spread over all kinds of points.
    order = sorted(range(len(points)), key=lambda number: (number * 38) % len(points))
    allowed = ALLOWED_S if fault_rows.in_full("cancel") else ALLOWED_BUSY_S

    def cancel(value=None):
        began.append(time.perf_counter())
        comfy.model_management.interrupt_current_processing(True)
        return value

    def check(number: int) -> float:
        rng = fault_rows.generator("cancel", number)
        prefix = f"c{number}"
        began.clear()
        stop_after = None
        if number < len(points):
            point, format = points[order[number]]
        else:
            point, format, stop_after = None, rng.choice(FORMATS), rng.random()
        timer = None
        stopped = True
        if stop_after is not None:
            timer = threading.Timer(0.02 + 0.9 * stop_after, cancel)
            timer.start()
        with faults.at(point, cancel):
            try:
                six_chunks.run(prefix, format, model=faults.model)
                stopped = False
            except comfy.model_management.InterruptProcessingException:
                pass
            finally:
                ended = time.perf_counter()
                if timer is not None:
                    timer.join()
                comfy.model_management.interrupt_current_processing(False)
        cancelled = began[0]
        late = max(0.0, ended - cancelled - faults.longest)
        more = sum(forward > cancelled for forward in faults.began)
        told = f"{format} point {where(point) if point is not None else 'at random'}"
        video = video_of(six_chunks.output, prefix, format)
        if stopped:
            frames = playable(video) if video.exists() else 0
            made = faults.seen.count("save")
            # What was handed over to be written is in the file; a first chunk has 9 frames, each other 12.
            assert frames == (12 * made - 3 if made else 0), f"{told}: {frames} frames after {made} saves"
        else:  # it came too late: behind the last forward, which is looked behind
            last = point is None or (chunk_of(point)[0] == CHUNKS - 1 and where(point)[0] != "forward")
            assert last and playable(video) == 69, f"{told}: it was not stopped"
            assert len(faults.ended) == FORWARDS and cancelled > faults.ended[-1], f"{told}: it was not heeded"
        # A timer's may come between the look for it and the forward behind that look.
        assert more <= (point is None), f"{told}: {more} forwards began after it"
        with faults.at(None, cancel):
            six_chunks.run(prefix, format, model=faults.model) if stopped else None
        assert content(video) == sound[format], f"{told}: the next run left another file"
        assert not list(six_chunks.output.glob(f"{prefix}_*.state*")), "a state was left"
        clean(six_chunks.output, prefix)
        assert late <= allowed, f"{told}: stopped {late:.2f} s after the end of a forward; {allowed:g} s are allowed"
        return late

    fault_rows.run_cases("cancel", check)


def test_row_nan(six_chunks, faults, sound, content, playable):
    points = sorted(range(fault_rows.POINTS), key=lambda point: (point * 5) % fault_rows.POINTS)

    def check(number: int) -> None:
        rng = fault_rows.generator("nan", number)
        point, format, prefix = points[number], FORMATS[number % 3], f"n{number}"
        kind, _ = where(point)
        chunk, step = chunk_of(point)
        bad = rng.choice((float("nan"), float("inf"), -float("inf")))
        whole = rng.random() < 0.5

        def spoil(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            flat = value.view(-1)
            if whole:
                flat.fill_(bad)
            else:
                flat[rng.randrange(flat.numel())] = bad
            return value

        words = [f"Chunk {chunk + 1} of {CHUNKS}"]
        words += [f"step {step + 1} of {STEPS[chunk]}"] if kind == "forward" else ["the step of decoding"]
        with faults.at(point, spoil):
            try:
                six_chunks.run(prefix, format, model=faults.model)
            except ValueError as error:
                message = str(error)
            else:
                raise AssertionError(f"{kind} {point}: no error")
        for word in words:
            assert word in message, f"{kind} {point}: {message!r} does not say {word!r}"
        video = video_of(six_chunks.output, prefix, format)
        frames = playable(video) if video.exists() else 0
        assert frames == (12 * chunk - 3 if chunk else 0), f"{kind} {point}: {frames} frames"
        with faults.at(None, spoil):
            six_chunks.run(prefix, format, model=faults.model)
        assert content(video) == sound[format], f"{kind} {point}: the next run left another file"
        clean(six_chunks.output, prefix)

    fault_rows.run_cases("nan", check)
