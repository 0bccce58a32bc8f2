// What the pack's drawings inside nodes share. ComfyUI loads every file of this folder as an extension: this one
// registers nothing.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const LOOK_MS = 500; // ComfyUI says which workflow is open only after its nodes have come
// A server that fails is asked again after this, then after twice as long each time, up to the most.
const [RETRY_MS, MOST_RETRY_MS] = [2_000, 120_000];
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
function isElsewhere(promptId) {
  return queuedFrom.has(promptId) && queuedFrom.get(promptId) !== openWorkflow();
}

/**
 * Drawings whose nodes are gone, as those of a workflow in another tab are. They go on listening, and when a person
 * comes back, the node in the same place takes over what its drawing has.
 *
 * A drawing has a `promptId`, the run that it shows or null; `clear` makes it as before any run, `adopt` takes over
 * what another one has, and `sending` says that an answer for it is on its way. Its `workflow` is set here.
 */
export class Away {
  /**
   * @param most that is kept; the oldest go first.
   * @param weigh how much of it a drawing is.
   */
  constructor(most, weigh = () => 1) {
    this.most = most;
    this.weigh = weigh;
    this.gone = new Set(); // the oldest first
  }

  has(drawing) {
    return this.gone.has(drawing);
  }

  [Symbol.iterator]() {
    return this.gone.values();
  }

  /** Undo gives a drawing another node. */
  delete(drawing) {
    this.gone.delete(drawing);
  }

  add(drawing) {
    this.settle(drawing);
    if (!drawing.workflow) return;
    const former = this.of(drawing);
    if (former) this.gone.delete(former);
    this.gone.add(drawing);
    queueMicrotask(() => this.trim()); // undo takes back in the same turn what it gives
  }

  trim() {
    let sum = [...this.gone].reduce((total, drawing) => total + this.weigh(drawing), 0);
    for (const drawing of this.gone) {
      if (sum <= this.most) return;
      sum -= this.weigh(drawing);
      this.gone.delete(drawing);
    }
  }

  /** The drawing that was in this one's place before its workflow was left. */
  of({ workflow, node }) {
    return [...this.gone].find((one) => one.workflow === workflow && String(one.node.id) === String(node.id));
  }

  /** Which workflow a node belongs to is known for sure only some time after it has come: till then it may change. */
  settle(drawing) {
    const workflow = openWorkflow();
    const mistaken = drawing.workflow && drawing.workflow !== workflow;
    if (mistaken || isElsewhere(drawing.promptId)) drawing.clear();
    if (!workflow || drawing.workflow === workflow) return;
    const former = this.of({ workflow, node: drawing.node });
    if (former?.sending) return; // its answer decides what there is to take over
    drawing.workflow = workflow;
    if (former) drawing.adopt(former);
  }

  /** Whether what a run says is for a drawing whose node it names. */
  hears(drawing, promptId) {
    if (this.has(drawing)) return promptId === drawing.promptId || queuedFrom.get(promptId) === drawing.workflow;
    this.settle(drawing);
    return !isElsewhere(promptId);
  }
}

/** When the server is to be asked: once for each question, and less and less often while it fails. */
export class Asking {
  constructor() {
    this.again();
  }

  /** The same question is a new one from now on. */
  again() {
    this.question = null;
  }

  /** Whether to ask this now, which then counts as asked. */
  isDue(question) {
    const isNew = question !== this.question;
    if (!isNew && performance.now() < this.askAt) return false;
    if (isNew) this.failures = 0; // in a row
    this.question = question;
    this.askAt = Infinity;
    return true;
  }

  answered() {
    this.failures = 0;
  }

  failed() {
    this.askAt = performance.now() + Math.min(RETRY_MS * 2 ** this.failures++, MOST_RETRY_MS);
  }
}

/** What an answer gives as its error; undefined where it is not of the pack's routes, as a proxy's page. */
export async function errorOf(reply) {
  return (await reply.json().catch(() => null))?.error;
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
 * @param away where the drawing is kept while its node is gone.
 */
export function addDrawing(drawing, name, { style, height, maxHeight = height, before, away }) {
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
    if (node.graph.rootGraph !== app.rootGraph) return; // inserting a workflow reads it into a graph that nobody sees
    // Pasting a subgraph makes its nodes twice: first in one of the copied one's id, and tells nothing to those.
    const known = app.rootGraph.subgraphs?.get(node.graph.id);
    if (known && known !== node.graph) return;
    living.add(held);
    watch(node.graph.rootGraph);
    const former = kept.get(place(held));
    if (former) {
      held.drawing = Object.assign(former, { node });
      widget.element = former.root;
    }
    held.drawing.begin();
    if (!away) return;
    away.delete(held.drawing);
    held.looking = setInterval(() => away.settle(held.drawing), LOOK_MS);
  }
  function end() {
    if (!living.delete(held)) return;
    held.drawing.end();
    clearInterval(held.looking);
    away?.add(held.drawing);
  }
  after(node, "onConfigure", () => grow(node));
  after(node, "onAdded", begin);
  after(node, "onRemoved", end);
  if (node.graph) begin();
}

const shownBy = new Map(); // id of a node that was made in a run -> id of the one that shows it on the canvas
const MOST_MADE = 10_000; // that are remembered, for ComfyUI says nothing of those that its cache answers for

// Nodes of other packs make further ones, as loops do for their later rounds ("9.0.0.3"). ComfyUI says before each node
// that runs, and at each of its steps, what those of the run so far are shown by.
api.addEventListener("progress_state", ({ detail }) => {
  for (const { node_id: id, display_node_id: shown } of Object.values(detail.nodes)) {
    shownBy.delete(id);
    if (shown !== id) shownBy.set(id, shown);
  }
  for (const id of shownBy.keys()) {
    if (shownBy.size <= MOST_MADE) break;
    shownBy.delete(id);
  }
});

/** Whether an event means this node: it names one, perhaps one inside a subgraph ("5:3"), or made by a loop. */
export function isNode(id, node) {
  return String(shownBy.get(id) ?? id).split(":").at(-1) === String(node.id);
}
