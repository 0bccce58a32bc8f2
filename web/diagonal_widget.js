// What the pack's drawings inside nodes share. ComfyUI loads every file of this folder as an extension: this one
// registers nothing.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const MIDDLE = { button: 1, held: 4 }; // the mouse's middle button, in an event's `button` and `buttons`

const STYLE = `
.diagonal-widget { box-sizing: border-box; font: 10px sans-serif; color: var(--fg-color, #ddd);
  background: var(--comfy-input-bg, #222); border-radius: 6px; overflow: hidden;
  --diagonal-warning: color-mix(in srgb, #e08a00 40%, var(--fg-color, #ddd)); /* readable on dark and light palettes */
  --diagonal-error: color-mix(in srgb, #e81c1c 55%, var(--fg-color, #ddd)); }
.diagonal-widget .warning { color: var(--diagonal-warning); }
.diagonal-widget .error { color: var(--diagonal-error); }
`;

const living = new Set(); // what is held by nodes that are in a graph
const kept = new Map(); // place -> the drawing for the node that comes there
const watched = new WeakSet(); // root graphs
const queuedFrom = new Map(); // a run's prompt_id -> the workflow that was open when this page queued it
const MOST_RUNS = 1000; // that are remembered

function openWorkflow() {
  return app.extensionManager.workflow?.activeWorkflow;
}

// Nothing else tells which workflow a run is of: ComfyUI's event of a queued prompt has no id.
const { queuePrompt } = api;
api.queuePrompt = async function (...args) {
  const workflow = openWorkflow();
  const answer = await queuePrompt.apply(this, args);
  if (answer?.prompt_id && workflow) queuedFrom.set(answer.prompt_id, workflow);
  if (queuedFrom.size > MOST_RUNS) queuedFrom.delete(queuedFrom.keys().next().value);
  return answer;
};

/**
 * Whether a run was queued from another workflow than the one that is open: its nodes may have the same ids. Of a run
 * that another page queued, or this one before it was loaded anew, nothing is known.
 */
export function isElsewhere(promptId) {
  return queuedFrom.has(promptId) && queuedFrom.get(promptId) !== openWorkflow();
}

/** Whether a run was queued from the workflow that is open, as far as this page knows. */
export function isHere(promptId) {
  return queuedFrom.has(promptId) && queuedFrom.get(promptId) === openWorkflow();
}

function place({ node, name }) {
  return [node.graph.rootGraph.id, node.graph.id, node.id, name].join(" ");
}

/**
 * Undo opens the graph anew, with other nodes in the places of the same ones: they take over the drawings, with all
 * that these show. Vue nodes would go on showing the former ones. Only between these two events is a node with the same
 * ids the same to a person: opening a file clears the graph before the first.
 */
function watch(root) {
  if (watched.has(root)) return;
  watched.add(root);
  root.events?.addEventListener("configuring", ({ detail }) => {
    if (!detail.clearGraph) return;
    for (const held of [...living]) {
      const { graph } = held.node;
      const inside = graph !== root;
      if (!inside || root.subgraphs.get(graph.id) === graph) kept.set(place(held), held.drawing);
      if (inside) held.end(); // ComfyUI tells nothing to the nodes inside subgraphs
    }
  });
  root.events?.addEventListener("configured", () => kept.clear());
}

function scrolls(target, root) {
  for (let at = target; at && at !== root; at = at.parentElement)
    if (at.scrollHeight > at.clientHeight && /auto|scroll/.test(getComputedStyle(at).overflowY)) return true;
  return false;
}

/** Zooming and panning go on to the classic canvas, as from ComfyUI's own texts. Vue nodes do so by themselves. */
function forward(root) {
  const pass = (type, isCanvas, process) =>
    root.addEventListener(type, (event) => {
      if (!LiteGraph.vueNodesMode && isCanvas(event)) app.canvas[process](event);
    });
  pass("wheel", (event) => event.ctrlKey || !scrolls(event.target, root), "processMouseWheel");
  pass("pointerdown", (event) => event.button === MIDDLE.button, "processMouseDown");
  pass("pointermove", (event) => event.buttons & MIDDLE.held, "processMouseMove");
  pass("pointerup", (event) => event.button === MIDDLE.button, "processMouseUp");
}

/** Runs `act` after the node's own `method`. */
function after(node, method, act) {
  const own = node[method];
  node[method] = (...args) => {
    const result = own?.apply(node, args);
    act();
    return result;
  };
}

/** A node saved before it had its drawing is too low for it. */
function grow(node) {
  const [width, height] = node.computeSize();
  const [ownWidth, ownHeight] = node.size;
  if (ownWidth < width || ownHeight < height) node.setSize([Math.max(width, ownWidth), Math.max(height, ownHeight)]);
}

/**
 * Puts a drawing into its node, below the widgets. Nothing of it is saved, and nothing reaches the API's graph.
 *
 * @param drawing has its `node`, which undo replaces, and its `root` element; `begin` is called when the node comes
 *   into a graph, which the clone that ComfyUI makes to copy a node never does, and `end` when it goes.
 * @param style rules, all under a class of our own.
 * @param height in canvas units; `maxHeight` where it may become higher than that.
 * @param before the drawing that this one is to stand above, whichever is made first.
 */
export function addDrawing(drawing, name, { style, height, maxHeight = height, before }) {
  const { node, root } = drawing;
  const sheet = document.createElement("style");
  sheet.textContent = STYLE + style; // here and not in the page's head, which other packs share
  root.append(sheet);
  root.classList.add("diagonal-widget");
  root.style.maxHeight = `${maxHeight}px`; // Vue nodes share out free height evenly
  forward(root);
  const widget = node.addDOMWidget(name, `diagonal_${name}`, root, {
    serialize: false,
    hideInPanel: true, // ComfyUI's side panel would list it as a row without anything
    getMinHeight: () => height,
    getMaxHeight: () => maxHeight,
  });
  widget.serialize = false; // the option above speaks of the API's graph, this of the saved one
  const above = node.widgets.findIndex((other) => other.name === before);
  if (above >= 0) node.widgets.splice(above, 0, ...node.widgets.splice(node.widgets.indexOf(widget), 1));
  grow(node);
  const held = { node, name, drawing, end };
  function begin() {
    if (living.has(held)) return;
    living.add(held);
    watch(node.graph.rootGraph);
    const former = kept.get(place(held));
    if (former) {
      held.drawing = Object.assign(former, { node });
      widget.element = former.root;
    }
    held.drawing.begin();
  }
  function end() {
    if (living.delete(held)) held.drawing.end();
  }
  after(node, "onConfigure", () => grow(node));
  after(node, "onAdded", begin);
  after(node, "onRemoved", end);
  if (node.graph) begin();
}

/** Whether an event that names a node, perhaps one inside a subgraph ("5:3"), means this one. */
export function isNode(id, node) {
  return String(id).split(":").at(-1) === String(node.id);
}
