"""kill -9 at any moment of a stream: the file plays, at most one announced frame is lost, and the run goes on.

In the same file, from its last state; killed before its first state, a video stays as it is and the next number begins.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import fault_rows
import pytest
from forks import forks

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

SECONDS, FPS = 8.0, 16
FRAMES = int(SECONDS * FPS)
FORMATS = ("mp4", "webm", "png")
PRELUDE = """
import sys
sys.path += [{helpers!r}, {root!r}]
import comfy_host
comfy_host.put_on_path(comfy_host.find_comfyui())
import folder_paths, torch
torch.set_num_threads(1)
folder_paths.set_output_directory({output!r})
model, clip, vae = comfy_host.pack_module("nodes.demo_loader").DiagonalDemoLoader.execute("student").result
streaming = comfy_host.pack_module("model_patches.streaming")
from diagonal_sampler.schedule import DiagonalSchedule
text = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle moves right"))

def job(**options):
    streaming.stream_video(
        model, text, text, vae, DiagonalSchedule.preset("diagonal 4-3-2"), streaming.StreamOptions(**options),
        on_frames=lambda progress: print("frames", progress.frames, flush=True),
        announce=lambda line: print("says", line.splitlines()[0], flush=True),
    )
"""


def announced(job) -> int:
    """Frames that were said to be watchable."""
    return max((int(line.split()[1]) for line in job.lines if line.startswith("frames ")), default=0)


def options(prefix: str, format: str, state_every: int) -> dict:
    return dict(
        width=64,
        height=64,
        seconds=SECONDS,
        fps=FPS,
        seed=3,
        filename_prefix=prefix,
        format=format,
        state_every=state_every,
    )


def test_row_kill_saving(comfyui_dir, tmp_path, content, playable, pack_module):
    read_state = pack_module("model_patches.stream_state").read_state
    output = tmp_path / "output"
    output.mkdir()
    root = fault_rows.ROOT
    prelude = PRELUDE.format(helpers=str(root / "tests" / "helpers"), root=str(root), output=str(output))
    sound: dict[tuple[str, int], object] = {}

    def video(prefix: str, format: str, number: int = 1) -> Path:
        return output / f"{prefix}_{number:05}_{'' if format == 'png' else '.' + format}"

    with forks(prelude, tmp_path) as children:

        def check(number: int) -> float:
            rng = fault_rows.generator("kill_saving", number)
            format, state_every, prefix = FORMATS[number % 3], rng.choice((1, 2, 4, 99)), f"k{number}"
            wanted = options(prefix, format, state_every)
            if (format, state_every) not in sound:
                name = f"sound_{format}_{state_every}"
                assert children.run(**{**wanted, "filename_prefix": name}).code == 0
                sound[format, state_every] = content(video(name, format))
            lost = 0
            kept: dict[Path, object] = {}  # killed before its first state: what it had
            newest = video(prefix, format)
            for _ in range(rng.choice((1, 1, 2))):  # some are killed again while they go on
                at = rng.randrange(1, FRAMES)
                job = children.start(**wanted)
                job.wait(lambda job, at=at: announced(job) >= at)
                time.sleep(rng.random() * 0.05)
                job.kill()
                newest = video(prefix, format, 1 + len(kept))
                there = playable(newest)
                lost = max(lost, announced(job) - there)
                assert lost <= 1, f"{announced(job)} frames were announced, {there} are there"
                if not list(output.glob(f"{prefix}_*.state*")):  # it was done first
                    assert there == FRAMES, f"{there} frames and no state"
                    break
                (state,) = (read_state(path) for path in output.glob(f"{prefix}_*.state.safetensors"))
                if state.chunk == 0:
                    kept[newest] = content(newest)
            else:
                job = children.run(**wanted)
                assert job.code == 0, job.lines[-2:]
                newest = video(prefix, format, 1 + len(kept))
            assert content(newest) == sound[format, state_every], f"another {format} than never killed"
            for path, before in kept.items():
                assert content(path) == before, f"{path.name} was touched"
            left = [path.name for path in output.glob(f"{prefix}_*") if path not in (newest, *kept)]
            assert not [name for name in left if not name.endswith(".lock")], left
            return float(lost)

        fault_rows.run_cases("kill_saving", check)
