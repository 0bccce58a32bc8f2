// Plays the chunks made so far inside the node that makes them, with what a person waits for: how fast, how far, how
// long still. A cancelled run leaves its frames here, which ComfyUI itself discards; one that is finished early gives
// what it made to the next nodes.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { phrase } from "./diagonal_texts.js";
import { addDrawing, Away, errorOf, isNode } from "./diagonal_widget.js";

const FINISH_ROUTE = "/diagonal/finish";
const NODES = ["DiagonalChunkSampler", "DiagonalStreamVideo"];
const HEIGHT = 204; // canvas units, the margin of 10 around it included
const MOST_HEIGHT = 2000; // a person may pull the node larger, to see more
const PICTURE = 128;
const MOST_FRAMES = 512; // of a long stream the newest are kept
const MOST_BARS = 32;
const MOST_AWAY = 4 * MOST_FRAMES; // of all nodes that are gone

const STYLE = `
.diagonal-preview { display: flex; flex-direction: column; gap: 4px; padding: 4px; user-select: none; }
.diagonal-preview img { flex: 1 1 ${PICTURE}px; min-height: 0; width: 100%; object-fit: contain; }
.diagonal-preview img.small { image-rendering: pixelated; }
.diagonal-preview img:not([src]) { visibility: hidden; }
.diagonal-preview .bars { display: flex; align-items: flex-end; gap: 2px; height: 22px; flex: none; }
.diagonal-preview .bar { flex: 1 1 0; max-width: 24px; background: rgb(128 128 128 / 0.3); position: relative; }
.diagonal-preview .bar > div { position: absolute; inset: auto 0 0 0; background: #5b8def; }
.diagonal-preview.idle { justify-content: center; align-items: center; color: var(--descrip-text, #999); }
.diagonal-preview.idle img, .diagonal-preview.idle .bars, .diagonal-preview .warnings:empty { display: none; }
.diagonal-preview .warnings { flex: none; max-height: 39px; line-height: 13px; overflow: auto;
  overflow-wrap: anywhere; }
.diagonal-preview .foot { flex: none; display: flex; align-items: flex-end; gap: 6px; }
.diagonal-preview .line { flex: 1 1 auto; line-height: 1.35; overflow-wrap: anywhere; }
.diagonal-preview.idle .line { text-align: center; }
.diagonal-preview button { flex: none; padding: 2px 8px; font: inherit; color: #fff; background: #5b8def; border: 0;
  border-radius: 4px; cursor: pointer; }
.diagonal-preview button:disabled { background: rgb(128 128 128 / 0.3); color: var(--descrip-text, #999);
  cursor: default; }
.diagonal-preview button[hidden] { display: none; }
`;

const previews = new Set();
const away = new Away(MOST_AWAY, (preview) => 1 + preview.frames.length);

function seconds(value) {
  if (value < 10) return phrase("seconds", { seconds: value.toFixed(1) });
  const whole = Math.round(value);
  if (whole < 60) return phrase("seconds", { seconds: whole });
  return phrase("minutes", { minutes: Math.floor(whole / 60), seconds: String(whole % 60).padStart(2, "0") });
}

class Preview {
  constructor(node) {
    this.node = node;
    this.root = document.createElement("div");
    this.root.className = "diagonal-preview";
    this.image = document.createElement("img");
    this.image.alt = "";
    this.bars = document.createElement("div");
    this.bars.className = "bars";
    this.line = document.createElement("div");
    this.line.className = "line";
    this.warnings = document.createElement("div");
    this.warnings.className = "warnings";
    this.warnings.setAttribute("role", "status");
    this.button = document.createElement("button");
    this.button.type = "button";
    this.button.addEventListener("click", () => this.finish());
    const foot = document.createElement("div");
    foot.className = "foot";
    foot.append(this.line, this.button);
    this.root.append(this.image, this.bars, foot, this.warnings);
    this.clear();
    addDrawing(this, "live", { style: STYLE, height: HEIGHT, maxHeight: MOST_HEIGHT, away });
  }

  begin() {
    previews.add(this);
    if (this.frames.length) this.play();
  }

  end() {
    previews.delete(this);
    this.pause();
  }

  /** Shows what the node showed before its workflow was left for another one, and what was made since. */
  adopt(former) {
    if (former.promptId === null) return;
    const { promptId, instance, shown, first, state, ending, finishing, refusal, fps } = former;
    Object.assign(this, { promptId, instance, shown, first, state, ending, finishing, refusal, fps });
    this.frames = [...former.frames];
    this.steps = new Map(former.steps);
    this.root.classList.remove("idle");
    this.drawBars();
    this.say();
    this.warn(former.warned);
    if (this.frames.length) this.play();
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = null;
  }

  reset(promptId) {
    this.pause();
    this.promptId = promptId;
    this.frames = [];
    this.shown = -1;
    this.first = null; // seconds until the first chunk
    this.state = null;
    this.ending = null; // the name of a text
    this.finishing = false; // asked to end with the chunk in work
    this.refusal = null; // why it does not
    this.steps = new Map(); // chunk -> [steps done, steps]
    this.image.removeAttribute("src");
    this.bars.replaceChildren();
    this.button.hidden = true;
    this.warn([]);
  }

  /** As it was before any run. */
  clear() {
    this.reset(null);
    this.root.classList.add("idle");
    this.line.textContent = phrase("idle");
    this.line.removeAttribute("title");
  }

  belongs(data) {
    if (!isNode(data.node, this.node) || !away.hears(this, data.prompt_id)) return false;
    // Another instance of the subgraph that the node is in, or a node that a loop runs again, begins anew.
    const again = data.node !== this.instance || data.forwards <= this.state?.forwards;
    if (data.prompt_id !== this.promptId || again) this.reset(data.prompt_id);
    this.instance = data.node;
    this.root.classList.remove("idle");
    this.ending = null;
    return true;
  }

  onProgress(data) {
    if (!this.belongs(data)) return;
    this.state = { ...this.state, ...data };
    if (data.steps) this.steps.set(data.chunk, [data.step, data.steps]);
    if (this.steps.size > MOST_BARS) this.steps.delete(this.steps.keys().next().value);
    this.drawBars();
    this.say();
    this.warn(data.warnings ?? []);
  }

  /** Behind the last forward: when a cancelled run's state could not be saved, say. */
  onWarnings(data) {
    if (data.prompt_id === this.promptId && data.node === this.instance) this.warn(data.warnings);
  }

  /** What the server warns of, in its own English, which its log has too. */
  warn(lines) {
    this.warned = lines;
    const words = lines.join("\n");
    if (words === this.warnings.title) return;
    this.warnings.title = words;
    this.warnings.replaceChildren(
      ...lines.map((words) => {
        const line = document.createElement("div");
        line.className = "warning";
        line.textContent = words;
        return line;
      }),
    );
  }

  onChunk(data) {
    if (!this.belongs(data)) return;
    this.first = data.first;
    // Null before two forwards are done: what there is until then is mostly the loading of the models.
    this.state = { ...this.state, pixelFrames: data.pixel_frames, pixelElapsed: data.sampling };
    this.frames.push(...data.frames);
    if (this.frames.length > MOST_FRAMES) {
      const gone = this.frames.length - MOST_FRAMES;
      this.frames.splice(0, gone);
      this.shown = Math.max(-1, this.shown - gone);
    }
    this.fps = data.fps;
    this.say();
    if (this.timer === null && this.frames.length && !away.has(this)) this.play();
  }

  play() {
    this.shown = (this.shown + 1) % this.frames.length;
    this.image.src = this.frames[this.shown];
    this.image.classList.toggle("small", this.image.naturalHeight > 0 && this.image.naturalHeight < PICTURE);
    // A breath before it begins again.
    const pause = this.shown === this.frames.length - 1 ? 600 : 0;
    this.timer = setTimeout(() => this.play(), 1000 / this.fps + pause);
  }

  drawBars() {
    const chunks = [...this.steps];
    const most = Math.max(...chunks.map(([, [, steps]]) => steps), 1);
    this.bars.replaceChildren(
      ...chunks.map(([chunk, [done, steps]]) => {
        const bar = document.createElement("div");
        bar.className = "bar";
        bar.style.height = `${(100 * steps) / most}%`;
        bar.title = phrase("bar", { chunk, done, steps });
        const fill = document.createElement("div");
        fill.style.height = `${(100 * done) / steps}%`;
        bar.append(fill);
        return bar;
      }),
    );
  }

  say() {
    const { chunk, chunks, forwards, made, total, guided, elapsed, sampling } = this.state ?? {};
    const { pixelFrames, pixelElapsed } = this.state ?? {};
    const parts = [];
    if (chunk) parts.push(phrase("chunk_of", { chunk, chunks }));
    if (this.first !== null) parts.push(phrase("first_after", { time: seconds(this.first) }));
    if (pixelFrames && pixelElapsed)
      parts.push(phrase("frames_a_second", { rate: (pixelFrames / pixelElapsed).toFixed(1) }));
    const goesOn = forwards < total; // else Finish came too late: the video is whole
    if (this.ending) parts.push(phrase(this.ending));
    else if (this.refusal && goesOn) parts.push(this.refusal);
    else if (this.finishing && goesOn) parts.push(phrase("finishing"));
    else if (forwards && goesOn) {
      if (sampling !== null) parts.push(phrase("left", { time: seconds((sampling / made) * (total - forwards)) }));
    } else if (forwards) {
      const name = guided ? "forwards_twice_in" : "forwards_in";
      parts.push(phrase(name, { forwards: made, time: seconds(elapsed) }));
    }
    this.line.textContent = parts.join(" · ");
    this.line.title = this.line.textContent;
    this.button.hidden = this.ending !== null || !(chunk < chunks);
    this.button.disabled = this.finishing;
    this.button.textContent = phrase("finish");
    this.button.title = phrase("finish_hint");
  }

  /** Asks for the end of the run with the chunk in work: what is made until then goes on to the next nodes. */
  async finish() {
    const { promptId } = this;
    this.finishing = true;
    this.refusal = null;
    this.say();
    let refusal = null;
    try {
      const reply = await api.fetchApi(FINISH_ROUTE, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ client_id: api.clientId, prompt_id: promptId, node: this.instance }),
      });
      if (!reply.ok) refusal = (await errorOf(reply)) ?? phrase("prompt_refused", { status: reply.status });
    } catch (error) {
      refusal = phrase("unreachable", { why: error.message });
    }
    if (refusal === null || this.promptId !== promptId || this.ending) return;
    this.finishing = false;
    this.refusal = refusal;
    this.say();
  }

  onFinished(data) {
    if (data.prompt_id === this.promptId && data.node === this.instance) this.stop(data.prompt_id, "finished_early");
  }

  /** What comes behind the last forward or an early finish is of a later node, unless it names this one's `instance`. */
  stop(promptId, ending, instance = null) {
    const goesOn = this.state?.forwards < this.state?.total && this.ending !== "finished_early";
    if (promptId !== this.promptId || !(goesOn || instance === this.instance)) return;
    this.ending = ending;
    this.say();
  }

  /** A run that has not ended goes on unseen, or is gone with its server. */
  onLost() {
    if (!this.ending) this.stop(this.promptId, "connection_lost");
  }
}

app.registerExtension({
  name: "diagonaldistillation.preview",
  init() {
    const all = (act) => (event) => [...previews, ...away].forEach((preview) => act(preview, event.detail));
    // For programs that use the API; without a listener ComfyUI's page warns of it.
    api.addEventListener("diagonal.stream", () => {});
    api.addEventListener("diagonal.progress", all((preview, data) => preview.onProgress(data)));
    api.addEventListener("diagonal.warnings", all((preview, data) => preview.onWarnings(data)));
    api.addEventListener("diagonal.chunk", all((preview, data) => preview.onChunk(data)));
    api.addEventListener("diagonal.finish", all((preview, data) => preview.onFinished(data)));
    api.addEventListener("execution_interrupted", all((p, data) => p.stop(data.prompt_id, "cancelled", data.node_id)));
    api.addEventListener("execution_error", all((p, data) => p.stop(data.prompt_id, "failed", data.node_id)));
    api.addEventListener("reconnecting", all((preview) => preview.onLost()));
  },
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass)) new Preview(node);
  },
});
