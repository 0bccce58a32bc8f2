"""The page that the browser tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
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
        )
        try:
            yield Frontend(context.pages[0] if context.pages else context.new_page(), comfy_server.url)
        finally:
            context.close()
