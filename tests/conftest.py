"""Fixtures for all tests.

- `comfyui_dir`: the ComfyUI folder, or the test is skipped.
- `pack`: this pack, loaded into this process by ComfyUI's own loader on the CPU.
- `pack_module`: `pack_module("nodes.sampling")` gives a module of it. `<pack>.diagonal_sampler` and
  `import diagonal_sampler` are one and the same module.
- `output`: its output folder in this process, of one test.
- `comfy_server`: a real server in its own process (`tests/helpers/comfy_host.py`).

Core tests `import diagonal_sampler` and need no ComfyUI. Files below tests/comfy may import ComfyUI's modules
(`import comfy.sd`, `import nodes`) at the top; without a ComfyUI they are not collected. Modules below
tests/helpers are importable by their name from any test. `nodes` is always ComfyUI's, never our package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

# Our root goes last: where `python -m pytest` puts it, our `nodes/` would hide ComfyUI's nodes.py.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
sys.path += [str(TESTS / "helpers"), str(ROOT)]

import comfy_host  # noqa: E402

NEEDS_COMFYUI = (
    "comfy",
    "browser",
    "faults",
)  # folders whose files import ComfyUI at the top, or make no sense without it


class _RootIsNoTestPackage:
    """Keep pytest from importing the pack's `__init__.py` as a test package: it lies above the tests."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_RootIsNoTestPackage(), "root-is-no-test-package")
    comfy_host.share_core()
    try:
        config.comfyui_dir = comfy_host.find_comfyui()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if config.comfyui_dir is not None:
        comfy_host.put_on_path(config.comfyui_dir)


def pytest_report_header(config: pytest.Config) -> str:
    if config.comfyui_dir is None:
        return f"comfyui: {comfy_host.NO_COMFYUI}; the tests that need it are skipped"
    return f"comfyui: {config.comfyui_dir}"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.comfyui_dir is None and collection_path.parent == TESTS and collection_path.name in NEEDS_COMFYUI:
        return True
    return None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = (yield).get_result()
    server = getattr(item, "funcargs", {}).get("comfy_server")
    if report.failed and server is not None:
        report.sections.append(("ComfyUI server log", server.log_tail()))


@pytest.fixture(scope="session")
def comfyui_dir(pytestconfig: pytest.Config) -> Path:
    """The ComfyUI folder."""
    if pytestconfig.comfyui_dir is None:
        pytest.skip(comfy_host.NO_COMFYUI)
    return pytestconfig.comfyui_dir


@pytest.fixture(scope="session")
def pack(comfyui_dir: Path) -> ModuleType:
    """This pack as ComfyUI loads it, in this process."""
    return comfy_host.load_pack()


@pytest.fixture(scope="session")
def pack_module(pack: ModuleType) -> Callable[[str], ModuleType]:
    """A function from a dotted name inside the pack to its module."""
    return comfy_host.pack_module


@pytest.fixture
def output(pack: ModuleType, tmp_path: Path) -> Iterator[Path]:
    """ComfyUI's output folder in this process, empty."""
    import folder_paths

    before, folder = folder_paths.get_output_directory(), tmp_path / "output"
    folder.mkdir()
    folder_paths.set_output_directory(str(folder))
    yield folder
    folder_paths.set_output_directory(before)


@pytest.fixture(scope="session")
def comfy_server(comfyui_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[comfy_host.ComfyServer]:
    """A running ComfyUI server with this pack; one for the whole session."""
    server = comfy_host.ComfyServer(comfyui_dir, tmp_path_factory.mktemp("comfy-server"))
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()
