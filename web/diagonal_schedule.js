// Draws the schedule inside the Diagonal Schedule node: chunks across, sigma down, each forward a dot. Dragging a
// chunk up or down changes its steps. The server computes what is drawn, by the code that the node runs.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { list, phrase, shownName } from "./diagonal_texts.js";
import { addDrawing, Asking, errorOf } from "./diagonal_widget.js";

const NODE = "DiagonalSchedule";
const ROUTE = "/diagonal/schedule";
const WIDGETS = ["preset", "steps", "context_mode", "context_sigma", "shift", "frames_per_chunk", "sigmas"];
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 190; // of the whole drawing, in canvas units
const PLOT = { top: 22, bottom: 18, left: 24, right: 8, height: 140 };
const PIXELS_PER_STEP = 12; // of a drag
const MOST_DRAGGED = 12; // steps of a chunk, by mouse or keys; the text may have more
const NUMBER_WIDTH = 14; // of a chunk's number, in canvas units
const SERVER_FAULT = 500; // and up: HTTP's statuses of a server that is at fault itself
const POLL_MS = 300; // undo and other extensions change values without saying so

const STYLE = `
.diagonal-schedule { display: flex; flex-direction: column; user-select: none; }
.diagonal-schedule svg { width: 100%; height: ${PLOT.height}px; flex: none; touch-action: none; }
.diagonal-schedule text { fill: var(--descrip-text, #999); }
.diagonal-schedule .grid { stroke: var(--border-color, #444); stroke-width: 0.5; }
.diagonal-schedule .column { fill: transparent; outline: none; }
.diagonal-schedule .column.editable { cursor: ns-resize; }
.diagonal-schedule .column.editable:hover, .diagonal-schedule .column:focus-visible { fill: rgb(128 128 128 / 0.18); }
.diagonal-schedule .descent { fill: none; stroke: #5b8def; stroke-width: 1.2; }
.diagonal-schedule .context { stroke: var(--diagonal-warning); stroke-width: 1; stroke-dasharray: 2 2; }
.diagonal-schedule .forward { fill: #5b8def; }
.diagonal-schedule .pass { fill: none; stroke: var(--diagonal-warning); stroke-width: 1.4; }
.diagonal-schedule .count { fill: var(--fg-color, #ddd); font-weight: 600; }
.diagonal-schedule .words { padding: 2px 8px 4px; line-height: 1.35; overflow: auto; overflow-wrap: anywhere; }
`;

function element(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

/** Steps per chunk as text, without the entries that the repeating last one makes needless. */
export function stepsText(steps) {
  const kept = [...steps];
  while (kept.length > 1 && kept.at(-1) === kept.at(-2)) kept.pop();
  return kept.join(",");
}

/** What the server draws; `failed` where it may do better another time, and not where it refuses what it was sent. */
async function ask(body) {
  try {
    const headers = { "Content-Type": "application/json" };
    const response = await api.fetchApi(ROUTE, { method: "POST", headers, body });
    if (response.ok) return await response.json();
    const why = phrase("server_status", { status: response.status });
    const error = (await errorOf(response)) ?? phrase("no_drawing", { why });
    return { error, failed: response.status >= SERVER_FAULT };
  } catch (error) {
    return { error: phrase("no_drawing", { why: error.message }), failed: true };
  }
}

class ScheduleDrawing {
  constructor(node) {
    this.node = node;
    this.asking = new Asking();
    this.askAgain = () => this.asking.again();
    this.reply = null;
    this.counts = null; // steps of each chunk, ahead of the reply while a person changes them
    this.root = document.createElement("div");
    this.root.className = "diagonal-schedule";
    this.svg = element("svg", { role: "group", "aria-label": phrase("levels") }, this.root);
    this.words = document.createElement("div");
    this.words.className = "words";
    this.root.append(this.words);
    this.resizes = new ResizeObserver(() => this.draw());
    addDrawing(this, "drawing", { style: STYLE, height: HEIGHT, maxHeight: HEIGHT + 30 });
  }

  begin() {
    if (this.watched !== this.node) this.watch();
    this.timer = setInterval(() => this.refresh(), POLL_MS);
    this.resizes.observe(this.root);
    api.addEventListener("reconnected", this.askAgain);
  }

  end() {
    clearInterval(this.timer);
    this.resizes.disconnect();
    api.removeEventListener("reconnected", this.askAgain);
  }

  widget(name) {
    return this.node.widgets.find((widget) => widget.name === name);
  }

  watch() {
    this.watched = this.node;
    for (const name of WIDGETS) {
      const widget = this.widget(name);
      const before = widget.callback;
      widget.callback = (...args) => {
        const result = before?.apply(widget, args);
        this.refresh();
        return result;
      };
    }
  }

  linked() {
    return (this.node.inputs ?? [])
      .filter((input) => input.link != null && WIDGETS.includes(input.widget?.name))
      .map((input) => input.widget.name);
  }

  async refresh() {
    if (!this.node.graph) return;
    const linked = this.linked();
    const body = linked.length
      ? `linked:${linked}`
      : JSON.stringify(Object.fromEntries(WIDGETS.map((name) => [name, String(this.widget(name).value ?? "")])));
    if (!this.asking.isDue(body)) return;
    let reply;
    if (linked.length) {
      const names = list(linked.map((name) => shownName(this.node, name)));
      reply = { error: phrase("linked", { names }) };
    } else reply = await ask(body);
    if (this.asking.question !== body) return; // the values have changed since: a newer reply comes
    if (reply.failed) this.asking.failed();
    else this.asking.answered();
    this.reply = reply;
    this.counts = reply.sigmas?.map((sigmas) => sigmas.length) ?? null;
    this.draw();
  }

  draw() {
    const reply = this.reply;
    if (!reply) return;
    this.words.replaceChildren();
    const say = (text, kind) => {
      const line = document.createElement("div");
      line.className = kind;
      line.textContent = text;
      this.words.append(line);
    };
    const focused = this.svg.contains(document.activeElement) ? document.activeElement.dataset.chunk : undefined;
    this.svg.replaceChildren();
    if (reply.error) {
      say(reply.error, "error");
      return;
    }
    const width = Math.max(this.root.clientWidth, 120);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${PLOT.height}`);
    const bottom = PLOT.height - PLOT.bottom;
    const y = (sigma) => bottom - sigma * (bottom - PLOT.top);
    for (const sigma of [0, 0.5, 1]) {
      element("line", { class: "grid", x1: PLOT.left, x2: width - PLOT.right, y1: y(sigma), y2: y(sigma) }, this.svg);
      element("text", { x: PLOT.left - 4, y: y(sigma) + 3, "text-anchor": "end" }, this.svg, `${sigma}`);
    }
    element("text", { x: 4, y: 11 }, this.svg, "σ");
    const end = reply.sigmas.length - 1;
    const repeats = reply.listed <= reply.sigmas.length; // else there are other chunks behind the last one shown
    const column = (width - PLOT.left - PLOT.right) / reply.sigmas.length;
    const numbered = Math.max(1, Math.ceil(NUMBER_WIDTH / column)); // numbers that would touch are left out
    reply.sigmas.forEach((sigmas, chunk) => {
      const left = PLOT.left + chunk * column;
      const last = chunk === end;
      const levels = reply.cache_pass === null ? sigmas : [...sigmas, reply.cache_pass];
      const x = (i) => left + ((i + 0.5) / levels.length) * column;
      const points = sigmas.map((sigma, i) => `${x(i)},${y(sigma)}`).join(" ");
      element("polyline", { class: "descent", points }, this.svg);
      sigmas.forEach((sigma, i) => element("circle", { class: "forward", cx: x(i), cy: y(sigma), r: 2.6 }, this.svg));
      if (reply.cache_pass !== null)
        element("circle", { class: "pass", cx: x(sigmas.length), cy: y(reply.cache_pass), r: 2.6 }, this.svg);
      if (!last) {
        const level = y(reply.context_sigma[chunk]);
        const [x1, x2] = [x(levels.length - 1), left + 1.5 * column];
        element("line", { class: "context", x1, x2, y1: level, y2: level }, this.svg);
      }
      const middle = left + column / 2;
      element("text", { class: "count", x: middle, y: 11, "text-anchor": "middle" }, this.svg, `${sigmas.length}`);
      const number = `${chunk + 1}${last && repeats ? "…" : ""}`;
      if (last || (chunk % numbered === 0 && end - chunk >= numbered))
        element("text", { class: "number", x: middle, y: PLOT.height - 5, "text-anchor": "middle" }, this.svg, number);
      this.addColumn(chunk, last, last && repeats, left, column, bottom);
    });
    this.svg.querySelector(`[data-chunk="${focused}"]`)?.focus();
    const { steps, forwards, chunks, uniform_steps: uniform, uniform_forwards: more } = reply.cost;
    const ratio = (more / forwards).toFixed(2);
    say(phrase("cost", { steps, mode: reply.context_mode, forwards, chunks, uniform, more, ratio }), "info");
    if (reply.uninformative !== null) {
      const name = reply.cache_pass === null ? "uninformative" : "uninformative_pass";
      say(phrase(name, { sigma: reply.uninformative.toFixed(3) }), "warning");
    }
    const drawn = reply.sigmas.length;
    if (reply.listed > drawn) say(phrase("drawn_part", { drawn, listed: reply.listed }), "hint");
    else if (!reply.editable) say(phrase("own_sigmas"), "hint");
  }

  addColumn(chunk, last, repeats, left, column, bottom) {
    const steps = this.reply.sigmas[chunk].length;
    const area = element("rect", { x: left, y: 0, width: column, height: bottom + PLOT.bottom }, this.svg);
    area.setAttribute("class", this.reply.editable ? "column editable" : "column");
    area.dataset.chunk = chunk;
    const name = phrase(repeats ? "chunk_and_later" : "chunk", { chunk: chunk + 1 });
    const levels = this.reply.sigmas[chunk].map((sigma) => sigma.toFixed(3)).join(", ");
    element("title", {}, area, phrase("chunk_steps", { name, steps, levels }));
    if (!this.reply.editable) return;
    const most = Math.max(MOST_DRAGGED, steps);
    const slider = {
      role: "slider",
      tabindex: 0,
      "aria-label": phrase("steps_of", { name }),
      "aria-valuenow": steps,
      "aria-valuemin": 1,
      "aria-valuemax": most,
    };
    for (const [key, value] of Object.entries(slider)) area.setAttribute(key, value);
    area.addEventListener("keydown", (event) => {
      const by = { ArrowUp: 1, ArrowDown: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      event.stopPropagation();
      const before = this.widget("steps").value;
      this.setSteps(chunk, last, Math.min(this.counts?.[chunk] + by, most));
      this.record(before);
    });
    area.addEventListener("pointerdown", (event) => this.drag(event, chunk, last, most));
  }

  drag(event, chunk, last, most) {
    if (event.button !== 0 || !this.counts) return; // the middle button pans the canvas
    event.preventDefault();
    event.stopPropagation();
    const began = event.clientY;
    const before = this.widget("steps").value;
    const steps = this.counts[chunk];
    // The node may be zoomed: as many screen pixels a step as the drawing shows.
    const pixels = (PIXELS_PER_STEP * this.svg.getBoundingClientRect().height) / PLOT.height;
    const move = (at) =>
      this.setSteps(chunk, last, Math.min(steps + Math.round((began - at.clientY) / pixels), most));
    const end = () => {
      window.removeEventListener("pointermove", move, true);
      window.removeEventListener("pointerup", end, true);
      window.removeEventListener("pointercancel", end, true);
      this.record(before);
    };
    window.addEventListener("pointermove", move, true);
    window.addEventListener("pointerup", end, true);
    window.addEventListener("pointercancel", end, true);
  }

  /** Makes a change of the steps a step of ComfyUI's undo, which sees by itself what its own widgets do. */
  record(before) {
    if (this.widget("steps").value === before) return;
    app.canvas.emitBeforeChange?.();
    app.canvas.emitAfterChange?.();
  }

  /** Changes one chunk's steps; the last one shown stands for all later chunks too. */
  setSteps(chunk, last, wanted) {
    if (!this.counts) return; // the server has gone meanwhile
    const steps = [...this.counts];
    const value = Math.max(wanted, 1);
    if (steps[chunk] === value) return;
    steps[chunk] = value;
    this.counts = steps;
    const widget = this.widget("steps");
    const text = stepsText(last ? steps.slice(0, chunk + 1) : steps);
    if (widget.value === text) return;
    widget.value = text;
    widget.callback?.(text);
    this.node.graph?.setDirtyCanvas(true, true);
  }
}

app.registerExtension({
  name: "diagonaldistillation.schedule",
  nodeCreated(node) {
    if (node.comfyClass === NODE) new ScheduleDrawing(node);
  },
});
