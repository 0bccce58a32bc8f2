"""Makes any Wan 2.1 text-to-video MODEL causal by swapping one function per attention layer.

Wan's own forward does the rest, so that LoRA, fp8, GGUF and offloading keep working. The swapped functions look for a
run in `transformer_options`; without one (any sampler but ours) they call what they replaced. A block's own forward is
swapped too, where nobody else did: it calls the block's modules as ComfyUI does, with fewer kernels between them.

Shape suffixes: B batch (conditions times samples), L tokens, N heads, D channels a head, C channels of the model.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import logging
import textwrap
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch
import torch.nn.functional as F
from comfy.ldm.flux.math import apply_rope
from comfy.ldm.wan.ar_model import CausalWanAttentionBlock, CausalWanModel
from comfy.ldm.wan.model import WanAttentionBlock, WanModel
from comfy.model_patcher import ModelPatcher
from comfy.ops import disable_weight_init
from torch import Tensor

from ..diagonal_sampler.cache import KVCache
from ..diagonal_sampler.dit import timestep_embedding
from ..diagonal_sampler.rope import axis_dims, axis_frequencies
from ..diagonal_sampler.settings import CausalSettings
from ..diagonal_sampler.wan_layout import LATENT_CHANNELS, variant_of
from .attention import attend, cudnn_first, preference

log = logging.getLogger(__name__)

WRAPPER_KEY = "diagonal_causal"
SETTINGS_KEY = "diagonal_causal_settings"
RUN_KEY = "diagonal_run"
FORWARD_KEY = "diagonal_forward"
ROPE_PATH = "diffusion_model.rope_encode"
FORWARD_PATH = "diffusion_model.forward_orig"
NETWORK = -1
"""Beside the numbers of blocks: what belongs to the network as a whole."""
KEPT_LEVELS = 32
"""Noise levels whose modulations a run keeps: more than those of any preset, 2.5 MB each in bf16 with Wan 14B."""
KNOWN_FORWARDS = frozenset(
    (
        # WanModel.forward_orig of ComfyUI 0.24.1, of 0.26.0 and 0.27.0, of 0.30.0
        "34c5e3f697f1a41d2fd20e5b0cd3348abb9c4ef2153f94aed577106cf0ba42ea",
        "cad5cbf484d31fd292dcd285649b3d26b5e80240d08e61788e1170ff3a7590ff",
        "68779ef3aea1c2c038dcdb2e22155f3a6b0f671a37c7cae70b15daebcd91fe15",
        # WanAttentionBlock.forward and CausalWanAttentionBlock.forward of all four
        "58a701a7f04b692b8326e34a0521ee0c3eec7437682c1940d5218e401093c6e4",
        "c41afa19e841f4d3a9e1884fd3059afc7e647172aa2b299e156da35fa374d441",
    )
)
"""Digests of what `_LeanForward` and `_LeanBlock` were written after: see `_digest`."""


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

        A run of up to KEPT_LEVELS levels computes each once.
        """
        assert self.sigma is not None
        if self.sigma not in self._levels:
            if len(self._levels) >= KEPT_LEVELS:
                del self._levels[next(iter(self._levels))]  # the oldest
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
    return _plain(model.get_model_object("diffusion_model"))


def _plain(network: torch.nn.Module) -> torch.nn.Module:
    """A network without torch.compile around it."""
    return getattr(network, "_orig_mod", network)


def _own(model: ModelPatcher, path: str) -> Callable:
    """What a MODEL has at a path, without our patch around it."""
    found = model.get_model_object(path)
    return found.original if isinstance(found, _Patch) else found


def _is(original: Callable, function: Callable) -> bool:
    """Whether a bound method is of this function."""
    return getattr(original, "__func__", None) is function


def _patch_network(model: ModelPatcher) -> None:
    """Put our functions into the MODEL's object patches, in place of earlier ones of ours.

    Raises:
        ValueError: another node has replaced a self-attention.
    """
    network = _network(model)
    for layer in range(len(network.blocks)):
        for name, make in (("self_attn", _CausalSelfAttention), ("cross_attn", _CachedCrossAttention)):
            path = f"diffusion_model.blocks.{layer}.{name}"
            module, original = model.get_model_object(path), _own(model, f"{path}.forward")
            if not _is(original, type(module).forward):
                if name == "cross_attn":
                    continue  # another node's, which ours would hide; all that ours does is to save time
                raise ValueError(
                    f"Another node has replaced {path}.forward, which causal attention has to replace itself. Remove "
                    "that node."
                )
            model.add_object_patch(f"{path}.forward", make(module, original, layer))
        path = f"diffusion_model.blocks.{layer}"
        block, original = model.get_model_object(path), _own(model, f"{path}.forward")
        kind = type(block)
        if kind in (WanAttentionBlock, CausalWanAttentionBlock) and _is_known(original, kind.forward):
            model.add_object_patch(f"{path}.forward", _LeanBlock(block, original, layer))
    original = _own(model, FORWARD_PATH)
    if _is_known(original, WanModel.forward_orig):
        model.add_object_patch(FORWARD_PATH, _LeanForward(network, original))
    model.add_object_patch(ROPE_PATH, _KnownRotations(_own(model, ROPE_PATH)))


def _is_known(original: Callable, function: Callable) -> bool:
    """Whether a forward is ComfyUI's `function`, which nobody changed, with a body that ours repeats."""
    return _is(original, function) and _has_known_body(function)


@functools.cache
def _has_known_body(function: Callable) -> bool:
    try:
        known = _digest(function) in KNOWN_FORWARDS
    except Exception:  # no Python function, or one whose source is not there: only speed depends on it
        known = False
    if not known:
        log.info(
            "%s is not as this pack knows it (of another version of ComfyUI, or replaced): it runs as it is, and the "
            "faster form of it is not used.",
            getattr(function, "__qualname__", function),
        )
    return known


def _digest(function: Callable) -> str:
    """sha256 of what a Python function says: of its syntax tree, without the docstring and the fields left empty.

    Comments and layout do not count, nor does the version of Python (3.10 to 3.13 were compared), as it does in
    ast.dump and ast.unparse.
    """
    # Of its code: of a function inspect would give the source of the one that it says it wraps.
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function.__code__))).body
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    return hashlib.sha256(repr(_tree(definition)).encode()).hexdigest()


def _tree(node: Any) -> Any:
    if isinstance(node, list):
        return [_tree(item) for item in node]
    if not isinstance(node, ast.AST):
        return node
    fields = sorted((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
    return type(node).__name__, *((name, _tree(value)) for name, value in fields)


def _follow_clone(old: ModelPatcher, new: ModelPatcher) -> None:
    """ON_CLONE callback: a clone around a network of its own gets patches that hold that network's modules.

    ComfyUI makes such clones of a MODEL in dynamic VRAM where a conditioning has hooks, and for further GPUs. With the
    old patches the forward would run in the old network, whose weights no hook changes.
    """
    if new.model is old.model:
        return
    for path, patch in list(new.object_patches.items()):
        if isinstance(patch, _Patch):
            del new.object_patches[path]
            # Only rotations are ever put around another node's function.
            if path == ROPE_PATH and not _is(patch.original, WanModel.rope_encode):
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
            "stream chunk by chunk. For a start image use a text-to-video checkpoint with Diagonal Context Frames."
        )
    # ComfyUI knows Wan 2.2's image-to-video models, and those of another VAE, as text-to-video ones.
    channels = network.in_dim, network.out_dim
    if channels != (LATENT_CHANNELS, LATENT_CHANNELS):
        raise ValueError(
            f"The MODEL takes {channels[0]} latent channels and gives {channels[1]}, a Wan 2.1 text-to-video model "
            f"{LATENT_CHANNELS}: this is {variant_of(*channels)}, which cannot stream chunk by chunk. Load a Wan 2.1 "
            "text-to-video model, for a start image with Diagonal Context Frames."
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
        with cudnn_first(x.device, dtype):
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
    blocks = _plain(network).blocks
    failed = next((layer for layer in range(len(blocks)) if layer not in wrote), None)
    if failed is None or isinstance(blocks[failed].self_attn.forward, _CausalSelfAttention):
        return
    raise ValueError(
        f"Another node has replaced the self-attention of block {failed}, and a chunk's forward fails there "
        f"({type(error).__name__}: {error}). Remove that node."
    ) from error


class _Patch:
    """A replacement for one function of the network. `original` is what it replaced."""

    def __init__(self, original: Callable) -> None:
        self.original = original

    @staticmethod
    def forward_of(transformer_options: dict | None) -> tuple[dict, ForwardInfo | None]:
        """The options, and what the layers need of this forward: None where it is of no run of ours."""
        options = {} if transformer_options is None else transformer_options
        return options, options.get(FORWARD_KEY)


class _AttentionPatch(_Patch):
    """A replacement for an attention layer's forward."""

    def __init__(self, module: torch.nn.Module, original: Callable, layer: int) -> None:
        super().__init__(original)
        self.module, self.layer = module, layer

    # Always eager: see _prepare_forward. The graph breaks here and goes on after it.
    @torch.compiler.disable
    def __call__(self, x: Tensor, *args: Any, transformer_options: dict | None = None, **kwargs: Any) -> Tensor:
        options, forward = self.forward_of(transformer_options)
        if forward is None:
            return self.original(x, *args, transformer_options=options, **kwargs)
        return self.cached(x, *args, forward=forward, transformer_options=options)

    def cached(self, x: Tensor, *args: Any, forward: ForwardInfo, transformer_options: dict) -> Tensor:
        raise NotImplementedError


class _LeanForward(_Patch):
    """The network's forward with the embeddings of noise level and text kept.

    ComfyUI makes a table for the noise level on the CPU in every forward, and copying it has the host wait for the GPU:
    the core's is the same, made on the device.
    """

    def __init__(self, network: WanModel, original: Callable) -> None:
        super().__init__(original)
        self.network = network

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
        options, forward = self.forward_of(transformer_options)
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


class _LeanBlock(_Patch):
    """A block's forward with its modulation kept and put into the norms: five kernels fewer of 28.

    norm(x)*(1 + scale) + shift is one layer norm whose weight and bias are 1 + scale and shift, and those follow from
    the noise level alone. torch.compile fuses the same by itself, so that a compiled block stays ComfyUI's.
    """

    def __init__(self, block: WanAttentionBlock, original: Callable, layer: int) -> None:
        super().__init__(original)
        self.block, self.layer = block, layer

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
        options, forward = self.forward_of(transformer_options)
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


class _KnownRotations(_Patch):
    """Stands in for `rope_encode`, which ComfyUI calls in every forward: the rotations that the forward has already.

    Inside a compiled graph the original stays, whose result no layer of ours reads: see `_prepare_forward`.
    """

    def __call__(self, *args: Any, transformer_options: dict | None = None, **kwargs: Any) -> Tensor:
        options, forward = self.forward_of(transformer_options)
        if forward is None or kwargs.get("source_id") or torch.compiler.is_compiling():
            return self.original(*args, transformer_options=options, **kwargs)
        return forward.freqs


def require_known_rotations(network: torch.nn.Module) -> None:
    """To be called where positions are the window's: the cache moves its keys in time, by Wan's own frequencies.

    Raises:
        ValueError: another node gave the network other ones.
    """
    encode = network.rope_encode
    encode = encode.original if isinstance(encode, _Patch) else encode
    time_dim, position = axis_dims(network.dim // network.num_heads)[0], 16.0
    turns = (
        network.rope_embedder(torch.tensor([[[position, 0.0, 0.0]]])).reshape(-1, 2, 2)[: time_dim // 2, :, 0].double()
    )
    angles = axis_frequencies(time_dim) * position
    known = torch.allclose(turns.cpu(), torch.stack([angles.cos(), angles.sin()], dim=-1), atol=1e-3)
    if not known or not _is(encode, WanModel.rope_encode):
        raise ValueError(
            "Another node changed the rotations of positions (RifleX or the like), and with positions in the window "
            "the keys in the cache are moved by Wan's own. Remove the node: in a window no position comes up that the "
            "model was not trained on."
        )


class _CausalSelfAttention(_AttentionPatch):
    """Writes the chunk's keys and values to the cache and attends to everything in it."""

    def cached(self, x_BLC: Tensor, freqs: Tensor, *, forward: ForwardInfo, transformer_options: dict) -> Tensor:
        module, cache = self.module, forward.run.cache
        heads = module.num_heads
        split = (*x_BLC.shape[:2], heads, module.head_dim)
        q = module.norm_q(module.q(x_BLC)).view(split)
        k = module.norm_k(module.k(x_BLC)).view(split)
        q, k = apply_rope(q, k, forward.freqs)
        v = module.v(x_BLC).view(split)

        wish = preference(module)
        samples = x_BLC.shape[0] // len(forward.conditions)
        outputs = []
        for index, condition in enumerate(forward.conditions):
            rows = slice(index * samples, (index + 1) * samples)
            write = condition not in forward.again
            if write:
                forward.run.wrote.add((condition, self.layer))
            keys, values = cache.condition(condition).update(self.layer, k[rows], v[rows], write=write)
            outputs.append(
                attend(
                    q[rows].flatten(2),
                    keys.flatten(2),
                    values.flatten(2),
                    heads=heads,
                    transformer_options=transformer_options,
                    **wish,
                )
            )
            del keys, values  # in 8 bits written out: not to be there beside the next condition's
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


class _CachedCrossAttention(_AttentionPatch):
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
        options = {"transformer_options": transformer_options, **preference(module)}
        return module.o(attend(q, k, v, heads=module.num_heads, **options))
