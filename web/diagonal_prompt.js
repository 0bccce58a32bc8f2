// Sends a new prompt to the run that goes on, from inside the Diagonal Prompt Schedule node: it begins with the next
// chunk. The node also shows the prompt that is being made now.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { phrase } from "./diagonal_texts.js";
import { addDrawing, Away, errorOf, isNode } from "./diagonal_widget.js";

const NODE = "DiagonalPromptSchedule";
const ROUTE = "/diagonal/prompt";
const EVENT = "diagonal.prompt";
const LATER = 202; // the HTTP status of a prompt that the run has not looked at yet
const HEIGHT = 104; // canvas units
const MOST_AWAY = 256; // fields of nodes that are gone

const STYLE = `
.diagonal-prompt { display: flex; flex-direction: column; gap: 4px; padding: 6px; }
.diagonal-prompt .row { display: flex; gap: 4px; flex: 1 1 auto; min-height: 0; }
.diagonal-prompt textarea { flex: 1 1 auto; min-width: 0; resize: none; font: inherit; padding: 4px; color: inherit;
  background: var(--bg-color, #111); border: 1px solid var(--border-color, #444); border-radius: 4px; }
.diagonal-prompt button { flex: none; width: 56px; font: inherit; color: #fff; background: #5b8def; border: 0;
  border-radius: 4px; cursor: pointer; }
.diagonal-prompt button:disabled { background: rgb(128 128 128 / 0.3); color: var(--descrip-text, #999);
  cursor: default; }
.diagonal-prompt .line { flex: none; height: 26px; line-height: 13px; overflow: hidden; overflow-wrap: anywhere; }
.diagonal-prompt .line.error { height: auto; min-height: 26px; max-height: 39px; overflow: auto; }
`;

const fields = new Set();
const away = new Away(MOST_AWAY);

class PromptField {
  constructor(node) {
    this.node = node;
    this.sending = false;
    this.root = document.createElement("div");
    this.root.className = "diagonal-prompt";
    const row = document.createElement("div");
    row.className = "row";
    this.text = document.createElement("textarea");
    this.text.placeholder = phrase("prompt_hint");
    this.text.setAttribute("aria-label", phrase("prompt_label"));
    this.button = document.createElement("button");
    this.button.type = "button";
    this.button.textContent = phrase("send");
    row.append(this.text, this.button);
    this.line = document.createElement("div");
    this.line.className = "line";
    this.line.setAttribute("role", "status");
    this.root.append(row, this.line);
    this.text.addEventListener("input", () => {
      this.refusal = null;
      this.refresh();
    });
    this.text.addEventListener("keydown", (event) => {
      const modified = event.ctrlKey || event.metaKey;
      if (event.key === "Enter" && modified && !event.altKey && !event.shiftKey) {
        event.stopPropagation(); // ComfyUI would queue the graph
        event.preventDefault();
        this.send();
      } else if (!modified && !event.altKey) event.stopPropagation(); // plain keys are text, whoever else listens
    });
    this.button.addEventListener("click", () => this.send());
    this.clear();
    addDrawing(this, "live_prompt", { style: STYLE, height: HEIGHT, away });
  }

  begin() {
    fields.add(this);
  }

  end() {
    fields.delete(this);
  }

  /** As it was before any run. What a person typed stays. */
  clear() {
    this.running = false;
    this.promptId = null;
    this.instance = null; // the id that the node has in the run, as inside a subgraph or a loop
    this.words = phrase("prompt_idle");
    this.lost = false;
    this.refusal = null; // why the last prompt was not taken
    if (this.text.value === this.adopted) this.text.value = "";
    this.adopted = null; // the text that was taken over
    this.refresh();
  }

  /** Goes on as the field did before its workflow was left for another one, with what came since. */
  adopt(former) {
    const { running, promptId, instance, words, lost, refusal } = former;
    Object.assign(this, { running, promptId, instance, lost, refusal });
    if (promptId !== null) this.words = words; // before any run they are in the language of today
    if (!this.text.value) this.text.value = this.adopted = former.text.value;
    this.refresh();
  }

  /** A refusal stays until the person types or sends, or the run ends: the next chunk's event comes at once. */
  refresh() {
    const words = this.sending ? phrase("sending") : (this.refusal ?? this.words);
    if (this.line.textContent !== words) this.line.textContent = words;
    this.line.title = words;
    this.line.classList.toggle("error", this.lost || this.refusal !== null);
    this.button.disabled = !this.running || this.sending || !this.text.value.trim();
  }

  /** A linked or promoted widget's value is not what runs; left out, the server takes the run's own. */
  value(name) {
    if (this.node.inputs?.some((input) => input.widget?.name === name && input.link != null)) return undefined;
    return this.node.widgets.find((widget) => widget.name === name)?.value;
  }

  onEvent(data) {
    const instance = data.nodes.find((id) => isNode(id, this.node));
    if (instance === undefined || !away.hears(this, data.prompt_id)) return;
    if (data.refused) {
      // After "the run has not read the prompt yet", and after the text has left the field.
      this.text.value ||= data.text;
      this.refusal = data.refused;
      return this.refresh();
    }
    const wasRunning = this.running;
    this.running = data.running;
    this.promptId = data.prompt_id;
    this.instance = instance;
    if (wasRunning && !data.running) this.refusal = null; // the end is the newer word
    if (data.running) this.words = phrase("prompt_now", data);
    else if (wasRunning) this.words = phrase("run_ended");
    this.lost = false;
    this.refresh();
  }

  onLost() {
    if (!this.running) return;
    this.running = false;
    this.refusal = null;
    this.words = phrase("connection_lost");
    this.lost = true;
    this.refresh();
  }

  async send() {
    if (this.button.disabled) return;
    const text = this.text.value.trim();
    this.sending = true;
    this.refusal = null;
    this.refresh();
    try {
      const reply = await api.fetchApi(ROUTE, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({
          client_id: api.clientId,
          prompt_id: this.promptId,
          node: this.instance,
          text,
          switch: this.value("switch"),
          blend_chunks: this.value("blend_chunks"),
        }),
      });
      if (!reply.ok) this.refusal = (await errorOf(reply)) ?? phrase("prompt_refused", { status: reply.status });
      else {
        const answer = await reply.json();
        if (this.text.value.trim() === text) this.text.value = "";
        const taken = { chunk: answer.chunk, how: answer.switch, text: answer.text };
        this.words = reply.status === LATER ? phrase("prompt_later") : phrase("prompt_taken", taken);
      }
    } catch (error) {
      this.refusal = phrase("unreachable", { why: error.message });
    } finally {
      this.sending = false;
      this.refresh();
    }
  }
}

app.registerExtension({
  name: "diagonaldistillation.prompt",
  init() {
    const all = (act) => (event) => [...fields, ...away].forEach((field) => act(field, event.detail));
    api.addEventListener(EVENT, all((field, data) => field.onEvent(data)));
    api.addEventListener("reconnecting", all((field) => field.onLost()));
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE) new PromptField(node);
  },
});
