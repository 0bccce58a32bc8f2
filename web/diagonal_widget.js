// What the pack's drawings inside nodes share. ComfyUI loads every file of this folder as an extension: this one
// registers nothing.

const STYLE = `
.diagonal-widget { box-sizing: border-box; font: 10px sans-serif; color: var(--fg-color, #ddd);
  background: var(--comfy-input-bg, #222); border-radius: 6px; overflow: hidden; }
.diagonal-widget .warning { color: #e0a458; }
.diagonal-widget .error { color: #f07070; }
`;

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
 * Puts `root` into the node, below its widgets. Nothing of it is saved, and nothing reaches the API's graph.
 *
 * @param style rules, all under a class of our own.
 * @param height in canvas units; `maxHeight` where it may become higher than that.
 * @param before the drawing that this one is to stand above, whichever is made first.
 * @param onRemoved called when the node goes.
 */
export function addDrawing(node, name, root, { style, height, maxHeight = height, before, onRemoved }) {
  const sheet = document.createElement("style");
  sheet.textContent = STYLE + style; // here and not in the page's head, which other packs share
  root.append(sheet);
  root.classList.add("diagonal-widget");
  root.style.maxHeight = `${maxHeight}px`; // Vue nodes share out free height evenly
  const widget = node.addDOMWidget(name, `diagonal_${name}`, root, {
    serialize: false,
    getMinHeight: () => height,
    getMaxHeight: () => maxHeight,
  });
  widget.serialize = false; // the option above speaks of the API's graph, this of the saved one
  const place = node.widgets.findIndex((other) => other.name === before);
  if (place >= 0) node.widgets.splice(place, 0, ...node.widgets.splice(node.widgets.indexOf(widget), 1));
  grow(node);
  after(node, "onConfigure", () => grow(node));
  after(node, "onRemoved", onRemoved);
  return widget;
}

/** Whether an event that names a node, perhaps one inside a subgraph ("5:3"), means this one. */
export function isNode(id, node) {
  return String(id).split(":").at(-1) === String(node.id);
}
