"""ComfyUI for the tests: where it is, how it gets into this process, and how a real server is started.

Found in this order: the environment variable COMFYUI_DIR, then the host that quickstart.py puts into `.host`.
Everything ComfyUI writes goes to a private temporary folder; the install itself stays as it is.
"""

from __future__ import annotations

import asyncio
import atexit
import importlib
import importlib.abc
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from bootstrap.host import link_pack
from bootstrap.processes import CHILDREN
from bootstrap.server import command_line, free_port

ROOT = Path(__file__).resolve().parents[2]
# The name under which ComfyUI's load_custom_node registers a pack: its path, without dots.
PACK_NAME = str(ROOT).replace(".", "_x_")
NO_COMFYUI = "no ComfyUI: set COMFYUI_DIR to an install, or run `python quickstart.py --test`"
# Tests run on the CPU, so that their numbers are the same everywhere; DIAGONAL_TEST_GPU=1 uses the GPU.
USE_GPU = os.environ.get("DIAGONAL_TEST_GPU", "") == "1"
# The `static` folder of another comfyui-frontend-package than the one that is installed.
OTHER_FRONTEND = os.environ.get("DIAGONAL_TEST_FRONTEND", "")
START_TIMEOUT_S = 600.0
PORT_IS_TAKEN = re.compile("already in use|only one usage of each socket address", re.IGNORECASE)
EXAMPLE_PICTURE = "example.png"  # in the input folder of every install
CORE_PACKAGE = "diagonal_sampler"


def find_comfyui() -> Path | None:
    """Return the ComfyUI folder, or None. Raises ValueError when COMFYUI_DIR names something else."""
    named = os.environ.get("COMFYUI_DIR")
    if named:
        folder = Path(named).expanduser().resolve()
        if not (folder / "main.py").is_file() or not (folder / "nodes.py").is_file():
            raise ValueError(
                f"COMFYUI_DIR is {named!r}, which has no main.py and nodes.py of ComfyUI. "
                "Name the folder that holds them, or unset COMFYUI_DIR."
            )
        return folder
    folder = ROOT / ".host" / "ComfyUI"
    return folder if (folder / "main.py").is_file() else None


def put_on_path(comfyui: Path) -> None:
    """Make ComfyUI's modules importable in this process, set to the CPU and to private folders."""
    sys.path.insert(0, str(comfyui))
    # ComfyUI parses an empty command line unless main.py asks otherwise: pytest's arguments do not reach it.
    from comfy.cli_args import args

    args.cpu = not USE_GPU
    base = Path(tempfile.mkdtemp(prefix="diagonal-comfy-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    (base / "custom_nodes").mkdir()
    args.base_directory = str(base)
    args.database_url = "sqlite:///:memory:"


class _OneCore(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Let `<pack>.diagonal_sampler.x` be the very module `diagonal_sampler.x`.

    ComfyUI imports the core as a sub-package of the pack, tests import it by its own name. Two imports would
    make two classes of every name, and `isinstance` would lie.
    """

    prefix = f"{PACK_NAME}."

    def find_spec(self, fullname, path=None, target=None):
        own_name = fullname.removeprefix(self.prefix)
        if own_name == fullname or own_name.split(".")[0] != CORE_PACKAGE:
            return None
        if importlib.util.find_spec(own_name) is None:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec):
        module = importlib.import_module(spec.name.removeprefix(self.prefix))
        spec.loader_state = module.__spec__  # the import system overwrites __spec__; exec_module restores it
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state


def share_core() -> None:
    """Install the finder that keeps one copy of the core in this process."""
    if not any(isinstance(finder, _OneCore) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OneCore())


class _Collect(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def load_pack() -> ModuleType:
    """Load this pack with ComfyUI's own loader and return its package; a second call returns the same one."""
    if PACK_NAME in sys.modules:
        return sys.modules[PACK_NAME]
    share_core()
    import nodes

    collected = _Collect()
    logging.getLogger().addHandler(collected)
    try:
        loaded = asyncio.run(nodes.load_custom_node(str(ROOT)))
    finally:
        logging.getLogger().removeHandler(collected)
    if not loaded:
        sys.modules.pop(PACK_NAME, None)
        raise RuntimeError("ComfyUI could not load the pack:\n" + "\n".join(collected.lines))
    return sys.modules[PACK_NAME]


def pack_module(name: str) -> ModuleType:
    """Return a module of the loaded pack by its dotted name inside it, e.g. `model_patches.causal_wan`."""
    load_pack()
    return importlib.import_module(f"{PACK_NAME}.{name}")


@contextmanager
def demo_models(weights: str) -> Iterator[tuple[Any, ...]]:
    """MODEL, positive, negative, VAE of the bundled demo's `weights`, student or teacher; unloaded afterwards."""
    import comfy.model_management

    model, clip, vae = pack_module("nodes.demo_loader").DiagonalDemoLoader.execute(weights).result
    texts = ("a red circle moves right", "")
    yield (model, *(clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts), vae)
    comfy.model_management.unload_all_models()


class ComfyServer:
    """A real ComfyUI server in its own process, with this pack in custom_nodes and private folders.

    Args:
        port: where it is to listen; a free port without it.

    Attributes:
        url: "http://127.0.0.1:PORT", without a slash at the end.
        base_dir: its base directory; models go to `base_dir / "models" / KIND`.
        output_dir, input_dir: where it writes results and reads images.
        log_path: everything it printed.
    """

    def __init__(self, comfyui: Path, base_dir: Path, *, port: int | None = None) -> None:
        self.output_dir = base_dir / "output"
        self.input_dir = base_dir / "input"
        self.log_path = base_dir / "server.log"
        (base_dir / "models").mkdir(parents=True, exist_ok=True)
        self.input_dir.mkdir(exist_ok=True)
        picture = self.input_dir / EXAMPLE_PICTURE
        if not picture.exists():
            Image.new("RGB", (96, 64), (40, 90, 160)).save(picture)
        link_pack(base_dir / "custom_nodes")
        self._comfyui, self._base_dir, self._asked_port = comfyui, base_dir, port
        self._environment = dict(os.environ)
        self._start()

    def _start(self) -> None:
        port = self._asked_port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        folders = {"base": self._base_dir, "output": self.output_dir}
        command = command_line(sys.executable, self._comfyui, **folders, port=port, gpu=USE_GPU)
        command += ["--base-directory", str(self._base_dir)]
        if OTHER_FRONTEND:
            command += ["--front-end-root", OTHER_FRONTEND]
        with self.log_path.open("wb") as log:
            options = {"cwd": self._base_dir, "env": self._environment}
            self.process = CHILDREN.start(command, stdout=log, stderr=subprocess.STDOUT, **options)

    def wait_ready(self) -> None:
        """Wait until the server answers. Raises RuntimeError with the log's end on failure."""
        give_up = time.monotonic() + START_TIMEOUT_S
        again = True
        while time.monotonic() < give_up:
            if self.process.poll() is not None:
                # Another program took the port between free_port and here.
                if again and PORT_IS_TAKEN.search(self.log_tail()):
                    again = False
                    self._start()
                    continue
                raise RuntimeError(f"ComfyUI ended with code {self.process.returncode}:\n{self.log_tail()}")
            try:
                self.get("/system_stats", timeout=5.0)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError(f"ComfyUI did not answer within {START_TIMEOUT_S:.0f} s:\n{self.log_tail()}")

    def log_tail(self, lines: int = 60) -> str:
        """Return the last lines the server printed."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def get(self, path: str, timeout: float = 30.0):
        """GET `path` and return its JSON."""
        with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict, timeout: float = 30.0):
        """POST `body` as JSON and return the status and the JSON of the answer ({} where it has none)."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")

    def queue(self, graph: dict, *, client_id: str | None = None) -> str:
        """Queue an API graph and return its prompt id. Raises ValueError with the server's complaint."""
        body = {"prompt": graph} if client_id is None else {"prompt": graph, "client_id": client_id}
        status, answer = self.post("/prompt", body)
        if status != 200:
            raise ValueError(f"the server refused the graph ({status}): {json.dumps(answer, indent=1)}")
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 300.0) -> dict:
        """Return the history entry of a finished prompt, failed or not. Raises TimeoutError."""
        give_up = time.monotonic() + timeout
        while time.monotonic() < give_up:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with code {self.process.returncode}:\n{self.log_tail()}")
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1)
        raise TimeoutError(f"prompt {prompt_id} was not done after {timeout:.0f} s:\n{self.log_tail()}")

    def run(self, graph: dict, timeout: float = 300.0) -> dict:
        """Queue a graph, wait for it and return its outputs. Raises RuntimeError with the node's error."""
        entry = self.wait(self.queue(graph), timeout)
        if entry["status"]["status_str"] != "success":
            raise RuntimeError(f"the graph failed: {json.dumps(entry['status'], indent=1)}\n{self.log_tail()}")
        return entry["outputs"]

    def stop(self) -> None:
        """End the server."""
        CHILDREN.stop(self.process)
