// Says inside a node what a run will take of the GPU's memory, before it runs. The graph is followed from the node to
// the files and sizes; the server reckons, as the sampler will ask ComfyUI for it, and this page puts it into words.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { list, phrase, shownName } from "./diagonal_texts.js";
import { addDrawing, Asking } from "./diagonal_widget.js";

const SAMPLERS = ["DiagonalChunkSampler", "DiagonalStreamVideo"];
const DEMO = "DiagonalDemoLoader";
const LOADERS = ["DiagonalModelLoader", DEMO];
const STREAM = "DiagonalStreamVideo";
const CAUSAL = "DiagonalCausalAttention";
const FLOW = "DiagonalFlowConditioning";
const BLENDING = "adapter+blend";
const CARRYING = ["auto", "reference", BLENDING]; // modes of optical flow in which a VAE may work between chunks
// Beside these a node that is given a latent may make another of it: larger, longer, or more of them.
const SAME_SIZE = [
  "SetLatentNoiseMask",
  "KSampler",
  "KSamplerAdvanced",
  "SamplerCustom",
  "SamplerCustomAdvanced",
  "DiagonalChunkSampler",
];
// Loader -> its widget that names the file.
const FILES = {
  DiagonalModelLoader: "ckpt_name",
  DiagonalDemoLoader: "weights",
  UNETLoader: "unet_name",
  CheckpointLoaderSimple: "ckpt_name",
  UnetLoaderGGUF: "unet_name",
  UnetLoaderGGUFAdvanced: "unet_name",
};
// Of a loader that feeds no sampler yet.
const USUAL_SIZE = { width: 832, height: 480, length: 81 };
const DEMO_SIZE = { width: 64, height: 64, length: 81 };
const HEIGHT = 78; // canvas units, the margin of 10 around it included
const POLL_MS = 500; // links, undo and other extensions change the graph without saying so
const MOST_STEPS = 64; // of a walk: a graph may have a circle while it is edited
const PARTS = ["weights", "keys_values", "text", "forward", "decoder"]; // names of the server, texts and colours
// What a run leaves loaded or frees changes what the next one could have; and a server that is back may answer.
const ASK_AGAIN = ["execution_success", "execution_interrupted", "execution_error", "reconnected"];
const [ACTIVE, MUTED, BYPASSED] = [0, 2, 4]; // a node's mode
const [GB, MB] = [1e9, 1e6];

const STYLE = `
.diagonal-memory { display: flex; flex-direction: column; gap: 2px; padding: 4px 8px; line-height: 1.3; }
.diagonal-memory .bar { display: flex; height: 5px; flex: none; border-radius: 2px; overflow: hidden;
  background: rgb(128 128 128 / 0.3); }
.diagonal-memory .bar[hidden] { display: none; }
.diagonal-memory .weights { background: #5b8def; }
.diagonal-memory .keys_values { background: #e0a458; }
.diagonal-memory .text { background: #c9c25a; }
.diagonal-memory .forward { background: #59b08a; }
.diagonal-memory .decoder { background: #a37bd6; }
.diagonal-memory .words { overflow: auto; }
.diagonal-memory .detail { color: var(--descrip-text, #999); }
.diagonal-memory.red .text-line { color: var(--diagonal-error); font-weight: 600; }
`;

/** What cannot be known before the run, in words. */
class Unknown extends Error {}

function widget(node, name) {
  return node.widgets?.find((found) => found.name === name);
}

/** The node that an input comes from; null without a link. */
function source(node, name) {
  const id = node.inputs?.find((input) => input.name === name)?.link;
  if (id == null) return null;
  const found = node.graph.getNodeById(node.graph.getLink(id)?.origin_id);
  if (!found) throw new Unknown(phrase("from_outside", { name: shownName(node, name) }));
  return found;
}

/** A widget's value, also where another node's value is linked to it. */
function value(node, name) {
  let [at, key] = [node, name];
  for (let step = 0; step < MOST_STEPS; step++) {
    const linked = at.inputs?.find((input) => (input.widget?.name ?? input.name) === key)?.link != null;
    if (!linked) {
      const found = widget(at, key);
      if (!found) throw new Unknown(phrase("no_widget", { node: node.title, name }));
      return found.value;
    }
    const before = source(at, key);
    if (!before) break;
    [at, key] = [before, widget(before, "value") ? "value" : (before.widgets?.[0]?.name ?? "")];
    if (!/primitive|constant|reroute/i.test(at.type)) break;
  }
  throw new Unknown(phrase("from_other_node", { node: node.title, name: shownName(node, name) }));
}

/**
 * Walks up from an input until `found` says so. Nodes that are bypassed pass on their input of that type, and of the
 * others those that `passes` names; all, where it is not given.
 */
function walk(node, name, type, found, passes) {
  let at = source(node, name);
  for (let step = 0; at && step < MOST_STEPS; step++) {
    if (at.mode === MUTED) throw new Unknown(phrase("muted", { node: at.title }));
    if (at.mode !== BYPASSED && found(at)) return at;
    // What lies in a subgraph may set the window, or be another model: it is not looked into.
    const changes = at.subgraph || (passes && !passes.includes(at.type) && !/reroute/i.test(at.type));
    if (changes && at.mode !== BYPASSED) throw new Unknown(phrase("made_by", { node: at.title, type }));
    const input = at.inputs?.find((entry) => entry.type === type) ?? (/reroute/i.test(at.type) ? at.inputs?.[0] : null);
    if (!input && at.mode === BYPASSED) throw new Unknown(phrase("bypassed", { node: at.title }));
    if (!input) throw new Unknown(phrase("made_by", { node: at.title, type }));
    at = source(at, input.name);
  }
  throw new Unknown(phrase("connect", { name: shownName(node, name) }));
}

/** The loader of a sampler's model, and the node that sets its window. */
function modelOf(sampler) {
  let causal = null;
  const loader = walk(sampler, "model", "MODEL", (node) => {
    if (node.type === CAUSAL) causal ??= node;
    return node.type in FILES;
  });
  return [loader, causal ?? (loader.type === "DiagonalModelLoader" ? loader : null)];
}

function modelQuery(loader, causal) {
  const query = { node: loader.type, file: value(loader, FILES[loader.type]) };
  if (!query.file) throw new Unknown(phrase("no_file", { node: loader.title })); // a list without any file
  for (const name of ["weights", "weight_dtype"])
    if (widget(loader, name) && name !== FILES[loader.type]) query[name] = value(loader, name);
  const of = ["frames_per_chunk", "window", "sink", "kv_cache_dtype"];
  for (const name of of) if (causal && widget(causal, name)) query[name] = value(causal, name);
  return query;
}

/** What a run takes from the schedule and not from the model. */
function scheduleQuery(sampler) {
  try {
    const schedule = walk(sampler, "schedule", "DIAGONAL_SCHEDULE", (node) => widget(node, "frames_per_chunk"));
    const frames = value(schedule, "frames_per_chunk");
    if (frames > 0) return { frames_per_chunk: frames };
    return widget(schedule, "preset") ? { preset: value(schedule, "preset") } : {};
  } catch (error) {
    if (error instanceof Unknown) return {};
    throw error;
  }
}

/** The VAE of a node, under a name. */
function vaeQuery(node, name) {
  const vae = walk(node, "vae", "VAE", (found) => widget(found, "vae_name") || found.type === DEMO);
  const query = { [`${name}_node`]: vae.type };
  if (widget(vae, "vae_name")) query[name] = value(vae, "vae_name");
  return query;
}

/** The VAE that carries frames from chunk to chunk, where optical flow may have it do so. */
function flowQuery(sampler) {
  let flow = source(sampler, "optical_flow");
  for (let step = 0; flow && /reroute/i.test(flow.type) && step < MOST_STEPS; step++)
    flow = source(flow, flow.inputs?.[0]?.name);
  if (!flow || flow.mode !== ACTIVE) return {}; // a node that is muted or bypassed gives none
  if (flow.type !== FLOW) throw new Unknown(phrase("made_by", { node: flow.title, type: "DIAGONAL_OPTICAL_FLOW" }));
  const mode = value(flow, "mode");
  if (!CARRYING.includes(mode) || !value(flow, "strength") || !source(flow, "vae")) return {};
  if (mode === BLENDING && !value(flow, "blend")) return {};
  return { flow: mode, ...vaeQuery(flow, "flow_vae") };
}

function sizeQuery(sampler) {
  const [width, height] = ["width", "height"];
  if (sampler.type === STREAM) {
    const length = Math.max(1, Math.floor(value(sampler, "length") * value(sampler, "fps") + 0.5));
    const query = { width: value(sampler, width), height: value(sampler, height), length, cfg: value(sampler, "cfg") };
    return { ...query, ...vaeQuery(sampler, "vae") };
  }
  const sized = (node) => widget(node, width) && widget(node, "length");
  const latent = walk(sampler, "latent_image", "LATENT", sized, SAME_SIZE);
  const query = { cfg: value(sampler, "cfg") };
  for (const name of [width, height, "length"]) query[name] = value(latent, name);
  if (widget(latent, "batch_size")) query.batch = value(latent, "batch_size");
  return query;
}

function samplerQuery(sampler) {
  return {
    ...modelQuery(...modelOf(sampler)),
    ...scheduleQuery(sampler),
    ...sizeQuery(sampler),
    ...flowQuery(sampler),
  };
}

/** The nodes of a graph, and of the subgraphs in it. */
function* everyNode(graph) {
  for (const node of graph.nodes) {
    yield node;
    if (node.subgraph) yield* everyNode(node.subgraph);
  }
}

/** What to ask the server for a node: of a loader, for each sampler that it feeds, else for a size, `assumed` why. */
function questions(node) {
  if (SAMPLERS.includes(node.type)) return [samplerQuery(node)];
  if (node.mode === MUTED) throw new Unknown(phrase("muted", { node: node.title }));
  if (node.mode === BYPASSED) throw new Unknown(phrase("bypassed", { node: node.title }));
  const asked = [];
  for (const sampler of node.graph.nodes) {
    if (!SAMPLERS.includes(sampler.type) || sampler.mode !== ACTIVE) continue;
    try {
      if (modelOf(sampler)[0] === node) asked.push(samplerQuery(sampler));
    } catch (error) {
      if (!(error instanceof Unknown)) throw error;
    }
  }
  if (asked.length) return asked;
  const demo = node.type === DEMO;
  const beyond = [...everyNode(node.graph.rootGraph)].some(
    (found) => SAMPLERS.includes(found.type) && found.mode === ACTIVE && found.graph !== node.graph,
  );
  const assumed = beyond ? "sampler_beyond" : "no_sampler";
  return [{ ...modelQuery(node, demo ? null : node), ...(demo ? DEMO_SIZE : USUAL_SIZE), assumed }];
}

async function ask(query) {
  try {
    const response = await api.fetchApi(`/diagonal/memory?${query}`);
    if (!response.ok) throw new Error(phrase("server_status", { status: response.status }));
    return await response.json();
  } catch (error) {
    return { error: phrase("memory_unknown", { why: error.message }), failed: true };
  }
}

const lines = new Set();

class MemoryLine {
  constructor(node) {
    this.node = node;
    this.asking = new Asking();
    this.root = document.createElement("div");
    this.root.className = "diagonal-memory";
    this.root.setAttribute("role", "status");
    this.bar = document.createElement("div");
    this.bar.className = "bar";
    this.words = document.createElement("div");
    this.words.className = "words";
    this.root.append(this.bar, this.words);
    this.askAgain = () => this.asking.again();
    addDrawing(this, "memory", { style: STYLE, height: HEIGHT, before: "live" });
  }

  begin() {
    this.timer = setInterval(() => this.refresh(), POLL_MS);
    lines.add(this);
    for (const name of ASK_AGAIN) api.addEventListener(name, this.askAgain);
  }

  end() {
    clearInterval(this.timer);
    lines.delete(this);
    for (const name of ASK_AGAIN) api.removeEventListener(name, this.askAgain);
  }

  async refresh() {
    if (!this.node.graph) return;
    let queries = [];
    let unknown = null;
    try {
      queries = [...new Set(questions(this.node).map((query) => new URLSearchParams(query).toString()))];
    } catch (error) {
      if (!(error instanceof Unknown)) throw error;
      unknown = { error: error.message };
    }
    const asked = unknown?.error ?? queries.join(" ");
    if (!this.asking.isDue(asked)) return;
    const replies = unknown ? [unknown] : await Promise.all(queries.map(ask));
    if (this.asking.question !== asked) return;
    const most = replies.reduce((a, b) => ((b.total ?? 0) > (a.total ?? 0) ? b : a));
    this.draw(most, new URLSearchParams(queries[0]).get("assumed"));
    if (replies.some((reply) => reply.failed)) this.asking.failed();
    else this.asking.answered();
  }

  draw(reply, assumed) {
    const error = reply.missing ? phrase("file_missing", missing(reply.missing)) : reply.error;
    const { text, suggestion, detail } = error ? {} : inWords(reply);
    this.root.classList.toggle("red", reply.fits === false);
    this.root.title = [text, suggestion, detail, error].filter(Boolean).join("\n");
    if (error) this.say([[error, "detail"]]);
    else {
      const rest = suggestion ? [suggestion, "text-line"] : [assumed ? phrase(assumed, { parts: detail }) : detail, "detail"];
      this.say([[text, "text-line"], rest]);
    }
    this.bar.replaceChildren();
    this.bar.hidden = Boolean(error);
    if (error) return;
    const whole = Math.max(reply.total, reply.available);
    for (const name of PARTS) {
      const part = document.createElement("div");
      part.className = name;
      part.style.width = `${(100 * reply.parts[name]) / whole}%`;
      part.title = phrase(name);
      this.bar.append(part);
    }
  }

  /** Lines [words, kind]; left alone where they are the same, for a screen reader reads out what is put here. */
  say(lines) {
    const said = JSON.stringify(lines);
    if (said === this.said) return;
    this.said = said;
    this.words.replaceChildren(
      ...lines.map(([words, kind]) => {
        const line = document.createElement("div");
        line.className = kind;
        line.textContent = words;
        return line;
      }),
    );
  }
}

function bytes(count) {
  return count >= GB ? `${(count / GB).toFixed(1)} GB` : `${(count / MB).toFixed(0)} MB`;
}

function missing({ file, folders }) {
  return {
    file,
    folders: list(
      folders.map((folder) => `models/${folder}`),
      "disjunction",
    ),
  };
}

/** The server's figures: what is needed, of what parts, and what to do where that is too much. */
function inWords({ fits, parts, total, available, waiting, on_gpu, width, height, window, changes }) {
  const shown = PARTS.filter((name) => name !== "decoder" || parts[name]).map((name) => {
    const words = name === "keys_values" ? phrase("keys_values_of", { window }) : phrase(name);
    return `${words} ${bytes(parts[name])}`;
  });
  const remedies = changes.map((change) => {
    const [across, down] = change.size ?? [];
    return list([
      ...(change.weights ? [phrase(change.weights)] : []),
      ...(change.kv_cache_dtype ? [phrase("kv_cache_dtype", { dtype: change.kv_cache_dtype })] : []),
      ...(change.window ? [phrase("window", { window: change.window })] : []),
      ...(change.size ? [phrase("size", { width: across, height: down })] : []),
    ]);
  });
  const advice = remedies.length
    ? phrase("fits_with", { changes: list(remedies, "disjunction") })
    : phrase("nothing_fits");
  const slow = waiting ? [phrase("slow", { size: bytes(waiting) })] : [];
  return {
    text: phrase(on_gpu ? "needs_vram" : "needs_ram", { total: bytes(total), available: bytes(available) }),
    suggestion: fits ? "" : [...slow, advice].join(" "),
    detail: phrase("memory_parts", { width, height, parts: shown.join(phrase("comma")) }),
  };
}

app.registerExtension({
  name: "diagonaldistillation.memory",
  refreshComboInNodes() {
    for (const line of lines) line.askAgain(); // a person who presses R may have brought a file
  },
  nodeCreated(node) {
    if (SAMPLERS.includes(node.comfyClass) || LOADERS.includes(node.comfyClass)) new MemoryLine(node);
  },
});
