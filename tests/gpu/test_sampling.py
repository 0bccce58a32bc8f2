"""The chunk sampler on CUDA, through ComfyUI's own Wan."""

from __future__ import annotations

import gc
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from bootstrap.packages import missing_build_tools
from diagonal_sampler.cache import KVCache
from diagonal_sampler.schedule import DiagonalSchedule

DIAGONAL = DiagonalSchedule.preset("diagonal 4-3-2")
EQUAL_TO_CPU = 1e-3
"""Max abs between float32 latents of CPU and GPU: other kernels sum in another order, over 17 forwards."""
RUNS = ("diag_7", "relative_20")
CLIP = (1, 16, 21, 16, 16)
BUSY_CYCLES = 400_000_000
"""Some tenths of a second of a GPU's clock: far more than the linear map of a chunk takes."""
MEMORY_SLACK = 1 << 20
"""Bytes that a number or two and the allocator's rounding may differ by; a latent frame's keys are more."""


def parity_run(name: str):
    """A reference run of tests/parity, whose latents were computed on a CPU."""
    path = Path(__file__).resolve().parents[1] / "parity" / "test_parity.py"
    spec = importlib.util.spec_from_file_location("gpu_parity_runs", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.Run.load(name)


@pytest.fixture
def sampling(gpu_pack):
    return gpu_pack("model_patches.sampling")


def empty(frames: int) -> dict[str, torch.Tensor]:
    return {"samples": torch.zeros(1, 16, frames, *CLIP[3:])}


@pytest.mark.parametrize("name", RUNS)
def test_float32_equals_the_cpus_latents(name, gpu_pack, sampling, exact_float32):
    import comfy.sd

    run = parity_run(name)
    model = comfy.sd.load_diffusion_model(str(run.model_path), model_options={"dtype": torch.float32})
    model = gpu_pack("model_patches.causal").make_causal(model, run.settings)
    conditioning, devices = [[run.tensors["context"], {}]], set()
    result = sampling.sample_latent(
        model,
        conditioning,
        conditioning,
        {"samples": torch.zeros_like(run.noise)},
        run.schedule,
        seed=0,
        noise=run.draw,
        on_chunk=lambda chunk: devices.add(chunk.latents.device.type),
    )
    assert devices == {"cuda"}
    latents = model.get_model_object("latent_format").process_in(result["samples"])
    assert (latents - run.latents).abs().max() < EQUAL_TO_CPU


def correlation(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]).float())[0, 1])


# e4m3 has three bits of mantissa: each weight is off by up to 6 %.
@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.99), (torch.float8_e4m3fn, 0.9)])
def test_small_number_formats_make_about_the_same_video(dtype, least, tiny_wan, sampling, prompt):
    exact, model = tiny_wan(), tiny_wan(dtype)
    assert model.model.diffusion_model.blocks[0].ffn[0].weight.dtype == dtype
    wanted, got = (
        sampling.sample_latent(which, prompt, [], empty(21), DIAGONAL, seed=1)["samples"] for which in (exact, model)
    )
    assert got.isfinite().all()
    assert correlation(got, wanted) > least


def test_nothing_waits_for_the_device_inside_a_chunk(tiny_wan, sampling, prompt, monkeypatch):
    """From the first draw of a chunk to its commit. One look for NaN comes after it, see `FiniteLook`."""
    model = tiny_wan(torch.bfloat16, window=9, sink=3)

    def sample() -> None:
        sampling.sample_latent(model, prompt, [], empty(24), DIAGONAL, seed=1)

    sample()  # tables that are kept are copied once
    begin, commit, chunks = KVCache.begin, KVCache.commit, []

    def watched_begin(cache: KVCache, frames: int) -> None:
        begin(cache, frames)
        torch.cuda.set_sync_debug_mode("error")

    def watched_commit(cache: KVCache) -> None:
        torch.cuda.set_sync_debug_mode("default")
        commit(cache)
        chunks.append(cache.committed)

    monkeypatch.setattr(KVCache, "begin", watched_begin)
    monkeypatch.setattr(KVCache, "commit", watched_commit)
    try:
        sample()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(chunks) == 8


def test_a_streams_chunk_is_given_away_without_waiting_for_it(tiny_wan, sampling, prompt, monkeypatch):
    model, given, give = tiny_wan(torch.bfloat16), [], sampling._SamplingRun.give
    plan = sampling.plan_clip(model, (1, 16, 9, *CLIP[3:]), DIAGONAL)

    def watched(*named) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            give(*named)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(sampling._SamplingRun, "give", watched)
    sampling.stream_latent(model, prompt, [], plan, given.append, seed=1)
    assert [chunk.latents.device.type for chunk in given] == ["cuda"] * 3


def test_pictures_of_a_chunk_are_made_of_what_the_gpu_has_finished(tiny_wan, gpu_pack):
    """No previewer of the user's is chosen here, so that it is the linear map."""
    latents = torch.randn(1, 16, 3, *CLIP[3:], generator=torch.Generator().manual_seed(0))
    pictures_of = gpu_pack("model_patches.previews").preview_of(tiny_wan())
    wanted = [picture.tobytes() for picture in pictures_of(latents)]
    there = latents.cuda()
    list(pictures_of(-there))  # prepares kernels, and leaves other pictures in memory that is used again
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    assert [picture.tobytes() for picture in pictures_of(there)] == wanted


def test_the_watch_for_waits_can_fail():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def test_memory_does_not_grow_with_the_length_and_is_given_back(tiny_wan, sampling, prompt):
    import comfy.model_management

    model = tiny_wan(torch.bfloat16, window=6, sink=3)

    def stream(frames: int, stop_at: int | None = None) -> int:
        """Peak of a run in which nothing keeps a chunk."""
        plan = sampling.plan_clip(model, (1, 16, frames, *CLIP[3:]), DIAGONAL)

        def take(chunk) -> None:
            if chunk.index == stop_at:
                comfy.model_management.interrupt_current_processing()

        torch.cuda.reset_peak_memory_stats()
        sampling.stream_latent(model, prompt, [], plan, take, seed=1)
        return torch.cuda.max_memory_allocated()

    stream(12)  # loads the model
    before = allocated()
    short, long = stream(12), stream(120)
    assert short > before + MEMORY_SLACK  # the keys and values of the window
    assert abs(long - short) < MEMORY_SLACK
    assert abs(allocated() - before) < MEMORY_SLACK
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream(120, stop_at=3)
    assert abs(allocated() - before) < MEMORY_SLACK


MISSING = missing_build_tools()


@pytest.mark.skipif(MISSING is not None, reason=f"torch.compile cannot work here: {MISSING}")
def test_compiled_equals_eager_over_eight_chunks(tiny_wan, sampling, prompt, exact_float32):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    model = tiny_wan(window=9, sink=3)
    schedule = DiagonalSchedule.from_steps((2, 1))
    eager = sampling.sample_latent(model, prompt, [], empty(24), schedule, seed=1)["samples"]
    compiled_model = TorchCompileModel.execute(model, "inductor").result[0]
    compiled = sampling.sample_latent(compiled_model, prompt, [], empty(24), schedule, seed=1)["samples"]
    assert (compiled - eager).abs().max() < EQUAL_TO_CPU


def test_the_demo_student_end_to_end(gpu_pack, sampling):
    import comfy_host

    with comfy_host.demo_models("student") as (model, positive, _, vae):
        latent = {"samples": torch.zeros(1, 16, 12, 8, 8)}
        samples, again = (
            sampling.sample_latent(model, positive, [], latent, DIAGONAL, seed=seed)["samples"] for seed in (1, 1)
        )
        assert samples.isfinite().all()
        torch.testing.assert_close(samples, again, rtol=0, atol=EQUAL_TO_CPU)
        with gpu_pack("model_patches.stream_decode").stream_decoder(vae) as decoder:
            images = torch.cat([decoder.decode(chunk) for chunk in samples.split(3, dim=2)], dim=1)
    assert images.shape[1:] == (45, 64, 64, 3)
    # The caption says a red circle: somewhere red stands alone.
    red = images[..., 0] - images[..., 1:].amax(-1)
    assert red.amax() > 0.3
