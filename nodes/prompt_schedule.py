"""DiagonalPromptSchedule: prompts at times, and new ones while a run goes on."""

from comfy_api.latest import io

from ..diagonal_sampler.prompt_schedule import SWITCHES
from ..model_patches.prompts import schedule_prompts
from .common import CATEGORY, own_id

WAN_FPS = 16.0


class DiagonalPromptSchedule(io.ComfyNode):
    """Encodes rows of prompts as one CONDITIONING that the diagonal samplers follow over time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiagonalPromptSchedule",
            display_name="Diagonal Prompt Schedule",
            category=f"{CATEGORY}/conditioning",
            description="Prompts that take effect at set times. Connect it to positive of Diagonal Chunk Sampler or "
            "Diagonal Stream Video. While they run, a new prompt can be sent from this node, or by one HTTP call. "
            "Other samplers take the first prompt.",
            search_aliases=["prompt travel", "prompt scheduling", "interactive prompt", "steer video"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder. It also encodes what is sent while a run goes on."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="0: a red circle moves right\n3s: a blue square moves up",
                    tooltip="A row for each prompt: a time, a colon, the prompt. Times: 0, 5s, 1.5m (seconds, minutes "
                    "of the video; words will do, too), or chunk 12 (counted from 1). A prompt takes effect in the "
                    "chunk that contains its time. Rows with # are skipped. A single prompt needs no time.",
                ),
                io.Combo.Input(
                    "switch",
                    options=list(SWITCHES),
                    default=SWITCHES[0],
                    tooltip="What becomes of the frames that the model remembers. recache: they are computed again "
                    "under the new prompt and steps begin anew, so that it is followed at once (a few more forwards). "
                    "keep: they stay, and the picture changes slowly. blend: they stay, and the prompts are mixed over "
                    "blend_chunks. cut: they are forgotten wholly, and a new shot begins (no forwards more).",
                ),
                io.Int.Input(
                    "blend_chunks",
                    default=4,
                    min=1,
                    max=1000,
                    tooltip="Chunks over which the old prompt fades into the new one, in equal steps. Only with switch "
                    "blend.",
                ),
                io.Float.Input(
                    "fps",
                    default=WAN_FPS,
                    min=0.1,
                    max=240.0,
                    step=1.0,
                    round=0.001,
                    tooltip="Frames a second of the video, for times in seconds. Set it as in the node that saves the "
                    "video. Wan 2.1 makes 16.",
                ),
                io.Conditioning.Input(
                    "previous",
                    optional=True,
                    tooltip="What comes before these rows: another schedule (with a switch of its own), or one prompt "
                    "from CLIP Text Encode, which then begins the video.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="CONDITIONING",
                    tooltip="For positive of Diagonal Chunk Sampler and Diagonal Stream Video.",
                )
            ],
            hidden=[io.Hidden.unique_id],
            # The result names this node, and ComfyUI leaves the ids of V3 nodes out of its cache's keys: a copy with
            # the same values would be given the other's.
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, clip, text: str, switch: str, blend_chunks: int, fps: float, previous=None) -> io.NodeOutput:
        return io.NodeOutput(
            schedule_prompts(
                clip,
                text,
                fps=fps,
                switch=switch,
                blend_chunks=blend_chunks,
                previous=previous,
                node_id=own_id(cls),
            )
        )
