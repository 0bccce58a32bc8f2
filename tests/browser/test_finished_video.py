"""A finished video in Chromium and in ComfyUI's web page."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_finished_video_of_several_megabytes_plays_jumps_and_brings_its_workflow(
    pack_module, frontend, comfy_server, suffix
):
    """The web page reads the first two megabytes of a video for its workflow; an index at the end lies behind them."""
    frontend.errors.clear()
    writer_of = pack_module("model_patches.video_writer")
    path = comfy_server.output_dir / f"long{suffix}"
    metadata = {"workflow": {"nodes": [], "note": "moov"}, "prompt": {"1": {"class_type": "x"}}}
    spec = writer_of.VideoSpec(width=128, height=128, rate=Fraction(16), crf=8.0, metadata=metadata)
    writer = writer_of.open_writer(path, spec)
    writer.write(torch.rand(240, 128, 128, 3, generator=torch.Generator().manual_seed(0)))
    writer.close()
    assert path.stat().st_size > 5 << 19
    seen = frontend.page.evaluate(
        """async (name) => {
            const url = app.api.apiURL(`/view?filename=${name}&type=output`);
            const video = document.createElement("video");
            const happens = (event) => new Promise((done, failed) => {
                video.addEventListener(event, done, { once: true });
                video.addEventListener("error", () => failed(new Error(video.error.message)), { once: true });
            });
            video.muted = true;
            video.src = url;
            await happens("loadeddata");
            video.currentTime = 11.3;
            await happens("seeked");
            const at = video.currentTime;
            await Promise.all([happens("ended"), (video.currentTime = 14.7, video.play())]);
            const blob = await (await fetch(url)).blob();
            const file = new File([blob], name);
            const read = name.endsWith(".mp4")
                ? window.comfyAPI.isobmff.getFromIsobmffFile : window.comfyAPI.ebml.getFromWebmFile;
            return { duration: video.duration, at, end: video.currentTime, found: await read(file) };
        }""",
        path.name,
    )
    assert seen["duration"] == pytest.approx(15.0, abs=0.01) and seen["end"] == pytest.approx(15.0, abs=0.01)
    assert seen["at"] == pytest.approx(11.3, abs=0.01)
    assert {key: seen["found"][key] for key in metadata} == metadata  # its reader takes more for texts in a WebM
    assert frontend.errors == []
