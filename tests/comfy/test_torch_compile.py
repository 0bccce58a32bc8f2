"""ComfyUI's TorchCompileModel on a causal MODEL: it drops guards on transformer_options, where positions live."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.utils
from comfy_extras.nodes_torch_compile import TorchCompileModel

from bootstrap.packages import missing_build_tools
from diagonal_sampler.flow import OpticalFlow
from diagonal_sampler.schedule import DiagonalSchedule

CHUNKS = 8


MISSING = missing_build_tools()


@contextlib.contextmanager
def compiles() -> Iterator[None]:
    """torch compiles something in here, even where another test has compiled the same before."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


@pytest.mark.skipif(MISSING is not None, reason=f"torch.compile cannot work here: {MISSING}")
def test_compiled_equals_eager_over_eight_chunks(tiny_wan, causal, prompt, sample_latent):
    model = causal(tiny_wan, window=9, sink=3)
    schedule = DiagonalSchedule.from_steps((2, 1), context_mode="renoise")
    latent = {"samples": torch.zeros(1, 16, 3 * CHUNKS, 4, 4)}
    eager = sample_latent(model, prompt(), [], latent, schedule, seed=1)["samples"]
    compiled_model = TorchCompileModel.execute(model, "inductor").result[0]
    with compiles():
        compiled = sample_latent(compiled_model, prompt(), [], latent, schedule, seed=1)["samples"]
    assert (compiled - eager).abs().max() < 1e-4
    # The cached frames matter: without them the last chunk would be another.
    alone = sample_latent(causal(tiny_wan, window=3, sink=0), prompt(), [], latent, schedule, seed=1)["samples"]
    assert (alone - eager).abs().max() > 0.01


@pytest.mark.skipif(MISSING is not None, reason=f"torch.compile cannot work here: {MISSING}")
def test_a_compiled_model_follows_motion_that_changes_from_chunk_to_chunk(
    tiny_wan, causal, prompt, sample_latent, pack_module
):
    generator = torch.Generator().manual_seed(4)
    adapter = (torch.randn(128, 4, 1, 2, 2, generator=generator), torch.randn(128, generator=generator))
    loading, control = pack_module("model_patches.loading"), pack_module("model_patches.flow_control")
    model = causal(tiny_wan, window=9, sink=3)
    model.set_attachments(loading.FLOW_ADAPTER_ATTACHMENT, adapter)
    steps = 4 * (3 * CHUNKS - 1)
    speed = torch.linspace(-4, 4, steps)[:, None, None, None].expand(steps, 32, 32, 2).contiguous()
    flow = control.FlowConditioning(optical_flow=OpticalFlow.everywhere(speed), mode="adapter")
    schedule = DiagonalSchedule.from_steps((2, 1), context_mode="renoise")
    latent = {"samples": torch.zeros(1, 16, 3 * CHUNKS, 4, 4)}
    plain, eager = (
        sample_latent(model, prompt(), [], latent, schedule, seed=1, optical_flow=motion)["samples"]
        for motion in (None, flow)
    )
    compiled_model = TorchCompileModel.execute(model, "inductor").result[0]
    with compiles():
        compiled = sample_latent(compiled_model, prompt(), [], latent, schedule, seed=1, optical_flow=flow)["samples"]
    assert (compiled - eager).abs().max() < 1e-4
    assert (eager - plain)[:, :, -3:].abs().max() > 0.01
