// The words of the drawings inside nodes: English, Chinese. This file registers nothing. ComfyUI's own table for packs
// (locales/) reaches the names and tooltips of nodes only.

import { app } from "../../scripts/app.js";

const LANGUAGES = ["en", "zh"];
const FALLBACK = 0;

// {name} stands for a value; {name|step|steps} for the word that goes with a number, one or more.
const TEXTS = {
  comma: [", ", "，"],
  server_status: ["the server answered {status}", "服务器返回 {status}"],

  // Memory
  from_outside: [
    "{name} comes from outside of the subgraph: known when it runs.",
    "“{name}”来自子图之外：运行时才能得知。",
  ],
  no_widget: ["{node} has no {name}.", "“{node}”没有“{name}”。"],
  from_other_node: [
    "{name} of {node} comes from another node: known when it runs.",
    "“{node}”的“{name}”来自其他节点：运行时才能得知。",
  ],
  made_by: [
    "{node} makes the {type}: its memory is known when it runs.",
    "{type} 由“{node}”生成：所需显存运行时才能得知。",
  ],
  connect: ["Connect {name} to see the memory needed.", "连接“{name}”后才能得知所需显存。"],
  memory_unknown: ["Memory unknown: {why}.", "显存需求未知：{why}。"],
  needs_vram: ["Needs {total} of {available} VRAM.", "需要 {total} 显存，可用 {available}。"],
  needs_ram: ["Needs {total} of {available} RAM (no GPU).", "需要 {total} 内存（无 GPU），可用 {available}。"],
  memory_parts: ["{width}x{height}: {parts}.", "{width}x{height}：{parts}。"],
  muted: ["{node} is muted.", "“{node}”已静音。"],
  bypassed: ["{node} is bypassed.", "“{node}”已绕过。"],
  no_file: ["No file is chosen in {node}.", "“{node}”尚未选择文件。"],
  file_missing: [
    "{file} is not in {folders}: put the file there and press R.",
    "{folders} 中没有 {file}：请把文件放到那里，然后按 R 键。",
  ],
  no_sampler: [
    "No sampler in this graph sets a size. Assumed {parts}",
    "此工作流中没有采样器给出尺寸，暂按假定尺寸估算。{parts}",
  ],
  sampler_beyond: [
    "A sampler on the other side of a subgraph is not seen from here. Assumed {parts}",
    "从这里看不到子图另一侧的采样器，暂按假定尺寸估算。{parts}",
  ],
  weights: ["weights", "权重"],
  keys_values: ["KV cache", "KV 缓存"],
  keys_values_of: ["KV cache ({window} latent frames)", "KV 缓存（{window} 个 Latent 帧）"],
  text: ["text", "文本"],
  forward: ["a forward", "一次前向"],
  decoder: ["decoding", "解码"],
  slow: [
    "Slow: {size} of the weights do not fit into VRAM and stay in RAM.",
    "会变慢：有 {size} 权重放不进显存，需暂存在内存中。",
  ],
  fits_with: ["Fits with {changes}.", "改用{changes}即可放下。"],
  nothing_fits: [
    "Nothing smaller fits either; use a smaller model.",
    "再小也放不下；请换用更小的模型。",
  ],
  fp8: ["an fp8 file", " fp8 文件"],
  gguf_q4: ["a 4-bit GGUF file", " 4 位 GGUF 文件"],
  kv_cache_dtype: ["kv_cache_dtype {dtype}", " kv_cache_dtype {dtype} "],
  window: ["window {window}", "窗口 {window} "],
  size: ["{width}x{height}", " {width}x{height} "],

  // Schedule
  levels: ["Noise levels of each chunk", "每个块的噪声水平"],
  no_drawing: ["No drawing: {why}.", "无法绘图：{why}。"],
  linked: [
    "{names} come from another node: known when it runs.",
    "{names}来自其他节点：运行时才能得知。",
  ],
  cost: [
    "{steps} steps, {mode} context: {forwards} forwards for {chunks} chunks; {uniform} uniform {uniform|step|steps} " +
      "with a cache pass {uniform|needs|need} {more} ({ratio}x).",
    "步数 {steps}，{mode} 上下文：{chunks} 个块共 {forwards} 次前向；均匀 {uniform} 步加缓存前向需要 {more} 次（{ratio} 倍）。",
  ],
  uninformative: [
    "A chunk ends at sigma {sigma} with noisy context: the next chunk is conditioned on almost pure noise. Use " +
      "context_mode renoise or clean, or more steps.",
    "有块在 sigma {sigma} 处结束，而上下文模式为 noisy：下一块的条件几乎是纯噪声。请改用 renoise 或 clean，或增加步数。",
  ],
  uninformative_pass: [
    "A chunk's context is at sigma {sigma}: the next chunk is conditioned on almost pure noise. Lower context_sigma.",
    "块的上下文处于 sigma {sigma}：下一块的条件几乎是纯噪声。请调低“上下文噪声”。",
  ],
  own_sigmas: [
    "Steps follow your sigmas; empty that field to drag them.",
    "步数由自定义噪声水平决定；清空该栏后才能拖动。",
  ],
  drawn_part: [
    "The first {drawn} of {listed} listed chunks are drawn; change steps in the text.",
    "图中只画出所列 {listed} 个块中的前 {drawn} 个；请在文本中修改步数。",
  ],
  chunk: ["chunk {chunk}", "第 {chunk} 块"],
  chunk_and_later: ["chunk {chunk} and later", "第 {chunk} 块及以后"],
  chunk_steps: ["{name}: {steps} {steps|step|steps} at sigma {levels}", "{name}：{steps} 步，sigma 为 {levels}"],
  steps_of: ["steps of {name}", "{name}的步数"],

  // Preview
  idle: ["Chunks play here as they are made.", "生成的块会在这里播放。"],
  bar: ["chunk {chunk}: {done} of {steps} {steps|step|steps}", "第 {chunk} 块：第 {done} 步，共 {steps} 步"],
  chunk_of: ["chunk {chunk} of {chunks}", "第 {chunk} 块，共 {chunks} 块"],
  first_after: ["first chunk after {time}", "首块用时 {time}"],
  frames_a_second: ["{rate} frames/s", "每秒 {rate} 帧"],
  left: ["{time} left", "剩余 {time}"],
  forwards_in: ["{forwards} {forwards|forward|forwards} in {time}", "{forwards} 次前向，用时 {time}"],
  forwards_twice_in: [
    "{forwards} {forwards|forward|forwards}, each twice for cfg, in {time}",
    "{forwards} 次前向，因 cfg 每次计算两遍，用时 {time}",
  ],
  seconds: ["{seconds} s", "{seconds} 秒"],
  minutes: ["{minutes}:{seconds} min", "{minutes} 分 {seconds} 秒"],
  cancelled: ["cancelled; these frames stay", "已取消；这些帧会保留"],
  failed: ["stopped by an error", "因错误而停止"],
  finish: ["Finish", "结束"],
  finish_hint: [
    "End the video after the current chunk; the nodes after this one get what has been made.",
    "在当前块完成后结束；已生成的部分会交给后面的节点。",
  ],
  finishing: ["ends with this chunk", "当前块完成后结束"],
  finished_early: ["finished early", "已提前结束"],

  // Live prompt
  prompt_idle: ["While a run goes on, a new prompt can be sent from here.", "运行期间可从这里发送新提示词。"],
  prompt_hint: ["a new prompt, from the next chunk on", "新提示词，从下一块开始生效"],
  prompt_label: ["New prompt for the run", "给本次运行的新提示词"],
  send: ["Send", "发送"],
  sending: ["Sending…", "正在发送……"],
  prompt_now: ["Chunk {chunk} of {chunks}: {text}", "第 {chunk} 块，共 {chunks} 块：{text}"],
  prompt_taken: ["From chunk {chunk} on ({how}): {text}", "从第 {chunk} 块开始（{how}）：{text}"],
  prompt_later: [
    "The run has not read the prompt yet; it takes effect in the chunk after that.",
    "采样尚未读到新提示词；读到后从下一块开始生效。",
  ],
  run_ended: ["The run has ended.", "运行已结束。"],
  connection_lost: ["The connection was lost.", "连接已断开。"],
  prompt_refused: ["The server answered {status}.", "服务器返回 {status}。"],
  unreachable: ["The server cannot be reached: {why}", "无法连接服务器：{why}"],
};

/** The language that ComfyUI shows, of those that there are texts in. */
function language() {
  const chosen = LANGUAGES.indexOf(app.extensionManager.setting.get("Comfy.Locale"));
  return chosen < 0 ? FALLBACK : chosen;
}

/** A text of the table in ComfyUI's language, with its values in place. */
export function phrase(name, values = {}) {
  return TEXTS[name][language()]
    .replace(/\{(\w+)\|(\w+)\|(\w+)\}/g, (_, value, one, more) => (Number(values[value]) === 1 ? one : more))
    .replace(/\{(\w+)\}/g, (_, value) => values[value]);
}

/** Words as one list: "a, b and c", or with "or". */
export function list(words, type = "conjunction") {
  return new Intl.ListFormat(LANGUAGES[language()], { type, style: "long" }).format(words);
}

/** The name that a node shows for one of its inputs. */
export function shownName(node, name) {
  const input = node.inputs?.find((found) => found.name === name);
  return input?.label ?? input?.localized_name ?? node.widgets?.find((found) => found.name === name)?.label ?? name;
}
