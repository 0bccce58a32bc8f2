"""ComfyUI's real frontend in headless Chromium, for the browser tests."""

from __future__ import annotations

import re

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
START_MS = 300_000  # on a machine that is busy with a training run, minutes
SETTLE_MS = 500  # widgets that depend on others are made a moment after the graph is there
# A fresh user of ComfyUI has no files of their own yet; its frontend asks for them and the console says 404. Older
# ones have no icon either.
ABSENT_USER_FILES = re.compile(
    r"/(favicon\.ico|api/userdata/user\.css|user\.css|api/userdata/comfy\.templates\.json"
    r"|api/userdata\?dir=(workflows|subgraphs)&\S*)$"
)
# It asks for the sizes of missing models, of a new user's first graph and of the Wan graphs of ours, which name their
# addresses; the server's page policy forbids that.
OUTSIDE_LOOKUP = re.compile(r"(Connecting to|Fetch API cannot load|Refused to connect to) '?https://")
# What the frontend says of itself while it starts, before any workflow is loaded.
STARTUP_NOISE = ("ComfyApp graph accessed before initialization",)
TITLE_HEIGHT = 30


class Frontend:
    """A page with ComfyUI's frontend, and what its console said."""

    def __init__(self, page, url: str) -> None:
        self.page, self.url = page, url
        self.started = False
        self.errors: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        self.open()

    def open(self) -> None:
        """Load the page, anew if it is open."""
        self.started = False
        self.page.goto(self.url, wait_until="domcontentloaded", timeout=START_MS)
        self.page.wait_for_function(
            "() => window.app?.extensionManager && window.app.graph && "
            "'DiagonalChunkSampler' in window.LiteGraph.registered_node_types && "
            "!document.querySelector('#splash-loader')",
            timeout=START_MS,
        )
        self.page.wait_for_timeout(SETTLE_MS)
        self.started = True

    def use_vue_nodes(self, wanted: bool) -> None:
        """Draw nodes with Vue, or on the classic canvas."""
        self.page.evaluate("on => app.ui.settings.setSettingValueAsync('Comfy.VueNodes.Enabled', on)", wanted)
        self.open()

    def _on_console(self, message) -> None:
        if message.type != "error":
            return
        source = message.location.get("url", "")
        if message.text.startswith("Failed to load resource") and ABSENT_USER_FILES.search(source):
            return
        # Release notes and the like come from the internet, which a test machine need not reach.
        if message.text.startswith("Failed to load resource") and not source.startswith(self.url):
            return
        if OUTSIDE_LOOKUP.match(message.text):
            return
        if not self.started and message.text.startswith(STARTUP_NOISE):
            return
        self.errors.append(f"{message.text} ({source})")

    def load(self, workflow: dict) -> None:
        """Open a canvas graph as File > Open does."""
        self.page.evaluate("workflow => window.app.loadGraphData(workflow, true, true)", workflow)
        self.page.wait_for_timeout(SETTLE_MS)

    def set_widget(self, kind: str, name: str, value) -> None:
        """Give a widget of the first node of a type another value."""
        self.page.evaluate(
            """([kind, name, value]) => {
                const node = app.graph.nodes.find((node) => node.type === kind);
                node.widgets.find((widget) => widget.name === name).value = value;
            }""",
            [kind, name, value],
        )

    def undo_a_move(self) -> None:
        """Move the first node and undo that: ComfyUI makes every node anew."""
        self.page.evaluate(
            """() => {
                app.canvas.emitBeforeChange();
                const [x, y] = app.graph.nodes[0].pos;
                app.graph.nodes[0].pos = [x + 10, y];
                app.canvas.emitAfterChange();
                for (const node of app.graph.nodes) node.seenBefore = true;
                return app.extensionManager.command.execute("Comfy.Undo"); // the key is for a text typed last, too
            }"""
        )
        self.page.wait_for_function(
            "() => app.graph.nodes.length && !app.graph.nodes.some((node) => node.seenBefore)", timeout=20_000
        )

    def open_help(self, kind: str, label: str = "Node Info") -> None:
        """Replace the graph by one node of a type and open its help; `label` is what the button is called."""
        self.page.evaluate(
            """(kind) => {
                app.graph.clear();
                const node = LiteGraph.createNode(kind);
                app.graph.add(node);
                node.pos = [0, 0];
                app.canvas.ds.scale = 0.6;
                app.canvas.ds.offset = [300, 250];
                app.canvas.selectNode(node);
                app.canvas.setDirty(true, true);
            }""",
            kind,
        )
        self.page.get_by_label(label).first.click(timeout=20_000)

    def api_export(self) -> dict:
        """What File > Export (API) writes."""
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def node_boxes(self) -> list[tuple[str, float, float, float, float]]:
        """(title, left, top, right, bottom) of every node, its title bar included."""
        boxes = self.page.evaluate("() => window.app.graph.nodes.map(n => [n.title, ...n.pos, ...n.size])")
        return [(title, x, y - TITLE_HEIGHT, x + width, y + height) for title, x, y, width, height in boxes]
