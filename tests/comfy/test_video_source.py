"""A stream that is made over another video: the same frames as from the whole video's latent, in constant memory."""

from __future__ import annotations

import io
import logging
from fractions import Fraction

import comfy.model_management
import comfy_host
import pytest
import torch
from comfy_api.latest import InputImpl, Types

from diagonal_sampler.flow import camera_flow
from diagonal_sampler.schedule import DiagonalSchedule
from distillation import sprites

av = pytest.importorskip("av")

SCHEDULE = DiagonalSchedule.preset("undistilled", steps=(4, 2))
SIZE, FPS = 64, 16
FRAMES = 33  # 9 latent frames


@pytest.fixture(scope="module")
def clip():
    """IMAGE [33, 64, 64, 3] of two sprites."""
    frames = sprites.render(sprites.sample_scenes(1, 4), torch.arange(FRAMES))[0]
    return frames.movedim(1, -1).float() / 255


@pytest.fixture(scope="module")
def numbered():
    """IMAGE [40, 64, 64, 3]: each picture is 6 levels lighter than the one before."""
    return (6 * torch.arange(40.0) / 255)[:, None, None, None].expand(-1, SIZE, SIZE, 3)


def as_video(images, rate=FPS):
    return InputImpl.VideoFromComponents(Types.VideoComponents(images=images, frame_rate=Fraction(rate)))


def as_file(images, path, rate=FPS):
    """The same as a file: H.264, without loss but that of colour."""
    as_video(images, rate).save_to(str(path), crf=0.0)
    return InputImpl.VideoFromFile(str(path))


@pytest.fixture
def source(pack_module, demo_vae):
    """`source(video, **changes)`: its latents for a new video."""

    def make(video, vae=demo_vae, width=SIZE, height=SIZE, rate=FPS):
        return pack_module("model_patches.video_source").VideoSource(
            video, vae, width=width, height=height, rate=Fraction(rate)
        )

    return make


class Pictures:
    """In place of a VAE: a latent frame is the mean of each of its pixel frames' last picture."""

    first_stage_model = None

    def __init__(self):
        self.asked = []

    def encode(self, images):
        self.asked.append(len(images))
        assert (len(images) - 1) % 4 == 0
        return images[::4].mean((1, 2, 3))[None, None, :, None, None]

    def levels(self, latent):
        return [round(value * 255 / 6) for value in latent.flatten().tolist()]


@pytest.mark.parametrize("kind", ["pictures", "png"])
def test_the_latents_of_chunks_are_those_of_the_whole_video(source, clip, demo_vae, pack_module, tmp_path, kind):
    """The demo's encoder looks at no other latent frame, so that nothing is lost by encoding a part."""
    video = as_video(clip)
    if kind == "png":
        writer = pack_module("model_patches.video_writer").open_writer(
            tmp_path / "v", pack_module("model_patches.video_containers").VideoSpec(
                width=SIZE, height=SIZE, rate=Fraction(FPS), crf=20.0, metadata={}
            ),
        )  # fmt: skip
        writer.write(clip)
        writer.close()
        video = pack_module("model_patches.png_video").PngVideo(tmp_path / "v", Fraction(FPS))
    shown = video.get_components().images
    assert len(shown) == FRAMES
    whole = demo_vae.encode(shown)
    video = source(video)
    assert video.frames == FRAMES
    chunks = [video.latents(start, 3) for start in (0, 3, 6)]
    assert torch.allclose(torch.cat(chunks, dim=2), whole, atol=1e-5)
    assert torch.equal(source(video.video).latents(6, 3), chunks[2]), "a resumed run begins anywhere"


@pytest.mark.parametrize(
    ("rate", "of_video", "wanted"),
    [
        (16, 16, [0, 4, 8, 12, 16, 20]),
        (16, 32, [0, 8, 16, 24, 32, 39]),  # every second picture; behind the end the last one stays
        (16, 8, [0, 2, 4, 6, 8, 10]),
        (16, 24, [0, 6, 12, 18, 24, 30]),
        (10, Fraction(16), [0, 6, 12, 19, 25, 32]),
    ],
)
@pytest.mark.parametrize("kind", ["pictures", "file"])
def test_each_frame_is_the_picture_of_its_moment(source, numbered, tmp_path, rate, of_video, wanted, kind):
    vae = Pictures()
    video = as_video(numbered, of_video) if kind == "pictures" else as_file(numbered, tmp_path / "v.mp4", of_video)
    over = source(video, vae, rate=rate)
    assert vae.levels(torch.cat([over.latents(0, 2), over.latents(2, 2), over.latents(4, 2)], dim=2)) == wanted
    assert vae.asked == [5, 13, 17], "three latent frames before a chunk, and no more"
    assert over.frames == (40 - 1) * rate // of_video + 1


def test_each_picture_of_a_file_is_decoded_once(source, numbered, tmp_path, monkeypatch, pack_module):
    decoded, vae = [], Pictures()
    module = pack_module("model_patches.video_source")
    array = module._array
    monkeypatch.setattr(module, "_array", lambda frame: (decoded.append(frame.pts), array(frame))[1])
    video = as_file(numbered, tmp_path / "v.mp4")
    over = source(video, vae)
    for start in range(0, 9, 3):
        over.latents(start, 3)
    assert len(decoded) == len(set(decoded)) == 33
    decoded.clear()
    assert vae.levels(source(video, vae).latents(6, 1)) == [24] and len(decoded) == 13, "only what it looks back on"
    over.close()
    assert vae.levels(over.latents(9, 1)) == [36], "it may go on"


def test_a_file_whose_clock_does_not_begin_at_0(source, numbered, tmp_path):
    path = tmp_path / "v.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "0"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv444p"
        for number, image in enumerate(numbered):
            frame = av.VideoFrame.from_ndarray((image * 255).round().byte().numpy(), format="rgb24")
            frame.pts, frame.time_base = 2 * FPS + number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        assert container.streams.video[0].start_time > 0
    vae = Pictures()
    over = source(InputImpl.VideoFromFile(str(path)), vae)
    assert vae.levels(over.latents(0, 3)) == [0, 4, 8] and vae.levels(over.latents(5, 2)) == [20, 24]
    for start in (4, 7, 9):  # a transport stream is no file to seek in: it may go too far
        again = source(InputImpl.VideoFromFile(str(path)), vae)
        assert vae.levels(again.latents(start, 1)) == [4 * start]


def test_a_part_of_a_file_is_that_part(source, numbered, tmp_path):
    vae, file = Pictures(), as_file(numbered, tmp_path / "v.mp4")
    middle = source(file.as_trimmed(0.5, 1.25), vae)
    assert middle.frames == 20 and vae.levels(middle.latents(0, 5)) == [8, 12, 16, 20, 24]
    end = source(file.as_trimmed(-1.0, 0.0, strict_duration=False), vae)
    assert end.frames == 16 and vae.levels(end.latents(0, 4)) == [24, 28, 32, 36]
    behind = source(file.as_trimmed(0.5, 0.0, strict_duration=False), vae)
    assert behind.frames == 32, "ComfyUI counts 1 frame where only the start is set"
    assert len({source(video, vae).digest() for video in (file, middle.video, end.video, behind.video)}) == 4


def test_a_file_in_memory_is_read_and_left_open(source, numbered, tmp_path):
    as_file(numbered, tmp_path / "v.mp4")
    held = io.BytesIO((tmp_path / "v.mp4").read_bytes())
    vae, video = Pictures(), InputImpl.VideoFromFile(held)
    over = source(video, vae)
    assert over.digest() == source(InputImpl.VideoFromFile(str(tmp_path / "v.mp4")), vae).digest()
    assert vae.levels(over.latents(0, 2)) == [0, 4] and not held.closed


def test_a_file_that_ends_before_it_says_holds_its_last_picture(source, numbered, tmp_path, monkeypatch):
    vae, video = Pictures(), as_file(numbered, tmp_path / "v.mp4")
    monkeypatch.setattr(InputImpl.VideoFromFile, "get_duration", lambda self: 5.0)  # a longer sound, say
    over = source(video, vae)
    assert over.frames == 80
    assert vae.levels(over.latents(0, 11)) == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 39]
    assert vae.levels(over.latents(11, 3)) == vae.levels(source(video, vae).latents(17, 3)) == [39, 39, 39]


@pytest.mark.parametrize(("width", "height"), [(64, 64), (32, 32), (128, 96)])
def test_pictures_are_scaled_to_cover_the_size_and_cut_at_the_edges(source, width, height):
    images = torch.zeros(5, 64, 128, 3)
    images[:, :, 16:112] = 1.0  # the edges are cut off: to a square 32 columns on each side
    seen = []

    class Looks(Pictures):
        def encode(self, images):
            seen.append(images)
            return super().encode(images)

    source(as_video(torch.cat([images, torch.zeros(5, 64, 128, 1)], dim=-1)), Looks(), width, height).latents(0, 2)
    assert seen[0].shape == (5, height, width, 3)
    assert seen[0].mean() > 0.98 and 0 <= seen[0].min() and seen[0].max() <= 1


# ---------------------------------------------------------------------------------------------------------------
# In a stream


@pytest.fixture(scope="module")
def demo(pack):
    with comfy_host.demo_models("teacher") as models:
        yield models


@pytest.fixture
def stream(pack_module, demo, output):
    """`stream(video, seconds, **more)`: made over it."""
    streaming = pack_module("model_patches.streaming")

    def run(video=None, seconds=2.0, size=SIZE, **more):
        changed = {name: more.pop(name) for name in ("cfg", "state_every", "seed", "format") if name in more}
        options = {"format": "png", "seed": 3, "state_every": 1, **changed}
        options = streaming.StreamOptions(
            width=size, height=size, seconds=seconds, fps=FPS, filename_prefix="v", **options
        )
        return streaming.stream_video(*demo, SCHEDULE, options, video=video, **more)

    return run


@pytest.fixture
def recorded(pack_module, monkeypatch):
    """The latents of every chunk that is decoded from now on."""
    found, decoder = [], pack_module("model_patches.streaming").StreamDecoder
    submit = decoder.submit
    monkeypatch.setattr(decoder, "submit", lambda self, x: (found.append(x.clone()), submit(self, x))[1])
    return found


class Stop(BaseException):
    pass


def stop_at(chunk):
    def report(progress):
        if progress.chunk == chunk:
            raise Stop

    return report


def test_it_is_what_the_sampler_makes_of_the_videos_latent(stream, recorded, clip, demo, sample_latent):
    model, positive, negative, vae = demo
    stream(as_video(clip), denoise=0.5, cfg=2.0)
    latent = {"samples": vae.encode(clip)}
    whole = sample_latent(model, positive, negative, latent, SCHEDULE, seed=3, cfg=2.0, denoise=0.5)["samples"]
    assert torch.allclose(torch.cat(recorded, dim=2), whole, atol=1e-5)
    free = sample_latent(model, positive, negative, {"samples": torch.zeros_like(whole)}, SCHEDULE, seed=3, cfg=2.0)
    assert (whole - latent["samples"]).abs().mean() < 0.8 * (free["samples"] - latent["samples"]).abs().mean()


def test_with_denoise_1_nothing_of_the_video_is_left(stream, recorded, clip):
    stream(as_video(clip), denoise=1.0)
    over = torch.cat(recorded, dim=2)
    recorded.clear()
    stream()
    assert torch.equal(torch.cat(recorded, dim=2), over)


def test_a_resumed_run_goes_on_bit_by_bit_and_another_denoise_is_another_video(stream, recorded, clip, output):
    stream(as_video(clip), denoise=0.5)
    whole = recorded.copy()
    recorded.clear()
    with pytest.raises(Stop):
        stream(as_video(clip.clone()), denoise=0.5, on_progress=stop_at(2))
    lines = []
    with pytest.raises(Stop):
        stream(as_video(clip), denoise=0.6, on_progress=stop_at(0), announce=lines.append)
    assert "denoise" in lines[0] and "unfinished" in lines[0]
    with pytest.raises(Stop):
        stream(as_video(clip.flip(0)), denoise=0.5, on_progress=stop_at(0), announce=lines.append)
    assert "video (its pictures or its part)" in lines[1]
    recorded.clear()
    stream(as_video(clip), denoise=0.5, announce=lines.append)
    assert "after chunk 2" in lines[2]
    assert len(recorded) == 1 and torch.equal(recorded[0], whole[2])


def test_the_end_of_the_video_ends_it(stream, clip, caplog):
    said = []
    result = stream(as_video(clip[:20]), seconds=10.0, denoise=0.5, announce=said.append)
    assert result.video.get_frame_count() == 20 and result.whole
    assert "The video that it is made over ends after 1.2 s, and so does this one." in said[0] + result.message
    assert stream(as_video(clip), seconds=1.0, denoise=0.5).video.get_frame_count() == 16


def test_given_frames_stand_for_the_videos_first(stream, recorded, clip, demo, sample_latent, given_frames):
    model, positive, negative, vae = demo
    given = given_frames(vae.encode(clip.flip(2)[:9]))  # 3 latent frames
    stream(as_video(clip), denoise=0.5, context=given)
    latent = {"samples": vae.encode(clip)}
    whole = sample_latent(model, positive, negative, latent, SCHEDULE, seed=3, denoise=0.5, context=given)["samples"]
    assert torch.allclose(torch.cat(recorded, dim=2), whole, atol=1e-5)


def test_the_model_comes_back_where_the_vae_has_pushed_it_out(stream, recorded, clip, pack_module, monkeypatch):
    stream(as_video(clip), denoise=0.5)
    whole = torch.cat(recorded, dim=2)
    recorded.clear()
    module = pack_module("model_patches.video_source")
    latents, loaded = module.VideoSource.latents, []

    def pushes_out(self, start, count):
        found = latents(self, start, count)
        comfy.model_management.unload_all_models()
        return found

    monkeypatch.setattr(module.VideoSource, "latents", pushes_out)
    after = lambda progress: loaded.append(len(comfy.model_management.loaded_models()))  # noqa: E731
    stream(as_video(clip), denoise=0.5, on_progress=after, seed=3)
    assert torch.equal(torch.cat(recorded, dim=2), whole) and min(loaded) >= 1


def test_what_does_not_fit_is_refused_before_anything_is_written(stream, clip, demo, pack_module, output):
    conditioning = pack_module("model_patches.flow_control").FlowConditioning(
        optical_flow=camera_flow(FRAMES - 1, SIZE, SIZE, pan=(1.0, 0.0)), mode="reference", vae=demo[3]
    )
    with pytest.raises(ValueError, match="denoise is 0.5.*optical flow in mode reference"):
        stream(as_video(clip), denoise=0.5, optical_flow=conditioning)
    for denoise in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="it must be above 0 and at most 1"):
            stream(as_video(clip), denoise=denoise)
    with pytest.raises(ValueError, match="The video has no pictures"):
        stream(as_video(clip[:0]), denoise=0.5)
    with pytest.raises(ValueError, match="video has no pictures|No video stream"):
        stream(InputImpl.VideoFromFile(io.BytesIO(_sound())), denoise=0.5)
    with pytest.raises(ValueError, match="The video cannot be read: Invalid data found.*Connect another one"):
        stream(InputImpl.VideoFromFile(io.BytesIO(b"no video" * 100)), denoise=0.5)
    assert not list(output.iterdir())


def test_a_file_that_is_damaged_behind_its_beginning_says_where(source, numbered, tmp_path, monkeypatch):
    video = as_file(numbered, tmp_path / "v.mp4")
    decode = av.container.InputContainer.decode

    def failing(self, stream):
        for number, frame in enumerate(decode(self, stream)):
            if number == 20:
                raise av.error.InvalidDataError(1094995529, "Invalid data found when processing input")
            yield frame

    over = source(video, Pictures())
    opened = av.open

    def open_damaged(*args, **more):
        container = opened(*args, **more)
        return type("Damaged", (), {
            "streams": container.streams, "close": container.close, "seek": container.seek,
            "decode": lambda self, stream: failing(container, stream),
        })()  # fmt: skip

    monkeypatch.setattr(av, "open", open_damaged)
    over.latents(0, 3)
    with pytest.raises(ValueError, match=r"The video at 1\.\d s cannot be read: Invalid data"):
        over.latents(3, 3)


def _sound() -> bytes:
    """A file without a video stream."""
    held = io.BytesIO()
    with av.open(held, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame(format="s16", layout="mono", samples=800)
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    return held.getvalue()


def test_denoise_alone_changes_nothing(stream, recorded, caplog):
    with caplog.at_level(logging.WARNING):
        stream(denoise=0.5)
    first = torch.cat(recorded, dim=2)
    recorded.clear()
    stream()
    assert torch.equal(torch.cat(recorded, dim=2), first)
