"""Streaming a video to the disk: equal to the whole clip, playable at any moment, resumed bit by bit."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import gc
import json
import logging
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy_host
import numpy as np
import pytest
import torch
from comfy_api.latest import InputImpl
from PIL import Image
from processes import still_running
from safetensors import SafetensorError
from safetensors.torch import save_file

from diagonal_sampler import disk
from diagonal_sampler.cache import KVCache
from diagonal_sampler.flow import OpticalFlow, camera_flow
from diagonal_sampler.noise import SeededNoise
from diagonal_sampler.schedule import DiagonalSchedule
from diagonal_sampler.settings import CausalSettings

av = pytest.importorskip("av")

SCHEDULE = DiagonalSchedule.preset("undistilled", steps=(2,))
SIZE = 64
FPS = 16
CHUNK = 3  # latent frames
PROC = Path("/proc/self").exists()
needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")


@pytest.fixture(scope="module")
def streaming(pack_module):
    return pack_module("model_patches.streaming")


@pytest.fixture(scope="module")
def video_writer(pack_module):
    return pack_module("model_patches.video_writer")


@pytest.fixture(scope="module")
def stream_state(pack_module):
    return pack_module("model_patches.stream_state")


@pytest.fixture(scope="module")
def demo(pack):
    """MODEL, positive, negative, VAE of the bundled demo."""
    with comfy_host.demo_models("teacher") as models:
        yield models


@pytest.fixture
def options(streaming):
    """2 seconds: 32 frames (of 33 that 9 latent frames hold), 3 chunks; a state after every chunk."""

    def make(**changes):
        fields = dict(width=SIZE, height=SIZE, seconds=2.0, fps=FPS, seed=3, filename_prefix="v", state_every=1)
        return streaming.StreamOptions(**{**fields, **changes})

    return make


@pytest.fixture
def stream(streaming, demo, output):
    """`stream(options, **more)`: the whole run."""

    def run(options, **more):
        return streaming.stream_video(*demo, SCHEDULE, options, **more)

    return run


class Stop(BaseException):
    """What a test stops a run with: nothing is saved behind it, as after a kill."""


def stop_at(chunk: int, error: type[BaseException] = Stop):
    """An on_progress that ends the run in the middle of a chunk."""

    def report(progress):
        if progress.chunk == chunk and progress.step == 1:
            raise error

    return report


def decoded(path: Path) -> list:
    """Every frame, after checking that times go up evenly."""
    if path.is_dir():
        return [torch.from_numpy(np.array(Image.open(name))) for name in sorted(path.glob("*.png"))]
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    for number, frame in enumerate(frames):
        assert abs(frame.time - number / FPS) < 1e-3
    return [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in frames]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def children(parent: int | None = None) -> list[int]:
    """ffmpeg's processes below a parent (this one), zombies too. Empty where there is no /proc."""

    def status(pid: str) -> str:
        try:
            return Path("/proc", pid, "status").read_text()
        except OSError:
            return ""

    line = f"PPid:\t{parent or os.getpid()}\n"
    found = [(pid, status(pid)) for pid in os.listdir("/proc") if pid.isdecimal()] if PROC else []
    return [int(pid) for pid, text in found if line in text and text.startswith("Name:\tffmpeg")]


def recorded(streaming, monkeypatch) -> list[torch.Tensor]:
    """The latents of every chunk from now on."""
    found = []
    submit = streaming.StreamDecoder.submit
    monkeypatch.setattr(
        streaming.StreamDecoder, "submit", lambda self, x: (found.append(x.clone()), submit(self, x))[1]
    )
    return found


def test_frames_equal_the_sampler_and_vae_decode(streaming, demo, stream, options, sample_latent, pack_module):
    model, positive, negative, vae = demo
    result = stream(options(format="png", cfg=2.0))
    latent = {"samples": torch.zeros(1, 16, 9, 8, 8)}
    whole = sample_latent(model, positive, negative, latent, SCHEDULE, seed=3, cfg=2.0)["samples"]
    images = vae.decode(whole)[0]
    assert len(images) == 33 and result.video.get_frame_count() == 32
    expected = (images[:32] * 255).clamp(0, 255).to(torch.uint8)
    found = (result.video.get_components().images * 255).round().to(torch.uint8)
    assert torch.equal(found, expected)
    encode = pack_module("model_patches.context_frames").encode_context
    assert torch.allclose(result.context.latent, encode(vae, images[:32], 6).latent, atol=1e-5)
    assert result.context.latent.shape == (1, 16, 6, 8, 8), "what Diagonal Context Frames takes of a video's end"


@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_an_encoded_video_shows_the_same_frames(streaming, stream, options, output, format):
    plain = stream(options(format="png")).video.get_components().images
    result = stream(options(format=format, crf=1.0))
    assert files(output) == sorted(["v_00001_", f"v_00002_.{format}"])
    frames = torch.stack(decoded(result.path)).float() / 255
    assert frames.shape == plain.shape
    assert (frames - plain).abs().mean() < 0.02  # half of the colour resolution is lost
    assert result.video.get_dimensions() == (SIZE, SIZE)
    assert result.video.get_frame_rate() == FPS
    assert abs(result.video.get_duration() - 2.0) < 0.07
    assert len(result.video.get_components().images) == 32


@pytest.fixture
def numbered(pack_module, tmp_path):
    """20 images, each 10 levels redder than the one before: a folder, and ComfyUI's own video of the same."""
    folder = tmp_path / "numbered"
    folder.mkdir()
    for number in range(1, 21):
        image = Image.new("RGB", (32, 16), (10 * number, 0, 0))
        image.save(folder / pack_module("model_patches.video_writer").png_name(number))
    images = pack_module("model_patches.png_video").PngVideo(folder, Fraction(16))
    images.save_to(str(tmp_path / "numbered.mp4"), crf=1.0)
    return images, InputImpl.VideoFromFile(str(tmp_path / "numbered.mp4"))


@pytest.mark.parametrize("start", [0.0, 0.25, 0.3, -0.5, -9.0])
@pytest.mark.parametrize("duration", [0.0, 0.25])
def test_a_part_of_a_folder_of_images_is_that_of_a_file(numbered, start, duration):
    def reds(video) -> list[int]:
        return [round(float(image[..., 0].mean()) * 25.5) for image in video.get_components().images]

    images, file = (video.as_trimmed(start, duration, strict_duration=False) for video in numbered)
    assert reds(images) == reds(file)
    assert images.get_frame_count() == len(reds(images)) and images.get_dimensions() == (32, 16)
    assert reds(images.as_trimmed(0.125)) == reds(images)[2:]


def test_only_the_images_of_a_part_are_read(numbered):
    """Trim Video before Get Video Components, so that the end of a long video does not take the memory of all."""
    video = numbered[0]
    for path in sorted(video.folder.iterdir())[:12]:
        path.write_bytes(b"no image")
    end = video.as_trimmed(-0.5)
    assert len(end.get_components().images) == end.get_frame_count() == 8 and end.get_duration() == 0.5
    assert video.as_trimmed(1.25) is None, "behind the last"
    assert video.as_trimmed(1.0, 0.5, strict_duration=True) is None
    assert video.as_trimmed(1.0, 0.5).get_frame_count() == 4


@pytest.mark.parametrize("format", ["mp4", "webm", "png"])
def test_a_resumed_run_leaves_the_same_file(stream, options, output, format, caplog):
    whole = stream(options(format=format, seconds=3.0))
    with pytest.raises(Stop):
        stream(options(format=format, seconds=3.0), on_progress=stop_at(3))
    assert not children()
    stopped = whole.path.with_name(whole.path.name.replace("1", "2"))
    assert set(files(output)) == {whole.path.name, stopped.name, "v_00002_.state.safetensors"}
    assert len(decoded(stopped)) == 33  # three chunks, all that was made
    lines, began = [], []
    with caplog.at_level(logging.INFO):
        resumed = stream(
            options(format=format, seconds=3.0), announce=lines.append, on_progress=lambda p: began.append(p)
        )
    assert resumed.path == stopped
    assert "Resumed v_00002_" in lines[0] and "frame 33 of 48, after chunk 3" in lines[0]
    assert any("Resumed v_00002_" in record.message for record in caplog.records)
    assert began[0].chunk == 3 and began[0].forwards == 10 and began[-1].forwards == began[-1].total
    assert torch.equal(resumed.context.latent, whole.context.latent)
    if format == "png":
        for name in files(whole.path):
            assert (whole.path / name).read_bytes() == (stopped / name).read_bytes()
    else:
        assert len(decoded(stopped)) == 48
        assert whole.path.read_bytes() == stopped.read_bytes()
    assert sorted(files(output)) == sorted([whole.path.name, stopped.name])


def test_resumed_latents_are_equal_bit_by_bit(streaming, stream, options, monkeypatch, tmp_path):
    """With guidance, a window that evicts, and two chunks to make again."""
    wanted = options(format="png", seconds=4.0, cfg=3.0, state_every=3)
    found = recorded(streaming, monkeypatch)
    stream(wanted)
    whole = found.copy()
    found.clear()
    with pytest.raises(Stop):
        stream(wanted, on_progress=stop_at(5))
    assert len(found) == 5
    lines = []
    stream(wanted, announce=lines.append)
    assert "after chunk 3" in lines[0]
    assert len(whole) == 6 and len(found) == 8
    assert all(torch.equal(a, b) for a, b in zip(found, whole[:5] + whole[3:], strict=True))


def test_a_cache_in_eight_bits_goes_on_bit_by_bit_and_is_of_another_video(
    streaming, demo, options, monkeypatch, pack_module, output
):
    causal = pack_module("model_patches.causal")
    settings = causal.causal_settings(demo[0])
    small = causal.make_causal(demo[0], dataclasses.replace(settings, kv_cache_dtype="int8"))
    found = recorded(streaming, monkeypatch)

    def run(model, **more):
        found.clear()
        lines = []
        wanted = options(format="png", seconds=4.0, state_every=3)
        streaming.stream_video(model, *demo[1:], SCHEDULE, wanted, announce=lines.append, **more)
        return found.copy(), "Resumed" in lines[0]

    whole, _ = run(small)
    with pytest.raises(Stop):
        run(small, on_progress=stop_at(5))
    plain, resumed = run(demo[0])
    assert not resumed and torch.equal(plain[0], whole[0]) and not torch.equal(plain[-1], whole[-1])
    rest, resumed = run(small)
    assert resumed and len(rest) == 3
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[3:], strict=True))


def cancelled_at(forwards: int):
    """An on_progress at which somebody presses ComfyUI's Cancel."""

    def report(progress):
        if progress.forwards == forwards:
            comfy.model_management.interrupt_current_processing()

    return report


def failing_at(forwards: int):
    """An on_progress at which the GPU has no memory left."""

    def report(progress):
        if progress.forwards == forwards:
            raise torch.OutOfMemoryError("no memory left")

    return report


CANCELLED = (cancelled_at, comfy.model_management.InterruptProcessingException)
FAILED = (failing_at, torch.OutOfMemoryError)


@pytest.mark.parametrize(
    ("ending", "forwards"),
    [*((CANCELLED, forwards) for forwards in (1, 2, 3, 4, 9, *range(12, 19))), (FAILED, 1), (FAILED, 4), (FAILED, 17)],
)
def test_after_cancel_or_an_error_only_the_chunk_in_work_is_made_again(
    stream, options, output, ending, forwards, cancelled_reference
):
    """With a window that evicts and moves keys in the middle of a chunk; no state is due but at the end."""
    at, error = ending
    wanted = options(format="png", seconds=4.0, state_every=99, filename_prefix=f"c{forwards}")
    with pytest.raises(error):
        stream(wanted, on_progress=at(forwards))
    lines = []
    resumed = stream(wanted, announce=lines.append)
    chunk = (forwards - 1) // FORWARDS_A_CHUNK
    assert ("Resumed" in lines[0]) == (chunk > 0)
    assert chunk == 0 or f"after chunk {chunk}" in lines[0]
    assert [image.read_bytes() for image in sorted(resumed.path.glob("*.png"))] == cancelled_reference


@pytest.mark.parametrize("state_every", [1, 99])
def test_a_video_finished_early_is_whole_and_goes_on_when_queued_again(
    stream, options, output, cancelled_reference, state_every
):
    """One state is there already where the run ends, or none yet."""
    wanted = options(format="png", seconds=4.0, state_every=state_every)
    done, lines = [], []

    def finish():
        done.append(len(done) + 1)
        return done[-1] == 2

    early = stream(wanted, finish=finish)
    images = [image.read_bytes() for image in sorted(early.path.glob("*.png"))]
    assert images == cancelled_reference[:21] and done == [1, 2] and not early.whole
    assert early.video.get_frame_count() == 21 and "Finished early, and queued again it goes on: 21" in early.message
    assert early.context.latent.shape == (1, 16, 6, 8, 8)
    assert "v_00001_.state.safetensors" in files(output)
    rest = stream(wanted, finish=lambda: False, announce=lines.append)
    assert "Resumed v_00001_" in lines[0] and "frame 21 of 64, after chunk 2" in lines[0]
    assert rest.whole and files(output) == ["v_00001_"]
    assert [image.read_bytes() for image in sorted(rest.path.glob("*.png"))] == cancelled_reference


def test_an_mp4_finished_early_plays_and_goes_on(stream, options, output):
    early = stream(options(), finish=lambda: True)
    assert len(decoded(early.path)) == 9 and early.video.get_frame_count() == 9
    assert len(decoded(stream(options()).path)) == 32


def test_after_cancel_an_encoded_video_has_a_key_frame_more_and_no_other_frames(stream, options, output):
    def keys(path: Path) -> list[int]:
        with av.open(str(path)) as container:
            return [number for number, frame in enumerate(container.decode(video=0)) if frame.key_frame]

    whole = stream(options(state_every=99, crf=1.0)).path
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream(options(state_every=99, crf=1.0), on_progress=cancelled_at(5))
    resumed = stream(options(state_every=99, crf=1.0)).path
    assert keys(resumed) == sorted([*keys(whole), 9])
    a, b = (torch.stack(decoded(path)).float() for path in (whole, resumed))
    assert a.shape == b.shape and (a - b).abs().mean() < 2


FORWARDS_A_CHUNK = 3  # two steps, and one that fills the cache


@pytest.fixture(scope="module")
def cancelled_reference(streaming, demo, tmp_path_factory):
    """The images of a run that nobody cancelled."""
    import folder_paths

    before, folder = folder_paths.get_output_directory(), tmp_path_factory.mktemp("whole")
    folder_paths.set_output_directory(str(folder))
    try:
        options = streaming.StreamOptions(
            width=SIZE, height=SIZE, seconds=4.0, fps=FPS, seed=3, filename_prefix="v", format="png"
        )
        path = streaming.stream_video(*demo, SCHEDULE, options).path
        return [image.read_bytes() for image in sorted(path.glob("*.png"))]
    finally:
        folder_paths.set_output_directory(before)


@pytest.mark.parametrize(
    ("seconds", "longer", "forwards"),
    [(2.5, 3.0, 11), (3.5, 4.0, 14), (5.0, 6.0, 14), (6.0, 5.0, 14)],
    ids=["short last chunk", "that evicts", "to the window's positions", "to absolute positions"],
)
def test_a_cancelled_video_goes_on_in_one_of_another_length(
    streaming, stream, options, monkeypatch, seconds, longer, forwards
):
    """Positions auto change at 21 latent frames, between 5 and 6 seconds; the window is full after four chunks."""
    found = recorded(streaming, monkeypatch)
    stream(options(format="png", seconds=longer, state_every=99, filename_prefix="whole"))
    whole = torch.cat(found, 2)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream(options(format="png", seconds=seconds, state_every=99), on_progress=cancelled_at(forwards))
    found.clear()
    lines = []
    stream(options(format="png", seconds=longer, state_every=99), announce=lines.append)
    chunk = (forwards - 1) // FORWARDS_A_CHUNK
    assert "Resumed" in lines[0] and f"after chunk {chunk}" in lines[0]
    torch.testing.assert_close(torch.cat(found, 2), whole[:, :, CHUNK * chunk :], atol=2e-3, rtol=0)


def test_a_state_that_does_not_say_how_far_its_keys_were_moved_goes_on_in_no_other_positions(
    stream, stream_state, options, output
):
    """As an older pack wrote them; of the same length it goes on."""
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream(options(format="png", seconds=5.0, state_every=99), on_progress=cancelled_at(14))
    path = output / "v_00001_.state.safetensors"
    state, tensors = stream_state.read_state(path), stream_state.load_tensors(path, "")
    assert state.moved == 0 and state.begun == 3
    older = dataclasses.replace(state, moved=None)
    stream_state.save_state(path, older, {name: tensor.clone() for name, tensor in tensors.items()})
    lines = []
    stream(options(format="png", seconds=6.0, state_every=99), announce=lines.append)
    assert "v_00001_ is unfinished and is not resumed" in lines[0] and "counts positions in another way" in lines[0]
    stream(options(format="png", seconds=5.0, state_every=99), announce=lines.append)
    assert "Resumed v_00001_" in lines[1]


def test_a_cancel_while_a_decoder_with_a_large_state_decodes_copies_nothing(
    streaming, stream, options, monkeypatch, pack_module, caplog
):
    monkeypatch.setattr(pack_module("model_patches.stream_decode"), "MOST_KEPT_BYTES", -1)
    copied = []
    monkeypatch.setattr(streaming, "save_state", lambda *_: copied.append("state"))
    snapshot = KVCache.snapshot
    monkeypatch.setattr(KVCache, "snapshot", lambda self: copied.append("cache") or snapshot(self))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream(options(format="png", seconds=3.0, state_every=99), on_progress=cancelled_at(3 * FORWARDS_A_CHUNK))
    assert not copied
    assert "The run was stopped while the VAE decoded" in caplog.text


def test_a_state_that_cannot_be_saved_leaves_a_cancel_a_cancel(stream, options, monkeypatch, caplog):
    def no_memory(_self):
        raise MemoryError("no memory for the copy")

    monkeypatch.setattr(KVCache, "snapshot", no_memory)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream(options(format="png", seconds=3.0, state_every=99), on_progress=cancelled_at(8))
    assert "No state could be saved when the run was stopped: no memory for the copy" in caplog.text


@pytest.mark.parametrize(
    ("saving_s", "keep_state", "saved"),
    [
        (0.9, False, [1, 2, 3, 4, 5]),
        (2.0, False, [1, 5]),  # 20 seconds of rest, in which three chunks are made
        (9.0, False, [1]),
        (9.0, True, [1, 5]),  # what a longer length goes on from is always saved
    ],
)
def test_a_slow_state_is_followed_by_ten_times_as_long_without_one(
    streaming, stream, options, monkeypatch, output, saving_s, keep_state, saved
):
    """On a clock on which a chunk takes six seconds. The file is the same, whatever was saved."""
    clock, found, save = [0.0], [], streaming.save_state

    def slow(path, state, tensors):
        save(path, state, tensors)
        found.append(state.chunk)
        clock[0] += saving_s

    def report(progress):
        clock[0] += 6.0 if progress.step == 1 else 0.0

    plain = stream(options(seconds=4.0, seed=8)).path.read_bytes()
    monkeypatch.setattr(streaming, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter))
    monkeypatch.setattr(streaming, "save_state", slow)
    made = stream(options(seconds=4.0, seed=8, keep_state=keep_state), on_progress=report)
    assert found == saved
    assert made.path.read_bytes() == plain and made.path.name == "v_00002_.mp4"


def test_a_cancel_while_states_rest_saves_one(streaming, stream, options, monkeypatch):
    monkeypatch.setattr(streaming, "QUICK_SAVE_S", -1.0)
    monkeypatch.setattr(streaming, "SAVE_REST", 1e9)
    lines = []
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream(options(format="png", seconds=4.0), on_progress=cancelled_at(4 * FORWARDS_A_CHUNK))
    stream(options(format="png", seconds=4.0), announce=lines.append)
    assert "after chunk 3" in lines[0]


# ---------------------------------------------------------------------------------------------------------------
# Motion to follow

PAN = camera_flow(60, SIZE, SIZE, pan=(-1.0, 0.5))


@pytest.fixture
def motion(pack_module, demo):
    """`motion(mode, **changes)` -> (the demo's model, what it is to follow); in mode adapter with random weights."""
    control = pack_module("model_patches.flow_control")
    attachment = pack_module("model_patches.loading").FLOW_ADAPTER_ATTACHMENT

    def make(mode, field=PAN, scale=0.3, **changes):
        model = demo[0].clone()
        generator = torch.Generator().manual_seed(1)
        adapter = [scale * torch.randn(shape, generator=generator) for shape in ((256, 4, 1, 2, 2), (256,))]
        model.set_attachments(attachment, tuple(adapter))
        # The two steps of SCHEDULE end at 0.833.
        changes = {"start_sigma": 0.9, **changes}
        return model, control.FlowConditioning(optical_flow=field, mode=mode, vae=demo[3], **changes)

    return make


@pytest.mark.parametrize("mode", ("adapter", "reference", "noise", "adapter+blend"))
def test_a_stream_that_follows_motion_is_the_samplers_and_resumes(
    streaming, demo, options, motion, sample_latent, monkeypatch, output, mode
):
    """The field ends in the middle of the video, which is stopped after that."""
    model, flow = motion(mode, field=OpticalFlow(PAN.flow[:30], PAN.valid[:30]))
    wanted = options(format="png", seconds=4.0, state_every=1)
    found = recorded(streaming, monkeypatch)

    def run(**more):
        return streaming.stream_video(model, *demo[1:], SCHEDULE, wanted, optical_flow=flow, **more)

    run()
    whole = torch.cat(found, dim=2)
    latent = {"samples": torch.zeros(1, 16, 17, 8, 8)}
    usual, other = (
        sample_latent(model, demo[1], demo[2], latent, SCHEDULE, seed=3, optical_flow=given)["samples"]
        for given in (flow, None)
    )
    torch.testing.assert_close(whole, usual, atol=1e-5, rtol=0)
    assert (usual - other)[:, :, :9].abs().max() > 0.05
    for stop in (1, 4):
        found.clear()
        with pytest.raises(Stop):
            run(on_progress=stop_at(stop))
        lines = []
        run(announce=lines.append)
        assert f"after chunk {stop}" in lines[0]
        assert torch.equal(torch.cat(found, dim=2), whole)


def test_only_the_same_motion_resumes(streaming, demo, options, motion, output):
    model, flow = motion("adapter")
    lines = []

    def run(model, flow, seconds=0.5, **more):
        return streaming.stream_video(
            model, *demo[1:], SCHEDULE, options(seconds=seconds), optical_flow=flow, announce=lines.append, **more
        )

    with pytest.raises(Stop):
        run(model, flow, seconds=2.0, on_progress=stop_at(1))
    changed = PAN.flow.clone()
    changed[57, 3, 3] += 1e-3
    others = [
        (model, None),
        motion("adapter", strength=0.5),
        motion("adapter", last_chunk=1),
        motion("reference"),
        motion("adapter", field=OpticalFlow(changed, PAN.valid)),
        motion("adapter", scale=0.2),
    ]
    for other in others:
        run(*other)
        assert "Resumed" not in lines[-1]
    run(*motion("adapter"), seconds=2.0)
    assert "Resumed" in lines[-1] and "after chunk 1" in lines[-1]
    with pytest.raises(Stop):
        run(model, None, seconds=3.0, on_progress=stop_at(1))
    run(*motion("adapter", strength=0.0), seconds=3.0)
    assert "Resumed" in lines[-1], "motion of strength 0 is none"


@pytest.mark.parametrize("mode", ("adapter", "reference", "noise", "adapter+blend"))
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux: tells the most memory held")
def test_motion_is_not_written_out_for_the_whole_video(pack_module, motion, mode):
    """Ten hours: one held step, or 60 and then none. Each would be 9 GB if every step were in memory."""

    def most_kb() -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1])

    frames = 10 * 3600 * FPS // 4
    plan = pack_module("model_patches.flow_control").FlowRun
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is held now
    before = most_kb()
    for field in (camera_flow(1, SIZE, SIZE, pan=(1, 0)), PAN):
        model, flow = motion(mode, field=field)
        run = plan(flow, model, (1, 16, frames, 8, 8), SCHEDULE, [CHUNK] * (frames // CHUNK))
        run.noise(SeededNoise(0, (1, 16, 8, 8)), 0)
    grown = (most_kb() - before) << 10
    assert grown < 200 << 20, f"{grown} bytes"


def test_comfyuis_cancel_keeps_the_video_and_the_state(stream, options, output):
    def cancel(progress):
        if progress.chunk == 2:
            comfy.model_management.interrupt_current_processing(True)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream(options(), on_progress=cancel)
    assert files(output) == ["v_00001_.mp4", "v_00001_.state.safetensors"]
    assert len(decoded(output / "v_00001_.mp4")) == 21
    assert not children()
    assert len(decoded(stream(options()).path)) == 32
    assert files(output) == ["v_00001_.mp4"]


def test_a_run_stopped_before_its_first_frame_leaves_nothing(stream, options, output):
    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(0))
    assert files(output) == []


def held(*_):
    """In the place of what changes a file that another program has open on Windows."""
    raise PermissionError(13, "in use")


@pytest.mark.parametrize("keep_state", [True, False])
def test_a_state_that_another_program_holds_does_not_fail_a_finished_video(
    streaming, stream, options, output, monkeypatch, caplog, keep_state
):
    monkeypatch.setattr(streaming, "replace_file" if keep_state else "remove_file", held)
    assert len(decoded(stream(options(keep_state=keep_state)).path)) == 32
    said = "v_00001_.mp4 is finished, but its state v_00001_.state.safetensors cannot be put away (in use"
    assert said in caplog.text and files(output) == ["v_00001_.mp4", "v_00001_.state.safetensors"]


def test_a_state_that_another_program_holds_leaves_a_cancel_a_cancel(
    streaming, stream, options, output, monkeypatch, caplog
):
    monkeypatch.setattr(streaming, "remove_file", held)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream(options(), on_progress=cancelled_at(1))
    assert "v_00001_.mp4 has no frames; its state v_00001_.state.safetensors cannot be removed (in use" in caplog.text
    assert files(output) == ["v_00001_.state.safetensors"]


def test_prompts_of_an_earlier_video_that_cannot_be_removed_are_not_the_new_ones(
    stream, options, output, monkeypatch, pack_module
):
    remove = pack_module("model_patches.stream_files").remove_file
    monkeypatch.setattr(
        pack_module("model_patches.stream_files"),
        "remove_file",
        lambda path: held() if path.name == "v_00001_.prompts.json" else remove(path),
    )
    assert stream(options(seconds=0.5)).path.name == "v_00002_.mp4"
    assert files(output) == ["v_00002_.mp4"]


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long"), "v_00001_.prompts.json cannot be removed: File name too"),
        (PermissionError(errno.EACCES, "in use"), None),
    ],
    ids=["another number does not help", "cancelled"],
)
def test_a_run_does_not_look_for_a_free_number_for_ever(
    stream, options, output, monkeypatch, pack_module, video_writer, error, ends
):
    asked = []

    def refuses(path):
        asked.append(path)
        if len(asked) == 3:
            comfy.model_management.interrupt_current_processing()
        raise error

    monkeypatch.setattr(pack_module("model_patches.stream_files"), "remove_file", refuses)
    expected = video_writer.VideoWriteError if ends else comfy.model_management.InterruptProcessingException
    with pytest.raises(expected, match=ends):
        stream(options())
    assert len(asked) == (1 if ends else 3) and files(output) == []


def test_a_video_that_cannot_be_opened_leaves_no_lock(stream, options, output, monkeypatch, pack_module, video_writer):
    """Else the next run would begin under another number."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pack_module("model_patches.stream_files"), "open_writer", full)
    with pytest.raises(video_writer.VideoWriteError, match="v_00001_.mp4 cannot be written: No space left on device"):
        stream(options())
    assert files(output) == []


@pytest.mark.parametrize("what", ["mp4", "png", "state"])
def test_a_video_that_another_program_holds_ends_the_run_and_goes_on_later(
    stream, options, output, monkeypatch, pack_module, video_writer, what
):
    """No new one is begun in its stead."""
    wanted = options(format="png" if what == "png" else "mp4", keep_state=what == "state", seconds=3.0)
    with contextlib.nullcontext() if what == "state" else pytest.raises(Stop):
        stream(wanted, on_progress=None if what == "state" else stop_at(2))
    longer = dataclasses.replace(wanted, seconds=4.0)
    before = files(output)
    video = output / ("v_00001_" if what == "png" else "v_00001_.mp4")
    opened, listed = os.open, os.listdir
    monkeypatch.setattr(disk, "BUSY_SECONDS", 0)
    with monkeypatch.context() as patched:
        if what == "mp4":
            patched.setattr(os, "open", lambda path, *more: held() if path == video else opened(path, *more))
        elif what == "png":
            patched.setattr(os, "listdir", lambda path: held() if path == video else listed(path))
        else:
            patched.setattr(pack_module("model_patches.stream_files"), "replace_file", held)
        name = "v_00001_.done.safetensors" if what == "state" else video.name
        with pytest.raises(video_writer.VideoWriteError) as error:
            stream(longer)
    assert str(error.value).startswith(f"{name} cannot be changed (in use)") and "Close the program" in str(error.value)
    assert files(output) == before
    assert stream(longer).path == video and len(decoded(video)) == 64


def test_a_video_that_is_held_for_a_moment_goes_on(stream, options, output, monkeypatch):
    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(2))
    video, opened, tries = output / "v_00001_.mp4", os.open, []

    def busy_once(path, *more):
        if path == video:
            tries.append(path)
            if len(tries) == 1:
                held()
        return opened(path, *more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", busy_once)
        assert stream(options()).path == video
    assert len(tries) == 2


def test_a_file_that_another_program_holds_is_said_and_waited_for(video_writer, stream_state, tmp_path, monkeypatch):
    """To free space, as the errors of a full disk say, would be no help."""
    spec = video_writer.VideoSpec(width=16, height=16, rate=Fraction(16), crf=20.0, metadata={})
    writer = video_writer.open_writer(tmp_path / "v", spec)
    writer.write(torch.zeros(1, 16, 16, 3))
    sync, tries = video_writer.sync_path, []

    def busy_once(path):
        tries.append(path.name)
        held() if len(tries) == 1 else sync(path)

    monkeypatch.setattr(video_writer, "sync_path", busy_once)
    assert writer.settle().frames == 1 and tries == ["00000001.png", "00000001.png", "v"]
    monkeypatch.setattr(video_writer, "replace_file", held)
    with pytest.raises(video_writer.VideoWriteError, match="v cannot be written: in use.*; close the program that"):
        writer.write(torch.zeros(1, 16, 16, 3))
    assert files(tmp_path / "v") == ["00000001.png"]
    monkeypatch.setattr(disk, "replace_file", held)
    with pytest.raises(video_writer.VideoWriteError, match=r"; close the program that has w.state.safetensors open"):
        stream_state.save_state(
            tmp_path / "w.state.safetensors", stream_state.StreamState(digest="d", length=1, latent_frames=1), {}
        )
    assert files(tmp_path) == ["v"]


def test_whoever_may_read_new_files_may_read_a_state(stream_state, tmp_path):
    """Two ComfyUIs of different users on one output folder."""
    plain, state, prompts = (tmp_path / name for name in ("plain", "v.state.safetensors", "v.prompts.json"))
    plain.touch()
    for _ in range(2):  # a new one, and one in the place of another
        stream_state.save_state(state, stream_state.StreamState(digest="d", length=1, latent_frames=1), {})
        stream_state.save_prompts(prompts, [])
        assert {path.stat().st_mode for path in tmp_path.iterdir()} == {plain.stat().st_mode}
    assert files(tmp_path) == ["plain", "v.prompts.json", "v.state.safetensors"]


def content(video: Path) -> list[bytes]:
    """The bytes of a file, or of every image in a folder."""
    return [path.read_bytes() for path in (sorted(video.iterdir()) if video.is_dir() else [video])]


class Killed(BaseException):
    """Ends a run as nothing else does: no state is saved."""


@pytest.mark.parametrize("format", ["mp4", "webm", "png"])
def test_a_video_that_stopped_before_its_first_state_keeps_all_that_it_has(stream, options, output, format):
    wanted = options(state_every=9, format=format, seconds=3.0)
    video = output / f"v_00001_{'' if format == 'png' else '.' + format}"
    with pytest.raises(Killed):
        stream(wanted, on_progress=stop_at(2, Killed))
    before = content(video)
    assert len(decoded(video)) == 21
    lines = []
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream(wanted, announce=lines.append, on_progress=cancelled_at(1))
    assert content(video) == before and files(output) == [video.name]
    assert f"{video.name} has no state to go on from: it is kept, and a new video is begun." in lines[0]
    result = stream(wanted, announce=lines.append)
    assert result.path.name == video.name.replace("1", "2") and len(decoded(result.path)) == 48
    assert content(video) == before and "no state" not in lines[1]


@pytest.mark.parametrize(
    ("error", "format", "state_every", "longer"),
    [
        (torch.OutOfMemoryError, "mp4", 9, False),
        (torch.OutOfMemoryError, "png", 9, True),
        (comfy.model_management.InterruptProcessingException, "webm", 1, False),
    ],
)
def test_a_run_that_stops_when_all_its_frames_are_made_makes_none_of_them_again(
    streaming, stream, options, output, monkeypatch, error, format, state_every, longer
):
    """A longer one needs keys and values, which are gone: it is another video."""
    wanted = options(format=format, state_every=state_every)
    whole = stream(wanted)
    video = whole.path.name.replace("1", "2")

    def fails(*_):
        raise error("while the last frames are encoded")

    with monkeypatch.context() as patched:
        patched.setattr(streaming, "encode_context", fails)
        for made in (3 * FORWARDS_A_CHUNK, 0):  # the second time there is nothing left to make
            seen, lines = [], []
            with pytest.raises(error):
                stream(wanted, on_progress=seen.append, announce=lines.append)
            assert len(seen) == made
    assert content(output / video) == content(whole.path) and "after chunk 3" in lines[0]
    if longer:
        assert stream(dataclasses.replace(wanted, seconds=2.1), announce=lines.append).path.name != video
        assert f"{video} is unfinished and is not resumed: all its frames are made" in lines[-1]
        return
    seen = []
    result = stream(dataclasses.replace(wanted, keep_state=True), on_progress=seen.append)
    assert result.path.name == video and content(result.path) == content(whole.path) and not seen
    assert torch.equal(result.context.latent, whole.context.latent) and result.whole
    assert files(output) == sorted([whole.path.name, video])


def test_a_kept_video_of_one_chunk_survives_a_longer_one_that_is_cancelled(stream, options, output):
    """It has no state of a whole chunk, which a longer one could go on from."""
    kept = stream(options(seconds=0.5, keep_state=True)).path
    before = kept.read_bytes()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream(options(keep_state=True), on_progress=cancelled_at(1))
    assert kept.read_bytes() == before and len(decoded(kept)) == 8
    assert stream(options(keep_state=True)).path.name == "v_00002_.mp4" and kept.read_bytes() == before


@pytest.mark.parametrize("format", ["mp4", "webm", "png"])
def test_a_kept_video_is_shortened_only_when_a_longer_one_has_more(stream, options, output, format):
    kept = stream(options(format=format, keep_state=True)).path
    before, there = content(kept), files(output)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream(options(format=format, seconds=4.0, keep_state=True), on_progress=cancelled_at(FORWARDS_A_CHUNK * 2 + 2))
    assert content(kept) == before and files(output) == there and f"{kept.stem}.done.safetensors" in there
    lines = []
    longer = stream(options(format=format, seconds=4.0, keep_state=True), announce=lines.append).path
    assert longer == kept and "after chunk 2" in lines[0] and len(decoded(longer)) == 64


@pytest.mark.parametrize("format", ["mp4", "webm", "png"])
def test_what_lies_behind_the_last_state_stays_until_there_is_more(stream, options, output, format):
    """Killed in the sixth chunk, behind the state of the fourth, and cancelled before the fifth is made again."""
    wanted = options(format=format, state_every=4, seconds=4.0)
    video = output / f"v_00001_{'' if format == 'png' else '.' + format}"
    with pytest.raises(Killed):
        stream(wanted, on_progress=stop_at(5, Killed))
    assert len(decoded(video)) == 57
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream(wanted, on_progress=cancelled_at(4 * FORWARDS_A_CHUNK + 1))
    assert len(decoded(video)) == 57
    assert len(decoded(stream(wanted).path)) == 64 and files(output) == [video.name]


def test_a_run_killed_before_its_first_frame_begins_again_in_its_file(stream, options, output, stream_state):
    with pytest.raises(Killed):
        stream(options(), on_progress=stop_at(2, Killed))
    os.truncate(output / "v_00001_.mp4", 0)
    state = stream_state.read_state(output / "v_00001_.state.safetensors")
    empty = dataclasses.replace(state, chunk=0, committed=0, frames=0, size=0)
    stream_state.save_state(output / "v_00001_.state.safetensors", empty, {})
    lines = []
    result = stream(options(), announce=lines.append)
    assert result.path.name == "v_00001_.mp4" and len(decoded(result.path)) == 32 and "Begun again" in lines[0]


@pytest.mark.parametrize("format", ["mp4", "webm", "png"])
def test_a_name_with_a_dot_is_a_name(stream, options, output, format):
    result = stream(options(format=format, seconds=0.5, filename_prefix="wan2.1_clip"))
    assert result.path.name == f"wan2.1_clip_00001_{'' if format == 'png' else '.' + format}"
    assert len(decoded(result.path)) == 8


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_video_says_the_colours_that_it_has(video_writer, tmp_path, suffix):
    """The matrix, the primaries and the transfer of BT.709, at limited range."""
    path = tmp_path / f"v{suffix}"
    spec = video_writer.VideoSpec(width=48, height=32, rate=Fraction(16), crf=20.0, metadata={})
    writer = video_writer.open_writer(path, spec)
    writer.write(torch.rand(3, 32, 48, 3))
    writer.close()
    said = subprocess.run([video_writer.find_ffmpeg(), "-i", str(path)], capture_output=True, text=True).stderr
    assert "yuv420p(tv, bt709" in said and "/unknown" not in said and "unknown/" not in said
    assert suffix != ".mp4" or path.read_bytes().count(b"colrnclx" + bytes([0, 1, 0, 1, 0, 1])) >= 1
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)


def test_each_reader_finds_the_texts_of_an_mp4_once(video_writer, tmp_path):
    """While it grows and when it is done: ffmpeg, PyAV, and what looks for a box at the start, as ComfyUI's page."""
    path = tmp_path / "v.mp4"
    metadata = {"prompt": {"a": 1}, "workflow": {"hdlr": ["keys", "moov"]}}
    spec = video_writer.VideoSpec(width=48, height=32, rate=Fraction(16), crf=20.0, metadata=metadata)
    writer = video_writer.open_writer(path, spec)

    def check():
        said = subprocess.run(
            [video_writer.find_ffmpeg(), "-loglevel", "error", "-i", str(path), "-f", "ffmetadata", "-"],
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        found = {line.split("=")[0]: line.split("=", 1)[1] for line in said if "=" in line}
        with av.open(str(path)) as container:
            for texts in (found, container.metadata):
                assert {key: json.loads(texts[key]) for key in metadata} == metadata
        start = path.read_bytes()[:2000]
        assert start.index(b"udta") < start.index(b"keys") < start.index(b'{"a": 1}') < start.index(b"moof")
        assert "udta" in boxes(path)

    writer.write(torch.rand(3, 32, 48, 3))
    mark = writer.settle()
    check()
    writer.close()
    check()
    writer = video_writer.open_writer(path, spec, mark)
    check()
    writer.write(torch.rand(3, 32, 48, 3))
    writer.close()
    check()


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ("4.2.2-static https://johnvansickle.com/ffmpeg/", True),
        ("5.0.1", True),
        ("5.1", False),
        ("n5.1.2", False),
        ("7.0.2-static", False),
        ("10.0", False),
        ("N-109542-g1234567", False),
        ("2023-01-01-git-62da0b4a74-full_build", False),
    ],
)
@needs_posix
def test_an_ffmpeg_that_is_too_old_is_refused_before_anything_is_made(
    stream, options, output, video_writer, monkeypatch, tmp_path_factory, said, refused
):
    import imageio_ffmpeg

    folder = tmp_path_factory.mktemp("bin")
    fake = folder / "ffmpeg"
    fake.write_text(f"#!/bin/sh\necho asked >>{folder / 'log'}\necho 'ffmpeg version {said} Copyright (c)'\n")
    fake.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(fake))
    if refused:
        seen = []
        with pytest.raises(video_writer.VideoWriteError, match="too old.*FFMPEG_EXE") as error:
            stream(options(), on_progress=seen.append)
        assert f'Run "{sys.executable}" -m pip install -U "imageio-ffmpeg>=0.6.0", set' in str(error.value)
        assert not seen and files(output) == []
    for _ in range(2):
        if not refused:
            assert video_writer.find_ffmpeg() == str(fake)
    assert (folder / "log").read_text() == "asked\n", "once"


@pytest.mark.parametrize("format", ["mp4", "webm", "png"])
def test_the_video_plays_while_it_grows(stream, options, format):
    seen = []

    def watch(progress):
        seen.append((progress.frames, len(decoded(progress.path))))

    stream(options(format=format), on_frames=watch)
    # A muxer holds its last frame until the next one; a state brings it out.
    assert [announced for announced, _ in seen][-1] == 32 and len(seen) >= 3
    # Frames are announced when they are there; more may have come while the file was read.
    assert all(announced <= there <= 32 for announced, there in seen)


@pytest.mark.parametrize("format", ["mp4", "webm", "png"])
def test_a_chunk_is_shown_before_the_next_one_is_made(stream, options, format):
    """The sampler waits in chunk 3 until all of chunk 2 has been shown; a muxer holds its last frame."""
    shown, watchable, late = [], threading.Event(), []

    def on_frames(progress):
        shown.append(len(progress.newest))
        if progress.frames >= 20:
            watchable.set()

    def wait(progress):
        if progress.chunk == 2 and progress.step == 0 and not watchable.wait(20.0):
            late.append(list(shown))

    stream(options(format=format, state_every=99), on_progress=wait, on_frames=on_frames)
    assert not late
    assert sum(shown) == 32


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("rate", [Fraction(2997, 125), Fraction(1, 10), Fraction(240)], ids=str)
def test_times_go_on_over_a_settling_and_a_reopening(video_writer, tmp_path, rate, suffix):
    path = tmp_path / f"v{suffix}"
    spec = video_writer.VideoSpec(width=48, height=32, rate=rate, crf=20.0, metadata={})
    images = torch.linspace(0, 1, 9)[:, None, None, None].expand(9, 32, 48, 3)
    writer = video_writer.open_writer(path, spec)
    writer.write(images[:5])
    mark = writer.settle()
    writer.write(images[5:7])
    writer.abandon()  # a crash: the frames after the mark are to be made again
    writer = video_writer.open_writer(path, spec, mark)
    writer.write(images[5:])
    writer.close()
    assert writer.frames == writer.submitted == 9 and not children()
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 9
    for number, frame in enumerate(frames):
        assert abs(frame.time - number / rate) < 0.00051  # WebM counts milliseconds
        assert abs(frame.to_ndarray(format="rgb24").mean() / 255 - number / 8) < 0.03
    if suffix == ".mp4":  # fragments are numbered through, too: the number lies behind the name, version and flags
        data = path.read_bytes()
        places = [at for at in range(len(data)) if data.startswith(b"mfhd", at)]
        assert [int.from_bytes(data[at + 8 : at + 12], "big") for at in places] == list(range(1, 10))
    with pytest.raises(FileExistsError):
        video_writer.open_writer(path, spec)


def test_frames_become_bytes_as_comfyuis_own_nodes_make_them(video_writer):
    images = torch.tensor([[-0.5, 0.5, 0.999, 0.3], [1.0, 2.0, 0.0, 0.3]])[None, None]  # the fourth is no colour
    assert video_writer.as_bytes(images).tolist() == [[[[0, 127, 254], [255, 255, 0]]]]
    for value in (math.nan, math.inf):
        with pytest.raises(video_writer.FrameValueError, match="hold NaN or infinite values"):
            video_writer.as_bytes(torch.full((1, 1, 1, 3), value))


def test_a_folder_of_images_is_cut_back_to_its_mark_and_keeps_what_is_not_its_own(video_writer, tmp_path):
    path = tmp_path / "v"
    spec = video_writer.VideoSpec(width=2, height=2, rate=Fraction(16), crf=20.0, metadata={"note": "x"})
    writer = video_writer.open_writer(path, spec)
    writer.write(torch.zeros(3, 2, 2, 3))
    mark = writer.settle()
    writer.write(torch.ones(2, 2, 2, 3))
    own = [f"0000000{number}.png" for number in range(1, 4)]
    for name in ("00000006.png.part", "note.txt", "x0000009.png", "00000009.jpg"):
        (path / name).touch()
    there = files(path)
    writer = video_writer.open_writer(path, spec, mark)
    writer.close()
    assert files(path) == there and "00000005.png" in there, "nothing was written yet"
    writer = video_writer.open_writer(path, spec, mark)
    writer.write(torch.ones(1, 2, 2, 3))
    assert files(path) == [*own, "00000004.png", "00000009.jpg", "note.txt", "x0000009.png"]
    assert (writer.frames, writer.submitted) == (4, 4)
    texts = [Image.open(path / f"0000000{number}.png").text.get("note") for number in (1, 2, 4)]
    assert texts == ["x", None, None]
    (path / own[1]).unlink()
    with pytest.raises(video_writer.VideoWriteError, match="v has no 00000002.png any more"):
        video_writer.open_writer(path, spec, mark)
    assert (path / "00000004.png").exists()


def test_frames_of_another_size_are_refused_and_quality_is_in_each_formats_own_measure(video_writer, tmp_path):
    spec = video_writer.VideoSpec(width=48, height=32, rate=Fraction(16), crf=34.0, metadata={})
    for suffix, crf in ((".mp4", "34"), (".webm", "42")):  # of H.264's 51 and VP9's 63
        arguments = video_writer.CONTAINERS[suffix](spec).arguments()
        assert arguments[arguments.index("-crf") + 1] == crf
    writer = video_writer.open_writer(tmp_path / "v.mp4", spec)
    with pytest.raises(ValueError, match="makes frames of 32x48 pixels where 48x32 are due"):
        writer.write(torch.zeros(1, 48, 32, 3))
    writer.abandon()


def test_what_is_written_beside_the_sampling_is_cut_counted_and_shown_once(pack_module, monkeypatch):
    """Two chunks behind two given latent frames, of a video of 11 frames; a third chunk cannot be written."""
    writing = pack_module("model_patches.writing_thread")
    monkeypatch.setattr(writing, "CONTEXT_LATENT_FRAMES", 2)
    error, written, shown = pack_module("model_patches.video_writer").FrameValueError("frames hold NaN"), [], []

    class Writer:
        frames = submitted = 0

        def write(self, images):
            if images.isnan().any():
                raise error
            written.append(images)
            self.frames = self.submitted = self.frames + len(images)

    def chunk(first, count):
        pixels = torch.arange(first, first + count).float()[None, :, None, None, None].expand(1, count, 1, 1, 4)
        return SimpleNamespace(result=lambda: pixels)

    state = SimpleNamespace(frames=0)
    opened = SimpleNamespace(state=state, writer=Writer(), path=Path("v"), subfolder="", length=11)
    options = SimpleNamespace(width=1, height=1, rate=Fraction(16), written_context=lambda plan: 5)
    plan = SimpleNamespace(settings=CausalSettings(frames_per_chunk=2), context_frames=2)
    thread = writing.WritingThread(opened, options, None, plan, shown.append)
    try:
        for handle in (chunk(0, 5), chunk(5, 4), chunk(9, 4)):
            thread.put(handle, "Chunk")
            thread.drain()
        assert torch.cat(written)[:, 0, 0, 0].tolist() == list(range(11))
        assert thread.tail[:, 0, 0].tolist() == [[float(frame)] * 3 for frame in range(6, 11)], "two latent frames"
        assert thread.tail.untyped_storage().nbytes() == thread.tail.nbytes, "no earlier frames stay with them"
        assert [(progress.frames, progress.made) for progress in shown] == [(5, 0), (9, 4), (11, 6)]
        assert [len(progress.newest) for progress in shown] == [5, 4, 2]
        opened.length = 99
        thread.put(SimpleNamespace(result=lambda: torch.full((1, 1, 1, 1, 3), math.nan)), "Chunk 4")
        with pytest.raises(ValueError, match="Chunk 4: its decoded frames hold NaN at the step of decoding"):
            thread.drain()
        with pytest.raises(ValueError, match="Chunk 4"):
            thread.put(chunk(0, 1), "Chunk 5")
        assert len(written) == 3
    finally:
        thread.end()


def test_an_encoder_that_would_write_other_frames_does_not_go_on_with_a_video(video_writer, tmp_path):
    """A header holds for the whole file: frames of another kind behind it would not play."""
    path = tmp_path / "v.mp4"
    spec = video_writer.VideoSpec(width=48, height=32, rate=Fraction(16), crf=20.0, metadata={})
    writer = video_writer.open_writer(path, spec)
    writer.write(torch.zeros(3, 32, 48, 3))
    mark = writer.settle()
    writer.abandon()
    before = path.read_bytes()
    other = video_writer.VideoSpec(width=64, height=32, rate=Fraction(16), crf=20.0, metadata={})
    writer = video_writer.open_writer(path, other, mark)
    with pytest.raises(video_writer.VideoWriteError, match="encodes in another way than the one that began v.mp4"):
        writer.write(torch.zeros(3, 32, 64, 3))
        writer.settle()
    writer.abandon()
    assert path.read_bytes() == before and not children()


@pytest.mark.parametrize("metadata", [{}, {"prompt": "x" * 999}], ids=["bare", "metadata"])
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_finished_video_says_how_long_it_is_and_a_growing_one_nothing_wrong(video_writer, tmp_path, suffix, metadata):
    path, rate = tmp_path / f"v{suffix}", Fraction(16)
    spec = video_writer.VideoSpec(width=48, height=32, rate=rate, crf=20.0, metadata=metadata)
    images = torch.rand(12, 32, 48, 3)

    def length() -> float | None:
        with av.open(str(path)) as container:
            return None if container.duration is None else container.duration / av.time_base

    writer = video_writer.open_writer(path, spec)
    writer.write(images[:5])
    mark = writer.settle()
    growing = length()
    writer.write(images[5:8])
    writer.close()  # as after Cancel
    assert length() == pytest.approx(8 / 16)
    writer = video_writer.open_writer(path, spec, mark)
    assert length() == pytest.approx(8 / 16), "nothing was written yet"
    writer.write(images[5:6])
    writer.abandon()
    assert length() == growing, "cut back, it is as it was"
    writer = video_writer.open_writer(path, spec, mark)
    writer.write(images[5:])
    writer.close()
    assert length() == pytest.approx(12 / 16)
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 12
        container.seek(round(0.5 * av.time_base))
        assert next(container.decode(video=0)).time <= 0.5


def boxes(path: Path) -> list[str]:
    """Names of the outermost boxes of an MP4, which must fill the file."""
    data, at, names = path.read_bytes(), 0, []
    while at < len(data):
        size, name = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8].decode()
        size = int.from_bytes(data[at + 8 : at + 16]) if size == 1 else size
        assert size >= 8
        names.append(name)
        at += size
    assert at == len(data)
    return names


@pytest.mark.parametrize("rate", [Fraction(16), Fraction(2997, 125), Fraction(239_999, 1000)], ids=str)
def test_a_finished_mp4_is_a_plain_one(video_writer, tmp_path, rate):
    """No fragments, one index, whose places, times and key frames are those of the fragments before."""
    path = tmp_path / "v.mp4"
    spec = video_writer.VideoSpec(width=48, height=32, rate=rate, crf=20.0, metadata={"prompt": "moov avcC"})
    count = round(5 * rate) if rate < 100 else 30
    images = torch.rand(count, 32, 48, 3)

    def packets() -> list[tuple]:
        with av.open(str(path)) as container:
            return [(p.pts, p.dts, p.is_keyframe, bytes(p)) for p in container.demux(video=0) if p.size]

    writer = video_writer.open_writer(path, spec)
    writer.write(images[: count - 9])
    mark = writer.settle()
    writer.write(images[count - 9 :])
    writer.settle()
    growing, seen = path.read_bytes(), packets()
    assert boxes(path) == ["ftyp", "udta", "free", "moov"] + ["moof", "mdat"] * count
    assert sum(key for _, _, key, _ in seen) >= 2 and not all(key for _, _, key, _ in seen)
    with av.open(str(path)) as container:
        assert container.metadata["prompt"] == "moov avcC"
    writer.close()
    assert boxes(path) == ["ftyp", "udta", "mdat", "moov"]
    assert len(packets()) == count and packets() == seen
    finished = path.read_bytes()
    room = growing.index(b"free") - 4
    assert finished[:room] == growing[:room] and finished[room + 16 : len(growing)] == growing[room + 16 :]
    with av.open(str(path)) as container:
        (video,) = container.streams
        assert video.frames == count and video.average_rate == rate and container.metadata["prompt"] == "moov avcC"
        assert video.duration * video.time_base == count / rate
        container.seek(round((count - 10) / rate * av.time_base))
        assert next(container.demux(video)).is_keyframe
    # Players that ask the index alone find the length and the texts there: the movie's and the track's, rounded up.
    index = finished[len(growing) :]
    (movie_rate, movie), (track,) = (
        struct.unpack_from(format, index, index.index(name) + at)
        for name, at, format in ((b"mvhd", 16, ">II"), (b"tkhd", 24, ">I"))
    )
    assert movie == track == math.ceil(count / rate * movie_rate)
    assert index.count(b"moov avcC") == 1
    again = video_writer.open_writer(path, spec, mark)
    again.close()
    assert path.read_bytes() == finished, "nothing was written"
    again = video_writer.open_writer(path, spec, mark)
    again.write(images[count - 9 :])
    again.close()
    assert path.read_bytes() == finished


def test_an_mp4_plays_wherever_its_ending_is_cut_off(video_writer, tmp_path, monkeypatch):
    path = tmp_path / "v.mp4"
    spec = video_writer.VideoSpec(width=48, height=32, rate=Fraction(16), crf=20.0, metadata={})

    def no_more(*_):
        raise OSError(28, "No space left on device")

    for at, left in (("_write_all", "mdat"), ("_write_at", "free")):
        writer = video_writer.open_writer(path, spec)
        writer.write(torch.rand(6, 32, 48, 3))
        mark = writer.settle()
        owner = video_writer if at == "_write_all" else type(writer)
        with monkeypatch.context() as patched:
            patched.setattr(owner, at, no_more)
            if at == "_write_at":  # killed there: nothing tidies up
                patched.setattr(os, "ftruncate", lambda *_: None)
            with pytest.raises(video_writer.VideoWriteError, match="No space left"):
                writer.close()
        assert boxes(path)[-1] == left and len(decoded(path)) == 6
        writer.abandon()
        assert path.stat().st_size == mark.size and len(decoded(path)) == 6
        path.unlink()


@pytest.mark.parametrize("finished", [True, False])
def test_a_video_that_another_server_finished_or_went_on_with_is_not_touched(
    stream, options, output, pack_module, stream_state, monkeypatch, finished
):
    files_of = pack_module("model_patches.stream_files")
    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(2))
    video = output / "v_00001_.mp4"
    before, listed = video.read_bytes(), files_of.find_states

    def and_then_it_is_done(folder):
        ((path, state),) = found = listed(folder)
        path.unlink() if finished else stream_state.save_state(path, dataclasses.replace(state, chunk=3), {})
        return found

    monkeypatch.setattr(files_of, "find_states", and_then_it_is_done)
    assert stream(options()).path.name == "v_00002_.mp4"
    assert video.read_bytes() == before


def test_a_lock_has_one_holder_and_a_look_leaves_nothing(stream_state, tmp_path, monkeypatch):
    path = tmp_path / "v.lock"
    first, second, third = (stream_state.StreamLock(path) for _ in range(3))
    assert not first.is_held() and not path.exists()
    assert first.acquire() and second.is_held() and not second.acquire()
    first.release()
    assert not second.is_held() and not path.exists()
    # The holder lets go, and removes the file, between the second's opening it and locking it.
    assert first.acquire()
    own = stream_state.try_lock

    def after_the_release(handle):
        monkeypatch.setattr(stream_state, "try_lock", own)
        first.release()
        assert third.acquire()
        return own(handle)

    monkeypatch.setattr(stream_state, "try_lock", after_the_release)
    assert not second.acquire() and third.is_held()
    third.release()

    def has_no_locks(handle):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(stream_state, "try_lock", has_no_locks)
    assert not first.is_held() and first.acquire() and not second.is_held()
    first.release()
    assert files(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux: tells which files are mapped")
@pytest.mark.parametrize("mode", ("reference", "noise"))
def test_a_resumed_run_holds_no_part_of_its_state_file(streaming, demo, options, motion, output, mode, pack_module):
    """Windows refuses to replace a file that is mapped. With prompts and motion a state has all that it can have."""
    model, flow = motion(mode)
    _, _, negative, vae = demo
    prompts = pack_module("model_patches.prompts")
    clip = pack_module("nodes.demo_loader").DiagonalDemoLoader.execute("student").result[1]
    positive = prompts.schedule_prompts(
        clip, "0: a red circle moves right\nchunk 4: a red circle moves up", fps=16.0, switch="recache", blend_chunks=1
    )
    wanted = options(format="png", seconds=4.0, state_every=1)

    def run(on_progress):
        return streaming.stream_video(
            model, positive, negative, vae, SCHEDULE, wanted, optical_flow=flow, on_progress=on_progress
        )

    with pytest.raises(Stop):
        run(stop_at(2))  # with a state after the first chunk, whose latents are history and the flow's tail at once
    mapped = []

    def look(progress):
        mapped.append(".state.safetensors" in Path("/proc/self/maps").read_text())

    run(look)
    assert mapped and not any(mapped)


@pytest.mark.parametrize("damage", ["overwritten", "shorter"])
def test_an_mp4_that_another_program_changed_is_not_given_a_wrong_index(video_writer, tmp_path, damage):
    path = tmp_path / "v.mp4"
    spec = video_writer.VideoSpec(width=48, height=32, rate=Fraction(16), crf=20.0, metadata={})
    writer = video_writer.open_writer(path, spec)
    writer.write(torch.rand(6, 32, 48, 3))
    size = writer.settle().size
    with path.open("r+b") as file:
        if damage == "shorter":
            file.truncate(size - 100)
        else:
            file.seek(path.read_bytes().rindex(b"moof"))
            file.write(b"mooo")
    with pytest.raises(video_writer.VideoWriteError, match="another program changed it"):
        writer.close()
    writer.abandon()


def test_an_error_in_the_last_chunk_ends_the_run_in_order(stream, options, output, video_writer, monkeypatch):
    write, given = video_writer.EncodedWriter.write, []

    def fails_at_last(self, images):
        given.append(len(images))
        if len(given) == 3:
            raise video_writer.VideoWriteError("no more")
        write(self, images)

    with monkeypatch.context() as patched:
        patched.setattr(video_writer.EncodedWriter, "write", fails_at_last)
        with pytest.raises(video_writer.VideoWriteError, match="no more"):
            stream(options())
    assert not [thread for thread in threading.enumerate() if thread.name == "diagonal-stream"] and not children()
    assert len(decoded(output / "v_00001_.mp4")) == 21 and boxes(output / "v_00001_.mp4")[-1] == "moov"
    assert stream(options()).path.name == "v_00001_.mp4"


def test_a_context_that_cannot_be_encoded_does_not_lose_a_state_that_is_to_be_kept(
    streaming, stream, options, output, monkeypatch
):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no memory for the context")

    with monkeypatch.context() as patched:
        patched.setattr(streaming, "encode_context", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            stream(options(keep_state=True))
    lines = []
    result = stream(options(keep_state=True), announce=lines.append)
    assert result.path.name == "v_00001_.mp4" and "after chunk 2" in lines[0] and len(decoded(result.path)) == 32
    assert stream(options(keep_state=True, seconds=4.0)).path == result.path, "what a longer one needs is kept"


def test_memory_does_not_depend_on_the_length(stream, options):
    """A day of video is 345,601 latent frames; held anywhere they would be 1.4 GB."""

    def held() -> tuple[int, int]:
        gc.collect()
        # By their own types: stand-ins that torch.compile leaves have no storage, nor have those on the meta device.
        tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
        tensors = [tensor for tensor in tensors if tensor.device.type != "meta"]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return len(tensors), sum(storages.values())

    before = held()[1]
    counts = {}

    def fits(now: tuple[int, int]) -> bool:
        return all(late <= early for late, early in zip(now, counts[6], strict=True))

    def count(progress):
        # As many chunks behind a state: the newest is held for a Cancel until it is in one.
        if progress.chunk == 6 and progress.step == 1:
            looks = []
            for _ in range(6):  # the writing thread may have a chunk's frames still
                looks.append(held())
                time.sleep(0.1)
            counts[6] = min(looks)
        if progress.chunk == 18 and progress.step == 1:
            give_up = time.monotonic() + 20
            while not fits(now := held()) and time.monotonic() < give_up:
                time.sleep(0.1)
            counts[18] = now
        if progress.chunk == 19:
            raise Stop

    with pytest.raises(Stop):
        stream(options(seconds=86_400.0, state_every=4), on_progress=count)
    assert fits(counts[18]), counts
    assert counts[18][1] - before < 16 << 20


NASTY = "=;#\\ \n\t\"'%s ü \u6f22 \U0001f388 \\"


@pytest.mark.parametrize("format", ["mp4", "webm", "png"])
def test_a_long_workflow_is_in_the_file(stream, options, format):
    metadata = {
        "workflow": {"nodes": [{"id": n, "text": NASTY} for n in range(4000)]},
        "prompt": {"1": {"inputs": {"text": NASTY}}},
        "note": "a = b; # c\nd",
    }
    assert len(json.dumps(metadata)) > 200_000
    with pytest.raises(Stop):
        stream(options(format=format), metadata=metadata, on_progress=stop_at(2))
    path = stream(options(format=format), metadata=metadata).path
    if format == "png":
        with Image.open(path / "00000001.png") as image:
            found = image.text
        assert (path / "00000002.png").stat().st_size < 200_000
    else:
        with av.open(str(path)) as container:
            found = {key.lower(): value for key, value in container.metadata.items()}
    assert json.loads(found["workflow"]) == metadata["workflow"]
    assert json.loads(found["prompt"]) == metadata["prompt"]
    assert found["note"] == metadata["note"]


@pytest.mark.parametrize("name", ["v.mp4", "v.webm", "v"])
def test_half_a_surrogate_pair_in_the_metadata_ends_no_run(video_writer, tmp_path, name):
    metadata = {"note": "a\ud800", "\u6f22\udcff": "b"}
    spec = video_writer.VideoSpec(width=48, height=32, rate=Fraction(16), crf=20.0, metadata=metadata)
    writer = video_writer.open_writer(tmp_path / name, spec)
    writer.write(torch.rand(2, 32, 48, 3))
    writer.close()
    first = tmp_path / name / "00000001.png" if name == "v" else tmp_path / name
    assert b"note" in first.read_bytes().lower() and b"a?" in first.read_bytes()


def test_a_longer_length_goes_on(stream, options, output, stream_state):
    whole = stream(options(seconds=4.0)).path
    with pytest.raises(Stop):
        stream(options(seconds=3.0), on_progress=stop_at(3))
    unfinished = stream(options(seconds=4.0)).path
    assert unfinished.name == "v_00002_.mp4"
    # 38 frames end inside the last chunk, which a longer length makes anew.
    finished = stream(options(seconds=2.4, keep_state=True, state_every=9))
    assert "v_00003_.done.safetensors" in files(output) and len(decoded(finished.path)) == 38
    before = finished.path.read_bytes()
    with pytest.raises(Stop):  # no longer than it is: another video, which is stopped before its first frame
        stream(options(seconds=2.2), on_progress=stop_at(0))
    assert finished.path.read_bytes() == before and "v_00003_.done.safetensors" in files(output)
    lines = []
    longer = stream(options(seconds=4.0), announce=lines.append).path
    assert longer == finished.path and "after chunk 3" in lines[0]
    assert len(decoded(longer)) == len(decoded(unfinished)) == 64
    assert unfinished.read_bytes() == whole.read_bytes()
    assert files(output) == ["v_00001_.mp4", "v_00002_.mp4", "v_00003_.mp4"]
    # Its last chunk lacks frames that a longer length has: it is never in the state, however often that is saved.
    again = stream(options(seconds=2.4, keep_state=True, state_every=1))
    state = stream_state.read_state(output / "v_00004_.done.safetensors")
    assert len(decoded(again.path)) == 38 and (state.chunk, state.frames) == (3, 33)


@pytest.mark.parametrize(("stopped", "goes_on"), [(4, True), (5, False)])
def test_a_length_that_counts_positions_in_another_way_goes_on_only_before_that_matters(
    stream, options, stopped, goes_on
):
    """80 frames are 21 latent frames, counted from the start; with more they count in the window of 12."""
    with pytest.raises(Stop):
        stream(options(seconds=5.0, state_every=stopped), on_progress=stop_at(stopped))
    lines = []
    with pytest.raises(Stop):
        stream(options(seconds=6.0), announce=lines.append, on_progress=stop_at(stopped if goes_on else 0))
    assert (f"after chunk {stopped}" in lines[0]) == goes_on
    assert ("counts positions in another way" in lines[0]) == (not goes_on)
    stream(options(seconds=5.0), announce=lines.append)
    assert f"Resumed v_00001_.mp4 at {(12 * stopped - 3) / FPS:.1f} s" in lines[1]


def test_memory_that_grows_with_the_length_is_said(streaming, demo, options, output, pack_module, caplog):
    make_causal = pack_module("model_patches.causal").make_causal
    for window, said in ((12, False), (-1, True)):
        model = make_causal(demo[0], CausalSettings(window=window, sink=0))
        with pytest.raises(Stop):
            streaming.stream_video(model, *demo[1:], SCHEDULE, options(), on_progress=stop_at(0))
        assert ("memory grows with the length: 9 latent frames" in caplog.text) == said


def test_only_the_same_graph_resumes(stream, options, output, demo, streaming, caplog):
    with pytest.raises(Stop):
        stream(options(seconds=4.0), on_progress=stop_at(5))
    lines = []
    changes = [{"seed": 4}, {"crf": 21.0}, {"fps": 15.0}, {"format": "webm"}, {"cfg": 2.0}, {"width": 80}]
    for number, change in enumerate(changes):
        stream(options(**{"seconds": 0.3, **change}), announce=lines.append)
        assert "Resumed" not in lines[-1] and f"v_{number + 2:05}_" in lines[-1]
        name = {"fps": "fps", "width": "width or height"}.get(next(iter(change)), next(iter(change)))
        # With guidance the negative prompt counts, too.
        assert "v_00001_ is unfinished and is not gone on with: " in lines[-1] and f"{name} changed." in lines[-1]
    model, positive, negative, vae = demo
    other = model.clone()
    key = next(name for name in model.model.state_dict() if name.endswith("ffn.0.weight"))
    other.add_patches({key: ("diff", (torch.ones_like(model.model.state_dict()[key]),))}, 0.1)
    prompt_words = "positive (a text, a time, switch or blend_chunks)"
    for what, *inputs in ((prompt_words, model, negative, negative, vae), ("model", other, positive, negative, vae)):
        result = streaming.stream_video(*inputs, SCHEDULE, options(seconds=0.3), announce=lines.append)
        assert "Resumed" not in lines[-1] and f"{what} changed." in lines[-1]
        result.path.unlink()
    # Too short a length, which has nothing left to make.
    with caplog.at_level(logging.WARNING):
        stream(options(seconds=1.0), announce=lines.append)
    assert "Resumed" not in lines[-1] and "57 frames already, and 16 are asked for" in caplog.text
    assert "v_00001_.state.safetensors" in files(output)
    # Without guidance the negative prompt has no say.
    anew = streaming.stream_video(model, positive, positive, vae, SCHEDULE, options(seconds=4.0), announce=lines.append)
    assert anew.path.name == "v_00001_.mp4" and "Resumed" in lines[-1]
    stream(options(seconds=0.3, seed=5), announce=lines.append)
    assert "unfinished" not in lines[-1]


def graph_with(**texts: str) -> dict:
    """An API graph whose stream node, "1", has a node with a text at each of its inputs."""
    graph = {name: {"class_type": "CLIPTextEncode", "inputs": {"text": text}} for name, text in texts.items()}
    return {**graph, "1": {"class_type": "DiagonalStreamVideo", "inputs": {name: [name, 0] for name in texts}}}


@pytest.mark.parametrize("older", [False, True], ids=["now", "an older pack's state"])
def test_a_node_at_an_input_that_is_not_used_does_not_count(streaming, stream, options, output, monkeypatch, older):
    """An older pack counted it: what it left goes on in its own graph, as before."""
    digest = streaming.graph_digest

    def queue(cfg, positive, negative, **more):
        lines = []
        graph = graph_with(positive=positive, negative=negative)
        with pytest.raises(Stop):
            stream(options(cfg=cfg), prompt=graph, node_id="1", announce=lines.append, **more)
        return "Resumed" in lines[0]

    with monkeypatch.context() as patched:
        if older:
            patched.setattr(
                streaming, "graph_digest", lambda prompt, node, inputs: digest(prompt, node, streaming.GRAPH_INPUTS)
            )
        assert not queue(1.0, "a", "b", on_progress=stop_at(1))
    at = stop_at(1)
    assert queue(1.0, "a", "b", on_progress=at)
    assert queue(1.0, "a", "edited", on_progress=stop_at(0 if older else 1)) == (not older)
    assert not queue(1.0, "edited", "b", on_progress=stop_at(0))
    assert not queue(2.0, "a", "b", on_progress=stop_at(1))
    assert queue(2.0, "a", "b", on_progress=at) and not queue(2.0, "a", "edited", on_progress=stop_at(0))


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (0, 1, 2, 1), (2, 0, 1, 0), (3, 4, 5, 1)])
def test_every_value_of_a_motion_counts(stream_state, place):
    motion = torch.zeros(4, 5, 6, 2)
    before = stream_state.digest_of_whole(motion)
    motion[place] = 1e-6
    assert stream_state.digest_of_whole(motion) != before
    motion[place] = 0
    assert stream_state.digest_of_whole(motion) == before


def test_a_setting_that_older_packs_lacked_leaves_their_videos_theirs(stream_state):
    """Half-made videos of before kv_cache_dtype go on."""
    known = [field for field in dataclasses.fields(CausalSettings) if field.name != "kv_cache_dtype"]
    older = dataclasses.make_dataclass("CausalSettings", [(field.name, object, field.default) for field in known])
    assert stream_state.digest_of(part=CausalSettings()) == stream_state.digest_of(part=older())
    assert stream_state.digest_of(part=CausalSettings(kv_cache_dtype="int8")) != stream_state.digest_of(part=older())
    assert stream_state.digest_of(part=CausalSettings(sink=2)) != stream_state.digest_of(part=older())


def test_an_input_that_older_packs_lacked_leaves_their_videos_theirs(stream_state, pack_module):
    """ComfyUI's page queues an older workflow with the defaults of all inputs that its nodes have now."""
    nodes = {node.define_schema().node_id: node.define_schema() for node in pack_module("nodes").NODES}

    def digest(kind, **later):
        graph = {
            "model": {"class_type": kind, "inputs": {"window": 12, **later}},
            "1": {"class_type": "DiagonalStreamVideo", "inputs": {"model": ["model", 0]}},
        }
        return stream_state.graph_digest(graph, "1", ["model"])

    for (kind, name), default in stream_state.INPUTS_ADDED_LATER.items():
        (there,) = [item for item in nodes[kind].inputs if item.id == name]
        assert there.optional and there.default == default, (kind, name)
        assert digest(kind, **{name: default}) == digest(kind), (kind, name)
        assert len({digest(kind), digest(kind, **{name: "other"}), digest(kind, **{name: ["model", 0]})}) == 3
        assert digest("AnotherNode", **{name: default}) != digest("AnotherNode")


def test_another_lora_is_another_model(demo, stream_state):
    """ComfyUI keeps a LoRA's tensors in an object of its own."""
    import comfy.sd

    path = "diffusion_model.blocks.0.ffn.0"
    rows, columns = demo[0].model.state_dict()[f"{path}.weight"].shape

    def digest(seed, strength=0.5):
        generator = torch.Generator().manual_seed(seed)
        lora = {
            f"{path}.lora_A.weight": torch.randn(2, columns, generator=generator),
            f"{path}.lora_B.weight": torch.randn(rows, 2, generator=generator),
        }
        model = comfy.sd.load_lora_for_models(demo[0], None, lora, strength, 0)[0]
        assert model.patches
        return stream_state.digest_of(model=model)

    assert digest(1) == digest(1)
    assert len({stream_state.digest_of(model=demo[0]), digest(1), digest(2), digest(1, 0.4)}) == 4


def test_a_model_is_the_same_before_and_after_dynamic_vram_has_loaded_it(tiny_wan, stream_state):
    """It casts the modulations in place, for good, and other weights beside the file's."""
    model = tiny_wan.model
    modulations = [name for name, _ in model.named_parameters() if name.endswith(".modulation")]
    assert {name for name in stream_state._lasting_dtypes(model)} == set(modulations) and len(modulations) == 3
    as_made = stream_state.digest_of(model=tiny_wan)
    for name in modulations:  # as a file of another dtype leaves them until the first load
        comfy.utils.get_attr(model, name).data = comfy.utils.get_attr(model, name).data.double()
    digest = stream_state.digest_of(model=tiny_wan)
    assert digest == as_made
    tiny_wan._load_list(for_dynamic=True, default_device=torch.device("cpu"))
    assert comfy.utils.get_attr(model, modulations[0]).dtype == torch.float32
    assert stream_state.digest_of(model=tiny_wan) == digest
    linear = model.diffusion_model.blocks[0].ffn[0]
    linear.weight.data = linear.weight.data.double()
    assert stream_state.digest_of(model=tiny_wan) != digest, "a weight that is not cast in place counts as it is"


def test_what_changed_is_said_for_videos_of_the_same_name_only(stream, options, output):
    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(2))
    lines = []
    for change in ({"seed": 4}, {"filename_prefix": "w"}, {"filename_prefix": "v_1"}):
        with pytest.raises(Stop):
            stream(options(**change), announce=lines.append, on_progress=stop_at(0))
    assert ["unfinished" in line for line in lines] == [True, False, False]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"graph"}, "a node before it"),
        ({"seed"}, "seed"),
        ({"model", "graph"}, "model"),  # the graph holds the model's node, too
        ({"rate", "size", "graph"}, "width or height and fps"),
        ({"seed", "cfg", "crf"}, ""),
        (set(), ""),
    ],
)
def test_what_a_person_changed_is_said_by_name(pack_module, stream_state, changed, said):
    names = ("model", "size", "seed", "cfg", "rate", "crf", "graph")
    state = stream_state.StreamState(digest="d", length=1, latent_frames=1, parts=dict.fromkeys(names, "before"))
    now = {name: "now" if name in changed else "before" for name in names}
    identity = pack_module("model_patches.stream_files").Identity(now)
    assert identity.changed_since(state) == said
    ended = dataclasses.replace(state, ended=True)
    assert identity.changed_since(ended) == ("" if said == "seed" or " and " in said else said)
    more = dataclasses.replace(state, parts={**state.parts, "write_context": "before"})
    one_more = " and ".join(filter(None, [said, "write_context"])) if len(changed - {"graph"}) < 2 else ""
    if changed != {"graph"}:
        assert identity.changed_since(more) == one_more, "a part that only the state has"
    assert identity.changed_since(dataclasses.replace(state, parts={})) == "", "a state of an older version"


@pytest.mark.parametrize(
    ("seconds", "fps", "frames", "latent_frames"),
    [
        (2.0, 16, 32, 9),
        (0.3, 16, 5, 2),
        (0.34375, 16, 6, 3),
        (0.03125, 16, 1, 1),
        (1.0, 29.97, 30, 9),
        (0.1, 0.001, 0, 0),
    ],
)
def test_a_length_is_rounded_to_whole_frames(options, seconds, fps, frames, latent_frames):
    if not frames:
        with pytest.raises(ValueError, match="less than half a frame"):
            options(seconds=seconds, fps=fps)
        return
    wanted = options(seconds=seconds, fps=fps)
    assert (wanted.frames, wanted.latent_frames) == (frames, latent_frames)


def test_restart_begins_anew_and_a_finished_video_is_never_touched(stream, options, output):
    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(2))
    first = (output / "v_00001_.mp4").read_bytes()
    second = stream(options(restart=True)).path
    assert second.name == "v_00002_.mp4" and (output / "v_00001_.mp4").read_bytes() == first
    third = stream(options()).path
    assert third.name == "v_00003_.mp4" and third.read_bytes() == second.read_bytes()
    assert files(output) == ["v_00001_.mp4", "v_00002_.mp4", "v_00003_.mp4"]


@pytest.mark.parametrize("ending", [CANCELLED, FAILED])
def test_a_restart_that_makes_nothing_leaves_the_video_that_it_would_replace(stream, options, output, ending):
    """Until the new video has something to go on from; with two unfinished ones, as two servers leave them."""
    at, error = ending
    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(2))
    for end in (".mp4", ".state.safetensors"):
        (output / f"v_00002_{end}").write_bytes((output / f"v_00001_{end}").read_bytes())
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    there = []
    for forwards in (1, FORWARDS_A_CHUNK):

        def report(progress, forwards=forwards):
            there.append({name for name in files(output) if name.endswith(".state.safetensors")})
            at(forwards)(progress)

        with pytest.raises(error):
            stream(options(restart=True), on_progress=report)
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    with pytest.raises(error):
        stream(options(restart=True), on_progress=at(FORWARDS_A_CHUNK + 1))
    assert files(output) == ["v_00001_.mp4", "v_00002_.mp4", "v_00003_.mp4", "v_00003_.state.safetensors"]
    assert there == [{f"v_{n:05}_.state.safetensors" for n in (1, 2, 3)}] * (1 + FORWARDS_A_CHUNK)


def test_a_restart_of_one_chunk_replaces_the_unfinished_video_when_it_is_done(stream, options, output):
    """It saves no state."""
    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(2))
    assert stream(options(seconds=0.5, restart=True)).path.name == "v_00002_.mp4"
    assert files(output) == ["v_00001_.mp4", "v_00002_.mp4"]


def test_a_restart_that_ends_with_frames_replaces_the_unfinished_video_without_a_state_too(stream, options, output):
    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(2))
    with pytest.raises(Stop):
        stream(options(restart=True, state_every=9), on_progress=stop_at(1))
    assert len(decoded(output / "v_00002_.mp4")) == 9
    assert files(output) == ["v_00001_.mp4", "v_00002_.mp4", "v_00002_.state.safetensors"]


def test_a_replaced_state_that_another_program_holds_does_not_end_the_run(
    stream, options, output, monkeypatch, caplog, pack_module
):
    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(2))
    monkeypatch.setattr(pack_module("model_patches.stream_files"), "remove_file", lambda path: path.exists() and held())
    assert len(decoded(stream(options(restart=True)).path)) == 32
    assert "v_00001_.state.safetensors cannot be removed: in use" in caplog.text
    assert "v_00001_.state.safetensors" in files(output)


def test_restart_leaves_the_kept_state_of_a_finished_video(stream, options, output):
    stream(options(keep_state=True))
    assert stream(options(restart=True)).path.name == "v_00002_.mp4"
    lines = []
    assert "v_00001_.done.safetensors" in files(output)
    assert stream(options(seconds=3.0), announce=lines.append).path.name == "v_00001_.mp4" and "Resumed" in lines[0]


@pytest.mark.parametrize("damage", ["gone", "short", "foreign", "state"])
def test_a_video_or_state_that_is_damaged_is_not_resumed(stream, options, output, caplog, damage):
    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(2))
    video, state = output / "v_00001_.mp4", output / "v_00001_.state.safetensors"
    if damage == "gone":
        video.unlink()
    elif damage == "short":
        os.truncate(video, video.stat().st_size // 2)
    elif damage == "foreign":
        video.write_bytes(bytes(video.stat().st_size))
    else:
        os.truncate(state, state.stat().st_size // 2)
    with caplog.at_level(logging.WARNING):
        result = stream(options())
    assert len(decoded(result.path)) == 32 and result.path.name != ("" if damage == "gone" else "v_00001_.mp4")
    assert ("" if damage == "gone" else "cannot be") in caplog.text
    assert state.exists() == (damage != "gone"), "nothing can go on with it"


@pytest.mark.parametrize("suffix", ["state", "done"])
def test_the_state_of_a_video_that_is_gone_is_removed_without_a_word(stream, options, output, stream_state, suffix):
    """Not while another process holds its lock, as when it begins the video; and not one of another name."""
    left = []
    for name in ("v_00007_", "w_00001_"):
        left += [output / f"{name}.{suffix}.safetensors", output / f"{name}.prompts.json"]
        state = stream_state.StreamState(digest="d", length=64, latent_frames=17, chunk=2, parts={"seed": "another"})
        stream_state.save_state(left[-2], state, {})
        left[-1].write_text("[]")
    lock = stream_state.StreamLock(output / "v_00007_.lock")
    lines = []

    def queue():
        with pytest.raises(Stop):
            stream(options(), announce=lines.append, on_progress=stop_at(0))
        return [path.exists() for path in left]

    assert lock.acquire() and queue() == [True] * 4
    lock.release()
    assert queue() == [False, False, True, True] and "".join(lines).count("\n") == 0
    assert set(files(output)) == {path.name for path in left[2:]}


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_a_video_behind_a_link_to_a_disk_that_is_away_keeps_its_state(stream, options, output):
    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(2))
    video = output / "v_00001_.mp4"
    video.unlink()
    video.symlink_to(output / "away" / "v.mp4")
    stream(options(seed=4, seconds=0.3))
    assert "v_00001_.state.safetensors" in files(output)


def test_an_unfinished_video_is_said_with_what_its_state_takes_and_one_that_was_ended_early_once(
    stream, options, output, stream_state
):
    early = stream(options(format="png"), finish=lambda: True)
    name = "v_00001_.state.safetensors"
    size = -(-(output / name).stat().st_size // 10**6)
    assert f" To go on it needs {name} ({size} MB); if you will not, delete that." in early.message
    lines = []

    def queue(**changes):
        with pytest.raises(Stop):
            stream(options(format="png", **changes), announce=lines.append, on_progress=stop_at(0))
        return lines[-1]

    assert stream_state.read_state(output / name).ended
    assert "unfinished" not in queue(seed=4) and "unfinished" not in queue(seconds=0.4)
    with pytest.raises(Stop):
        stream(options(format="png"), announce=lines.append, on_progress=stop_at(2))
    assert "Resumed" in lines[-1] and not stream_state.read_state(output / name).ended
    assert f"seed changed. Put it back to go on, or delete {name} (" in queue(seed=4)
    # Ended by a person, and with one thing changed other than the seed: that one may want to go on.
    stream_state.mark_ended(output / name)
    said = f"v_00001_ was finished early and is not gone on with: crf changed. Put it back to go on, or delete {name} ("
    assert said in queue(crf=21.0)
    assert "finished early" not in queue(seed=4) and "finished early" not in queue(seed=4, crf=21.0)


@pytest.mark.parametrize(("size", "said"), [(3_521_000_000, "(3.5 GB)"), (2_000_001, "(3 MB)"), (None, "")])
def test_a_file_is_said_with_its_size(pack_module, tmp_path, size, said):
    path = tmp_path / "v"
    if size is not None:
        path.touch()
        os.truncate(path, size)
    assert pack_module("model_patches.stream_files").name_and_size(path) == f"v {said}".strip()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parts", ["a"]), ("parts", {"seed": 3}), ("frames", "9"), ("frames", -1), ("chunk", True), ("chunk", 0),
        ("size", 1.0), ("moved", "0"), ("length", 0), ("live", [3]), ("run", None), ("digest", 5), ("\udcff", 1),
    ],
    ids=ascii,
)  # fmt: skip
def test_a_state_whose_values_are_of_other_kinds_is_left_alone(stream_state, tmp_path, caplog, field, value):
    sound = stream_state.StreamState(digest="d", length=33, latent_frames=9, chunk=1, committed=3, frames=9, size=99)
    path = tmp_path / f"v{stream_state.STATE_SUFFIX}"
    stream_state.save_state(path, sound, {})
    assert stream_state.read_state(path) is not None
    fields = dataclasses.asdict(sound) | {field: value}
    save_file({}, path, metadata={"format": "diagonal-stream-1", "stream": json.dumps(fields)})
    assert stream_state.find_states(tmp_path) == []
    assert "cannot be read" in caplog.text and caplog.text.isascii()


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_a_state_that_is_nested_too_deeply_or_has_a_name_of_other_bytes_is_left_alone(stream_state, tmp_path):
    path = tmp_path / f"v{stream_state.STATE_SUFFIX}"
    save_file({}, path, metadata={"format": "diagonal-stream-1", "stream": "[" * 100_000})
    stream_state.save_state(path.with_name("w.done.safetensors"), stream_state.StreamState(
        digest="d", length=33, latent_frames=9
    ), {})  # fmt: skip
    os.rename(tmp_path / "w.done.safetensors", os.fsencode(tmp_path) + b"/\xff.done.safetensors")
    assert stream_state.find_states(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("unable to mmap"), OSError(12, "no memory"), MemoryError()], ids=repr)
def test_a_state_is_found_without_being_mapped_and_one_that_cannot_be_is_named(
    stream, options, output, stream_state, video_writer, monkeypatch, error
):
    """Windows counts a mapping against the memory that programs may have: 3.5 GB for each state of Wan 1.3B."""
    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(2))
    before = content(output)

    def cannot(*_):
        raise error

    monkeypatch.setattr(stream_state, "safe_open", cannot)
    assert len(stream_state.find_states(output)) == 1
    with pytest.raises(video_writer.VideoWriteError, match="The state v_00001_.state.safetensors cannot be read: "):
        stream(options())
    assert content(output) == before


@pytest.mark.parametrize(
    ("lost", "said"), [("tail/", "tail/frames"), ("decoder/", "decoder/size"), ("decoder/0/", "decoder/.../started")]
)
def test_a_state_that_lacks_a_tensor_is_named(stream, options, output, stream_state, video_writer, lost, said):
    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(2))
    path = output / "v_00001_.state.safetensors"
    tensors = {name: tensor.clone() for name, tensor in stream_state.load_tensors(path, "").items()}
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
    if lost == "decoder/0/":
        kept["decoder/0/other"] = torch.zeros(1)
    stream_state.save_state(path, stream_state.read_state(path), kept)
    before = content(output)
    with pytest.raises(video_writer.VideoWriteError, match=f"The state v_00001_.state.safetensors lacks {said}"):
        stream(options())
    assert content(output) == before


NOTED = {"chunk": 1, "text": "a", "node": "2", "switch": "blend", "blend_chunks": 1}


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, *(json.dumps([NOTED | changed]) for changed in (
        {"chunk": "1"}, {"chunk": -1}, {"text": 5}, {"node": None}, {"switch": "jump"}, {"blend_chunks": 0}
    ))],
    ids=range(7),
)  # fmt: skip
def test_noted_prompts_of_another_kind_leave_those_of_the_state(pack_module, stream_state, tmp_path, content):
    path = tmp_path / f"v{stream_state.STATE_SUFFIX}"
    (tmp_path / f"v{stream_state.PROMPTS_SUFFIX}").write_text(content)
    live_prompts = pack_module("model_patches.stream_files").live_prompts
    state = stream_state.StreamState(digest="d", length=1, latent_frames=1, live=[NOTED])
    assert [dataclasses.asdict(prompt) for prompt in live_prompts(path, state)] == [NOTED]


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("size", [0, 1, 50])
def test_a_mark_before_the_end_of_the_header_does_not_cut_the_video(video_writer, tmp_path, suffix, size):
    path = tmp_path / f"v{suffix}"
    spec = video_writer.VideoSpec(width=48, height=32, rate=Fraction(16), crf=20.0, metadata={})
    writer = video_writer.open_writer(path, spec)
    writer.write(torch.rand(3, 32, 48, 3))
    writer.close()
    before = path.read_bytes()
    with pytest.raises(video_writer.VideoWriteError, match=f"3 frames in {size} bytes, less than its header"):
        video_writer.open_writer(path, spec, video_writer.Mark(frames=3, size=size))
    assert path.read_bytes() == before


def test_a_header_that_another_program_changed_does_not_leave_ffmpeg_without_a_reader(video_writer, tmp_path):
    path = tmp_path / "v.mp4"
    spec = video_writer.VideoSpec(width=48, height=32, rate=Fraction(16), crf=20.0, metadata={})
    writer = video_writer.open_writer(path, spec)
    writer.write(torch.rand(3, 32, 48, 3))
    mark = writer.settle()
    writer.close()
    path.write_bytes(path.read_bytes().replace(b"avcC", b"avcX"))
    writer = video_writer.open_writer(path, spec, mark)
    with pytest.raises(video_writer.VideoWriteError, match="v.mp4 is not a video that was written here .*Set restart"):
        writer.write(torch.rand(1, 32, 48, 3))
        writer.settle()
    writer.abandon()
    assert not children()


def test_of_two_finished_videos_a_longer_length_goes_on_with_the_longer(stream, options, output):
    stream(options(seconds=3.0, keep_state=True))
    stream(options(seconds=2.0, keep_state=True))
    assert [name for name in files(output) if "done" in name] == [f"v_0000{n}_.done.safetensors" for n in (1, 2)]
    assert stream(options(seconds=4.0)).path.name == "v_00001_.mp4"


def test_of_two_unfinished_videos_that_are_as_long_the_newest_goes_on(stream, options, output, stream_state):
    lock = stream_state.StreamLock(output / "v_00001_.lock")
    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(2))
    assert lock.acquire()  # else the second run would go on with it
    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(2))
    lock.release()
    for number, (newer, older) in enumerate(((2, 1), (1, 2)), start=1):
        for video, age in ((newer, 0), (older, 60)):
            state = output / f"v_{video:05}_.state.safetensors"
            os.utime(state, (time.time() - age, time.time() - age))
        lines = []
        with pytest.raises(Stop):
            stream(options(), announce=lines.append, on_progress=stop_at(2))
        assert f"Resumed v_{newer:05}_.mp4" in lines[0], number


def test_a_video_that_another_process_writes_is_left_alone(stream, options, output, stream_state):
    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(2))
    lock = stream_state.StreamLock(output / "v_00001_.lock")
    assert lock.acquire()
    assert stream(options()).path.name == "v_00002_.mp4"
    lock.release()
    assert stream(options()).path.name == "v_00001_.mp4"


def test_of_two_in_a_chain_the_finished_one_is_made_again_and_the_other_goes_on(stream, options, output):
    """As the help page says of a server that died during the second."""
    lines = []

    def chain(**more) -> list[str]:
        first = stream(options())
        second = stream(options(seconds=4.0), context=first.context, announce=lines.append, **more)
        return [first.path.name, second.path.name]

    with pytest.raises(Stop):
        chain(on_progress=stop_at(2))
    assert chain() == ["v_00003_.mp4", "v_00002_.mp4"] and "Resumed v_00002_.mp4" in lines[1]


def test_a_start_image_begins_the_video(stream, options, demo, sample_latent, pack_module):
    model, positive, negative, vae = demo
    image = torch.rand(1, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(1))
    given = pack_module("model_patches.context_frames").encode_context(vae, image, 6)
    wanted = options(format="png")
    latent = {"samples": torch.zeros(1, 16, 9, 8, 8)}
    whole = sample_latent(model, positive, negative, latent, SCHEDULE, seed=3, context=given)["samples"]
    with pytest.raises(Stop):
        stream(wanted, context=given, on_progress=stop_at(2))
    lines, forwards = [], []
    result = stream(wanted, context=given, announce=lines.append, on_progress=forwards.append)
    assert "frame 25 of 32, after chunk 2" in lines[0]
    total = forwards[0].total
    assert [at.forwards for at in forwards] == list(range(total + 1 - len(forwards), total + 1)), "counts on"
    expected = (vae.decode(whole)[0][:32] * 255).clamp(0, 255)
    found = result.video.get_components().images * 255
    assert (found - expected).abs().max() <= 1.001  # both are rounded
    assert "32 frames (2.0 s of video), 7 of them made now" in result.message
    seen = []
    result = stream(options(format="png", filename_prefix="anew"), context=given, on_frames=seen.append)
    assert "32 frames (2.0 s of video), 31 of them made now" in result.message, "one was given"
    assert [at.made for at in seen] == [at.frames - 1 for at in seen]


@pytest.fixture(scope="module")
def nine_frames(demo, pack_module):
    """9 frames that a video may begin with, as 3 latent frames."""
    images = torch.rand(9, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(1))
    return pack_module("model_patches.context_frames").encode_context(demo[3], images, 3)


@pytest.mark.parametrize("format", ["mp4", "webm", "png"])
def test_a_file_without_its_context_begins_with_the_first_new_frame(stream, options, format, nine_frames):
    """48 frames, of which 9 are given; two chunks, a stop, and the other two."""
    wanted = options(format=format, seconds=3.0, crf=1.0)
    short = dataclasses.replace(wanted, write_context=False)
    whole = stream(wanted, context=nine_frames)
    unstopped = stream(short, context=nine_frames)
    with pytest.raises(Stop):
        stream(short, context=nine_frames, on_progress=stop_at(2))
    lines, seen = [], []
    result = stream(short, context=nine_frames, announce=lines.append, on_frames=seen.append)
    assert "Resumed" in lines[0] and "at 1.5 s (frame 24 of 39, after chunk 2)" in lines[0]
    assert "39 frames (2.4 s of video), 15 of them made now" in result.message
    assert "39 frames (2.4 s of video), 39 of them made now" in unstopped.message
    assert {(at.length, at.resumed_at) for at in seen} == {(39, 24)}
    assert [at.made for at in seen] == [at.frames - 24 for at in seen] and seen[-1].frames == 39
    frames = [decoded(video.path) for video in (whole, unstopped, result)]
    assert [len(each) for each in frames] == [48, 39, 39]
    assert all(torch.equal(a, b) for a, b in zip(frames[1], frames[2], strict=True))
    away = [(a.float() - b.float()).abs().mean() for a, b in zip(frames[0][9:], frames[2], strict=True)]
    assert max(away) == 0 if format == "png" else max(away) < 2, "an encoder's frames depend on those before them"
    assert torch.equal(whole.context.latent, result.context.latent)
    assert torch.equal(whole.context.latent, unstopped.context.latent)


@pytest.mark.parametrize("format", ["mp4", "webm", "png"])
@pytest.mark.parametrize("ending", [CANCELLED, FAILED])
def test_a_run_stopped_while_its_file_has_given_frames_alone_leaves_nothing(
    stream, options, output, nine_frames, format, ending
):
    at, error = ending
    with pytest.raises(error):
        stream(options(format=format), context=nine_frames, on_progress=at(FORWARDS_A_CHUNK))
    assert files(output) == []


@pytest.mark.parametrize("format", ["mp4", "png"])
def test_a_disk_that_is_full_in_the_first_chunk_behind_given_frames_promises_nothing(
    stream, options, output, nine_frames, video_writer, format, monkeypatch
):
    name, room = ("replace_file", 9) if format == "png" else ("_write_all", 10)  # a file's header, too
    usual, calls = getattr(video_writer, name), []

    def fills_up(*arguments):
        calls.append(arguments)
        if len(calls) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return usual(*arguments)

    monkeypatch.setattr(video_writer, name, fills_up)
    with pytest.raises(video_writer.VideoWriteError) as error:
        stream(options(format=format), context=nine_frames)
    assert "No frame had been made yet, and nothing is kept; free some space" in str(error.value)
    assert files(output) == []


@pytest.mark.parametrize("format", ["mp4", "webm", "png"])
def test_a_run_killed_while_its_file_has_given_frames_alone_begins_again_in_it(
    stream, options, output, nine_frames, format, tmp_path
):
    wanted, lines = options(format=format, seconds=1.0), []
    left, there = tmp_path / "left", threading.Event()

    def kill(progress):
        assert progress.forwards < 2 * FORWARDS_A_CHUNK and (progress.chunk or there.wait(30))
        shutil.copytree(output, left, ignore=shutil.ignore_patterns("*.lock"), dirs_exist_ok=True)
        if progress.chunk or progress.step:
            raise Stop

    def leave():
        shutil.rmtree(output)
        shutil.copytree(left, output)

    with pytest.raises(Stop):
        stream(wanted, context=nine_frames, on_progress=kill, on_frames=lambda progress: there.set())
    assert files(output) == []
    leave()
    video = output / f"v_00001_{'' if format == 'png' else '.' + format}"
    assert 0 < len(decoded(video)) <= 9
    with pytest.raises(Stop):
        stream(wanted, context=nine_frames, on_progress=stop_at(0), announce=lines.append)
    assert files(output) == []
    leave()
    result = stream(wanted, context=nine_frames, announce=lines.append)
    assert result.path == video and len(decoded(video)) == 16 and files(output) == [video.name]
    assert all("Begun again" in line for line in lines[:2])


@pytest.mark.parametrize("format", ["mp4", "webm", "png"])
def test_only_a_video_of_few_frames_counts_as_given_frames_alone(pack_module, video_writer, tmp_path, format):
    has_own_frames = pack_module("model_patches.stream_files")._has_own_frames
    spec = video_writer.VideoSpec(width=SIZE, height=SIZE, rate=Fraction(FPS), crf=20.0, metadata={})
    path = tmp_path / f"v_{'' if format == 'png' else '.' + format}"
    writer = video_writer.open_writer(path, spec)
    writer.write(torch.rand(9, SIZE, SIZE, 3))
    writer.close()
    assert [has_own_frames(path, given) for given in (0, 8, 9, 10)] == [True, True, False, False]
    if format == "png":
        (path / "note.png").write_bytes(b"")
    else:
        path.write_bytes(b"not ours" * 9)
    assert has_own_frames(path, 9)


def test_a_file_without_its_context_counts_its_own_frames(stream, options, output, nine_frames):
    def queue(seconds=2.0, write_context=False, **more):
        lines = []
        wanted = options(format="png", seconds=seconds, write_context=write_context, keep_state=True)
        return stream(wanted, announce=lines.append, **more), lines[0]

    with pytest.raises(Stop):  # the given frames alone are no video
        queue(context=nine_frames, on_progress=stop_at(0))
    assert files(output) == []
    first, _ = queue(context=nine_frames)
    again, line = queue(context=nine_frames)
    assert "Resumed" not in line and again.path != first.path, "a finished video of this length is left alone"
    longer, line = queue(3.0, context=nine_frames)
    assert "frame 12 of 39, after chunk 1" in line and len(decoded(longer.path)) == 39
    # 13 frames: what goes on behind them begins with given ones.
    contexts = [queue(13 / FPS, written, context=nine_frames)[0].context.latent for written in (False, True)]
    assert torch.equal(*contexts) and contexts[0].shape[2] == 4


def test_a_file_with_and_one_without_its_context_are_two_videos(stream, options, nine_frames):
    lines = []

    def queue(**more):
        with pytest.raises(Stop):
            stream(options(write_context=more.pop("write_context", True)), announce=lines.append, **more)
        return lines[-1]

    queue(context=nine_frames, on_progress=stop_at(1))
    left_alone = "is not gone on with: write_context changed."
    assert left_alone in queue(context=nine_frames, write_context=False, on_progress=stop_at(1))
    assert "Resumed v_00001_" in queue(context=nine_frames, on_progress=stop_at(1))
    assert "Resumed v_00002_" in queue(context=nine_frames, write_context=False, on_progress=stop_at(1))
    queue(on_progress=stop_at(1))
    assert "Resumed v_00003_" in queue(write_context=False, on_progress=stop_at(1)), "it means nothing without context"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 60}, "width is 60 pixels; it must be a multiple of 16. The nearest that fit are 48 and 64"),
        ({"height": 8}, "height is 8 pixels; it must be a multiple of 16"),
        ({"seconds": 0.0}, "length is 0.0 seconds; it must be above 0"),
        ({"seconds": 0.01}, "less than half a frame"),
        ({"fps": 0.0}, "fps is 0.0"),
        ({"format": "avi"}, "choose one of mp4, webm, png"),
        ({"crf": 99.0}, "crf is 99.0"),
        ({"state_every": 0}, "state_every is 0"),
        ({"filename_prefix": "../v"}, "leaves ComfyUI's output folder; use a name such as video/ComfyUI"),
        ({"filename_prefix": "/etc/v"}, "leaves ComfyUI's output folder"),
        ({"filename_prefix": "a/../../v"}, "leaves ComfyUI's output folder"),
        ({"filename_prefix": ""}, "filename_prefix is '', which is no file's name; use one such as video/ComfyUI"),
        ({"filename_prefix": "."}, "which is no file's name"),
        ({"filename_prefix": "x" * 240}, "too long: make its last part, 'xxxxxxxxxxxxxxxx...', 18 bytes shorter"),
        ({"filename_prefix": "x" * 223}, ", 1 bytes shorter.* '_00001_.state.safetensors.partial', which is added"),
        ({"filename_prefix": "x" * 219 + "%date:yyyy%"}, ", 1 bytes shorter"),
        ({"filename_prefix": "\u4e2d" * 77}, r", 9 bytes shorter \(a Chinese character has 3\)"),
        ({"filename_prefix": "\udcff" + "a" * 300}, r"filename_prefix is '\\udcffa+', which is no Unicode text"),
    ],
)
def test_values_that_do_not_fit_are_refused_before_anything_is_written(stream, options, output, change, words):
    with pytest.raises(ValueError, match=words):
        stream(options(**change))
    assert files(output) == [] and [path for path in output.parent.iterdir() if path != output] == []


def test_the_longest_prefix_makes_a_video_and_its_state(stream, options, output):
    wanted = options(filename_prefix="x" * 222, keep_state=True)
    with pytest.raises(Stop):
        stream(wanted, on_progress=stop_at(1))
    assert stream(wanted).path.name == "x" * 222 + "_00001_.mp4"
    assert len(files(output)) == 2 and files(output)[0].endswith("x_00001_.done.safetensors")


@pytest.mark.parametrize(("system", "most", "refused"), [("posix", 143, 36), ("posix", -1, 0), ("nt", None, 0)])
def test_a_prefix_may_be_as_long_as_its_file_system_and_system_let_it_be(
    options, output, pack_module, monkeypatch, system, most, refused
):
    """On Windows 77 Chinese characters are 77, not 231."""
    files_module = pack_module("model_patches.stream_files")
    monkeypatch.setattr(files_module, "SYSTEM", system)
    monkeypatch.delattr(files_module.os, "pathconf", raising=False)
    if most is not None:
        monkeypatch.setattr(files_module.os, "pathconf", lambda folder, name: most, raising=False)
    prefix = "\u4e2d" * 77 if system == "nt" else "x" * 146
    with pytest.raises(ValueError, match=f"{refused} bytes shorter") if refused else contextlib.nullcontext():
        assert files_module.Place.find(options(filename_prefix=prefix)).filename == prefix


def test_a_context_that_does_not_fit_is_refused(stream, options, output, given_frames):
    with pytest.raises(ValueError, match="are of 2 videos and the latent has 1"):
        stream(options(), context=given_frames(torch.zeros(2, 16, 1, 8, 8)))
    with pytest.raises(ValueError, match="48x64 but the video is 64x64"):
        stream(options(), context=given_frames(torch.zeros(1, 16, 1, 8, 6)))
    assert files(output) == []


def test_numbers_and_names_follow_comfyui(stream, options, output):
    first = stream(options(seconds=0.3, filename_prefix="a/b/%width%x"))
    second = stream(options(seconds=0.3, filename_prefix="a/b/%width%x"))
    assert [first.path.name, second.path.name] == ["64x_00001_.mp4", "64x_00002_.mp4"]
    assert first.subfolder == "a/b" and first.path.parent == output / "a" / "b"


@needs_posix
def test_a_file_that_gets_too_large_is_one_line_and_the_video_stays(stream, options, output, video_writer):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
    try:
        with pytest.raises(video_writer.VideoWriteError) as error:
            stream(options(seconds=8.0, crf=1.0, state_every=99))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert "v_00001_.mp4 cannot be written: File too large" in str(error.value)
    assert "on another disk (filename_prefix" in str(error.value) and "free some space" not in str(error.value)
    assert files(output) == ["v_00001_.mp4", "v_00001_.state.safetensors"]
    there = len(decoded(output / "v_00001_.mp4"))
    assert there > 5 and f"The {there} frames before are kept" in str(error.value)
    assert not children()


IN_RUST = "Error while serializing: I/O error: as the system says (os error {})"
FULL_IN_RUST = 112 if sys.platform == "win32" else errno.ENOSPC


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "free some space"),
        (SafetensorError(IN_RUST.format(FULL_IN_RUST)), "free some space"),
        (OSError(errno.EFBIG, "File too large"), "on another disk"),
        (OSError(errno.EROFS, "Read-only file system"), "on another disk"),
        (OSError(errno.EIO, "Input/output error"), "on another disk"),
        (SafetensorError(IN_RUST.format(errno.EFBIG)), "on another disk"),
        (SafetensorError("Error while serializing: header too large"), "on another disk"),
        (PermissionError(errno.EACCES, "in use"), "close the program that has v.mp4 open"),
    ],
    ids=str,
)
def test_only_a_full_disk_needs_space(pack_module, error, way_out):
    assert way_out in pack_module("model_patches.video_containers").way_out(error, "v.mp4")


@needs_posix
def test_a_disk_too_full_for_the_state_keeps_the_one_before(stream, options, output, video_writer):
    import resource

    with pytest.raises(Stop):
        stream(options(), on_progress=stop_at(2))
    state = output / "v_00001_.state.safetensors"
    kept = state.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, before[1]))
    try:
        with pytest.raises(
            video_writer.VideoWriteError, match="The state v_00001_.state.safetensors cannot be written"
        ):
            stream(options(seconds=4.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert state.read_bytes() == kept and files(output) == ["v_00001_.mp4", "v_00001_.state.safetensors"]
    assert len(decoded(stream(options(seconds=4.0)).path)) == 64


def test_a_missing_or_broken_ffmpeg_is_one_line(stream, options, output, video_writer, monkeypatch, tmp_path_factory):
    import imageio_ffmpeg

    def fail():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", fail)
    with pytest.raises(video_writer.VideoWriteError, match='ffmpeg is needed.*Run ".*" -m pip install.*format png'):
        stream(options())
    assert files(output) == []
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(output / "none"))
    with pytest.raises(video_writer.VideoWriteError, match='could not be started.*Run ".*" -m pip install.*format png'):
        stream(options())
    assert files(output) == []
    if sys.platform != "win32":
        fake = tmp_path_factory.mktemp("bin") / "ffmpeg"
        fake.write_text("#!/bin/sh\necho one >&2; echo \"Unknown encoder 'libx264'\" >&2; exit 3\n")
        fake.chmod(0o755)
        monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(fake))
        with pytest.raises(video_writer.VideoWriteError, match=r"stopped \(code 3\).*Unknown encoder 'libx264'"):
            stream(options())
        assert files(output) == [] and not children()


def test_a_temporary_folder_that_is_full_is_one_line(video_writer, tmp_path, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video_writer.tempfile, "TemporaryFile", full)
    spec = video_writer.VideoSpec(width=48, height=32, rate=Fraction(16), crf=20.0, metadata={})
    writer = video_writer.open_writer(tmp_path / "v.mp4", spec)
    with pytest.raises(video_writer.VideoWriteError, match="temporary file, and none can be made .*No space left"):
        writer.write(torch.rand(1, 32, 48, 3))
    writer.abandon()


@needs_posix
@pytest.mark.parametrize("state_every", [2, 99])
def test_a_dying_ffmpeg_ends_the_run_and_it_resumes(stream, options, output, video_writer, state_every):
    """From its state, in the same file; where there is none yet, in another one."""
    wanted = options(seconds=4.0, state_every=state_every)
    whole = stream(wanted).path.read_bytes()
    ready = threading.Event()

    def watch(progress):
        if progress.frames >= 24:
            ready.set()

    def kill(progress):
        if progress.chunk == 3 and progress.step == 0:
            assert ready.wait(20.0), "the third chunk is not in the file"
            for pid in children():
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(video_writer.VideoWriteError, match="ffmpeg stopped.*queue the same graph again"):
        stream(wanted, on_progress=kill, on_frames=watch)
    stopped = output / "v_00002_.mp4"
    there = len(decoded(stopped))
    assert not children() and there >= 24
    path = stream(wanted).path
    assert path.name == ("v_00002_.mp4" if state_every == 2 else "v_00003_.mp4") and path.read_bytes() == whole
    assert state_every == 2 or len(decoded(stopped)) == there


CHILD = """
import sys
sys.path += [{helpers!r}, {root!r}]
import comfy_host
comfy_host.put_on_path(comfy_host.find_comfyui())
import folder_paths, math, torch
torch.set_num_threads({threads})
folder_paths.set_output_directory({output!r})
model, clip, vae = comfy_host.pack_module("nodes.demo_loader").DiagonalDemoLoader.execute("teacher").result
streaming = comfy_host.pack_module("model_patches.streaming")
streaming.QUICK_SAVE_S = math.inf  # a slow disk is no reason to save less often here
from diagonal_sampler.schedule import DiagonalSchedule
encode = lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))
streaming.stream_video(
    model, encode("a red circle moves right"), encode(""), vae, DiagonalSchedule.preset("undistilled", steps=(2,)),
    streaming.StreamOptions(**{options!r}), on_frames=lambda p: print(p.frames, flush=True),
)
"""


@needs_posix
@pytest.mark.slow
def test_kill_9_loses_no_announced_frame_and_the_run_resumes(stream, options, output, request):
    root = request.config.rootpath
    fields = dict(width=SIZE, height=SIZE, seconds=30.0, fps=FPS, seed=3, filename_prefix="v", state_every=4)
    code = CHILD.format(
        helpers=str(root / "tests" / "helpers"),
        root=str(root),
        output=str(output),
        options=fields,
        threads=torch.get_num_threads(),
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=output.parent, text=True, stderr=subprocess.DEVNULL
    )
    announced = 0
    for line in process.stdout:
        announced = int(line)
        if announced > 100:
            break
    encoders = children(process.pid)
    process.send_signal(signal.SIGKILL)
    announced = max([announced, *(int(line) for line in process.stdout)])
    process.wait()
    assert not still_running(encoders)
    path = output / "v_00001_.mp4"
    there = len(decoded(path))
    assert there >= announced - 1 and announced > 100
    lines = []
    wanted = options(**{**fields, "seconds": (announced + 40) / FPS})
    resumed = stream(wanted, announce=lines.append)
    at = int(lines[0].split("frame ")[1].split()[0])
    # A state is at most four chunks of 12 frames old.
    assert resumed.path == path and at > 0 and announced - at <= 4 * 12
    whole = stream(wanted)
    assert whole.path != path
    assert whole.path.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("video/a", "video/a"),
        ("%date:yyyy-MM-dd%/clip_%date:hh-mm-ss%", "2026-03-09/clip_07-05-02"),
        ("%date:d.M.yy h:m:s%", "9.3.26 7:5:2"),
        ("%date%_%width%", "20260309070502_%width%"),
        ("%date:../../%/x", "../..//x"),  # and refused, as any other that leads elsewhere
        ("100%", "100%"),
    ],
)
def test_a_date_in_the_prefix_is_todays(pack_module, prefix, expected):
    dated = pack_module("model_patches.stream_files").dated
    assert dated(prefix, datetime.datetime(2026, 3, 9, 7, 5, 2)) == expected


@pytest.mark.parametrize(
    ("prefix", "refused"),
    [
        ("clip:1", [":"]),
        ("v_%date:hh:mm%", [":"]),
        ('a/<b>|"c"?*', ['"', "*", "<", ">", "?", "|"]),
        ("C:clip", [":"]),
        ("C:\\ComfyUI\\output\\v_%date:hh-mm%", []),
        ("C:/ComfyUI/output/v", []),
        ("video/a b", []),
    ],
)
def test_a_prefix_that_windows_has_no_name_for_is_refused_there(
    stream, options, output, pack_module, monkeypatch, prefix, refused
):
    """Behind a colon Windows would write into a stream of a file that nobody sees."""
    files_module = pack_module("model_patches.stream_files")
    name = files_module.dated(prefix, datetime.datetime(2026, 3, 9, 7, 5, 2))
    assert files_module.refused_characters(name, "nt") == refused
    assert files_module.refused_characters(name, "posix") == []
    if refused:
        monkeypatch.setattr(files_module, "SYSTEM", "nt")
        with pytest.raises(ValueError, match=r"no name has .* in it on Windows.*in times use '-'"):
            stream(options(filename_prefix=prefix))
        assert files(output) == []


def test_a_video_named_by_its_date_is_resumed_under_that_name(stream, options, output, pack_module, monkeypatch):
    files_module = pack_module("model_patches.stream_files")

    class Clock(datetime.datetime):
        minute_now = 1

        @classmethod
        def now(cls):
            return cls(2026, 3, 9, 7, cls.minute_now)

    monkeypatch.setattr(files_module, "datetime", Clock)
    wanted = options(format="png", filename_prefix="v_%date:hh-mm%")
    with pytest.raises(Stop):
        stream(wanted, on_progress=stop_at(2))
    Clock.minute_now = 2
    lines = []
    assert stream(wanted, announce=lines.append).path == output / "v_07-01_00001_"
    assert "Resumed v_07-01_00001_" in lines[0]
    with pytest.raises(ValueError, match="leaves ComfyUI's output folder"):
        stream(options(filename_prefix="%date:../../%/v"))


# --- the node ---


def quiet_server(pack_module, monkeypatch):
    """ComfyUI's server as the nodes know it, while nobody listens."""
    server = SimpleNamespace(client_id=None, last_prompt_id="P")
    monkeypatch.setattr(pack_module("nodes.client"), "PromptServer", SimpleNamespace(instance=server))


@pytest.mark.parametrize("metadata", [True, False])
def test_the_nodes_widgets_and_inputs_reach_the_stream(pack_module, monkeypatch, options, metadata):
    nodes = pack_module("nodes.stream_video")
    queued = {"1": {"inputs": {"seed": 7}, "is_changed": [math.nan]}}  # ComfyUI notes a fingerprint there
    hidden = SimpleNamespace(unique_id="", prompt=queued, extra_pnginfo={"workflow": {"nodes": []}})
    monkeypatch.setattr(nodes.DiagonalStreamVideo, "hidden", hidden, raising=False)
    monkeypatch.setattr(nodes, "preview_callback", lambda model: "preview")
    monkeypatch.setattr(nodes.args, "disable_metadata", not metadata)
    quiet_server(pack_module, monkeypatch)
    asked = []
    result = SimpleNamespace(
        message="done",
        whole=True,
        path=Path("v_00001_"),
        subfolder="a",
        video=SimpleNamespace(get_frame_count=lambda: 9),
        context="X",
    )
    monkeypatch.setattr(nodes, "stream_video", lambda *given, **named: asked.append((given, named)) or result)
    widgets = {
        "width": 96, "height": 64, "fps": 12.0, "seed": 7, "cfg": 2.0, "filename_prefix": "a/v", "format": "png",
        "crf": 30.0, "state_every": 4, "restart": True, "keep_state": True, "write_context": False,
    }  # fmt: skip
    output = nodes.DiagonalStreamVideo.execute(
        "M", [], "N", "V", "S", length=3.0, context="C", optical_flow="F", **widgets
    )
    ((given, named),) = asked
    assert given == ("M", [], "N", "V", "S", options(seconds=3.0, **widgets))
    told = {"context": "C", "optical_flow": "F", "prompt": queued, "node_id": "", "prompts": None}
    assert {name: named[name] for name in told} == told
    saved = {"workflow": {"nodes": []}, "prompt": {"1": {"inputs": {"seed": 7}}}}
    assert named["metadata"] == (saved if metadata else {})
    assert output.result == (result.video, "X")
    (shown,) = output.ui["images"]
    assert (shown["filename"], shown["subfolder"], shown["in_sequence"]) == ("00000009.png", "a/v_00001_", True)
    as_video = nodes.DiagonalStreamVideo.execute("M", [], "N", "V", "S", length=3.0, **{**widgets, "format": "mp4"})
    assert output.ui.keys() == as_video.ui.keys(), "ComfyUI merges those of a list of formats by the first one's"
    assert (list(output.ui["animated"]), list(as_video.ui["animated"])) == ([False], [True])


def test_only_restart_and_an_early_end_make_a_finished_video_again(pack_module, monkeypatch):
    quiet_server(pack_module, monkeypatch)
    node = pack_module("nodes.stream_video").DiagonalStreamVideo
    finishing = pack_module("nodes.finishing")

    def fingerprint(unique_id, **widgets):
        monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id=unique_id), raising=False)
        return node.fingerprint_inputs(**widgets)

    assert fingerprint("5", restart=True) != fingerprint("5", restart=True)
    assert fingerprint("5", restart=False, seed=1) == fingerprint("5", seed=2) == fingerprint("6", seed=2)
    assert fingerprint("5", restart=None, seed=2) == fingerprint("5", seed=2), "a link, whose value is not known yet"
    assert fingerprint("6", seed=2) == 0
    finishing.ended_early("5")  # as it was queued last before "6": with seed 2
    assert fingerprint("5", seed=2) == fingerprint("5", seed=2) != fingerprint("5", seed=1)
    assert fingerprint("6", seed=2) == fingerprint("5", seed=1)
