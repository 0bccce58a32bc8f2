"""Which attention a chunk's layers compute: ComfyUI's choice, but where nobody made it and a faster kernel is at hand.

Shape suffixes: B batch, L tokens, D channels a head.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import comfy.ldm.modules.attention
import torch
import torch.nn.functional as F
from comfy.cli_args import args
from comfy.ldm.modules.attention import attention_pytorch, attention_sub_quad, optimized_attention, wrap_attn
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..diagonal_sampler.weight_files import short

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


def cudnn_first(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """In it PyTorch's attention takes cuDNN's kernel where `attend` leaves that to it: once for a whole forward."""
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


def attend(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
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


def preference(module: torch.nn.Module) -> dict[str, Any]:
    """The keyword by which a layer of ComfyUI's (after 0.30) tells its attention what the file asks for, if we can."""
    wish = getattr(module, "comfy_attention", None)
    return {"preferred_attention": wish} if _attention_of(wish) in DENSE_PREFERENCES else {}


def _attention_of(wish: Any) -> Callable | None:
    """The function that a layer's wish names; None where a newer ComfyUI keeps it elsewhere, and chunks do without."""
    return getattr(wish, "function", None)


def ignored_preferences(model: ModelPatcher) -> dict[str, int]:
    """Kinds of attention that a MODEL's file or LoRA asks for, and that chunks go without -> in how many layers.

    Where `function` is None ComfyUI itself goes without: there is no such kernel for the device.
    """
    found: Counter[str] = Counter()
    network = model.get_model_object("diffusion_model")
    for index, block in enumerate(getattr(network, "_orig_mod", network).blocks):
        for name in ("self_attn", "cross_attn"):
            if hasattr(getattr(block, name), "comfy_attention"):
                # A LoRA puts another in its place, as an object patch.
                wish = model.get_model_object(f"diffusion_model.blocks.{index}.{name}.comfy_attention")
                if _attention_of(wish) not in (None, *DENSE_PREFERENCES):
                    found[short(getattr(wish, "config", wish))] += 1
    return dict(found)
