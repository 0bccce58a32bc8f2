"""The page that the browser tests share."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import pytest
from comfy_host import ComfyServer
from frontend import CHROMIUM_ARGUMENTS, CHROMIUM_NAMES, START_MS, Frontend


# Not for the whole session: playwright keeps an event loop in this thread, where other tests want to start theirs.
@pytest.fixture(scope="module")
def frontend(comfy_server, tmp_path_factory) -> Iterator[Frontend]:
    chromium = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine: browser tests are skipped")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    # Without these the frontend greets a new user with a dialogue over the canvas.
    comfy_server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Notification.ShowVersionUpdates": False})
    with playwright.sync_playwright() as engine:
        context = engine.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("chromium")),
            executable_path=chromium,
            headless=True,
            args=CHROMIUM_ARGUMENTS,
            timeout=START_MS,
            viewport={"width": 1600, "height": 900},
            locale="en-US",  # ComfyUI's page takes the browser's language, and that the machine's
        )
        try:
            yield Frontend(context.pages[0] if context.pages else context.new_page(), comfy_server.url)
        finally:
            context.close()


@pytest.fixture
def nothing_stays(frontend, comfy_server: ComfyServer) -> Iterator[None]:
    """Behind a test, however it ends, no run goes on and no answer is made up."""
    yield
    frontend.page.unroute_all()
    give_up = time.monotonic() + 60
    while True:
        comfy_server.post("/queue", {"clear": True})
        # Again and again: ComfyUI forgets one that comes between taking a prompt off its queue and starting it.
        comfy_server.post("/interrupt", {})
        if not any(comfy_server.get("/queue").values()):
            return
        assert time.monotonic() < give_up, "a run does not end"
        time.sleep(0.1)
