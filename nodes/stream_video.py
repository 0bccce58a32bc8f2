"""DiagonalStreamVideo: samples, decodes and saves a video chunk by chunk."""

from collections.abc import Mapping
from typing import Any

from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..model_patches.previews import preview_callback
from ..model_patches.stream_files import MAX_FPS, MAX_SECONDS, StreamOptions
from ..model_patches.streaming import stream_video
from ..model_patches.video_containers import MAX_CRF
from ..model_patches.video_writer import FORMATS, png_name
from ..model_patches.writing_thread import StreamProgress
from .client import send, tell
from .common import CATEGORY, ContextType, FlowType, ScheduleType, cfg_input, sampled_inputs, seed_input
from .finishing import early_ends, ended_early, finishable
from .live import LiveReport
from .steering import steerable

STREAM_EVENT = "diagonal.stream"
DEFAULT_STATE_EVERY = 20
DEFAULT_DENOISE = 0.3


class DiagonalStreamVideo(io.ComfyNode):
    """A video of any length straight to the disk, in constant memory; it resumes where it was stopped."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiagonalStreamVideo",
            display_name="Diagonal Stream Video",
            category=f"{CATEGORY}/video",
            description="Samples, decodes and saves a video chunk by chunk: the file plays while it grows, memory does "
            "not depend on the length, and the same graph run again goes on where a crash or Cancel left it.",
            search_aliases=["save video", "long video", "endless video", "resume video", "stream to disk"],
            inputs=[
                *sampled_inputs(),
                io.Vae.Input("vae", tooltip="The VAE of the model: Wan 2.1, lighttaew2_1, or the demo's."),
                ScheduleType.Input("schedule", tooltip="From Diagonal Schedule."),
                io.Int.Input("width", default=832, min=16, max=8192, step=16, tooltip="Width in pixels."),
                io.Int.Input("height", default=480, min=16, max=8192, step=16, tooltip="Height in pixels."),
                io.Float.Input(
                    "length",
                    default=10.0,
                    min=0.01,
                    max=MAX_SECONDS,
                    step=0.5,
                    round=0.001,
                    tooltip="Length in seconds, context frames included, also where write_context leaves them out of "
                    "the file. A longer length continues an unfinished video of the same graph.",
                ),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=0.1,
                    max=MAX_FPS,
                    step=1.0,
                    round=0.001,
                    tooltip="Frames a second. Wan 2.1 makes 16.",
                ),
                seed_input("To resume, keep it: control after generate is fixed.", io.ControlAfterGenerate.fixed),
                cfg_input(),
                io.String.Input(
                    "filename_prefix",
                    default="video/diagonal",
                    tooltip="Name of the file, below ComfyUI's output folder; a number is added. %date:yyyy-MM-dd% "
                    "becomes the date.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default=FORMATS[0],
                    tooltip="mp4: H.264, plays everywhere while it grows. webm: VP9. png: a folder of images, without "
                    "loss.",
                ),
                io.Float.Input(
                    "crf",
                    default=20.0,
                    min=1.0,
                    max=float(MAX_CRF),
                    step=1.0,
                    tooltip="Quality from 1 (best, largest) to 51, on H.264's scale. No effect on png.",
                ),
                io.Int.Input(
                    "state_every",
                    default=DEFAULT_STATE_EVERY,
                    min=1,
                    max=100_000,
                    tooltip="Chunks between two states on the disk: at most so many are made again after a crash, or "
                    "more where writing a state takes over a second: ten times as long passes before the next. A state "
                    "is about as large as the KV cache (3.5 GB for Wan 1.3B at 832x480, window 12).",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "restart",
                    default=False,
                    tooltip="Begin a new video even where an unfinished one of this graph could be resumed. The "
                    "unfinished one stays as a file, but can no longer be resumed. Whether a finished one is made "
                    "again is up to ComfyUI's cache: while it knows the graph, only where this is set in the node "
                    "itself, not by a link; it may forget a graph when memory is short (on most machines once another "
                    "runs), does so when the server restarts, and then the whole video is made again. To work on with "
                    "a finished video, load its file: Load Video (upload it there), Trim Video (start_time -2 for the "
                    "end), Get Video Components.",
                ),
                io.Boolean.Input(
                    "keep_state",
                    default=False,
                    tooltip="Keep the state of the finished video beside it, so that a longer length goes on with it "
                    "in the same file.",
                    advanced=True,
                ),
                ContextType.Input(
                    "context",
                    optional=True,
                    tooltip="Frames that the video begins with, from Diagonal Context Frames: a start image, or the "
                    "end of a video to go on from. They count in the length.",
                ),
                FlowType.Input(
                    "optical_flow",
                    optional=True,
                    tooltip="Motion that the video is to follow, from Diagonal Flow Conditioning, in pixels per pixel "
                    "frame. Where it is shorter than the video, the rest is left to the model.",
                ),
                io.Boolean.Input(
                    "write_context",
                    default=True,
                    optional=True,
                    tooltip="Write the frames of context to the file, too. Off: the file begins with the first new "
                    "frame, so that it joins what the context is the end of without trimming, and is shorter than "
                    "length by them: 6 latent frames are 21 frames.",
                    advanced=True,
                ),
                io.Video.Input(
                    "video",
                    optional=True,
                    tooltip="A video that this one is made over (video to video): at each moment it begins with that "
                    "one's picture. It is cut to width and height at the edges, taken at fps, read as it is needed, "
                    "and ends this one where length goes beyond it.",
                ),
                io.Float.Input(
                    "denoise",
                    default=DEFAULT_DENOISE,
                    min=0.01,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    optional=True,
                    tooltip="How much of video is made anew: the share of the schedule that is left. 0.3 keeps where "
                    "things are and how they move, lower keeps colours too, higher the rough motion, 1 nothing. No "
                    "effect without video.",
                ),
            ],
            outputs=[
                io.Video.Output(display_name="VIDEO", tooltip="The saved video."),
                ContextType.Output(
                    display_name="context", tooltip="The last frames of the video (6 latent frames), to go on from."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, restart: bool = False, **widgets) -> float | int:
        """With restart every run begins a new video; without it ComfyUI's cache answers a finished one's graph."""
        return float("nan") if restart else early_ends(cls.hidden.unique_id, widgets)

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        vae,
        schedule,
        width: int,
        height: int,
        length: float,
        fps: float,
        seed: int,
        cfg: float,
        filename_prefix: str,
        format: str,
        crf: float,
        state_every: int,
        restart: bool,
        keep_state: bool,
        context=None,
        optical_flow=None,
        write_context: bool = True,
        video=None,
        denoise: float = DEFAULT_DENOISE,
    ) -> io.NodeOutput:
        options = StreamOptions(
            width=width,
            height=height,
            seconds=length,
            fps=fps,
            seed=seed,
            cfg=cfg,
            filename_prefix=filename_prefix,
            format=format,
            crf=crf,
            state_every=state_every,
            restart=restart,
            keep_state=keep_state,
            write_context=write_context,
        )
        hidden = cls.hidden or io.HiddenHolder.from_v3_data(None)
        prompt, node_id = hidden.prompt, hidden.unique_id
        metadata = {}
        if not args.disable_metadata:
            metadata |= hidden.extra_pnginfo or {}
            metadata |= {} if prompt is None else {"prompt": _as_queued(prompt)}
        live = LiveReport(node_id, model, cfg)
        reporter = _StreamReporter(node_id, live)
        with live, steerable(positive) as prompts, finishable(node_id) as finish:
            result = stream_video(
                model,
                positive,
                negative,
                vae,
                schedule,
                options,
                context=context,
                optical_flow=optical_flow,
                metadata=metadata,
                prompt=prompt,
                node_id=node_id,
                callback=preview_callback(model),
                on_progress=live.progress,
                on_frames=reporter.frames,
                announce=reporter.announce,
                prompts=prompts,
                finish=finish.is_set,
                video=video,
                denoise=denoise,
            )
        if not result.whole:
            ended_early(node_id)
        reporter.announce(result.message)
        if format == "png":
            folder = f"{result.subfolder}/{result.path.name}".lstrip("/")
            last = result.video.get_frame_count()
            result_of = ui.SavedResult(png_name(last), folder, io.FolderType.output)
            images = [{**result_of, "in_sequence": True}]  # queue_batch.py fetches those before it too
            # The keys of the other formats: of a list of formats ComfyUI merges the results by the first one's.
            shown = {"images": images, "animated": (False,)}
        else:
            saved = ui.SavedResult(result.path.name, result.subfolder, io.FolderType.output)
            shown = ui.PreviewVideo([saved]).as_dict()
        return io.NodeOutput(result.video, result.context, ui={**shown, "text": (result.message,)})


def _as_queued(prompt: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """A graph without the fingerprints that ComfyUI notes in its nodes: queued again it would take those for new ones,
    and one that is NaN is no JSON."""
    return {name: {key: node[key] for key in node if key != "is_changed"} for name, node in prompt.items()}


class _StreamReporter:
    """Tells the client that queued the prompt what can be watched, and the node what is going on."""

    def __init__(self, node_id: str, live: LiveReport) -> None:
        self.node_id = node_id
        self.live = live
        self.headline = ""

    def announce(self, text: str) -> None:
        self.headline = text
        self._show(text)

    def frames(self, progress: StreamProgress) -> None:
        """Called in the writing thread; ComfyUI's send functions may be."""
        seconds, length = (float(count / progress.rate) for count in (progress.frames, progress.length))
        self._show(f"{self.headline}\n{seconds:.1f} of {length:.1f} s can be watched.")
        self.live.frames(progress.newest, progress.made, progress.rate)
        send(
            STREAM_EVENT,
            {
                "node": self.node_id,
                "filename": progress.path.name,
                "subfolder": progress.subfolder,
                "type": io.FolderType.output.value,
                "frames": progress.frames,
                "length": progress.length,
                "resumed_at": progress.resumed_at,
                "fps": float(progress.rate),
            },
        )

    def _show(self, text: str) -> None:
        tell(self.node_id, text)
