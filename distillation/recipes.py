"""Training recipes: functions that return one checked, frozen config. Every field is also a flag of train.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from diagonal_sampler.dit import WanConfig
from diagonal_sampler.schedule import PRESETS, DiagonalSchedule, parse_steps
from diagonal_sampler.settings import GLOBAL_WINDOW, CausalSettings

STAGES = ("teacher", "ode", "forcing", "distill", "long")
EXITS = ("random", "last")
MOTION_FORMS = ("differences", "head")
ATTENTIONS = ("bidirectional", "causal")
PRECISIONS = ("bf16", "float32")


def option(default: Any, text: str) -> Any:
    """A field with the help text that train.py shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything a run depends on. The released hyper-parameters (METHOD.md, section 4) are the defaults.

    `motion_scale` 0.2 is from code whose motion term had no gradient (commit 81c5a80). In the authors' code as of
    commit 24ef1c9 it has one, ten times as strong beside the spatial term's: motion_scale 2, or motion_weight 10.

    Raises:
        ValueError: a value out of range, named with its rule.
    """

    name: str
    stage: str = option("distill", "teacher (demo only), ode, forcing, distill or long")

    # Files
    teacher: str = option("", "weights of the teacher, any layout that DiagonalModelLoader reads")
    student: str = option("", "weights the student starts from; empty: the teacher's")
    fake_score: str = option("", "the fake score's first weights; empty: the teacher's, if sizes differ the student's")
    prompts: str = option("", "prompts: .txt (with a text encoder) or .jsonl from distillation.embed_prompts")
    text_encoder: str = option("", "the demo's caption encoder, for .txt prompts")
    autoencoder: str = option("", "the demo's autoencoder, to write sample clips as video")
    clips: str = option("", "folder of clips for the stages ode (made if missing) and forcing")

    # Sizes of student and fake score. A teacher's file may be of another, if the student has its own file.
    dim: int = option(1536, "channels of the transformer")
    ffn_dim: int = option(8960, "channels of its feed-forward layers")
    num_layers: int = option(30, "transformer blocks")
    text_dim: int = option(4096, "channels of the text embedding")

    # The clip
    frames: int = option(21, "latent frames of a training clip")
    height: int = option(60, "latent height (pixels / 8)")
    width: int = option(104, "latent width (pixels / 8)")
    rollout_frames: int = option(240, "stage long: latent frames of the longest rollout")
    opening_share: float = option(0.0, "stage long: share of rollouts that end with their first window")
    given_share: float = option(0.0, "share of rollouts that go on from a finished chunk, as a video is extended")

    # How the student looks back and denoises: as at inference
    frames_per_chunk: int = option(3, "latent frames denoised together")
    window: int = option(12, "latent frames a chunk attends to, sink included; -1: all")
    sink: int = option(3, "latent frames at the start that are never evicted")
    steps: str = option("4,3,2", "denoising steps per chunk; the last repeats")
    preset: str = option("diagonal 4-3-2", "named schedule whose noise levels the steps are taken from")
    shift: float = option(5.0, "timestep shift")
    context_mode: str = option("noisy", "noisy, clean or renoise: what the next chunk is conditioned on")
    context_sigma: float = option(0.357142857, "noise level of renoise")
    exit: str = option("random", "random or last: the step whose prediction the losses see")

    # Optical flow
    flow_adapter: str = option("", "optical flow that all networks see: sprites, synthetic or a folder; empty: none")
    flow_dropout: float = option(0.3, "share of clips without flow, so that no flow stays as good as it was")
    flow_learning_rate: float = option(1e-3, "of the adapter's own weights, in student and fake score")

    # Losses
    cfg: float = option(4.0, "guidance of the teacher, in ComfyUI's convention")
    cfg_high: float = option(1.0, "largest noise level at which the teacher is guided; above it cfg is 1")
    score_attention: str = option("bidirectional", "bidirectional or causal: how teacher and fake score see a clip")
    score_sink: bool = option(False, "where a window begins later: the scores see the sink with it")
    score_shift: float = option(5.0, "shift of the noise levels at which the scores are compared")
    score_low: float = option(0.02, "smallest noise level of a score")
    score_high: float = option(0.98, "largest noise level of a score")
    dmd_weight: float = option(1.0, "weight of the spatial distribution matching loss")
    motion_weight: float = option(1.0, "the paper's gamma: weight of all motion terms; 0 turns them off")
    motion_scale: float = option(0.2, "weight of the motion distribution matching loss under gamma; of 24ef1c9: 2")
    motion_form: str = option("differences", "differences (the authors' code) or head (the paper's conv + MLP)")
    regression_weight: float = option(0.0, "weight of the regression terms: x0 and, with head, motion features")
    motion_regression_weight: float = option(-1.0, "of the motion features' under gamma; -1: --regression-weight's")

    # Optimisation
    seed: int = option(0, "seed of everything")
    updates: int = option(120, "generator updates (ode, forcing: updates)")
    batch: int = option(64, "clips an update, over all ranks")
    micro_batch: int = option(1, "clips a rank treats at once; the rest is accumulated")
    learning_rate: float = option(2e-6, "of the student")
    fake_score_learning_rate: float = option(4e-7, "of the fake score")
    motion_head_learning_rate: float = option(1e-4, "of the motion head")
    fake_score_updates: int = option(5, "fake score updates for each generator update")
    warmup: int = option(0, "updates of linear warm-up")
    cooldown: int = option(0, "updates at the end over which the learning rates fall linearly to zero")
    beta1: float = option(0.0, "first AdamW beta")
    beta2: float = option(0.999, "second AdamW beta")
    epsilon: float = option(1e-8, "of AdamW: gradients far below it move nothing")
    weight_decay: float = option(0.01, "of AdamW")
    gradient_clip: float = option(10.0, "largest gradient norm")
    ema_decay: float = option(0.99, "of the exported weights")
    ema_start: int = option(40, "update from which weights are averaged")
    lora_rank: int = option(0, "0 trains all weights; else adapters of this rank, alpha = rank")

    # Trajectories of the teacher (stage ode)
    ode_clips: int = option(1024, "trajectories to make")
    ode_steps: int = option(50, "Euler steps of the teacher")

    # Engine
    precision: str = option("bf16", "bf16 (float32 master weights; float32 on a CPU with AVX2 only) or float32")
    activation_checkpointing: bool = option(False, "recompute blocks in the backward pass")
    compile: bool = option(False, "torch.compile the blocks of teacher and fake score")

    # Bookkeeping
    save_every: int = option(10, "updates between checkpoints, and one after the last update; 0: none at all")
    keep: int = option(2, "checkpoints kept")
    sample_every: int = option(0, "updates between sample clips; 0: none")
    sample_prompts: int = option(4, "clips of a sample")
    tensorboard: bool = option(True, "also log for TensorBoard, if it is installed")

    def __post_init__(self) -> None:
        self._require_ranges()
        self._require_sources()
        self._require_windows()
        # Their own checks, at once rather than after the weights have loaded.
        _ = self.model, self.settings, self.schedule

    def _require_ranges(self) -> None:
        """Every field by itself, and those that divide or bound each other."""
        for item in fields(self):
            if item.type == "float" and not math.isfinite(getattr(self, item.name)):
                raise ValueError(f"{item.name} is {getattr(self, item.name)}; it must be a finite number.")
        _choice("stage", self.stage, STAGES)
        _choice("exit", self.exit, EXITS)
        _choice("motion_form", self.motion_form, MOTION_FORMS)
        _choice("score_attention", self.score_attention, ATTENTIONS)
        _choice("precision", self.precision, PRECISIONS)
        _choice("preset", self.preset, tuple(PRESETS))
        for name in (
            "frames", "height", "width", "batch", "micro_batch", "updates", "fake_score_updates", "keep",
            "ode_clips", "ode_steps", "rollout_frames", "frames_per_chunk",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in (
            "learning_rate", "fake_score_learning_rate", "motion_head_learning_rate", "weight_decay", "dmd_weight",
            "motion_weight", "motion_scale", "regression_weight", "warmup", "cooldown", "ema_start",
            "lora_rank", "save_every", "sample_every", "sample_prompts", "flow_learning_rate", "sink",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if self.motion_regression_weight < 0 and self.motion_regression_weight != -1:
            raise ValueError(
                f"motion_regression_weight is {self.motion_regression_weight}; it must be 0 or more, or -1 for "
                "regression_weight's."
            )
        for name in ("beta1", "beta2", "ema_decay", "flow_dropout", "opening_share", "given_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1).")
        for name in ("gradient_clip", "epsilon", "score_shift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if not 0 <= self.cfg_high <= 1:
            raise ValueError(f"cfg_high is {self.cfg_high}; it is a noise level in [0, 1].")
        if not 0 < self.score_low < self.score_high <= 1:
            raise ValueError(
                f"score_low is {self.score_low} and score_high {self.score_high}; they need 0 < score_low < "
                "score_high <= 1."
            )
        if self.batch % self.micro_batch:
            raise ValueError(f"batch is {self.batch}, no multiple of micro_batch ({self.micro_batch}).")
        if self.height % 2 or self.width % 2:
            raise ValueError(
                f"the latent is {self.height}x{self.width}; both must be even (the patch is 2): "
                f"{self.height + self.height % 2}x{self.width + self.width % 2} fits."
            )

    def _require_sources(self) -> None:
        """Where weights and noise levels come from."""
        if not PRESETS[self.preset].fresh_noise and self.stage not in ("teacher", "forcing"):
            few = ", ".join(name for name, preset in PRESETS.items() if preset.fresh_noise)
            raise ValueError(
                f"preset is {self.preset!r}, whose steps keep their noise; a few-step student is trained for fresh "
                f"noise at each: choose one of {few}."
            )
        if self.fake_score and self.lora_rank:
            raise ValueError(
                f"fake_score is {self.fake_score!r} and lora_rank {self.lora_rank}: with adapters the fake score is an "
                "adapter on the teacher; leave one of the two out."
            )

    def _require_windows(self) -> None:
        """The latent frames that the losses see."""
        if self.frames < 2 and self.motion_weight:
            raise ValueError("motion losses compare neighbouring latent frames; frames must be at least 2.")
        if self.stage == "long" and self.rollout_frames < self.frames:
            raise ValueError(f"rollout_frames is {self.rollout_frames}, less than frames ({self.frames}).")
        if self.window != GLOBAL_WINDOW and self.frames % self.frames_per_chunk and self.stage == "long":
            raise ValueError(
                f"frames is {self.frames}, no multiple of frames_per_chunk ({self.frames_per_chunk}): stage long "
                "trains on windows of whole chunks."
            )
        follows = self.score_sink and self.sink == self.frames_per_chunk  # the scores see all that was given
        least = self.frames_per_chunk + (2 if self.motion_weight else 1)
        if (self.stage == "long" or (self.given_share > 0 and not follows)) and self.frames < least:
            raise ValueError(
                f"frames is {self.frames}; the first chunk ({self.frames_per_chunk}) of a window that begins inside a "
                f"video learns nothing, and the losses need {least - self.frames_per_chunk} more: at least {least}."
            )
        whole = self.sink % self.frames_per_chunk == 0
        far = self.stage == "long" or self.given_share > 0  # windows that begin after the sink
        if far and self.score_sink and not (self.score_attention == "causal" and whole):
            raise ValueError(
                f"score_sink needs score_attention causal (it is {self.score_attention}) and a sink of whole chunks ("
                f"{self.sink} latent frames, {self.frames_per_chunk} a chunk)."
            )

    @property
    def model(self) -> WanConfig:
        """Sizes of student and fake score, and of a teacher that the student starts from."""
        return WanConfig(
            dim=self.dim,
            ffn_dim=self.ffn_dim,
            num_layers=self.num_layers,
            text_dim=self.text_dim,
            flow_adapter=bool(self.flow_adapter),
        )

    @property
    def settings(self) -> CausalSettings:
        """How the student looks back."""
        return CausalSettings(frames_per_chunk=self.frames_per_chunk, window=self.window, sink=self.sink)

    @property
    def schedule(self) -> DiagonalSchedule:
        """The schedule the student is trained for."""
        preset = PRESETS[self.preset]
        return DiagonalSchedule.from_steps(
            parse_steps(self.steps),
            times=preset.times,
            shift=self.shift,
            context_mode=self.context_mode,
            context_sigma=self.context_sigma,
        )

    @property
    def inference_schedule(self) -> DiagonalSchedule:
        """How the trained student is sampled: as it is trained, but after stage forcing like a teacher.

        That stage's student knows every noise level, and the clips' own distribution.
        """
        return DiagonalSchedule.preset("undistilled", shift=self.shift) if self.stage == "forcing" else self.schedule

    @property
    def sample_cfg(self) -> float:
        """Guidance of sample clips: stage forcing's student is sampled like a teacher, a few-step one never guided."""
        return self.cfg if self.stage == "forcing" else 1.0

    @property
    def motion_regression(self) -> float:
        """Weight of the regression on motion features, under gamma."""
        own = self.motion_regression_weight
        return self.regression_weight if own == -1 else own

    @property
    def distils(self) -> bool:
        """Whether the stage compares scores of self rollouts, rather than regressing on clips."""
        return self.stage in ("distill", "long")

    @property
    def student_weights(self) -> str:
        """The file the student starts from."""
        return self.student or self.teacher

    def accumulation(self, ranks: int) -> int:
        """Micro-batches of a rank in one update.

        Raises:
            ValueError: the batch does not divide.
        """
        if self.batch % (ranks * self.micro_batch):
            raise ValueError(
                f"batch is {self.batch}, which {ranks} ranks of micro_batch {self.micro_batch} cannot share evenly; "
                f"choose a multiple of {ranks * self.micro_batch}."
            )
        return self.batch // (ranks * self.micro_batch)


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}.")


def parse_field(name: str, text: str) -> Any:
    """A field's value from its flag.

    Raises:
        ValueError: text that is not of the field's type.
    """
    kind = {item.name: str(item.type) for item in fields(Recipe)}[name]
    if kind == "bool":
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(f"{name} is {text!r}; write true or false.")
        return text.lower() in ("true", "1", "yes")
    if kind == "str":
        return text
    try:
        return {"int": int, "float": float}[kind](text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}; write {'a whole number' if kind == 'int' else 'a number'}.") from None


# ---------------------------------------------------------------------------------------------------------------
# The recipes

DEMO = Path(__file__).parents[1] / "demo"


def demo(**changes: Any) -> Recipe:
    """The shipped student, from the shipped demo: minutes to hours on two CPU cores."""
    defaults = dict(
        name="demo",
        teacher=str(DEMO / "demo_teacher.safetensors"),
        text_encoder=str(DEMO / "demo_text_encoder.safetensors"),
        autoencoder=str(DEMO / "demo_autoencoder.safetensors"),
        prompts="sprites",
        dim=256,
        ffn_dim=1024,
        num_layers=4,
        text_dim=128,
        height=8,
        width=8,
        cfg=5.0,
        # The demo network was trained mostly with a noise level per chunk and causal attention: its scores are best so.
        score_attention="causal",
        # It was also trained on windows whose first chunk lies far back, as the student's sink does.
        score_sink=True,
        # Four chunks show all that a window does but its rolling, at little more than half the cost of a whole clip.
        frames=12,
        batch=8,
        micro_batch=8,
        updates=300,
        learning_rate=5e-5,
        fake_score_learning_rate=1e-4,
        fake_score_updates=2,
        ema_decay=0.98,
        ema_start=20,
        gradient_clip=1.0,
        save_every=25,
        sample_every=100,
    )
    return Recipe(**{**defaults, **changes})


def wan_1_3b(**changes: Any) -> Recipe:
    """Wan 2.1 T2V 1.3B with the released hyper-parameters: 8 GPUs of 80 GB, all weights trained.

    The release's teacher is the 14B model: give `teacher` it, `student` a causal 1.3B and `fake_score` the plain 1.3B.
    """
    defaults = dict(
        name="wan_1_3b", teacher="wan2.1_t2v_1.3B_bf16.safetensors", prompts="prompts/prompts.jsonl",
        activation_checkpointing=True, sample_every=100,
    )  # fmt: skip
    return Recipe(**{**defaults, **changes})


def wan_14b_lora(**changes: Any) -> Recipe:
    """Wan 2.1 T2V 14B: student and fake score are adapters on one frozen bf16 copy of the teacher."""
    defaults = dict(
        name="wan_14b_lora", teacher="wan2.1_t2v_14B_bf16.safetensors", prompts="prompts/prompts.jsonl",
        dim=5120, ffn_dim=13824, num_layers=40, lora_rank=256, learning_rate=1e-5, fake_score_learning_rate=2e-6,
        activation_checkpointing=True, sample_every=100,
    )  # fmt: skip
    return Recipe(**{**defaults, **changes})


def long_video(**changes: Any) -> Recipe:
    """Adapters on a distilled 1.3B student: windows of 21 latent frames of rollouts up to 240."""
    defaults = dict(
        name="long_video", stage="long", teacher="wan2.1_t2v_1.3B_bf16.safetensors", student="student.safetensors",
        prompts="prompts/prompts.jsonl", lora_rank=256, learning_rate=1e-5, fake_score_learning_rate=2e-6,
        opening_share=0.1,  # else one rollout of 74 trains a video's first chunk
        activation_checkpointing=True, sample_every=100,
    )  # fmt: skip
    return Recipe(**{**defaults, **changes})


RECIPES: dict[str, Callable[..., Recipe]] = {
    function.__name__: function for function in (demo, wan_1_3b, wan_14b_lora, long_video)
}
