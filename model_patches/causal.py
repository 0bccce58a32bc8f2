"""Makes any Wan 2.1 text-to-video MODEL causal by swapping one function per attention layer.

Wan's own forward does the rest, so that LoRA, fp8, GGUF and offloading keep working. The swapped functions look for a
run in `transformer_options`; without one (any sampler but ours) they call what they replaced. A block's own forward is
swapped too, where nobody else did: it calls the block's modules as ComfyUI does, with fewer kernels between them.

Shape suffixes: B batch (conditions times samples), L tokens, N heads, D channels a head, C channels of the model.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.patcher_extension
import torch
import torch.nn.functional as F
from comfy.cli_args import args
from comfy.ldm.flux.math import apply_rope
from comfy.ldm.modules.attention import attention_pytorch, attention_sub_quad, optimized_attention, wrap_attn
from comfy.ldm.wan.ar_model import CausalWanAttentionBlock, CausalWanModel
from comfy.ldm.wan.model import WanAttentionBlock, WanModel
from comfy.model_patcher import ModelPatcher
from comfy.ops import disable_weight_init
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..diagonal_sampler.cache import KVCache
from ..diagonal_sampler.dit import timestep_embedding
from ..diagonal_sampler.flow import adapter_tokens
from ..diagonal_sampler.noise import send
from ..diagonal_sampler.rope import axis_dims, axis_frequencies
from ..diagonal_sampler.settings import CausalSettings
from ..diagonal_sampler.wan_layout import LATENT_CHANNELS, variant_of
from ..diagonal_sampler.weight_files import short

WRAPPER_KEY = "diagonal_causal"
SETTINGS_KEY = "diagonal_causal_settings"
RUN_KEY = "diagonal_run"
FORWARD_KEY = "diagonal_forward"
ROPE_PATH = "diffusion_model.rope_encode"
FORWARD_PATH = "diffusion_model.forward_orig"
NETWORK = -1
"""Beside the numbers of blocks: what belongs to the network as a whole."""


@dataclass(slots=True)
class CausalRun:
    """What one sampling run adds to `transformer_options`: owned by the sampler, dropped when it returns.

    Attributes:
        cache: keys and values of this run.
        batch: samples of the clip; None if it is not known.
        fixed_weights: no hook changes weights during the run, and no wrapper of another node a forward's text or noise
            level, so that what follows from these alone can be kept.
        sigma: the noise level of the current forward, the same for all rows of the batch; None if it is not known.
        seen: conditions that the current forward has predicted so far.
        wrote: (condition, block) whose keys and values it has written.
    """

    cache: KVCache
    batch: int | None = None
    fixed_weights: bool = True
    sigma: float | None = None
    seen: set[Hashable] = field(default_factory=set)
    wrote: set[tuple[Hashable, int]] = field(default_factory=set)
    _all_seen: set[Hashable] = field(default_factory=set)
    _all_wrote: set[tuple[Hashable, int]] = field(default_factory=set)
    _text: dict[tuple[int, tuple[Hashable, ...], tuple[int, ...]], tuple[Tensor, ...]] = field(default_factory=dict)
    _rope: dict[Hashable, Tensor] = field(default_factory=dict)
    _levels: dict[float, dict[int, tuple[Tensor, ...]]] = field(default_factory=dict)

    def free(self) -> None:
        """Drop every tensor, also when the run failed."""
        self.cache.free()
        self._text.clear()
        self._rope.clear()
        self._levels.clear()

    def forget_text(self) -> None:
        """The prompt has changed: its keys and values are computed again."""
        self._text.clear()

    def begin_forward(self, sigma: float) -> None:
        """To be called before every forward."""
        self.sigma = sigma
        self.seen.clear()
        self.wrote.clear()

    def end_forward(self, blocks: int, replaced: Collection[Hashable]) -> None:
        """Refuse a forward that other nodes have kept from the cache: chunks would not know of each other.

        Args:
            blocks: of the network.
            replaced: keys of ComfyUI's patches_replace["dit"]; such a block may do without attention.

        Raises:
            ValueError: nothing, not every prompt, or not every block was written; with what does that.
        """
        self._all_seen |= self.seen
        if self.seen != self._all_seen:
            raise ValueError(
                "Another node skips forwards, or prompts in some of them (EasyCache, LazyCache, TeaCache, a guidance "
                "for some steps only, CFG Override to or from cfg 1): every forward of a causal model writes the keys "
                "and values that later chunks need. Remove that node, or have it and the sampler use a cfg such as "
                "1.01 in place of 1, which asks for both prompts."
            )
        wrote = {layer for _, layer in self.wrote}
        missing = [at for at in range(blocks) if at not in wrote and ("double_block", at) not in replaced]
        if missing or not self.seen:
            what = f"the self-attention of {len(missing)} of {blocks} blocks" if self.seen else "the whole forward"
            raise ValueError(
                f"Another node has replaced {what}: chunks would not know of each other. Remove that node, or one that "
                "reuses earlier forwards (EasyCache, LazyCache, TeaCache)."
            )
        self._all_wrote |= self.wrote
        if self.wrote != self._all_wrote:
            raise ValueError(
                "Another node leaves blocks out in some forwards (Skip Layer Guidance between two percents): what they "
                "wrote in others would stay in the cache as it was then. Let it act in all of them (start_percent 0, "
                "end_percent 1), or remove it."
            )

    def rope(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Rotations of one grid and position; a run uses few, and only the newest position comes again."""
        if key not in self._rope:
            if len(self._rope) >= 8:
                self._rope.clear()
            self._rope[key] = make()
        return self._rope[key]

    def text(
        self,
        part: int,
        conditions: tuple[Hashable, ...],
        shape: tuple[int, ...],
        make: Callable[[], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """What follows from the text alone: a block's keys and values by its number, NETWORK's embedding.

        Once per prompt and clip. Where memory is short ComfyUI predicts the same prompts now together, now one by one;
        what was made for another such order goes then, so that no prompt is held twice.

        Args:
            conditions: of the forward, in batch order.
            shape: of their text.
        """
        if not self.fixed_weights:
            return make()
        key = (part, conditions, shape)
        if key not in self._text:
            for other in [other for other in self._text if other[0] == part and set(conditions) & set(other[1])]:
                del self._text[other]
            self._text[key] = make()
        return self._text[key]

    def of_level(self, part: int, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What follows from the current noise level alone: a block's by its number, NETWORK's for all of them.

        A run of few levels computes each once.
        """
        assert self.sigma is not None
        if self.sigma not in self._levels:
            if len(self._levels) >= 8:
                self._levels.clear()
            self._levels[self.sigma] = {}
        parts = self._levels[self.sigma]
        if part not in parts:
            parts[part] = make()
        return parts[part]

    @property
    def keeps_levels(self) -> bool:
        """Whether `of_level` may be used."""
        return self.fixed_weights and self.sigma is not None


@dataclass(frozen=True, slots=True)
class ForwardInfo:
    """What the layers of one forward need: the run, its conditions in batch order, and the rotations.

    `again` are those of the conditions that this step has predicted already: guidance asks for them once more, of a
    weakened network for instance, and what is to stay in the cache is the first prediction's.
    """

    run: CausalRun
    conditions: tuple[Hashable, ...]
    freqs: Tensor
    again: frozenset[Hashable] = frozenset()

    @property
    def keeps_levels(self) -> bool:
        """Whether `of_level` may be used: what is predicted once more may be asked at another noise level."""
        return self.run.keeps_levels and not self.again

    def text(self, part: int, shape: tuple[int, ...], make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """`CausalRun.text`; what is predicted once more may have another text."""
        return make() if self.again else self.run.text(part, self.conditions, shape, make)


def causal_settings(model: ModelPatcher) -> CausalSettings | None:
    """The settings of a causal MODEL, None for any other."""
    return model.model_options.get(SETTINGS_KEY)


def make_causal(model: ModelPatcher, settings: CausalSettings) -> ModelPatcher:
    """A clone of `model` whose attention can be cached chunk by chunk. Applying it again replaces the settings.

    Args:
        model: any MODEL whose network is ComfyUI's Wan 2.1 text-to-video class or its causal class.
        settings: window, sink, positions and frames per chunk, in latent frames.

    Raises:
        ValueError: the MODEL is no Wan 2.1 text-to-video model, or another node has replaced its self-attention.
    """
    _require_text_to_video(_network(model))
    patched = model.clone()
    _patch_network(patched)
    patched.remove_wrappers_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, WRAPPER_KEY)
    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, WRAPPER_KEY, _prepare_forward)
    patched.remove_callbacks_with_key(comfy.patcher_extension.CallbacksMP.ON_CLONE, WRAPPER_KEY)
    patched.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_CLONE, WRAPPER_KEY, _follow_clone)
    patched.model_options[SETTINGS_KEY] = settings
    return patched


def _network(model: ModelPatcher) -> torch.nn.Module:
    network = model.get_model_object("diffusion_model")
    return getattr(network, "_orig_mod", network)


def _patch_network(model: ModelPatcher) -> None:
    """Put our functions into the MODEL's object patches, in place of earlier ones of ours.

    Raises:
        ValueError: another node has replaced a self-attention.
    """
    network = _network(model)
    for layer in range(len(network.blocks)):
        for name, make in (("self_attn", _CausalSelfAttention), ("cross_attn", _CachedCrossAttention)):
            path = f"diffusion_model.blocks.{layer}.{name}"
            module, original = model.get_model_object(path), model.get_model_object(f"{path}.forward")
            if isinstance(original, _Patch):
                original = original.original
            if getattr(original, "__func__", None) is not type(module).forward:
                if name == "cross_attn":
                    continue  # another node's, which ours would hide; all that ours does is to save time
                raise ValueError(
                    f"Another node has replaced {path}.forward, which causal attention has to replace itself. Remove "
                    "that node."
                )
            model.add_object_patch(f"{path}.forward", make(module, original, layer))
        path = f"diffusion_model.blocks.{layer}"
        block, original = model.get_model_object(path), model.get_model_object(f"{path}.forward")
        original = original.original if isinstance(original, _LeanBlock) else original
        known = type(block) in (WanAttentionBlock, CausalWanAttentionBlock)
        if known and getattr(original, "__func__", None) is type(block).forward:  # nobody else has changed it
            model.add_object_patch(f"{path}.forward", _LeanBlock(block, original, layer))
    original = model.get_model_object(FORWARD_PATH)
    original = original.original if isinstance(original, _LeanForward) else original
    if getattr(original, "__func__", None) is WanModel.forward_orig:
        model.add_object_patch(FORWARD_PATH, _LeanForward(network, original))
    original = model.get_model_object(ROPE_PATH)
    original = original.original if isinstance(original, _KnownRotations) else original
    model.add_object_patch(ROPE_PATH, _KnownRotations(original))


def _follow_clone(old: ModelPatcher, new: ModelPatcher) -> None:
    """ON_CLONE callback: a clone around a network of its own gets patches that hold that network's modules.

    ComfyUI makes such clones of a MODEL in dynamic VRAM where a conditioning has hooks, and for further GPUs. With the
    old patches the forward would run in the old network, whose weights no hook changes.
    """
    if new.model is old.model:
        return
    for path, patch in list(new.object_patches.items()):
        if isinstance(patch, (_Patch, _LeanBlock, _LeanForward, _KnownRotations)):
            del new.object_patches[path]
            # Only rotations are ever put around another node's function.
            if path == ROPE_PATH and getattr(patch.original, "__func__", None) is not WanModel.rope_encode:
                new.object_patches[path] = patch.original
    _patch_network(new)


def _require_text_to_video(network: torch.nn.Module) -> None:
    kind = type(network)
    if not isinstance(network, WanModel):
        raise ValueError(
            f"The MODEL is a {kind.__name__}, not a Wan 2.1 video model: causal attention is defined for Wan only. "
            "Load a Wan 2.1 text-to-video model."
        )
    if kind not in (WanModel, CausalWanModel) or network.model_type != "t2v" or network.ref_conv is not None:
        raise ValueError(
            f"The MODEL is a {kind.__name__} of type {network.model_type}: only Wan 2.1 text-to-video models can "
            "stream chunk by chunk. For a start image use a text-to-video model with ARVideoI2V."
        )
    # ComfyUI knows Wan 2.2's image-to-video models, and those of another VAE, as text-to-video ones.
    channels = network.in_dim, network.out_dim
    if channels != (LATENT_CHANNELS, LATENT_CHANNELS):
        raise ValueError(
            f"The MODEL takes {channels[0]} latent channels and gives {channels[1]}, a Wan 2.1 text-to-video model "
            f"{LATENT_CHANNELS}: this is {variant_of(*channels)}, which cannot stream chunk by chunk. Load a Wan 2.1 "
            "text-to-video model."
        )


def _prepare_forward(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """APPLY_MODEL wrapper: gives the layers of this forward their conditions and rotations.

    Rotations are computed here, outside of what TorchCompileModel compiles: it drops guards on transformer_options,
    so that a position read inside would stay frozen at the first chunk's.
    """
    transformer_options = {} if transformer_options is None else transformer_options
    run: CausalRun | None = transformer_options.get(RUN_KEY)
    if run is None:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    base = executor.class_obj
    network = base.diffusion_model
    dtype = base.get_dtype_inference()
    position = run.cache.position
    options = transformer_options.copy()
    rope_options = dict(options.get("rope_options") or {})
    rope_options["shift_t"] = rope_options.get("shift_t", 0.0) + position
    options["rope_options"] = rope_options
    frames, height, width = x.shape[2:]
    freqs = run.rope(
        (frames, height, width, position),
        # ComfyUI's default is the model's dtype, and bf16 holds every whole number up to 256 only.
        lambda: network.rope_encode(
            frames,
            height,
            width,
            device=x.device,
            dtype=torch.float32,
            transformer_options={"rope_options": rope_options},
        ),
    )
    conditions = tuple(zip(options["cond_or_uncond"], options["uuids"], strict=True))
    samples = x.shape[0] // len(conditions) if run.batch is None else run.batch
    if x.shape[0] != samples * len(conditions):
        raise ValueError(
            f"Another node gave the model {x.shape[0]} samples for {len(conditions)} prompts: which prompt's keys and "
            "values they are is not known. Remove the node that splits the batch (a model function wrapper)."
        )
    options[FORWARD_KEY] = ForwardInfo(run, conditions, freqs, again=frozenset(run.seen.intersection(conditions)))
    run.seen.update(conditions)
    try:
        with _cudnn_first(x.device, dtype):
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    except Exception as error:
        _name_replaced_attention(network, run, error)
        raise


def _name_replaced_attention(network: torch.nn.Module, run: CausalRun, error: Exception) -> None:
    """Refuse by name another node's self-attention that fails, as one that counts the whole clip's frames does: what
    it fails with says nothing of it.

    Args:
        error: of a forward.

    Raises:
        ValueError: the first block that wrote nothing has such a self-attention.
    """
    if isinstance(error, (comfy.model_management.OOM_EXCEPTION, comfy.model_management.InterruptProcessingException)):
        return
    wrote = {layer for _, layer in run.wrote}
    blocks = getattr(network, "_orig_mod", network).blocks
    failed = next((layer for layer in range(len(blocks)) if layer not in wrote), None)
    if failed is None or isinstance(blocks[failed].self_attn.forward, _CausalSelfAttention):
        return
    raise ValueError(
        f"Another node has replaced the self-attention of block {failed}, and a chunk's forward fails there "
        f"({type(error).__name__}: {error}). Remove that node."
    ) from error


class _Patch:
    """A replacement for one module's forward. `original` is what it replaced."""

    def __init__(self, module: torch.nn.Module, original: Callable, layer: int) -> None:
        self.module = module
        self.original = original
        self.layer = layer

    # Always eager: see _prepare_forward. The graph breaks here and goes on after it.
    @torch.compiler.disable
    def __call__(self, x: Tensor, *args: Any, transformer_options: dict | None = None, **kwargs: Any) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        forward: ForwardInfo | None = options.get(FORWARD_KEY)
        if forward is None:
            return self.original(x, *args, transformer_options=options, **kwargs)
        return self.cached(x, *args, forward=forward, transformer_options=options)

    def cached(self, x: Tensor, *args: Any, forward: ForwardInfo, transformer_options: dict) -> Tensor:
        raise NotImplementedError


class _LeanForward:
    """The network's forward with the embeddings of noise level and text kept.

    ComfyUI makes a table for the noise level on the CPU in every forward, and copying it has the host wait for the GPU:
    the core's is the same, made on the device.
    """

    def __init__(self, network: WanModel, original: Callable) -> None:
        self.network, self.original = network, original

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        freqs: Tensor | None = None,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        forward: ForwardInfo | None = options.get(FORWARD_KEY)
        plain = (
            forward is not None
            and forward.keeps_levels
            and clip_fea is None
            and all(value is None for value in kwargs.values())
            and "double_block" not in options.get("patches", {})
            and not options.get("patches_replace", {}).get("dit")
            and not torch.compiler.is_compiling()
        )
        if not plain:
            return self.original(x, t, context, clip_fea, freqs, transformer_options=options, **kwargs)
        network, run = self.network, forward.run
        # In float32, as there: bf16 would round the latents before the first product.
        tokens = network.patch_embedding(x.float()).to(x.dtype)
        options["grid_sizes"] = grid = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2)
        e, e0 = run.of_level(NETWORK, lambda: self._level(t[:1], x.dtype))
        e, e0 = (level.expand(t.shape[0], *level.shape[1:]) for level in (e, e0))
        (text,) = forward.text(NETWORK, context.shape, lambda: (network.text_embedding(context),))
        options["total_blocks"], options["block_type"] = len(network.blocks), "double"
        for index, block in enumerate(network.blocks):
            options["block_index"] = index
            tokens = block(tokens, e=e0, freqs=freqs, context=text, context_img_len=None, transformer_options=options)
        return network.unpatchify(network.head(tokens, e), grid)

    def _level(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A noise level's embeddings for the head, [1, 1, C], and for the blocks, [1, 1, 6, C]."""
        network = self.network
        table = timestep_embedding(t.flatten(), network.freq_dim).to(dtype)
        e = network.time_embedding(table).reshape(1, 1, -1)
        return e, network.time_projection(e).unflatten(2, (6, network.dim))


class _LeanBlock:
    """A block's forward with its modulation kept and put into the norms: five kernels fewer of 28.

    norm(x)*(1 + scale) + shift is one layer norm whose weight and bias are 1 + scale and shift, and those follow from
    the noise level alone. torch.compile fuses the same by itself, so that a compiled block stays ComfyUI's.
    """

    def __init__(self, block: WanAttentionBlock, original: Callable, layer: int) -> None:
        self.block, self.original, self.layer = block, original, layer

    def __call__(
        self,
        x_BLC: Tensor,
        e: Tensor,
        freqs: Tensor,
        context: Tensor,
        context_img_len: int | None = 257,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        forward: ForwardInfo | None = options.get(FORWARD_KEY)
        keeps = forward is not None and forward.keeps_levels
        one_level = e.ndim == 4 and e.shape[1] == 1 and e.dtype == x_BLC.dtype
        if not keeps or not one_level or torch.compiler.is_compiling():
            return self.original(x_BLC, e, freqs, context, context_img_len, transformer_options=options, **kwargs)
        block = self.block
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = forward.run.of_level(
            self.layer, lambda: self._modulation(e)
        )
        x = x_BLC.contiguous()
        y = F.layer_norm(x, x.shape[-1:], scale, shift, block.norm1.eps)
        x = torch.addcmul(x, block.self_attn(y, freqs, transformer_options=options), gate)
        x = x + block.cross_attn(block.norm3(x), context, context_img_len=context_img_len, transformer_options=options)
        for patch in options.get("patches", {}).get("attn2_patch", ()):
            x = patch({"x": x, "transformer_options": options})
        y = F.layer_norm(x, x.shape[-1:], ffn_scale, ffn_shift, block.norm2.eps)
        return torch.addcmul(x, self._feed_forward(y), ffn_gate)

    def _feed_forward(self, y_BLC: Tensor) -> Tensor:
        """The feed-forward layers; on CUDA the first product ends in GELU, which saves a pass over its large result.

        Only where ComfyUI would multiply by the weight as it lies: with casts, patches or hooks its own layers stay.
        """
        layers = self.block.ffn
        # Another node may run the three in its own way, in pieces for instance.
        if y_BLC.device.type != "cuda" or type(layers) is not torch.nn.Sequential or not _is_untouched(layers):
            return layers(y_BLC)
        first, activation, second = layers
        plain = (
            type(activation) is torch.nn.GELU
            and activation.approximate == "tanh"
            and _is_untouched(activation)
            and _multiplies_as_it_is(first, y_BLC)
        )
        if not plain:
            return layers(y_BLC)
        hidden = torch._addmm_activation(first.bias, y_BLC.flatten(0, 1), first.weight.t(), use_gelu=True)
        return second(hidden.unflatten(0, y_BLC.shape[:2]))

    def _modulation(self, e: Tensor) -> tuple[Tensor, ...]:
        """Shift, 1 + scale and gate, [C] each, of attention and of the feed-forward layers; e is [B, 1, 6, C]."""
        own = comfy.model_management.cast_to(self.block.modulation, dtype=e.dtype, device=e.device)
        # All rows of a batch are at one noise level here, so the first stands for all.
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (own + e[0])[0].unbind()
        return shift, 1 + scale, gate, ffn_shift, 1 + ffn_scale, ffn_gate


def _is_untouched(module: torch.nn.Module) -> bool:
    """Whether a module's forward is its class's, with no hook and no object patch around it."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _multiplies_as_it_is(layer: torch.nn.Module, x: Tensor) -> bool:
    """Whether a linear layer of ComfyUI's is nothing but F.linear with its own weight and bias, on x's device."""
    return (
        type(layer) is disable_weight_init.Linear
        and not (layer.comfy_cast_weights or layer.weight_function or layer.bias_function or hasattr(layer, "_v"))
        and _is_untouched(layer)
        and layer.bias is not None
        and layer.weight.dtype == layer.bias.dtype == x.dtype
        and layer.weight.device == layer.bias.device == x.device
    )


class _KnownRotations:
    """Stands in for `rope_encode`, which ComfyUI calls in every forward: the rotations that the forward has already.

    Inside a compiled graph the original stays, whose result no layer of ours reads: see `_prepare_forward`.
    """

    def __init__(self, original: Callable) -> None:
        self.original = original

    def __call__(self, *args: Any, transformer_options: dict | None = None, **kwargs: Any) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        forward: ForwardInfo | None = options.get(FORWARD_KEY)
        if forward is None or kwargs.get("source_id") or torch.compiler.is_compiling():
            return self.original(*args, transformer_options=options, **kwargs)
        return forward.freqs


def require_known_rotations(network: torch.nn.Module) -> None:
    """To be called where positions are the window's: the cache moves its keys in time, by Wan's own frequencies.

    Raises:
        ValueError: another node gave the network other ones.
    """
    encode = network.rope_encode
    encode = encode.original if isinstance(encode, _KnownRotations) else encode
    time_dim, position = axis_dims(network.dim // network.num_heads)[0], 16.0
    turns = (
        network.rope_embedder(torch.tensor([[[position, 0.0, 0.0]]])).reshape(-1, 2, 2)[: time_dim // 2, :, 0].double()
    )
    angles = axis_frequencies(time_dim) * position
    known = torch.allclose(turns.cpu(), torch.stack([angles.cos(), angles.sin()], dim=-1), atol=1e-3)
    if not known or getattr(encode, "__func__", None) is not WanModel.rope_encode:
        raise ValueError(
            "Another node changed the rotations of positions (RifleX or the like), and with positions in the window "
            "the keys in the cache are moved by Wan's own. Remove the node: in a window no position comes up that the "
            "model was not trained on."
        )


class FlowEmbedding:
    """Stands in for `patch_embedding.forward` during one run and adds the current chunk's motion to its tokens.

    Args:
        original: what it replaces.
        weight, bias: [dim, 4, *patch] and [dim], of the checkpoint's `flow_embedding`.
        strength: factor on what is added.
    """

    def __init__(self, original: Callable, weight: Tensor, bias: Tensor, strength: float) -> None:
        self.original = original
        self.weight, self.bias, self.strength = weight, bias, strength
        self._tokens: Tensor | None = None

    def set(self, features: Tensor | None) -> None:
        """The motion of the chunk that comes next: [1, 4, frames, H, W] from `adapter_features`; None adds nothing."""
        if features is None:
            self._tokens = None
            return
        # Moved once: a run has an instance of its own.
        self.weight, self.bias = (send(tensor.float(), features.device) for tensor in (self.weight, self.bias))
        self._tokens = self.strength * adapter_tokens(features, self.weight, self.bias)

    # Always eager, as the attention is: a compiled graph would keep the first chunk's motion.
    @torch.compiler.disable
    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = self.original(x, *args, **kwargs)
        if self._tokens is None:
            return out
        if out.shape[2:] != self._tokens.shape[2:]:
            raise ValueError(
                f"The optical-flow adapter has motion for {tuple(self._tokens.shape[2:])} tokens and the model was "
                f"given {tuple(out.shape[2:])}: an area of the picture cannot follow it. Remove ConditioningSetArea, "
                "or use mode reference."
            )
        return out + self._tokens.to(out)


CUDNN_FIRST = [
    getattr(SDPBackend, name)
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    if hasattr(SDPBackend, name)  # an old torch has not all of them
]
CUDNN_CAPABILITIES = (9,)
"""Major compute capabilities on which cuDNN's kernel was measured to be faster than PyTorch's flash: Hopper."""


@functools.cache
def _cudnn_is_faster(device: torch.device) -> bool:
    ordered = "set_priority" in inspect.signature(sdpa_kernel).parameters and len(CUDNN_FIRST) == 4
    known = torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] in CUDNN_CAPABILITIES
    return ordered and known


def _takes_cudnn(device: torch.device, dtype: torch.dtype) -> bool:
    plain = optimized_attention is attention_pytorch and dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and plain and _cudnn_is_faster(device)


def _cudnn_first(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """In it PyTorch's attention takes cuDNN's kernel where `_attention` leaves that to it: once for a whole forward."""
    return sdpa_kernel(CUDNN_FIRST, set_priority=True) if _takes_cudnn(device, dtype) else nullcontext()


_NOT_PLAIN = ("mask", "skip_reshape", "skip_output_reshape", "scale", "enable_gqa")
"""Arguments of ComfyUI's attention that `_attention_plain` leaves to it."""


@wrap_attn
def _attention_plain(q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's attention with whatever kernel it takes; q, k, v and the result are [B, L, heads * D].

    Another node's override may call it with a mask, other shapes or a scale: that is ComfyUI's to do.
    """
    if args or any(kwargs.get(name) is not None and kwargs[name] is not False for name in _NOT_PLAIN):
        return attention_pytorch(q, k, v, heads, *args, **kwargs)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _attention(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    """ComfyUI's attention, but where it takes a slower one of PyTorch's kernels because nobody chose another.

    On a CPU in float32 that is its own fallback: PyTorch's takes half the time there; in bfloat16 it takes twice as
    long, and the fallback stays. On Hopper it is PyTorch's flash attention, which ComfyUI puts before cuDNN's.
    """
    if q.device.type == "cuda":
        return (_attention_plain if _takes_cudnn(q.device, q.dtype) else optimized_attention)(q, k, v, **kwargs)
    fallback = optimized_attention is attention_sub_quad and not args.use_quad_cross_attention
    faster = fallback and q.device.type == "cpu" and q.dtype == torch.float32
    return (attention_pytorch if faster else optimized_attention)(q, k, v, **kwargs)


_INT8 = getattr(comfy.ldm.modules.attention, "attention_comfy_kitchen_int8", None)  # not in ComfyUI 0.30
DENSE_PREFERENCES = () if _INT8 is None else (_INT8,)
"""Kinds of attention that a file may ask for and that only change the arithmetic of the dense one: any number of keys
goes with any number of queries. Sparse ones (Sol-Attn) need as many of both."""


def _preference(module: torch.nn.Module) -> dict[str, Any]:
    """The keyword by which a layer of ComfyUI's (after 0.30) tells its attention what the file asks for, if we can."""
    preference = getattr(module, "comfy_attention", None)
    return {"preferred_attention": preference} if _attention_of(preference) in DENSE_PREFERENCES else {}


def _attention_of(preference: Any) -> Callable | None:
    """The function that a preference names; None where a newer ComfyUI keeps it elsewhere, and chunks do without."""
    return getattr(preference, "function", None)


def ignored_preferences(model: ModelPatcher) -> dict[str, int]:
    """Kinds of attention that a MODEL's file or LoRA asks for, and that chunks go without -> in how many layers.

    Where `function` is None ComfyUI itself goes without: there is no such kernel for the device.
    """
    found: Counter[str] = Counter()
    for index, block in enumerate(_network(model).blocks):
        for name in ("self_attn", "cross_attn"):
            if hasattr(getattr(block, name), "comfy_attention"):
                # A LoRA puts another in its place, as an object patch.
                preference = model.get_model_object(f"diffusion_model.blocks.{index}.{name}.comfy_attention")
                if _attention_of(preference) not in (None, *DENSE_PREFERENCES):
                    found[short(getattr(preference, "config", preference))] += 1
    return dict(found)


class _CausalSelfAttention(_Patch):
    """Writes the chunk's keys and values to the cache and attends to everything in it."""

    def cached(self, x_BLC: Tensor, freqs: Tensor, *, forward: ForwardInfo, transformer_options: dict) -> Tensor:
        module, cache = self.module, forward.run.cache
        heads = module.num_heads
        split = (*x_BLC.shape[:2], heads, module.head_dim)
        q = module.norm_q(module.q(x_BLC)).view(split)
        k = module.norm_k(module.k(x_BLC)).view(split)
        q, k = apply_rope(q, k, forward.freqs)
        v = module.v(x_BLC).view(split)

        preference = _preference(module)
        samples = x_BLC.shape[0] // len(forward.conditions)
        outputs = []
        for index, condition in enumerate(forward.conditions):
            rows = slice(index * samples, (index + 1) * samples)
            write = condition not in forward.again
            if write:
                forward.run.wrote.add((condition, self.layer))
            keys, values = cache.condition(condition).update(self.layer, k[rows], v[rows], write=write)
            outputs.append(
                _attention(
                    q[rows].flatten(2),
                    keys.flatten(2),
                    values.flatten(2),
                    heads=heads,
                    transformer_options=transformer_options,
                    **preference,
                )
            )
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        for patch in transformer_options.get("patches", {}).get("attn1_patch", ()):
            try:
                out = patch({"x": out, "q": q, "k": k, "transformer_options": transformer_options})
            except TypeError:
                _require_wan_patch(patch)
                raise
        return module.o(out)


def _require_wan_patch(patch: Callable) -> None:
    """Raise ValueError for an attn1_patch of image networks, which takes (q, k, v, extra_options)."""
    try:
        inspect.signature(patch).bind({})
    except TypeError:
        raise ValueError(
            f"Another node patches self-attention as image networks (SD 1.5, SDXL) have it, and not as Wan does: "
            f"{getattr(patch, '__qualname__', type(patch).__qualname__)}. Remove that node (HyperTile, Token Merging)."
        ) from None


class _CachedCrossAttention(_Patch):
    """Computes the text's keys and values once per prompt and clip."""

    def cached(
        self,
        x_BLC: Tensor,
        context_BLC: Tensor,
        *,
        forward: ForwardInfo,
        transformer_options: dict,
    ) -> Tensor:
        module = self.module
        k, v = forward.text(
            self.layer, context_BLC.shape, lambda: (module.norm_k(module.k(context_BLC)), module.v(context_BLC))
        )
        q = module.norm_q(module.q(x_BLC))
        options = {"transformer_options": transformer_options, **_preference(module)}
        return module.o(_attention(q, k, v, heads=module.num_heads, **options))
