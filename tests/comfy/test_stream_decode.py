"""Streaming decode: chunks equal the whole clip, state is constant, and the VAE stays the user's."""

from __future__ import annotations

import gc
import logging

import comfy.latent_formats
import comfy.ldm.wan.vae
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.taesd.taehv
import pytest
import torch
import torch.nn.functional as F

import nodes

CHANNELS = 16
FRAMES = 7
HEIGHT, WIDTH = 2, 3
SPLITS = [(7,), (1,) * 7, (3, 3, 1), (1, 2, 4), (2, 1, 1, 3), (5, 2)]
TOLERANCE = 1e-5


def random_state(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a size that keeps activations near 1, under the model's names."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        fan_in = max(1, value[0].numel()) if value.ndim > 1 else 100
        state[name] = 1 + 0.1 * noise if name.endswith("gamma") else noise / fan_in**0.5
    return state


def wan_vae() -> comfy.sd.VAE:
    model = comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=CHANNELS, temperal_downsample=[False, True, True])
    return comfy.sd.VAE(sd=random_state(model, 1), dtype=torch.float32)


def taehv_vae(dtype: torch.dtype = torch.float32, latent_channels: int = CHANNELS) -> comfy.sd.VAE:
    """A tiny VAE whose file has this dtype; it computes in float32."""
    state = random_state(comfy.taesd.taehv.TAEHV(latent_channels=latent_channels), 2)
    return comfy.sd.VAE(sd={name: value.to(dtype) for name, value in state.items()}, dtype=torch.float32)


class Foreign(torch.nn.Module):
    """A video decoder that this pack does not know; each latent frame sees the one before it."""

    def decode(self, latents):
        seen = latents[:, :3].clone()
        seen[:, :, 1:] += 0.5 * latents[:, :3, :-1]
        pixels = F.interpolate(seen.tanh(), scale_factor=(4, 8, 8), mode="nearest")
        return pixels[:, :, 3:]


@pytest.fixture(scope="module")
def streaming(pack_module):
    return pack_module("model_patches.stream_decode")


@pytest.fixture(scope="module")
def demo_vae(pack_module, request):
    return pack_module("model_patches.demo").load_demo_vae(
        request.config.rootpath / "demo" / "demo_autoencoder.safetensors"
    )


@pytest.fixture
def foreign_vae(pack_module, request):
    vae = pack_module("model_patches.demo").load_demo_vae(
        request.config.rootpath / "demo" / "demo_autoencoder.safetensors"
    )
    vae.first_stage_model = Foreign()
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=torch.device("cpu")
    )
    return vae


@pytest.fixture(scope="module")
def vaes(demo_vae):
    return {"wan": wan_vae(), "taehv": taehv_vae(), "demo": demo_vae}


@pytest.fixture(params=["wan", "taehv", "demo"])
def vae(request, vaes):
    return vaes[request.param]


def latents_of(seed: int, frames: int = FRAMES, batch: int = 1, height: int = HEIGHT, width: int = WIDTH):
    return torch.randn(batch, CHANNELS, frames, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def whole():
    """`whole(vae, latents)`: what VAE.decode returns, computed once per input."""
    known = {}

    def decode(vae, latents):
        key = (id(vae), latents.sum().item(), latents.shape)
        if key not in known:
            with torch.inference_mode():
                known[key] = vae.decode(latents)
        return known[key]

    return decode


def difference(got, wanted) -> float:
    assert got.shape == wanted.shape
    return (got - wanted).abs().max().item()


def held_bytes(decoder) -> int:
    """Bytes of every tensor that can be reached from the decoder, found by Python's collector; not the VAE's."""
    seen, stack, storages = {id(decoder.vae), id(decoder.vae.first_stage_model)}, [decoder._clips], {}
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, (list, tuple, dict)) or hasattr(thing, "tensors"):
            stack += gc.get_referents(thing) + list(getattr(thing, "__dict__", {}).values())
    return sum(storages.values())


def test_comfyui_recognises_the_files(vaes):
    assert isinstance(vaes["wan"].first_stage_model, comfy.ldm.wan.vae.WanVAE)
    assert isinstance(vaes["taehv"].first_stage_model, comfy.taesd.taehv.TAEHV)
    assert vaes["taehv"].first_stage_model.latent_format is None  # lighttaew2_1
    assert taehv_vae(torch.float16).first_stage_model.latent_format is comfy.latent_formats.HunyuanVideo


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: "-".join(map(str, split)))
def test_chunks_equal_the_whole_clip(streaming, vae, whole, split):
    latents = latents_of(1)
    wanted = whole(vae, latents)
    assert wanted.std() > 0.01  # else equality would say little
    with streaming.stream_decoder(vae) as decoder:
        chunks = [decoder.decode(chunk) for chunk in latents.split(split, dim=2)]
    assert [chunk.shape[1] for chunk in chunks] == [4 * n - 3 * (i == 0) for i, n in enumerate(split)]
    got = torch.cat(chunks, dim=1)
    assert difference(got, wanted) < TOLERANCE


def test_a_batch_equals_the_whole_batch(streaming, vae, whole):
    latents = latents_of(2, frames=5, batch=2)
    with streaming.stream_decoder(vae) as decoder:
        got = torch.cat([decoder.decode(chunk) for chunk in latents.split((2, 1, 2), dim=2)], dim=1)
    assert difference(got, whole(vae, latents)) < TOLERANCE


def test_one_latent_frame_is_one_image(streaming, vae, whole):
    latents = latents_of(3, frames=1)
    with streaming.stream_decoder(vae) as decoder:
        images = decoder.submit(latents).result()
    assert difference(images, whole(vae, latents)) < TOLERANCE
    assert images.shape == (1, 1, 8 * HEIGHT, 8 * WIDTH, 3)
    assert images.dtype == torch.float32 and images.device.type == "cpu" and images.is_contiguous()


def test_number_formats_of_latents_and_images_are_converted(streaming, vae, monkeypatch):
    monkeypatch.setattr(vae, "vae_output_dtype", lambda: torch.float16)  # as with --fp16-intermediates
    latents = latents_of(1, frames=2)
    with streaming.stream_decoder(vae) as decoder:
        images = decoder.decode(latents.double())
        decoder.reset()
        assert torch.equal(images, decoder.decode(latents))
    assert images.dtype == torch.float16 and images.is_contiguous()


def test_the_node_gives_the_same_frames(streaming, vaes):
    latents = latents_of(1)
    with torch.inference_mode():
        wanted = nodes.VAEDecode().decode(vaes["wan"], {"samples": latents})[0]
    with streaming.stream_decoder(vaes["wan"]) as decoder:
        got = torch.cat([decoder.decode(chunk)[0] for chunk in latents.split(3, dim=2)])
    assert difference(got, wanted) < TOLERANCE


def test_a_tiny_vae_of_other_channels(streaming, whole):
    """Wan 2.2's layout: 48 channels, pixels shuffled out of 2x2."""
    state = random_state(comfy.taesd.taehv.TAEHV(latent_channels=48), 4)
    vae = comfy.sd.VAE(sd=state, dtype=torch.float32)
    latents = torch.randn(1, 48, 3, 2, 2, generator=torch.Generator().manual_seed(4))
    with streaming.stream_decoder(vae) as decoder:
        got = torch.cat([decoder.decode(chunk) for chunk in latents.split((1, 2), dim=2)], dim=1)
    assert difference(got, whole(vae, latents)) < TOLERANCE


def test_state_is_constant_over_fifty_chunks(streaming, vae):
    sizes, counted = [], []
    with streaming.stream_decoder(vae) as decoder:
        for k in range(50):
            decoder.decode(latents_of(k, frames=1 + k % 3 % 2, height=1, width=1))
            sizes.append(decoder.state_bytes)
            counted.append(held_bytes(decoder))
        assert set(sizes[3:]) == {max(sizes)}
        assert counted == sizes
        # No view holds more than it shows.
        assert sizes[-1] == sum(tensor.nbytes for clip in decoder._clips for tensor in clip.tensors())
    assert decoder.state_bytes == 0
    assert (max(sizes) > 0) == (type(vae.first_stage_model).__name__ != "DemoAutoencoder")


def test_wans_estimate_is_that_of_full_caches_from_the_first_frame_on(streaming, vaes):
    vae = vaes["wan"]
    with streaming.stream_decoder(vae) as decoder:
        for frames in (1, 3, 9):
            shape = (1, CHANNELS, frames, HEIGHT, WIDTH)
            whole_clip = vae.memory_used_decode((*shape[:2], 50, *shape[3:]), vae.vae_dtype)
            assert decoder.memory_required(shape) == int(whole_clip)


def test_memory_is_asked_for_a_chunk_and_the_vae_loaded_once(streaming, vae, monkeypatch):
    comfy.model_management.unload_all_models()
    asked = []
    load = comfy.model_management.load_models_gpu

    def record(models, memory_required=0, **options):
        asked.append((models, memory_required, options))
        return load(models, memory_required=memory_required, **options)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", record)
    with streaming.stream_decoder(vae) as decoder:
        for _ in range(4):
            decoder.decode(latents_of(5, frames=3))
        assert asked == [([vae.patcher], decoder.memory_required((1, CHANNELS, 3, HEIGHT, WIDTH)), asked[0][2])]
        assert asked[0][2]["force_full_load"] is vae.disable_offload
        # What is short, or gone, is asked for again; models that must stay go with it.
        monkeypatch.setattr(vae.patcher, "get_free_memory", lambda device: 0)
        decoder.decode(latents_of(5, frames=3))
        assert len(asked) == 2 and asked[1][1] == asked[0][1]
    monkeypatch.undo()
    other = comfy.model_patcher.ModelPatcher(torch.nn.Linear(1, 1), vae.device, torch.device("cpu"))
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", record)
    monkeypatch.setattr(vae, "disable_offload", True)
    with streaming.stream_decoder(vae) as decoder:
        decoder.keep_loaded([other])
        decoder.decode(latents_of(5, frames=1))
    assert asked[-1][0] == [vae.patcher, other] and asked[-1][2]["force_full_load"] is True


def test_a_state_that_the_next_one_replaces_is_not_asked_for_again(streaming, vaes, monkeypatch):
    vae, asked = vaes["wan"], []
    monkeypatch.setattr(vae.patcher, "get_free_memory", lambda device: 0)
    monkeypatch.setattr(
        comfy.model_management, "load_models_gpu", lambda *a, memory_required, **k: asked.append(memory_required)
    )
    with streaming.stream_decoder(vae) as decoder:
        for kept in (1 << 30, 0):
            monkeypatch.setattr(streaming, "MOST_KEPT_BYTES", kept)
            decoder.decode(latents_of(5, frames=3, batch=2))
        whole_clip = decoder.memory_required((2, CHANNELS, 3, HEIGHT, WIDTH))
        assert asked == [whole_clip, whole_clip - decoder.state_bytes // 2]
        monkeypatch.setattr(streaming, "MOST_KEPT_BYTES", 1 << 30)
        decoder.decode(latents_of(5, frames=3, batch=2))
        assert asked[2] == whole_clip, "what is kept aside needs room beside what comes in its place"


@pytest.mark.parametrize("dynamic", [False, True])
def test_on_a_full_card_dynamic_vram_is_asked_once(streaming, vaes, monkeypatch, dynamic):
    vae, asked = vaes["taehv"], []
    monkeypatch.setattr(vae.patcher, "get_free_memory", lambda device: 0)
    monkeypatch.setattr(vae.patcher, "is_dynamic", lambda: dynamic)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models, **k: asked.append(models))
    loaded = [vae.patcher]
    monkeypatch.setattr(comfy.model_management, "loaded_models", lambda *given: loaded)
    monkeypatch.setattr(vae.patcher, "loaded_size", lambda: 1)
    with streaming.stream_decoder(vae) as decoder:
        for _ in range(3):
            decoder.decode(latents_of(5, frames=1))
        assert len(asked) == (1 if dynamic else 3)
        loaded.clear()
        decoder.decode(latents_of(5, frames=1))
        assert len(asked) == (2 if dynamic else 4), "the VAE is gone"


def test_vae_decode_in_between_changes_nothing(streaming, vae, whole):
    latents, foreign = latents_of(1), latents_of(6, frames=3, height=1, width=2)
    alone = whole(vae, foreign)
    with streaming.stream_decoder(vae) as decoder:
        chunks = []
        for chunk in latents.split((2, 1, 4), dim=2):
            chunks.append(decoder.decode(chunk))
            with torch.inference_mode():
                assert torch.equal(vae.decode(foreign), alone)
    assert difference(torch.cat(chunks, dim=1), whole(vae, latents)) < TOLERANCE


def test_two_decoders_do_not_mix(streaming, vae, whole):
    clips = latents_of(1), latents_of(7, height=1, width=2)
    with streaming.stream_decoder(vae) as first, streaming.stream_decoder(vae) as second:
        chunks = [
            (first.decode(a), second.decode(b))
            for a, b in zip(clips[0].split((1, 2, 4), dim=2), clips[1].split((3, 3, 1), dim=2), strict=True)
        ]
    for clip, images in zip(clips, zip(*chunks, strict=True), strict=True):
        assert difference(torch.cat(images, dim=1), whole(vae, clip)) < TOLERANCE


def test_the_vae_is_left_as_it_was(streaming, vae):
    model = vae.first_stage_model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {id(m): set(vars(m)) for m in model.modules()}
    with streaming.stream_decoder(vae) as decoder:
        decoder.decode(latents_of(1, frames=2))
    assert {id(m): set(vars(m)) for m in model.modules()} == attributes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not vae.patcher.object_patches and not vae.patcher.patches and not vae.patcher.wrappers


@pytest.mark.parametrize("split", SPLITS[1:], ids=lambda split: "-".join(map(str, split)))
def test_a_restored_decoder_goes_on_bit_by_bit(streaming, vae, split):
    """After every chunk, from a snapshot that has nothing of the first decoder but its numbers."""
    chunks = latents_of(2, batch=2).split(split, dim=2)
    with streaming.stream_decoder(vae) as first:
        assert first.snapshot() == {}
        for done, chunk in enumerate(chunks[:-1], 1):
            first.decode(chunk)
            snapshot = first.snapshot()
            assert all(type(name) is str and x.device.type == "cpu" for name, x in snapshot.items())
            with streaming.stream_decoder(vae) as second:
                second.restore({name: x.clone() for name, x in snapshot.items()})
                assert second.state_bytes <= first.state_bytes
                with pytest.raises(RuntimeError, match="inside a clip"):
                    second.restore(snapshot)
                found = [second.decode(rest) for rest in chunks[done:]]
            with streaming.stream_decoder(vae) as third:
                expected = [third.decode(chunk) for chunk in chunks][done:]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_restored_decoder_keeps_its_clips_size_and_a_snapshot_is_no_view(streaming, vaes):
    with streaming.stream_decoder(vaes["wan"]) as first, streaming.stream_decoder(vaes["wan"]) as second:
        second.restore(first.snapshot())  # of a clip that has not begun
        first.decode(latents_of(1, frames=1))
        snapshot = first.snapshot()
        second.restore(snapshot)
        with pytest.raises(ValueError, match="must agree"):
            second.decode(latents_of(1, frames=1, height=4))
        held = {x.data_ptr() for decoder in (first, second) for clip in decoder._clips for x in clip.tensors()}
        assert held.isdisjoint(x.data_ptr() for x in snapshot.values())


@pytest.mark.parametrize("size", [None, [1 << 40, 2, 3], [0, 2, 3], [2, 3]])
def test_a_snapshot_of_more_clips_than_it_holds_is_refused(streaming, demo_vae, size):
    with streaming.stream_decoder(demo_vae) as first, streaming.stream_decoder(demo_vae) as second:
        first.decode(latents_of(1, frames=1))
        snapshot = {name: x for name, x in first.snapshot().items() if name != "size"}
        with pytest.raises(ValueError, match="holds the memory of 1 clips"):
            second.restore(snapshot if size is None else {**snapshot, "size": torch.tensor(size)})
        second.restore(first.snapshot())


def test_a_restored_window_goes_on(streaming, foreign_vae):
    latents = latents_of(8, frames=9)
    with streaming.stream_decoder(foreign_vae) as first, streaming.stream_decoder(foreign_vae) as second:
        first.decode(latents[:, :, :5])
        second.restore(first.snapshot())
        assert torch.equal(second.decode(latents[:, :, 5:]), first.decode(latents[:, :, 5:]))


def test_the_callers_latents_and_grad_mode_are_left_alone(streaming, vae, whole):
    latents = latents_of(1)
    kept = latents.clone()
    with streaming.stream_decoder(vae) as decoder:
        chunks = [decoder.decode(latents[:, :, :2])]
        assert torch.is_grad_enabled() and not chunks[0].requires_grad
        with torch.inference_mode():
            chunks.append(decoder.decode(latents[:, :, 2:5]))
        with torch.no_grad():
            chunks.append(decoder.decode(latents[:, :, 5:]))
    assert torch.equal(latents, kept)
    assert difference(torch.cat(chunks, dim=1), whole(vae, latents)) < TOLERANCE


def interrupt(*_):
    comfy.model_management.interrupt_current_processing(True)


def out_of_memory(*_):
    raise torch.OutOfMemoryError


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("name", ["wan", "taehv"])
@pytest.mark.parametrize("ending", [interrupt, out_of_memory])
def test_an_end_in_between_frees_a_large_state_and_keeps_a_small_one(
    streaming, vaes, whole, name, large, ending, monkeypatch
):
    monkeypatch.setattr(streaming, "MOST_KEPT_BYTES", 0 if large else 1 << 30)
    vae, latents = vaes[name], latents_of(1)
    model = vae.first_stage_model
    last = model.decoder.head[2] if name == "wan" else model.decoder[22]
    decoder = streaming.stream_decoder(vae)
    decoder.decode(latents[:, :, :3])
    assert decoder.state_bytes > 0
    hook = last.register_forward_pre_hook(ending)
    try:
        with pytest.raises((comfy.model_management.InterruptProcessingException, torch.OutOfMemoryError)):
            decoder.decode(latents[:, :, 3:])
    finally:
        hook.remove()
        comfy.model_management.interrupt_current_processing(False)
    if not large:
        frames = 4 * 3 - 3
        assert difference(decoder.decode(latents[:, :, 3:]), whole(vae, latents)[:, frames:]) < TOLERANCE
        return
    assert decoder.state_bytes == 0 and held_bytes(decoder) == 0
    with pytest.raises(RuntimeError, match=r"reset\(\)"):
        decoder.decode(latents[:, :, 3:])
    decoder.reset()
    got = torch.cat([decoder.decode(chunk) for chunk in latents.split((3, 4), dim=2)], dim=1)
    assert difference(got, whole(vae, latents)) < TOLERANCE


def test_behind_a_cut_a_clip_is_decoded_as_another_one_and_keeps_its_count_of_frames(streaming, vae, whole):
    before, behind = latents_of(1), latents_of(2)
    wanted = whole(vae, behind)
    decoder = streaming.stream_decoder(vae)
    decoder.cut()
    assert decoder.decode(before[:, :, :2]).shape[1] == 5, "nothing comes before the first chunk"
    decoder.cut()
    kept = decoder.snapshot()
    comfy.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            decoder.decode(behind[:, :, :2])
    finally:
        comfy.model_management.interrupt_current_processing(False)
    again = decoder.snapshot()
    assert again.keys() == kept.keys() and all(torch.equal(again[name], kept[name]) for name in kept)
    first, rest = decoder.decode(behind[:, :, :2]), decoder.decode(behind[:, :, 2:])
    assert first.shape[1] == 8 and difference(first[:, :4], wanted[:, :1].expand(-1, 4, -1, -1, -1)) < TOLERANCE
    assert difference(torch.cat([first[:, 3:], rest], dim=1), wanted) < TOLERANCE


def test_the_demo_stops_when_cancelled(streaming, demo_vae):
    comfy.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            streaming.stream_decoder(demo_vae).decode(latents_of(1))
    finally:
        comfy.model_management.interrupt_current_processing(False)


def test_an_error_in_a_with_block_frees_the_state(streaming, vaes):
    with pytest.raises(KeyError), streaming.stream_decoder(vaes["wan"]) as decoder:
        decoder.decode(latents_of(1, frames=1))
        raise KeyError
    assert decoder.state_bytes == 0
    for refused in (lambda: decoder.decode(latents_of(1, frames=1)), decoder.snapshot, lambda: decoder.restore({})):
        with pytest.raises(RuntimeError, match="closed"):
            refused()


def test_a_float16_tiny_vae_is_wans(streaming, whole, caplog):
    """ComfyUI takes it for HunyuanVideo's; with Wan's scaling it must equal the same weights fed scaled latents."""
    half, latents = taehv_vae(torch.float16), latents_of(1, frames=3)
    plain = comfy.sd.VAE(sd=half.first_stage_model.state_dict(), dtype=torch.float32)
    wanted = whole(plain, comfy.latent_formats.Wan21().process_in(latents))

    with caplog.at_level(logging.WARNING), streaming.stream_decoder(half) as decoder:
        got = torch.cat([decoder.decode(chunk) for chunk in latents.split((1, 2), dim=2)], dim=1)
    assert difference(got, wanted) < TOLERANCE
    assert sum("taew2_1" in record.message for record in caplog.records) == 1
    assert difference(whole(half, latents), wanted) > 100 * TOLERANCE


def test_the_numbers_of_a_scale_go_to_the_device_once(streaming, pack_module, monkeypatch):
    """The device "meta" stands for any other."""
    own, meta = comfy.latent_formats.Wan21(), torch.device("meta")
    on_device = pack_module("model_patches.vae_scale").on_device
    moved, latents = on_device(own, meta), latents_of(1)
    assert moved.latents_mean.device == moved.latents_std.device == meta
    assert own.latents_mean.device == own.latents_std.device == latents.device
    here = on_device(own, latents.device)
    assert torch.equal(here.process_in(latents), own.process_in(latents))
    assert torch.equal(here.process_out(latents), own.process_out(latents))
    for dtype, is_moved in ((torch.float16, True), (torch.float32, False)):
        vae = taehv_vae(dtype)
        monkeypatch.setattr(vae, "device", meta)
        scale = streaming.stream_decoder(vae)._architecture.new_clip().scale
        assert hasattr(scale, "__self__") == is_moved
        assert not is_moved or scale.__self__.latents_mean.device == meta


def test_the_stream_that_decodes_goes_before_the_one_that_samples(streaming, monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority=0: made.append((device, priority)) or "a stream")
    vae = taehv_vae()
    decoder = streaming.stream_decoder(vae)
    decoder.decode(latents_of(1))
    assert not made, "on the CPU there is none"
    monkeypatch.setattr(vae, "device", torch.device("cuda"))
    decoder._open_stream()
    decoder._open_stream()
    assert made == [(torch.device("cuda"), -1)]


def test_everywhere_a_float16_tiny_vae_is_wans(pack_module, whole, caplog):
    """What streaming decodes, context frames must have encoded in the same scale; other files stay as they are."""
    scale, encode_context = pack_module("model_patches.vae_scale"), pack_module("model_patches.context_frames")
    half = taehv_vae(torch.float16)
    plain = comfy.sd.VAE(sd=half.first_stage_model.state_dict(), dtype=torch.float32)
    wan = comfy.latent_formats.Wan21()
    images = torch.rand(5, 16, 16, 3, generator=torch.Generator().manual_seed(5))
    raw = plain.encode(images)
    assert difference(scale.encode(half, images), wan.process_out(raw)) < TOLERANCE
    assert difference(half.encode(images), wan.process_out(raw)) > 100 * TOLERANCE
    assert torch.equal(scale.encode(plain, images), raw)
    latents = latents_of(1, frames=3)
    assert difference(scale.decode(half, latents), whole(plain, wan.process_in(latents))) < TOLERANCE
    assert torch.equal(scale.decode(plain, latents), plain.decode(latents))
    with caplog.at_level(logging.WARNING):
        found = encode_context.encode_context(half, images, 2)
    assert difference(found.latent, wan.process_out(raw)) < TOLERANCE
    assert sum("taew2_1" in record.message for record in caplog.records) == 1
    still = encode_context.encode_context(half, images[:1], 2).still
    assert difference(still, wan.process_out(plain.encode(images[:1].expand(5, -1, -1, -1))[:, :, 1:])) < TOLERANCE


def test_an_unknown_vae_falls_back_to_windows(streaming, foreign_vae, whole, caplog):
    latents = latents_of(8, frames=9)
    with caplog.at_level(logging.WARNING), streaming.stream_decoder(foreign_vae) as decoder:
        chunks = [decoder.decode(chunk) for chunk in latents.split((1, 3, 1, 4), dim=2)]
        assert decoder.memory_required(latents.shape) > foreign_vae.memory_used_decode(latents.shape, torch.float32)
        held = decoder.state_bytes
        decoder.decode(latents)
        assert decoder.state_bytes == held
    assert sum("Foreign" in record.message for record in caplog.records) == 1
    # This decoder remembers less than a window holds, so that even it comes out equal.
    assert difference(torch.cat(chunks, dim=1), whole(foreign_vae, latents)) < TOLERANCE


@pytest.mark.parametrize("factor", [100, -1])
def test_a_decoder_with_other_frame_counts_is_refused(streaming, foreign_vae, factor):
    foreign_vae.upscale_ratio = (lambda frames: factor * frames, 8, 8)
    with pytest.raises(ValueError, match="cannot be streamed"):
        streaming.stream_decoder(foreign_vae).decode(latents_of(1))


@pytest.mark.parametrize("shape", [(1, 4, 1, 2, 2), (16, 1, 2, 2), (1, 16, 0, 2, 2)])
def test_wrong_latents_are_refused_with_what_is_needed(streaming, vae, shape):
    with pytest.raises(ValueError, match=r"\[batch, 16, frames, height, width\]"):
        streaming.stream_decoder(vae).decode(torch.zeros(shape))


@pytest.mark.parametrize("change", [{"height": 4}, {"width": 1}, {"batch": 2}])
def test_a_clip_keeps_its_size(streaming, vae, whole, change):
    latents = latents_of(3, frames=2)
    with streaming.stream_decoder(vae) as decoder:
        first = decoder.decode(latents[:, :, :1])
        with pytest.raises(ValueError, match=r"must agree.*reset\(\)"):
            decoder.decode(latents_of(1, **change))
        got = torch.cat([first, decoder.decode(latents[:, :, 1:])], dim=1)  # the clip goes on
        assert difference(got, whole(vae, latents)) < TOLERANCE
        decoder.reset()
        decoder.decode(latents_of(1, frames=1, **change))


def test_other_vaes_are_refused(streaming, foreign_vae):
    foreign_vae.latent_dim = 2
    with pytest.raises(ValueError, match="video VAE"):
        streaming.stream_decoder(foreign_vae)
    foreign_vae.latent_dim, foreign_vae.upscale_ratio = 3, 8
    with pytest.raises(ValueError, match="video VAE"):
        streaming.stream_decoder(foreign_vae)
    foreign_vae.first_stage_model = None
    with pytest.raises(RuntimeError, match="VAE is invalid"):
        streaming.stream_decoder(foreign_vae)
