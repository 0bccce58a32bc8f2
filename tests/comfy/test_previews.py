"""Pictures of a run that goes on must never end it, whatever previewer another node pack puts in ComfyUI's place."""

from __future__ import annotations

import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch


class PlaysByItself:
    """As VideoHelperSuite's animated previews: shows what it is given and gives no picture back."""

    def __init__(self):
        self.shown = 0

    def decode_latent_to_preview_image(self, preview_format, latents):
        self.shown += 1


class Fails:
    def decode_latent_to_preview_image(self, preview_format, latents):
        raise RuntimeError("no room for the preview")


def no_previewer(*_given):
    raise Exception("Unsupported preview type")


LATENTS = torch.linspace(-1, 1, 16 * 3 * 4 * 6).reshape(1, 16, 3, 4, 6)


def test_a_previewer_that_gives_no_picture_is_replaced(pack_module, tiny_wan, monkeypatch):
    import latent_preview

    previews = pack_module("model_patches.previews")
    monkeypatch.setattr(latent_preview, "get_previewer", lambda *given: None)
    expected = list(previews.preview_of(tiny_wan)(LATENTS))
    assert len(expected) == 3 and len({picture.tobytes() for picture in expected}) == 3
    previewer = PlaysByItself()
    monkeypatch.setattr(latent_preview, "get_previewer", lambda *given: previewer)
    found = list(previews.preview_of(tiny_wan)(LATENTS))
    assert previewer.shown == 3
    assert [picture.tobytes() for picture in found] == [picture.tobytes() for picture in expected]


def test_a_previewer_that_plays_by_itself_is_shown_no_single_frames(pack_module, tiny_wan, monkeypatch):
    import functools

    import latent_preview

    previews, theirs = pack_module("model_patches.previews"), PlaysByItself()
    under = latent_preview.Latent2RGBPreviewer([[1.0, 0.0, 0.0]] * 16)
    monkeypatch.setattr(latent_preview, "get_previewer", lambda device, latent_format: under)
    expected = [picture.tobytes() for picture in previews.preview_of(tiny_wan)(LATENTS)]
    for _ in range(2):  # of two packs, one around the other
        inner = latent_preview.get_previewer
        wrapped = functools.update_wrapper(lambda device, latent_format: theirs, inner)
        monkeypatch.setattr(latent_preview, "get_previewer", wrapped)
    found = [picture.tobytes() for picture in previews.preview_of(tiny_wan)(LATENTS)]
    assert found == expected and len(set(found)) == 3 and theirs.shown == 0


class OnAGpu(torch.Tensor):
    """Latents that are elsewhere, until they are copied."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_colours_are_made_of_latents_that_have_come_and_other_previewers_get_them_as_they_are(
    pack_module, tiny_wan, monkeypatch
):
    import latent_preview

    given = []

    class Linear(latent_preview.Latent2RGBPreviewer):
        def decode_latent_to_preview_image(self, preview_format, latents):
            given.append(type(latents))
            return super().decode_latent_to_preview_image(preview_format, latents)

    class Another(PlaysByItself):
        def decode_latent_to_preview_image(self, preview_format, latents):
            given.append(type(latents))

    monkeypatch.setattr(latent_preview, "Latent2RGBPreviewer", Linear)
    pictures_of = pack_module("model_patches.previews").preview_of
    for previewer, expected in ((None, [torch.Tensor] * 3), (Another(), [OnAGpu, torch.Tensor] * 3)):
        monkeypatch.setattr(latent_preview, "get_previewer", lambda *given, found=previewer: found)
        given.clear()
        found = list(pictures_of(tiny_wan)(LATENTS.as_subclass(OnAGpu)))
        assert len(found) == 3 and given == expected


@pytest.mark.parametrize("get_previewer", [lambda *given: Fails(), no_previewer])
def test_a_preview_that_fails_is_warned_of_once_and_left_out(pack_module, tiny_wan, monkeypatch, caplog, get_previewer):
    import comfy.utils
    import latent_preview

    monkeypatch.setattr(latent_preview, "get_previewer", get_previewer)
    bars = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: bars.append((value, total)))
    callback = pack_module("model_patches.previews").preview_callback(tiny_wan)
    for step in range(3):
        callback(step, LATENTS, LATENTS, 3)
    assert bars[0] == (1, 3) and bars[-1] == (3, 3)  # ComfyUI leaves out what comes within 50 ms

    live = pack_module("nodes.live")
    sent = []
    server = SimpleNamespace(last_prompt_id="P", client_id="C", send_sync=lambda *message: sent.append(message))
    monkeypatch.setattr(pack_module("nodes.client"), "PromptServer", SimpleNamespace(instance=server))
    report = live.LiveReport("5", tiny_wan)
    for start in (0, 3, 6):
        report.chunk(SimpleNamespace(start_frame=start, latents=LATENTS))
    assert [(data["frames"], data["pixel_frames"]) for _, data, _ in sent] == [([], 9), ([], 21), ([], 33)]
    told = [record.getMessage() for record in caplog.records if "without previews" in record.getMessage()]
    assert len(told) == 2, "once by the progress bar's callback, once by the canvas's report"


@pytest.fixture
def sent(pack_module, monkeypatch):
    """What the canvas is sent of a run's pictures."""
    found = []
    server = SimpleNamespace(last_prompt_id="P", client_id="C", send_sync=lambda *message: found.append(message[1]))
    monkeypatch.setattr(pack_module("nodes.client"), "PromptServer", SimpleNamespace(instance=server))
    return found


def test_pictures_of_decoded_frames_play_at_the_speed_of_the_video(pack_module, tiny_wan, sent):
    report = pack_module("nodes.live").LiveReport("5", tiny_wan)
    report.frames(torch.rand(9, 16, 16, 3), 9, Fraction(24))
    report.frames(torch.rand(4, 16, 16, 3), 13, Fraction(8))
    report.chunk(SimpleNamespace(start_frame=0, latents=LATENTS))
    assert [(len(data["frames"]), data["fps"]) for data in sent] == [(3, 6.0), (1, 2.0), (3, 4.0)]


def test_a_picture_that_cannot_be_made_of_decoded_frames_ends_no_run(pack_module, tiny_wan, sent, monkeypatch, caplog):
    live = pack_module("nodes.live")

    def no_room(_picture):
        raise OSError("encoder error -2")

    monkeypatch.setattr(live, "as_address", no_room)
    report = live.LiveReport("5", tiny_wan)
    for made in (9, 21):
        report.frames(torch.rand(9, 16, 16, 3), made, Fraction(16))
    assert [(data["frames"], data["pixel_frames"]) for data in sent] == [([], 9), ([], 21)]
    assert caplog.text.count("without previews, which failed: OSError: encoder error -2") == 1


# Pictures of a GPU's chunks, which are made in another thread


@pytest.fixture
def on_its_way(pack_module, monkeypatch):
    """`on_its_way(wait)`: every chunk's latents seem to come from a GPU; `wait` is called where they are waited for."""

    def use(wait):
        monkeypatch.setattr(pack_module("nodes.live"), "on_its_way", lambda latents: (latents, wait))

    return use


def chunk_at(start):
    return SimpleNamespace(start_frame=start, latents=LATENTS * (1 + start))


def makes_pictures():
    return any(thread.name.startswith("diagonal-pictures") for thread in threading.enumerate())


def test_a_gpus_pictures_are_waited_for_and_sent_behind_the_sampling_in_order(pack_module, tiny_wan, sent, on_its_way):
    live, there = pack_module("nodes.live"), threading.Event()
    with live.LiveReport("5", tiny_wan) as report:
        for start in (0, 3, 6):
            report.chunk(chunk_at(start))
    expected = [(data["pixel_frames"], data["frames"]) for data in sent]
    assert [count for count, _ in expected] == [9, 21, 33] and len({frames[0] for _, frames in expected}) == 3
    sent.clear()
    on_its_way(lambda: there.wait(20))
    with live.LiveReport("5", tiny_wan) as report:
        for start in (0, 3, 6):
            report.chunk(chunk_at(start))
        assert sent == [] and makes_pictures()
        there.set()
    assert [(data["pixel_frames"], data["frames"]) for data in sent] == expected
    assert not makes_pictures()


def test_a_cancel_ends_the_pictures_thread_behind_what_it_was_given(pack_module, tiny_wan, sent, on_its_way):
    import comfy.model_management

    live = pack_module("nodes.live")
    on_its_way(lambda: time.sleep(0.05))
    with pytest.raises(comfy.model_management.InterruptProcessingException), live.LiveReport("5", tiny_wan) as report:
        report.chunk(chunk_at(0))
        raise comfy.model_management.InterruptProcessingException
    assert [len(data["frames"]) for data in sent] == [3] and not makes_pictures()


def test_pictures_that_fail_in_their_thread_are_left_out_and_the_node_says_so(
    pack_module, tiny_wan, sent, on_its_way, caplog
):
    def no_room():
        raise RuntimeError("no room")

    on_its_way(no_room)
    with pack_module("nodes.live").LiveReport("5", tiny_wan) as report:
        for start in (0, 3):
            report.chunk(chunk_at(start))
    assert [(data["frames"], data["pixel_frames"]) for data in sent] == [([], 9), ([], 21)]
    assert caplog.text.count("without previews, which failed: RuntimeError: no room") == 1
    assert len(report.warnings.lines) == 1 and "no room" in report.warnings.lines[0]


@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_cancel_that_the_pictures_thread_sees_ends_the_run(pack_module, tiny_wan, sent, on_its_way, at_the_end):
    """ComfyUI tells of it once."""
    import comfy.model_management

    def interrupted():
        raise comfy.model_management.InterruptProcessingException

    on_its_way(interrupted)
    progress = pack_module("model_patches.sampling").Progress(forwards=1, total=9, chunk=0, chunks=3, step=0, steps=2)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        with pack_module("nodes.live").LiveReport("5", tiny_wan) as report:
            report.chunk(chunk_at(0))
            for _ in range(0 if at_the_end else 400):
                report.progress(progress)
                time.sleep(0.05)
            assert at_the_end
    assert not makes_pictures()


def test_few_chunks_wait_for_a_cpu_that_is_slower_than_the_gpu(pack_module, tiny_wan, sent, monkeypatch):
    live, behind = pack_module("nodes.live"), []

    def on_its_way(latents):
        behind.append(len(behind) - len(sent))
        return latents, lambda: time.sleep(0.03)

    monkeypatch.setattr(live, "on_its_way", on_its_way)
    with live.LiveReport("5", tiny_wan) as report:
        for chunk in range(10):
            report.chunk(chunk_at(3 * chunk))
    assert len(sent) == 10 and 1 < max(behind) <= live.MOST_WAITING


def test_a_previewer_that_may_need_the_device_stays_in_the_sampling_thread(
    pack_module, tiny_wan, sent, on_its_way, monkeypatch
):
    """As one of ComfyUI's small VAEs does: it loads it."""
    import latent_preview

    previews, seen = pack_module("model_patches.previews"), []

    class Vae(PlaysByItself):
        def decode_latent_to_preview_image(self, preview_format, latents):
            seen.append(threading.get_ident())

    monkeypatch.setattr(latent_preview, "get_previewer", lambda *given: Vae())
    assert not previews.preview_of(tiny_wan).on_cpu
    on_its_way(lambda: None)
    with pack_module("nodes.live").LiveReport("5", tiny_wan) as report:
        report.chunk(chunk_at(0))
        assert seen == [threading.get_ident()] * 3 and len(sent) == 1
    own = tiny_wan.clone()
    own.set_attachments(previews.PREVIEW_ATTACHMENT, lambda latents: latents[:, :3])
    assert previews.preview_of(own).on_cpu


def test_latents_of_the_cpu_are_on_no_way(pack_module):
    assert pack_module("model_patches.previews").on_its_way(LATENTS) is None


def test_a_cancel_within_a_preview_still_cancels(pack_module, tiny_wan, monkeypatch):
    import comfy.model_management
    import comfy.utils

    def interrupted(*_given, **_named):
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", interrupted)
    callback = pack_module("model_patches.previews").preview_callback(tiny_wan)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        callback(0, LATENTS, LATENTS, 3)
