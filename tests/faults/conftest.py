"""The demo model and a stream of six chunks, for the tests that break it off."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import comfy_host
import fault_rows
import pytest

FPS = 16
FRAMES = 69
"""Pixel frames of six chunks of three latent frames."""


@pytest.fixture(scope="session")
def comfy_server(comfyui_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[comfy_host.ComfyServer]:
    """A running server with this pack and the node that puts in faults."""
    base = tmp_path_factory.mktemp("faults-server") / "base"
    (base / "custom_nodes").mkdir(parents=True)
    shutil.copy(fault_rows.ROOT / "tests" / "helpers" / "fault_node.py", base / "custom_nodes")
    server = comfy_host.ComfyServer(comfyui_dir, base)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def demo(pack):
    """MODEL, positive, negative, VAE of the bundled demo's student."""
    with comfy_host.demo_models("student") as models:
        yield models


@pytest.fixture
def six_chunks(pack_module, demo, output) -> SimpleNamespace:
    """`run(prefix, format, **more)`: diagonal 4-3-2 over six chunks to the disk; and its modules."""
    from diagonal_sampler.schedule import DiagonalSchedule

    streaming = pack_module("model_patches.streaming")
    schedule = DiagonalSchedule.preset("diagonal 4-3-2")

    def run(prefix: str, format: str = "mp4", *, model=None, seconds: float = FRAMES / FPS, **more):
        options = streaming.StreamOptions(
            width=64,
            height=64,
            seconds=seconds,
            fps=FPS,
            seed=3,
            filename_prefix=prefix,
            format=format,
            state_every=1,
        )
        return streaming.stream_video(model or demo[0], *demo[1:], schedule, options, **more)

    return SimpleNamespace(
        run=run, streaming=streaming, output=output, writer=pack_module("model_patches.video_writer")
    )


@pytest.fixture
def content() -> Callable[[Path], bytes | dict[str, bytes]]:
    """`content(path)`: the bytes of a video, by image where it is a folder."""

    def read(path: Path):
        return {p.name: p.read_bytes() for p in path.iterdir()} if path.is_dir() else path.read_bytes()

    return read


@pytest.fixture
def playable() -> Callable[[Path], int]:
    """`playable(path)`: how many frames can be watched, each after the one before it."""
    av = pytest.importorskip("av")

    def frames(path: Path) -> int:
        if path.is_dir():
            from PIL import Image

            names = sorted(path.glob("*.png"))
            for name in names:
                with Image.open(name) as image:
                    image.load()
            return len(names)
        with av.open(str(path)) as container:
            times = [frame.time for frame in container.decode(video=0)]
        assert all(abs(time - number / FPS) < 1e-3 for number, time in enumerate(times)), "uneven times"
        return len(times)

    return frames
