"""The nodes that a person drags. Widgets become a checked configuration and one call; no tensor maths here."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .causal_attention import DiagonalCausalAttention
from .chunk_sampler import DiagonalChunkSampler
from .context_frames import DiagonalContextFrames
from .demo_loader import DiagonalDemoLoader
from .flow_conditioning import DiagonalFlowConditioning
from .flow_preview import DiagonalFlowPreview
from .model_loader import DiagonalModelLoader
from .prompt_schedule import DiagonalPromptSchedule
from .routes import add_routes
from .schedule import DiagonalScheduleNode
from .stream_video import DiagonalStreamVideo

NODES: list[type[io.ComfyNode]] = [
    DiagonalModelLoader,
    DiagonalCausalAttention,
    DiagonalDemoLoader,
    DiagonalScheduleNode,
    DiagonalPromptSchedule,
    DiagonalContextFrames,
    DiagonalFlowConditioning,
    DiagonalFlowPreview,
    DiagonalChunkSampler,
    DiagonalStreamVideo,
]


class DiagonalExtension(ComfyExtension):
    """What ComfyUI asks for the list of nodes."""

    @override
    async def on_load(self) -> None:
        add_routes()

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> DiagonalExtension:
    """ComfyUI's entry point of a pack of V3 nodes."""
    return DiagonalExtension()
