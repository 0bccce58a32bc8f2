"""What several nodes share: the pack's own types, and the widgets that stand in more than one node."""

from comfy_api.latest import io

from ..diagonal_sampler.settings import KV_CACHE_DTYPES, POSITIONS, CausalSettings

ScheduleType = io.Custom("DIAGONAL_SCHEDULE")
ContextType = io.Custom("DIAGONAL_CONTEXT")
"""Frames that a clip begins with: a ContextFrames."""

FlowType = io.Custom("DIAGONAL_OPTICAL_FLOW")
"""Motion and how to follow it: a FlowConditioning."""

CATEGORY = "Diagonal"
_DEFAULTS = CausalSettings()


def own_id(node: type[io.ComfyNode]) -> str | None:
    """The id that a running node has in its graph; None in a call by hand."""
    return None if node.hidden is None else node.hidden.unique_id


def sampled_inputs() -> list[io.Input]:
    """What is sampled, and from which conditionings."""
    return [
        io.Model.Input(
            "model",
            tooltip="A causal MODEL, from Diagonal Model Loader, Diagonal Causal Attention or Diagonal Demo Loader.",
        ),
        io.Conditioning.Input(
            "positive",
            tooltip="What the video shows. With Diagonal Prompt Schedule it can change over time.",
        ),
        io.Conditioning.Input("negative", tooltip="What it must not show. Ignored at cfg 1."),
    ]


def window_inputs() -> list[io.Input]:
    """Widgets of CausalSettings' window, sink and positions."""
    return [
        io.Int.Input(
            "window",
            default=_DEFAULTS.window,
            min=-1,
            max=4096,
            tooltip="Latent frames (4 pixel frames each) that a chunk attends to, the sink and the chunk itself "
            "included. Memory grows with it. -1 attends to the whole clip.",
        ),
        io.Int.Input(
            "sink",
            default=_DEFAULTS.sink,
            min=0,
            max=4096,
            tooltip="Latent frames at the start of the clip that are never forgotten. They keep long videos stable.",
        ),
        io.Combo.Input(
            "positions",
            options=list(POSITIONS),
            default=_DEFAULTS.positions,
            tooltip="How time is counted (RoPE, in latent frames). absolute: from the start of the clip. window: "
            "inside the window, for any length. auto: absolute up to 21 latent frames (81 pixel frames), else window. "
            "With window -1 always absolute.",
        ),
    ]


def kv_cache_input() -> io.Input:
    """Widget of CausalSettings' kv_cache_dtype."""
    return io.Combo.Input(
        "kv_cache_dtype",
        options=list(KV_CACHE_DTYPES),
        default=_DEFAULTS.kv_cache_dtype,
        optional=True,
        advanced=True,
        tooltip="Number format of the keys and values that are kept (KV cache). default: as the model computes them. "
        "int8: 8 bits and a scale for each head of each token, about half of the memory at a small loss and some time.",
    )


def seed_input(
    more: str = "The same seed gives the same noise on any device.",
    after: bool | io.ControlAfterGenerate = True,
) -> io.Input:
    """Widget of the noise's seed. more: what its tooltip says beside that. after: what a new node does to it."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=after,
        tooltip=f"Seed of the noise (no unit). {more}",
    )


def cfg_input() -> io.Input:
    """Widget of the guidance scale."""
    return io.Float.Input(
        "cfg",
        default=1.0,
        min=0.0,
        max=100.0,
        step=0.1,
        round=0.01,
        tooltip="Guidance scale (no unit). Distilled models use 1, which is also twice as fast: the negative is then "
        "ignored.",
    )
