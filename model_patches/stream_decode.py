"""Decodes a clip chunk by chunk and keeps, between chunks, what the decoder remembers of the past.

The frames of all chunks, put together, are the frames that VAEDecode makes of the whole clip, while memory stays that
of one chunk:

- Wan 2.1's VAE: the last two frames before every causal convolution.
- TAEHV (lighttaew2_1, taew2_1 and the other tiny video autoencoders): the last frame before every MemBlock.
- the demo's autoencoder: whether the first frame has been decoded.
- any other video VAE: the last latent frames, decoded again before the new ones. Equality is not promised then, and a
  warning says so.

All state lives in the `StreamDecoder`, never in the VAE: other decoders and VAEDecode may use the same VAE in between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import comfy.model_management
import comfy.sd
import torch
import torch.nn.functional as F
from comfy.ldm.wan.vae import CACHE_T, WanVAE, count_cache_layers
from comfy.model_patcher import ModelPatcher
from comfy.taesd.taehv import TAEHV, MemBlock, TGrow
from torch import Tensor, nn

from ..diagonal_sampler.demo_autoencoder import DemoAutoencoder
from ..diagonal_sampler.frames import TIME_FACTOR
from ..diagonal_sampler.noise import pinned_empty
from .pace import mark_behind
from .vae_scale import into_decoder, warn_if_mistaken

log = logging.getLogger(__name__)

WAN_GROUP_FRAMES = 2
"""Latent frames that Wan's decoder takes at once after the first, as ComfyUI feeds it."""
WAN_MARK = "Rep"
"""What ComfyUI's Wan decoder puts in place of the features of a layer that has seen the first frame only."""
WAN_ESTIMATE_FRAMES = 5
"""ComfyUI's estimate for Wan's decoder steps up after 4 latent frames, with the caches full; here they stay full."""
TAEHV_LAYOUT = torch.channels_last
"""How TAEHV's activations lie on CUDA: as cuDNN's convolutions for tensor cores want them."""
MOST_KEPT_BYTES = 256 << 20
"""Of a decoder's memory that is kept while the next chunk is decoded, in case that is broken off: Wan's is larger."""
FIRST = -1
"""Priority of the stream that decodes, above the usual 0 (on ROCm too); what it gains was not measured on a card."""
WINDOW_CONTEXT_FRAMES = 4
"""Latent frames decoded again before the new ones where the decoder's own memory is not known."""


class _ClipState(Protocol):
    """The decoder's side of one clip of one sample."""

    def decode(self, latents: Tensor) -> Tensor:
        """[1, C, T, h, w] on the VAE's device and in its dtype -> the new pixels [1, C', T', H, W], raw."""
        ...

    def tensors(self) -> Iterator[Tensor]:
        """The tensors held until the next chunk."""
        ...

    def snapshot(self) -> dict[str, Tensor]:
        """All of the state by name, numbers as tensors too; the tensors may be views of what is held."""
        ...

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Take the state of a snapshot, whose tensors are on the VAE's device, into a clip that has not begun."""
        ...


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How one kind of VAE is streamed.

    Attributes:
        new_clip: makes the state of a clip that has not begun.
        estimate_frames: latent frames to ask ComfyUI's memory estimate for, from those of a chunk.
    """

    new_clip: Callable[[], _ClipState]
    estimate_frames: Callable[[int], int]


class _FeatureCache(list):
    """Wan's feature cache; every entry holds the last two frames before a convolution, however many came at once.

    ComfyUI stores the last two frames of a group. After a group of one frame that would be one frame, and the frame
    before it would count as zeros: ComfyUI itself has such a group at the ends of a clip only, a chunk has it anywhere.
    """

    def __init__(self, layers: int) -> None:
        super().__init__([None] * layers)
        self._taken: dict[int, Tensor | None] = {}

    def __setitem__(self, layer: int, value: Tensor | str | None) -> None:
        previous = self[layer]
        if value is None:  # a convolution takes its entry out while it runs
            self._taken[layer] = previous
        else:
            previous = self._taken.pop(layer, previous)
            if isinstance(value, Tensor) and isinstance(previous, Tensor) and value.shape[2] < CACHE_T:
                value = torch.cat([previous[:, :, value.shape[2] - CACHE_T :], value], dim=2)
        super().__setitem__(layer, value)


class _WanClip:
    """Wan 2.1's VAE: one latent frame first, then up to two at once, with the feature cache carried on."""

    def __init__(self, model: WanVAE) -> None:
        self.model = model
        self.features = _FeatureCache(count_cache_layers(model.decoder))
        self.started = False

    def decode(self, latents: Tensor) -> Tensor:
        pixels: list[Tensor] = []
        start = 0
        while start < latents.shape[2]:
            stop = start + (WAN_GROUP_FRAMES if self.started else 1)
            group = self.model.conv2(latents[:, :, start:stop])
            pixels += self.model.decoder(group, feat_cache=self.features, feat_idx=[0])
            self.started = True
            start = stop
        return torch.cat(pixels, dim=2)

    def tensors(self) -> Iterator[Tensor]:
        return (entry for entry in self.features if isinstance(entry, Tensor))

    def snapshot(self) -> dict[str, Tensor]:
        # ComfyUI marks some layers that have seen one frame only with a word instead of a tensor.
        marks = [index for index, entry in enumerate(self.features) if isinstance(entry, str)]
        kept = {f"feature/{index}": e for index, e in enumerate(self.features) if isinstance(e, Tensor)}
        return {"started": torch.tensor([self.started]), "marks": torch.tensor(marks, dtype=torch.int64), **kept}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        self.started = bool(snapshot["started"])
        for index in snapshot["marks"].tolist():
            self.features[index] = WAN_MARK
        for name, value in snapshot.items():
            if name.startswith("feature/"):
                self.features[int(name.removeprefix("feature/"))] = value


class _TaehvClip:
    """TAEHV: latent frame by latent frame; the frames that it makes too many at the start of a clip are dropped.

    The frames that a latent frame grows into go through the layers as one batch, each behind the one before it.
    """

    def __init__(self, model: TAEHV, scale: Callable[[Tensor], Tensor]) -> None:
        self.model = model
        self.scale = scale
        self.memory: dict[int, Tensor] = {}
        self.trim = model.frames_to_trim

    def decode(self, latents: Tensor) -> Tensor:
        pixels = torch.cat([self._frames(frame) for frame in self.scale(latents).unbind(2)])
        kept, self.trim = pixels[self.trim :], 0
        return kept.movedim(0, 1).unsqueeze(0)

    def _frames(self, x: Tensor) -> Tensor:
        """One latent frame [1, C, h, w] -> the pixel frames [n, 3, H, W] that come of it, in order."""
        layout = TAEHV_LAYOUT if x.device.type == "cuda" else torch.contiguous_format
        x = x.contiguous(memory_format=layout)
        for index, layer in enumerate(self.model.decoder):
            if isinstance(layer, MemBlock):
                past = self.memory.get(index)
                past = torch.zeros_like(x[:1]) if past is None else past
                self.memory[index] = x[-1:].clone()
                x = layer(x, torch.cat([past, x[:-1]]))
            elif isinstance(layer, TGrow):
                x = _grow(layer, x).contiguous(memory_format=layout)
            else:
                x = layer(x)
        return F.pixel_shuffle(x, self.model.patch_size) if self.model.patch_size > 1 else x

    def tensors(self) -> Iterator[Tensor]:
        return iter(self.memory.values())

    def snapshot(self) -> dict[str, Tensor]:
        return {"trim": torch.tensor([self.trim]), **{f"memory/{index}": x for index, x in self.memory.items()}}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        self.trim = int(snapshot["trim"])
        self.memory = {int(name.removeprefix("memory/")): x for name, x in snapshot.items() if name != "trim"}


def _grow(layer: TGrow, x: Tensor) -> Tensor:
    """TGrow's forward, [N, C, h, w] -> [N*stride, C, h, w], with one copy where x lies channels last."""
    grown = layer.conv(x).movedim(1, -1).unflatten(-1, (layer.stride, -1))  # [N, h, w, stride, C]
    return grown.movedim(-2, 1).flatten(0, 1).movedim(-1, 1)


class _DemoClip:
    """The demo's autoencoder: no layer sees two latent frames, only the first frame is special."""

    def __init__(self, model: DemoAutoencoder) -> None:
        self.model = model
        self.started = False

    def decode(self, latents: Tensor) -> Tensor:
        pixels = self.model.decode(latents, has_first_frame=not self.started)
        self.started = True
        return pixels

    def tensors(self) -> Iterator[Tensor]:
        return iter(())

    def snapshot(self) -> dict[str, Tensor]:
        return {"started": torch.tensor([self.started])}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        self.started = bool(snapshot["started"])


class _WindowClip:
    """An unknown decoder: earlier latent frames go in again as context, and their pixel frames are dropped."""

    def __init__(self, model: nn.Module, pixel_frames: Callable[[int], int]) -> None:
        self.model = model
        self.pixel_frames = pixel_frames
        self.context: Tensor | None = None
        self.seen = 0

    def decode(self, latents: Tensor) -> Tensor:
        window = latents if self.context is None else torch.cat([self.context, latents], dim=2)
        before = self.pixel_frames(self.seen) if self.seen else 0
        new = self.pixel_frames(self.seen + latents.shape[2]) - before
        pixels = self.model.decode(window)
        if not 0 <= new <= pixels.shape[2]:
            raise ValueError(
                f"The VAE ({type(self.model).__name__}) made {pixels.shape[2]} frames of {window.shape[2]} latent "
                f"frames where {new} new ones are due, so that it cannot be streamed. Use VAE Decode, or the Wan 2.1 "
                "VAE or lighttaew2_1."
            )
        self.seen += latents.shape[2]
        self.context = window[:, :, -WINDOW_CONTEXT_FRAMES:].clone()
        return pixels[:, :, pixels.shape[2] - new :]

    def tensors(self) -> Iterator[Tensor]:
        return iter(() if self.context is None else (self.context,))

    def snapshot(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor([self.seen]), **({} if self.context is None else {"context": self.context})}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        self.seen = int(snapshot["seen"])
        self.context = snapshot.get("context")


class DecodeHandle:
    """A chunk that may still be decoding."""

    def __init__(self, images: Tensor, done: torch.cuda.Event | None = None) -> None:
        self._images = images
        self._done = done
        self.held = 0  # times that the first frame comes once more

    def hold(self, frames: int) -> None:
        """Have the first frame come as often as it takes to give so many."""
        self.held = max(0, frames - self._images.shape[1])

    def result(self) -> Tensor:
        """Wait for the chunk and return its images [B, T_pix, H, W, C]; see `StreamDecoder.decode`."""
        if self._done is not None:
            self._done.synchronize()
        if not self.held:
            return self._images
        return torch.cat([self._images[:, :1].expand(-1, self.held, -1, -1, -1), self._images], dim=1)


class StreamDecoder:
    """Decodes the chunks of one clip after another; made by `stream_decoder`.

    A context manager: leaving it frees the state. One decoder serves one thread.

    Attributes:
        vae: the user's VAE, which is never changed.
    """

    def __init__(self, vae: comfy.sd.VAE, architecture: _Architecture) -> None:
        self.vae = vae
        self._architecture = architecture
        self._keep_loaded: tuple[ModelPatcher, ...] = ()
        self._clips: list[_ClipState] = []
        self._size: tuple[int, int, int] | None = None  # batch, height and width of the clip's latents
        self._refusal: str | None = None
        self._stream: torch.cuda.Stream | None = None
        self._asked = False  # ComfyUI for the VAE and memory
        self._cut = False

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next chunk of the clip.

        Args:
            latents: [B, C, T, h, w] in the scale of ComfyUI's LATENT, T at least 1 and free to differ from chunk to
                chunk. The first chunk begins with the clip's first latent frame.

        Returns:
            images [B, T_pix, H, W, 3] on the CPU, contiguous: the pixel frames that this chunk completes, 4 T of them,
            or 4 T - 3 in the first chunk, for decoders of Wan's geometry. Float32 (float16 if ComfyUI runs with
            --fp16-intermediates). In [0, 1], but for a TAEHV, which ComfyUI does not clamp and which may leave that
            range a little; so do VAEDecode's images. On CUDA they lie in pinned memory, if it may be had.

        Raises:
            ValueError: latents of another shape than this clip's, or than the VAE takes. The clip can go on.
            RuntimeError: the chunk before failed, or the decoder is closed.
        """
        return self.submit(latents).result()

    def submit(self, latents: Tensor) -> DecodeHandle:
        """Begin to decode the next chunk; arguments, result and errors as in `decode`.

        On CUDA this returns while the GPU decodes, on a stream of its own (without pinned memory it waits). If ComfyUI
        holds the VAE fully and statically on the GPU, what is queued next runs beside it; else it runs behind it,
        because ComfyUI shares the buffers that weights are copied to. With the VAE on the CPU, as under --cpu-vae, the
        chunk is decoded when this returns. If anything fails, or the person cancels, a decoder with a small state
        (MOST_KEPT_BYTES) stays as it was before this chunk; a larger one is freed at once.
        """
        if self._refusal is not None:
            raise RuntimeError(self._refusal)
        self._require_shape(latents)
        kept = [clip.snapshot() for clip in self._clips] if self.state_bytes <= MOST_KEPT_BYTES else []
        try:
            with torch.no_grad(), comfy.model_management.cuda_device_context(self.vae.device):
                self._load(tuple(latents.shape), keeps_state=bool(kept))
                if not self._clips or self._cut:
                    self._size = (latents.shape[0], *latents.shape[3:])
                    self._clips = [self._architecture.new_clip() for _ in range(latents.shape[0])]
                handle = self._start(latents)
                if self._cut:
                    handle.hold(TIME_FACTOR * latents.shape[2])
                    self._cut = False
        except BaseException as error:
            if kept and isinstance(error, (Exception, comfy.model_management.InterruptProcessingException)):
                self._clips = [self._architecture.new_clip() for _ in kept]
                for clip, before in zip(self._clips, kept, strict=True):
                    clip.restore(before)
                raise
            self.reset()
            self._refusal = (
                "The decoder stopped in the middle of a clip and has lost its memory of it. Call reset() and decode "
                "from a clip's first latent frame."
            )
            raise
        return handle

    @property
    def intact(self) -> bool:
        """Whether the next chunk can be decoded, or a snapshot taken: not where breaking off cost a large state."""
        return self._refusal is None

    def cut(self) -> None:
        """Have the next chunk decoded as another clip's first, with its first frame held: it gives 4 T frames, too."""
        self._cut = bool(self._clips)

    def reset(self) -> None:
        """Free the state; the next chunk begins another clip, of any size."""
        self._wait()
        self._clips = []
        self._cut = False
        self._size = None
        self._refusal = None

    def keep_loaded(self, models: Sequence[ModelPatcher]) -> None:
        """Name the models that must stay on the GPU if the VAE has to be loaded, in place of those before: the guider's
        `model_patcher`, when chunks are decoded while it samples."""
        self._keep_loaded = tuple(models)

    def snapshot(self) -> dict[str, Tensor]:
        """What the decoder remembers of the clip, by name; copies on the CPU. Empty before the first chunk.

        With it a later run goes on after the chunks decoded so far: see `restore`.

        Raises:
            RuntimeError: the chunk before failed, or the decoder is closed.
        """
        if self._refusal is not None:
            raise RuntimeError(self._refusal)
        self._wait()
        if not self._clips:
            return {}
        out = {"size": torch.tensor(self._size)}
        for number, clip in enumerate(self._clips):
            for name, value in clip.snapshot().items():
                out[f"{number}/{name}"] = value.detach().to("cpu", copy=True).contiguous()
        return out

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Go on where a snapshot was taken, with a VAE of the same weights, in a decoder that has not begun a clip.

        Raises:
            ValueError: a snapshot whose size is not that of what it holds.
            RuntimeError: a clip has begun, or the decoder is closed.
        """
        if self._refusal is not None or self._clips:
            raise RuntimeError(self._refusal or "StreamDecoder.restore inside a clip; call reset() first.")
        if not snapshot:
            return
        size = snapshot["size"].tolist() if "size" in snapshot else []
        held = {name.partition("/")[0] for name in snapshot if name != "size"}
        if len(size) != 3 or size[0] != len(held) or held != set(map(str, range(len(held)))):
            raise ValueError(
                f"The decoder's snapshot says batch, height, width {size} and holds the memory of {len(held)} clips: "
                "it is not as snapshot() made it. Set restart to begin a new video."
            )
        batch, height, width = size
        clips = [self._architecture.new_clip() for _ in range(batch)]
        device = self.vae.device
        if device.type == "cuda":
            self._open_stream()
        # Copied by the stream that decodes: memory belongs to the stream that it was taken on.
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for number, clip in enumerate(clips):
                prefix = f"{number}/"
                own = {name.removeprefix(prefix): x for name, x in snapshot.items() if name.startswith(prefix)}
                clip.restore({name: x.to(device, copy=True) for name, x in own.items()})
        self._size = (batch, height, width)
        self._clips = clips

    def close(self) -> None:
        """Free the state for good. Handles stay valid."""
        self.reset()
        self._stream = None
        self._refusal = "The decoder is closed. Make another with stream_decoder(vae)."

    def __enter__(self) -> StreamDecoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    @property
    def state_bytes(self) -> int:
        """Bytes of the tensors held until the next chunk, on the VAE's device."""
        storages = (tensor.untyped_storage() for clip in self._clips for tensor in clip.tensors())
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def memory_required(self, shape: Sequence[int]) -> int:
        """Bytes that ComfyUI estimates for decoding one chunk of latents [B, C, T, h, w].

        Samples of a batch are decoded one after the other, so that a batch needs this once, and beyond it the state
        (`state_bytes`) of its other samples.
        """
        _, channels, frames, height, width = shape
        asked = (1, channels, self._architecture.estimate_frames(frames), height, width)
        return int(self.vae.memory_used_decode(asked, self.vae.vae_dtype))

    def _require_shape(self, latents: Tensor) -> None:
        channels = self.vae.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}; this VAE needs [batch, {channels}, frames, height, width] "
                "with nothing empty. Give the samples of a video LATENT made for this VAE."
            )
        size = (latents.shape[0], *latents.shape[3:])
        if self._size is not None and size != self._size:
            raise ValueError(
                f"latents has batch, height, width {size}, but the clip began with {self._size}; all chunks of a clip "
                "must agree. Call reset() before the first chunk of another clip."
            )

    def _resident(self) -> bool:
        """Whether ComfyUI has the VAE loaded, with no part of it left out."""
        patcher = self.vae.patcher
        if not any(loaded is patcher for loaded in comfy.model_management.loaded_models()):
            return False
        return patcher.is_dynamic() or (not patcher.model.model_lowvram and patcher.loaded_size() > 0)

    def _load(self, shape: Sequence[int], *, keeps_state: bool) -> None:
        """Have ComfyUI load the VAE with memory for one chunk.

        Nothing is asked where the VAE is loaded and the memory is there: each request makes ComfyUI reload every
        model it names and may synchronise the GPU, between the chunks of a model that is sampling. In dynamic VRAM
        weights make room by themselves: there one request is enough, which pushes out what does not.

        Args:
            keeps_state: what is remembered stays while the chunk is decoded. Else what the chunk leaves takes its
                place, and the estimate, in which one clip's is counted, is less by that.
        """
        vae = self.vae
        needed = self.memory_required(shape)
        if self._clips and not keeps_state:
            needed = max(0, needed - self.state_bytes // len(self._clips))
        makes_room = self._asked and vae.patcher.is_dynamic()
        if self._resident() and (makes_room or vae.patcher.get_free_memory(vae.device) >= needed):
            return
        self._wait()
        comfy.model_management.load_models_gpu(
            [vae.patcher, *self._keep_loaded], memory_required=needed, force_full_load=vae.disable_offload
        )
        self._asked = True

    def _start(self, latents: Tensor) -> DecodeHandle:
        device = self.vae.device
        # A copy, made in the caller's order of work: the caller may overwrite its own at once.
        latents = latents.to(device=device, dtype=self.vae.vae_dtype, copy=True)
        if device.type != "cuda":
            return DecodeHandle(self._images(latents).to("cpu"))
        self._open_stream()
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            images = self._images(latents)
            host = pinned_empty(images.shape, images.dtype)
            host = images.to("cpu") if host is None else host.copy_(images, non_blocking=True)
            done = mark_behind(self._stream)
        latents.record_stream(self._stream)
        if self.vae.patcher.is_dynamic() or not self._resident():
            current.wait_stream(self._stream)
        return DecodeHandle(host, done)

    def _open_stream(self) -> None:
        """Its work goes before that of a model that samples meanwhile: frames are not to wait for the next chunk."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.vae.device, priority=FIRST)

    def _images(self, latents: Tensor) -> Tensor:
        """Latents on the VAE's device, in its dtype -> images [B, T_pix, H, W, C] there, scaled as VAE.decode does."""
        images = []
        for clip, sample in zip(self._clips, latents.split(1), strict=True):
            # ComfyUI's own layers ask this before every operation; the demo's and other packs' may not.
            comfy.model_management.throw_exception_if_processing_interrupted()
            pixels = clip.decode(sample).to(dtype=self.vae.vae_output_dtype(), copy=True)
            self.vae.process_output(pixels)  # in place; VAE.decode does not use what it returns
            images.append(pixels.movedim(1, -1))
        return torch.cat(images).contiguous()

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def stream_decoder(vae: comfy.sd.VAE) -> StreamDecoder:
    """A decoder that takes the chunks of a clip one by one.

    Args:
        vae: a video VAE as ComfyUI's loaders give it. A tiny one is decoded in Wan's scale, see vae_scale.

    Returns:
        the decoder. For an unknown VAE it decodes overlapping windows, and a warning is logged.

    Raises:
        ValueError: a VAE that does not decode video.
    """
    vae.throw_exception_if_invalid()
    return StreamDecoder(vae, _recognise(vae))


def _recognise(vae: comfy.sd.VAE) -> _Architecture:
    model = vae.first_stage_model
    if isinstance(model, WanVAE):
        return _Architecture(lambda: _WanClip(model), lambda frames: max(frames, WAN_ESTIMATE_FRAMES))
    if isinstance(model, TAEHV):
        warn_if_mistaken(vae)
        scale = into_decoder(model, vae.device)
        return _Architecture(lambda: _TaehvClip(model, scale), lambda frames: frames)
    if isinstance(model, DemoAutoencoder):
        return _Architecture(lambda: _DemoClip(model), lambda frames: frames)
    if vae.latent_dim != 3 or not isinstance(vae.upscale_ratio, tuple) or not callable(vae.upscale_ratio[0]):
        raise ValueError(
            f"The VAE ({type(model).__name__}) does not decode video; streaming needs a video VAE. Load the Wan 2.1 "
            "VAE or lighttaew2_1 with Load VAE."
        )
    log.warning(
        "The VAE (%s) is none whose memory this pack knows. Each chunk is decoded with the %d latent frames before it "
        "as context; the frames may differ a little from VAE Decode's where chunks meet.",
        type(model).__name__,
        WINDOW_CONTEXT_FRAMES,
    )
    return _Architecture(
        lambda: _WindowClip(model, vae.upscale_ratio[0]), lambda frames: frames + WINDOW_CONTEXT_FRAMES
    )
