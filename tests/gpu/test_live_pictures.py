"""Pictures of a run's chunks on CUDA, which are made while the sampler goes on."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from diagonal_sampler.schedule import DiagonalSchedule

DIAGONAL = DiagonalSchedule.preset("diagonal 4-3-2")
SIZE = (16, 16)
BUSY_CYCLES = 100_000_000
"""Some hundredths of a second of a GPU's clock: far more than a copy of a chunk takes."""


def test_a_chunks_pictures_do_not_halt_the_sampler_and_are_of_what_the_gpu_has_finished(
    tiny_wan, gpu_pack, prompt, monkeypatch
):
    live, previews = gpu_pack("nodes.live"), gpu_pack("model_patches.previews")
    sample_latent = gpu_pack("model_patches.sampling").sample_latent
    sent, kept, model = [], [], tiny_wan(torch.bfloat16)
    server = SimpleNamespace(last_prompt_id="P", client_id="C", send_sync=lambda *message: sent.append(message[1]))
    monkeypatch.setattr(gpu_pack("nodes.client"), "PromptServer", SimpleNamespace(instance=server))

    def on_chunk(chunk) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(BUSY_CYCLES)
            latents = chunk.latents.clone()
            kept.append(latents)
            report.chunk(SimpleNamespace(start_frame=chunk.start_frame, latents=latents))
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with live.LiveReport("5", model) as report:
        empty = {"samples": torch.zeros(1, 16, 9, *SIZE)}
        sample_latent(model, prompt, [], empty, DIAGONAL, seed=1, on_chunk=on_chunk)
    pictures_of = previews.preview_of(model)
    wanted = [[previews.as_address(picture) for picture in pictures_of(latents.cpu())] for latents in kept]
    assert [len(frames) for frames in wanted] == [3, 3, 3]
    assert [data["frames"] for data in sent] == wanted
