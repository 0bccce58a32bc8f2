"""Makes the pictures of the help pages and the README, and the thumbnails of the workflows, in ComfyUI's real canvas.

    COMFYUI_DIR=... python tests/helpers/canvas_pictures.py [help] [thumbnails] [readme] [NODE ...]

It starts a server of its own, with a header and a hole in the place of each model file, and headless Chromium.
Look at what it made.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import sys
import tempfile
from math import prod
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests" / "helpers"), str(ROOT)]

import torch  # noqa: E402
from comfy_host import EXAMPLE_PICTURE, ComfyServer, find_comfyui, put_on_path  # noqa: E402
from frontend import CHROMIUM_ARGUMENTS, CHROMIUM_NAMES, Frontend  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.serialization import skip_data  # noqa: E402

from diagonal_sampler.wan_layout import WanDims, expected_shapes  # noqa: E402

PICTURES = ROOT / "web" / "docs" / "images"
# Node -> the workflow to show it in; None: on its own.
HELP = {
    "DiagonalModelLoader": "wan_1_3b_self_forcing",
    "DiagonalCausalAttention": "causal_any_wan",
    "DiagonalDemoLoader": "demo",
    "DiagonalSchedule": "demo",
    "DiagonalPromptSchedule": "endless_prompts",
    "DiagonalContextFrames": "image_to_video",
    "DiagonalFlowConditioning": None,
    "DiagonalFlowPreview": None,
    "DiagonalChunkSampler": "demo",
    "DiagonalStreamVideo": "stream_to_disk",
}
# Workflows that are run for the picture, and what the node's own preview says when it is taken.
RUN = {"demo": "forwards in", "stream_to_disk": "forwards in"}
WIDGETS = {"DiagonalModelLoader": {"ckpt_name": "causal_forcing-framewise.safetensors", "window": 12, "sink": 3}}
MARGIN, BADGE_HEIGHT = 12, 18
# Of the page; and the finished video, which ComfyUI shows below its node: it may not be loaded yet.
HIDDEN = ".graph-canvas-menu, .litegraph-minimap, [class*=minimap], .comfy-img-preview { display: none !important }"
QUALITY = 82
THUMBNAIL_WIDTH, README_WIDTH = 1280, 1600
README_WORKFLOW = "endless_prompts"
# The others show what they make.
THUMBNAILS = (
    "wan_1_3b_self_forcing",
    "wan_1_3b_stream",
    "wan_1_3b_image_to_video",
    "wan_1_3b_camera_motion",
    "krea_14b",
    "causal_any_wan",
)
SIZES = {
    "1.3B": WanDims(dim=1536, depth=30, ffn_dim=8960, text_dim=4096, freq_dim=256, in_channels=16, out_channels=16),
    "14B": WanDims(dim=5120, depth=40, ffn_dim=13824, text_dim=4096, freq_dim=256, in_channels=16, out_channels=16),
}


def place_models(models: Path) -> None:
    """Every file that a workflow's note names: a safetensors header, and a hole for the weights."""
    from comfy.ldm.wan.vae import WanVAE  # ComfyUI must be on the path
    from comfy.taesd.taehv import TAEHV

    decoders = {
        "lighttae": lambda: TAEHV(16),
        "wan_2.1_vae": lambda: WanVAE(dim=96, z_dim=16, temperal_downsample=[False, True, True]),
    }
    for path in sorted((ROOT / "workflows").glob("*.json")):
        for folder, name in re.findall(r"in `(\w+)/`: \*\*([^*]+)\*\*", path.read_text(encoding="utf-8")):
            shapes = {"nothing": (1,)}
            if folder == "diffusion_models":
                shapes = expected_shapes(SIZES["14B" if "14b" in name else "1.3B"])
            elif make := next((decoders[start] for start in decoders if name.startswith(start)), None):
                with torch.device("meta"):
                    shapes = {tensor: tuple(value.shape) for tensor, value in make().state_dict().items()}
            (models / folder).mkdir(parents=True, exist_ok=True)
            if name.endswith(".pt"):
                with FakeTensorMode():
                    tree = {f"model.{tensor}": torch.empty(shape) for tensor, shape in shapes.items()}
                with skip_data(materialize_fake_tensors=True):
                    torch.save({"generator_ema": tree}, models / folder / name)
                continue
            header, end = {}, 0
            for tensor, shape in shapes.items():
                begin, end = end, end + 2 * prod(shape)
                header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            data = json.dumps(header).encode()
            with (models / folder / name).open("wb") as file:
                file.write(struct.pack("<Q", len(data)) + data)
                file.truncate(8 + len(data) + end)


def load(frontend: Frontend, name: str, *, run_until: str | None = None) -> None:
    """Open a workflow, and perhaps run it until its node says so."""
    frontend.load(json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")))
    page = frontend.page
    page.wait_for_timeout(3000)  # drawings ask the server
    if run_until:
        page.evaluate("() => app.queuePrompt(0, 1)")
        page.wait_for_function(
            "words => document.querySelector('.diagonal-preview .line')?.textContent.includes(words)",
            arg=run_until,
            timeout=180_000,
        )


def shown(page, left: float, top: float, scale: float) -> None:
    """Put a place of the canvas into the page's corner."""
    page.evaluate(
        """([left, top, scale]) => {
            app.canvas.deselectAll();
            app.canvas.ds.scale = scale;
            app.canvas.ds.offset = [-left, -top];
            app.canvas.setDirty(true, true);
        }""",
        [left, top, scale],
    )
    page.wait_for_timeout(1500)


def take_help(frontend: Frontend, nodes: list[str]) -> None:
    page, opened = frontend.page, None
    PICTURES.mkdir(exist_ok=True)
    for node, workflow in sorted(((node, HELP[node]) for node in nodes), key=lambda item: item[1] or ""):
        if workflow != opened or workflow is None:
            load(frontend, workflow or "demo", run_until=RUN.get(workflow or ""))
            opened = workflow
        left, top, width, height = page.evaluate(
            """([type, alone, values]) => {
                [...app.graph.groups].forEach((group) => app.graph.remove(group));
                if (alone) {
                    app.graph.clear();
                    app.graph.add(LiteGraph.createNode(type));
                }
                const node = app.graph.nodes.find((found) => found.type === type);
                for (const [name, value] of Object.entries(values))
                    node.widgets.find((widget) => widget.name === name).value = value;
                return [...node.pos, ...node.size];
            }""",
            [node, workflow is None, WIDGETS.get(node, {})],
        )
        # Away from the page's own buttons, which lie over the canvas.
        shown(page, left - 330, top - 150, 1.0)
        clip = {
            "x": 330 - MARGIN,
            "y": 150 - 30 - MARGIN,
            "width": width + 2 * MARGIN,
            "height": height + 30 + 2 * MARGIN,
        }
        picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
        picture.save(PICTURES / f"{node}.webp", quality=QUALITY, method=6)


def whole_graph(page) -> Image.Image:
    """All nodes and groups of the open graph, a pixel a canvas unit."""
    left, top, right, bottom = page.evaluate(
        """() => {
            const boxes = [...app.graph.nodes, ...app.graph.groups].map((item) => [...item.pos, ...item.size]);
            const low = (i) => Math.min(...boxes.map((box) => box[i]));
            const high = (i) => Math.max(...boxes.map((box) => box[i] + box[i + 2]));
            return [low(0) - 20, low(1) - 60, high(0) + 20, high(1) + 20];
        }"""
    )
    shown(page, left - 100, top - 100, 1.0)
    clip = {"x": 100, "y": 100, "width": right - left, "height": bottom - top}
    return Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")


def narrower(picture: Image.Image, width: int) -> Image.Image:
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)


def take_thumbnails(frontend: Frontend) -> None:
    for name in THUMBNAILS:
        load(frontend, name)
        picture = narrower(whole_graph(frontend.page), THUMBNAIL_WIDTH)
        picture.save(ROOT / "workflows" / f"{name}.jpg", quality=QUALITY)


def take_readme(frontend: Frontend) -> None:
    """A workflow behind its run."""
    load(frontend, README_WORKFLOW, run_until="forwards in")
    picture = narrower(whole_graph(frontend.page), README_WIDTH)
    picture.save(ROOT / "docs" / "canvas.webp", quality=QUALITY, method=6)


def main(wanted: list[str]) -> int:
    unknown = set(wanted) - {"help", "thumbnails", "readme", *HELP}
    if unknown:
        sys.stderr.write(f"Unknown: {', '.join(sorted(unknown))}. Nodes: {', '.join(HELP)}.\n")
        return 1
    comfyui = find_comfyui()
    chromium = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if comfyui is None or chromium is None:
        sys.stderr.write("This needs ComfyUI (COMFYUI_DIR, or quickstart.py) and Chromium.\n")
        return 1
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as engine:
        put_on_path(comfyui)
        place_models(Path(folder, "models"))
        Path(folder, "input").mkdir()
        shutil.copy(comfyui / "input" / EXAMPLE_PICTURE, Path(folder, "input"))
        server = ComfyServer(comfyui, Path(folder))
        try:
            server.wait_ready()
            server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Notification.ShowVersionUpdates": False})
            browser = engine.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
            # As large as a workflow, so that it is drawn at full size.
            page = browser.new_page(viewport={"width": 3700, "height": 1700})
            frontend = Frontend(page, server.url)
            page.evaluate("() => app.ui.settings.setSettingValue('Comfy.Minimap.Visible', false)")
            page.add_style_tag(content=HIDDEN)
            nodes = list(HELP) if "help" in wanted or not wanted else [node for node in HELP if node in wanted]
            take_help(frontend, nodes)
            if "thumbnails" in wanted or not wanted:
                take_thumbnails(frontend)
            if "readme" in wanted or not wanted:
                take_readme(frontend)
            browser.close()
        finally:
            server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
