"""The optical-flow adapter of the core's DiT, and checkpoints that have one."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_wan import CONFIG, caption, latent, normal, tiny_dit
from torch.utils.flop_counter import FlopCounterMode
from wan_files import DIMS, tiny_wan

from diagonal_sampler.checkpoints import load_checkpoint
from diagonal_sampler.dit import WanConfig, WanDiT
from diagonal_sampler.wan_layout import FLOW_ADAPTER_KEYS, expected_shapes

WITH_ADAPTER = replace(CONFIG, flow_adapter=True)
TIME = torch.tensor([500.0])


def motion(frames: int, seed: int = 3) -> torch.Tensor:
    return normal(seed, 1, 4, frames, 4, 4)


def test_a_fresh_adapter_changes_nothing_at_all():
    plain = tiny_dit()
    model = WanDiT(WITH_ADAPTER)
    missing, left = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == set(FLOW_ADAPTER_KEYS) and not left
    x, text = latent(1, 3), caption(2)
    with torch.no_grad():
        expected = plain(x, TIME, text)
        assert torch.equal(model(x, TIME, text, optical_flow=motion(3)), expected)
        assert torch.equal(model(x, TIME, text), expected)


def test_a_trained_adapter_without_flow_changes_nothing_at_all():
    plain, model = tiny_dit(), tiny_dit(config=WITH_ADAPTER)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in FLOW_ADAPTER_KEYS}
    assert model.flow_embedding.weight.abs().max() > 0
    plain.load_state_dict(weights)
    x, text = latent(1, 3), caption(2)
    with torch.no_grad():
        expected = plain(x, TIME, text)
        assert torch.equal(model(x, TIME, text), expected)
        assert torch.equal(model(x, TIME, text, optical_flow=torch.zeros(1, 4, 3, 4, 4)), expected)


def test_the_adapter_costs_less_than_a_hundredth_of_a_forward():
    """Wan 1.3B at 832x480, in floating-point operations of a first chunk, the cheapest: nothing is before it."""
    with torch.device("meta"):
        model = WanDiT(WanConfig(flow_adapter=True))
        x, text, field = torch.empty(1, 16, 3, 60, 104), torch.empty(1, 512, 4096), torch.empty(1, 4, 3, 60, 104)
        counts = []
        for flow in (None, field):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(x, torch.empty(1), text, optical_flow=flow)
            counts.append(counter.get_total_flops())
    plain, more = counts
    tokens = 3 * 30 * 52
    products = sum(p.numel() for name, p in model.blocks.named_parameters() if "ffn" in name or "self_attn" in name)
    assert plain > 2 * tokens * 0.99 * products, "the blocks were counted"
    print(f"\nthe adapter: {(more - plain) / plain:.6%} of a forward")
    assert 0 < more - plain < 0.01 * plain


def test_a_trained_adapter_moves_its_own_frames_first():
    model = tiny_dit(config=WITH_ADAPTER)
    x, text = latent(1, 4), caption(2)
    features = torch.zeros(1, 4, 4, 4, 4)
    features[:, :, 2:] = motion(2)
    with torch.no_grad():
        plain = model(x, TIME, text, frames_per_chunk=2, optical_flow=torch.zeros_like(features))
        moved = model(x, TIME, text, frames_per_chunk=2, optical_flow=features)
        both = model(x.expand(2, -1, -1, -1, -1), TIME.expand(2), text.expand(2, -1, -1), frames_per_chunk=2,
                     optical_flow=features)  # fmt: skip
    assert torch.allclose(moved[:, :, :2], plain[:, :, :2], atol=1e-5), "an earlier chunk does not see it"
    assert (moved[:, :, 2:] - plain[:, :, 2:]).abs().max() > 0.05
    assert torch.allclose(both[1:], moved, atol=1e-5), "one field for the batch"


def test_the_adapter_learns():
    model = WanDiT(WITH_ADAPTER)
    with torch.no_grad():
        model.head.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    model(latent(1, 2), TIME, caption(2), optical_flow=motion(2)).square().sum().backward()
    assert model.flow_embedding.weight.grad.abs().max() > 0


def test_what_does_not_fit_is_refused():
    x, text = latent(1, 3), caption(2)
    with pytest.raises(ValueError, match="no adapter for it"):
        tiny_dit()(x, TIME, text, optical_flow=motion(3))
    with pytest.raises(ValueError, match=r"optical_flow has shape \(1, 4, 2, 4, 4\)"):
        tiny_dit(config=WITH_ADAPTER)(x, TIME, text, optical_flow=motion(2))


def test_the_config_is_read_from_the_keys():
    model = tiny_dit(config=WITH_ADAPTER)
    assert WanConfig.from_state_dict(model.state_dict()).flow_adapter
    assert not WanConfig.from_state_dict(tiny_dit().state_dict()).flow_adapter


def test_a_checkpoint_with_an_adapter_is_recognised(tmp_path):
    dims = replace(DIMS, flow_adapter=True)
    weights = tiny_wan(dims=dims)
    assert expected_shapes(dims)[FLOW_ADAPTER_KEYS[0]] == (128, 4, 1, 2, 2)
    save_file(weights, tmp_path / "model.safetensors")
    found = load_checkpoint(tmp_path / "model.safetensors")
    assert found.info.dims == dims and "with an optical-flow adapter" in found.info.summary()
    assert torch.equal(found.state_dict[FLOW_ADAPTER_KEYS[0]], weights[FLOW_ADAPTER_KEYS[0]])
    save_file({k: v for k, v in weights.items() if k != FLOW_ADAPTER_KEYS[1]}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="1 tensors are missing: .*flow_embedding.bias"):
        load_checkpoint(tmp_path / "half.safetensors")
    weights[FLOW_ADAPTER_KEYS[0]] = weights[FLOW_ADAPTER_KEYS[0]][:, :3].contiguous()
    save_file(weights, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"flow_embedding.weight: expected \(128, 4, 1, 2, 2\)"):
        load_checkpoint(tmp_path / "wrong.safetensors")
