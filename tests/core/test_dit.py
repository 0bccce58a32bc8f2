"""One network, three forwards: bidirectional, causal over a clip and cached must agree wherever they see the same."""

import random

import pytest
import torch
from tiny_wan import CONFIG, ListKV, caption, latent, normal, split, stream, tiny_dit

from diagonal_sampler.cache import KVCache
from diagonal_sampler.dit import WanConfig, WanDiT, timestep_embedding
from diagonal_sampler.settings import CausalSettings

# window, sink, frames per chunk, frames of the clip
CASES = [
    (-1, 0, 3, 9),
    (-1, 0, 3, 8),
    (-1, 2, 2, 7),
    (6, 3, 3, 13),
    (7, 2, 3, 14),
    (5, 0, 2, 11),
    (8, 3, 2, 13),
    (4, 1, 1, 7),
    (9, 0, 3, 6),
]


@pytest.fixture(scope="module")
def model() -> WanDiT:
    return tiny_dit()


def chunk_timesteps(seed: int, frames: int, chunk: int, batch: int) -> torch.Tensor:
    """[B, T]: a random timestep for each chunk and sample."""
    per_chunk = 1000 * torch.rand(batch, -(-frames // chunk), generator=torch.Generator().manual_seed(seed))
    return per_chunk.repeat_interleave(chunk, dim=1)[:, :frames]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# The forwards against each other


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("window", "sink", "chunk", "frames"), CASES)
def test_streaming_equals_the_whole_clip_forward(model, window, sink, chunk, frames, batch):
    x, context = latent(1, frames, batch), caption(2, batch)
    timesteps = chunk_timesteps(3, frames, chunk, batch)
    settings = CausalSettings(frames_per_chunk=chunk, window=window, sink=sink, positions="absolute")
    masked = model(x, timesteps, context, frames_per_chunk=chunk, window=window, sink=sink)
    close(stream(model, settings, x, timesteps, context), masked)


@torch.no_grad()
def test_streaming_equals_the_whole_clip_forward_for_any_sizes(model):
    rng = random.Random(0)
    for seed in range(12):
        chunk, sink = rng.randint(1, 3), rng.randint(0, 4)
        window, frames = sink + chunk + rng.randint(0, 4), rng.randint(1, 14)
        settings = CausalSettings(frames_per_chunk=chunk, window=window, sink=sink, positions="absolute")
        x, context, timesteps = latent(seed, frames), caption(seed), chunk_timesteps(seed, frames, chunk, 1)
        masked = model(x, timesteps, context, frames_per_chunk=chunk, window=window, sink=sink)
        close(stream(model, settings, x, timesteps, context), masked)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["absolute", "window"])
@pytest.mark.parametrize(("window", "sink", "chunk", "frames"), CASES)
def test_streaming_equals_a_list_of_unrotated_keys(model, window, sink, chunk, frames, positions):
    settings = CausalSettings(frames_per_chunk=chunk, window=window, sink=sink, positions=positions)
    x, context, timesteps = latent(1, frames), caption(2), chunk_timesteps(3, frames, chunk, 1)
    reference, expected = ListKV(settings, frames), []
    for start, stop in split(frames, chunk):
        reference.begin(stop - start)
        expected.append(model(x[:, :, start:stop], timesteps[:, start], context, cache=reference))
        reference.commit()
    close(stream(model, settings, x, timesteps, context), torch.cat(expected, dim=2))


@torch.no_grad()
@pytest.mark.parametrize("positions", ["absolute", "window"])
def test_positions_per_latent_frame_scale_inside_a_chunk_too(model, positions):
    settings = CausalSettings(frames_per_chunk=3, window=6, sink=2, positions=positions)
    x, context, timestep = latent(1, 11), caption(2), torch.tensor([500.0])
    cache, reference = KVCache(settings, 11, time_scale=0.5), ListKV(settings, 11, 0.5)
    for start, stop in split(11, 3):
        cache.begin(stop - start)
        reference.begin(stop - start)
        pair = (cache.condition("only"), reference)
        found, expected = (model(x[:, :, start:stop], timestep, context, cache=kv) for kv in pair)
        close(found, expected)
        cache.commit()
        reference.commit()
    whole = KVCache(CausalSettings(frames_per_chunk=3, window=-1), 3, time_scale=0.5)
    whole.begin(3)
    scaled = model(x[:, :, :3], timestep, context, cache=whole.condition("only"))
    assert (scaled - model(x[:, :, :3], timestep, context)).abs().max() > 1e-3


@torch.no_grad()
def test_the_settings_matter(model):
    """Window, sink, positions and chunk size change the result far more than the tolerance above."""
    x, context, timesteps = latent(1, 12), caption(2), chunk_timesteps(3, 12, 2, 1)

    def run(window: int, sink: int, chunk: int, positions: str) -> torch.Tensor:
        settings = CausalSettings(frames_per_chunk=chunk, window=window, sink=sink, positions=positions)
        return stream(model, settings, x, timesteps, context)[:, :, -2:]

    base = run(6, 2, 2, "absolute")
    for other in (run(6, 0, 2, "absolute"), run(8, 2, 2, "absolute"), run(6, 2, 2, "window"), run(-1, 0, 2, "auto")):
        assert (other - base).abs().max() > 1e-2


@torch.no_grad()
def test_bidirectional_is_one_chunk_of_all_frames(model):
    x, context, timestep = latent(1, 5, 2), caption(2, 2), torch.tensor([700.0, 30.0])
    whole = model(x, timestep, context)
    close(model(x, timestep, context, frames_per_chunk=5), whole)
    close(model(x, timestep, context, frames_per_chunk=100), whole)
    assert (model(x, timestep, context, frames_per_chunk=2) - whole).abs().max() > 1e-2


@torch.no_grad()
def test_a_timestep_for_the_clip_is_one_for_each_frame(model):
    x, context, timestep = latent(1, 4, 2), caption(2, 2), torch.tensor([700.0, 30.0])
    close(model(x, timestep[:, None].expand(2, 4), context), model(x, timestep, context))
    varied = torch.tensor([[700.0, 700.0, 700.0, 30.0], [30.0, 30.0, 30.0, 30.0]])
    out = model(x, varied, context)
    close(out[1], model(x, timestep, context)[1])
    assert (out[0] - model(x, timestep, context)[0]).abs().max() > 1e-2


@torch.no_grad()
def test_nothing_later_reaches_an_earlier_chunk(model):
    x, context, timesteps = latent(1, 6), caption(2), torch.full((1, 6), 500.0)
    changed, later = x.clone(), timesteps.clone()
    changed[:, :, 4] += 1
    later[:, 4] = 20
    causal = [model(a, t, context, frames_per_chunk=2) for a, t in ((x, timesteps), (changed, later))]
    close(causal[1][:, :, :4], causal[0][:, :, :4])
    assert (causal[1] - causal[0])[:, :, 5].abs().max() > 1e-3  # its own chunk
    both = [model(a, t, context) for a, t in ((x, timesteps), (changed, later))]
    assert (both[1] - both[0])[:, :, 0].abs().max() > 1e-3  # the bidirectional forward sees it everywhere


@torch.no_grad()
def test_samples_of_a_batch_do_not_mix(model):
    x, context, timestep = latent(1, 3, 2), caption(2, 2), torch.tensor([700.0, 30.0])
    both = model(x, timestep, context)
    for sample in range(2):
        one = slice(sample, sample + 1)
        close(both[one], model(x[one], timestep[one], context[one]))


@torch.no_grad()
def test_text_and_every_patch_matter(model):
    x, timestep = latent(1, 2), torch.tensor([400.0])
    assert (model(x, timestep, caption(2)) - model(x, timestep, caption(3))).abs().max() > 1e-2
    # The frame's patches are told apart by position: swapping two rows of patches does not just swap the output.
    swapped = x.roll(2, dims=3)
    assert (model(swapped, timestep, caption(2)).roll(-2, dims=3) - model(x, timestep, caption(2))).abs().max() > 1e-3


def test_patches_go_back_where_they_came_from():
    """A head that copies its token's mean writes each patch's number to each patch's place."""
    config = WanConfig(dim=128, ffn_dim=8, num_layers=1, text_dim=8, in_channels=4, out_channels=4, freq_dim=16)
    model = tiny_dit(0, config)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        x = torch.zeros(1, 4, 3, 6, 8)
        base = model(x, torch.tensor([100.0]), caption(0))
        x[:, 1, 1, 4, 3] = 5  # lies in the patch of rows 4 to 5 and columns 2 to 3
        changed = (model(x, torch.tensor([100.0]), caption(0)) - base).abs().amax(dim=(0, 1)) > 1e-6
    expected = torch.zeros(3, 6, 8, dtype=torch.bool)
    expected[1, 4:6, 2:4] = True
    assert torch.equal(changed, expected)


def test_timestep_embedding_is_cosines_then_sines():
    found = timestep_embedding(torch.tensor([[0.0], [250.0]]), 8)
    speeds = torch.tensor([1.0, 0.1, 0.01, 0.001])
    assert found.shape == (2, 1, 8)
    close(found[0, 0], torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]))
    close(found[1, 0], torch.cat(((250 * speeds).cos(), (250 * speeds).sin())))


# Training


def test_every_weight_gets_a_gradient_in_every_forward(model):
    x, context, timestep = latent(1, 4), caption(2), torch.tensor([500.0])
    cache = KVCache(CausalSettings(frames_per_chunk=4, window=-1), 4)
    cache.begin(4)
    options = ({}, {"frames_per_chunk": 2}, {"cache": cache.condition("only")})
    for option in options:
        model.zero_grad(set_to_none=True)
        model(x, timestep, context, **option).square().mean().backward()
        silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
        assert silent == []
    model.zero_grad(set_to_none=True)


def test_training_works_after_a_run_in_inference_mode(model):
    """Rotations are kept between calls; autograd refuses tensors made in inference mode."""
    x, context, timestep = normal(1, 1, 4, 5, 8, 6), caption(2), torch.tensor([500.0])  # a grid of no other test
    with torch.inference_mode():
        expected = model(x, timestep, context, frames_per_chunk=2, window=4, sink=1)
    found = model(x, timestep, context, frames_per_chunk=2, window=4, sink=1)
    close(found, expected)
    found.square().mean().backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_bf16_stays_bf16_and_near():
    model = tiny_dit().bfloat16()
    x, context, timestep = latent(1, 4), caption(2), torch.tensor([500.0])
    exact = tiny_dit()(x, timestep, context)
    settings = CausalSettings(frames_per_chunk=4, window=-1)
    for out in (
        model(x.bfloat16(), timestep, context.bfloat16()),
        model(x.bfloat16(), timestep, context.bfloat16(), frames_per_chunk=4),
        stream(model, settings, x.bfloat16(), timestep[:, None].expand(1, 4), context.bfloat16()),
    ):
        assert out.dtype == torch.bfloat16
        assert (out.float() - exact).abs().mean() < 0.03 * exact.abs().mean() + 0.02


# Weights


def names(layers: int) -> set[str]:
    """METHOD's list of a bare Wan state dict, written out."""
    stems = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"]
    stems += ["time_projection.1", "head.head"]
    found = {"head.modulation"}
    for layer in range(layers):
        block = f"blocks.{layer}"
        for attention in ("self_attn", "cross_attn"):
            stems += [f"{block}.{attention}.{part}" for part in "qkvo"]
            found |= {f"{block}.{attention}.norm_{part}.weight" for part in "qk"}
        stems += [f"{block}.norm3", f"{block}.ffn.0", f"{block}.ffn.2"]
        found.add(f"{block}.modulation")
    return found | {f"{stem}.{kind}" for stem in stems for kind in ("weight", "bias")}


def test_state_dict_has_wans_names():
    assert set(WanDiT(CONFIG).state_dict()) == names(2)


def test_the_1_3b_model_has_its_size(monkeypatch):
    # A device's mode lists torch's constructors once and for all at its first use: with the true randn among them.
    with torch.device("meta"):
        torch.empty(0)
    # Drawing and scaling numbers on `meta` would load torch's compiler, seconds of it; only shapes are wanted here.
    monkeypatch.setattr(torch, "randn", torch.empty)
    monkeypatch.setattr(torch.Tensor, "__truediv__", lambda self, other: self)
    monkeypatch.setattr(WanDiT, "_initialise", lambda self: None)
    with torch.device("meta"):
        model = WanDiT(WanConfig())
    assert set(model.state_dict()) == names(30)
    dim, ffn, text, freq, layers = 1536, 8960, 4096, 256, 30

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    block = 8 * linear(dim, dim) + 4 * dim + 2 * dim + linear(dim, ffn) + linear(ffn, dim) + 6 * dim
    total = layers * block + linear(16 * 4, dim) + linear(text, dim) + linear(dim, dim)
    total += linear(freq, dim) + linear(dim, dim) + linear(dim, 6 * dim) + linear(dim, 64) + 2 * dim
    assert total == 1_418_996_800
    assert sum(p.numel() for p in model.parameters()) == total
    assert model.config.num_heads == 12


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        WanConfig(dim=256, ffn_dim=96, num_layers=11, text_dim=12, in_channels=36, out_channels=16, freq_dim=32),
        WanConfig(dim=128, ffn_dim=8, num_layers=1, text_dim=8, in_channels=4, out_channels=8, patch_size=(1, 1, 4)),
    ],
)
def test_sizes_are_read_from_a_state_dict(config):
    weights = WanDiT(config).state_dict()
    assert WanConfig.from_state_dict(weights) == config
    assert all(type(value) is int for value in (config.dim, WanConfig.from_state_dict(weights).dim))
    with pytest.raises(KeyError, match="head.head.weight"):
        WanConfig.from_state_dict({key: value for key, value in weights.items() if key != "head.head.weight"})


@torch.no_grad()
def test_weights_carry_over(model):
    weights = model.state_dict()
    copy = WanDiT(WanConfig.from_state_dict(weights))
    copy.load_state_dict(weights)
    x, timestep = latent(1, 3), torch.tensor([500.0])
    assert torch.equal(copy(x, timestep, caption(2)), model(x, timestep, caption(2)))


@torch.no_grad()
def test_a_fresh_model_predicts_no_flow_but_is_not_dead():
    torch.manual_seed(0)
    model = WanDiT(CONFIG)
    assert model(latent(1, 3), torch.tensor([500.0]), caption(2)).abs().max() == 0
    for name, weight in model.named_parameters():
        assert torch.isfinite(weight).all()
        if name.endswith("weight") and "norm" not in name and name != "head.head.weight":
            assert weight.std() > 0, name
        assert not name.endswith("bias") or name == "patch_embedding.bias" or weight.abs().max() == 0
    bound = (6 / (16 + 128)) ** 0.5  # Xavier over the flattened patch
    assert 0.9 * bound < model.patch_embedding.weight.abs().max() <= bound


# Bad input


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"dim": 100}, "dim is 100"),
        ({"dim": 0}, "dim is 0"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"ffn_dim": -1}, "ffn_dim is -1"),
        ({"text_dim": 0}, "text_dim is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"out_channels": 0}, "out_channels is 0"),
        ({"freq_dim": 15}, "freq_dim is 15"),
        ({"freq_dim": 0}, "freq_dim is 0"),
    ],
)
def test_bad_sizes_name_the_parameter(sizes, named):
    with pytest.raises(ValueError, match=named):
        WanConfig(**sizes)


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({"x": (1, 5, 3, 4, 4)}, "x has shape"),
        ({"x": (1, 4, 3, 5, 4)}, "H a multiple of 2"),
        ({"x": (1, 4, 3, 4, 3)}, "W of 2"),
        ({"x": (1, 4, 4, 4)}, "x has shape"),
        ({"timestep": (3,)}, "timestep has shape"),
        ({"timestep": (1, 2)}, "timestep has shape"),
        ({"timestep": (2, 3)}, "timestep has shape"),
        ({"timestep": ()}, "timestep has shape"),
        ({"context": (2, 5, 8)}, "context has shape"),
        ({"context": (1, 5, 7)}, "context has shape"),
        ({"context": (5, 8)}, "context has shape"),
    ],
)
def test_bad_shapes_name_the_argument(model, shapes, named):
    inputs = {"x": (1, 4, 3, 4, 4), "timestep": (1,), "context": (1, 5, 8)}
    with torch.no_grad():
        model(*(torch.zeros(shape) for shape in inputs.values()))
        with pytest.raises(ValueError, match=named):
            model(*(torch.zeros(shape) for shape in {**inputs, **shapes}.values()))


def test_bad_options_name_the_argument(model):
    x, timestep, context = latent(1, 3), torch.tensor([500.0]), caption(2)
    cache = KVCache(CausalSettings(frames_per_chunk=3, window=-1), 6)
    condition = cache.condition("only")
    cache.begin(2)
    with torch.no_grad():
        with pytest.raises(ValueError, match="give one of them"):
            model(x, timestep, context, frames_per_chunk=3, cache=condition)
        with pytest.raises(ValueError, match="frames_per_chunk is 0"):
            model(x, timestep, context, frames_per_chunk=0)
        with pytest.raises(ValueError, match="window is 2"):
            model(x, timestep, context, frames_per_chunk=3, window=2)
        with pytest.raises(ValueError, match="3 latent frames.*2"):
            model(x, timestep, context, cache=condition)
