/** Elements on nodes and the colours of sockets, in both renderers: the classic canvas and Nodes 2.0 (Vue). */

import { app } from "../../scripts/app.js";

/** Pixels that the canvas leaves free above and below an element, within the widget's height. */
const MARGIN = 10;
/** Pixels between two widgets. */
const GAP = 4;
/** The middle button of the mouse, in event.button and in event.buttons. */
const MIDDLE = 1;
const MIDDLE_HELD = 4;
/** Socket type -> the colour of its dots and links. */
const COLOURS = { FP8_REPORT: "#4db6ac", FP8_CALIBRATION: "#d4a373" };

/**
 * Add an element as the last widget of a node. It is not saved in the workflow or the prompt.
 * @param {object} node
 * @param {string} name of the widget, and class of the element
 * @param {HTMLElement} host
 * @param {{width: number, height: number}} size the least one
 * @returns {object} the widget
 */
export function addElement(node, name, host, { width, height }) {
  host.classList.add(name);
  host.style.minHeight = `${height}px`;
  passOn(host);
  const widget = node.addDOMWidget(name, name, host, {
    serialize: false,
    hideOnZoom: false,
    hideInPanel: true,
    getMinHeight: () => height + 2 * MARGIN,
  });
  widget.serialize = false;
  const [minWidth, minHeight] = node.computeSize();
  const hidden = window.LiteGraph.vueNodesMode ? advancedHeight(node) : 0;
  node.setSize([Math.max(width, minWidth), Math.max(minHeight, node.size[1]) - hidden]);
  return widget;
}

/** The height of a node's advanced inputs, which Nodes 2.0 hides at first. */
function advancedHeight(node) {
  const advanced = node.widgets.filter((widget) => widget.advanced ?? widget.options?.advanced);
  const heights = advanced.map(
    (widget) => widget.computeLayoutSize?.(node).minHeight ?? window.LiteGraph.NODE_WIDGET_HEIGHT,
  );
  return heights.reduce((sum, height) => sum + height + GAP, 0);
}

/**
 * Pass on the wheel and the middle button to the canvas below an element, which zoom and pan. In Nodes 2.0 the page does
 * that itself.
 */
function passOn(host) {
  const isMiddle = ({ button }) => button === MIDDLE;
  const events = [
    ["wheel", () => true, "processMouseWheel"],
    ["pointerdown", isMiddle, "processMouseDown"],
    ["pointermove", ({ buttons }) => buttons & MIDDLE_HELD, "processMouseMove"],
    ["pointerup", isMiddle, "processMouseUp"],
  ];
  for (const [name, isMeant, method] of events) {
    host.addEventListener(name, (event) => {
      if (!window.LiteGraph.vueNodesMode && isMeant(event)) app.canvas[method](event);
    });
  }
}

/** Give our socket types colours. Themes set an empty colour for types that they do not know, which is ignored. */
export function setColours() {
  const sheet = new CSSStyleSheet();
  const variables = Object.entries(COLOURS).map(([type, colour]) => `--color-datatype-${type}: ${colour};`);
  sheet.replaceSync(`:root { ${variables.join(" ")} }`);
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
  for (const table of [app.canvas.default_connection_color_byType, window.LGraphCanvas.link_type_colors]) {
    for (const [type, colour] of Object.entries(COLOURS)) {
      let themes = table[type];
      Object.defineProperty(table, type, {
        get: () => themes || colour,
        set: (value) => (themes = value),
        enumerable: true,
      });
    }
  }
}

/**
 * Show an element that a node has not had from the start, which Nodes 2.0 of 2025 (front end 1.32) does not mount.
 * @param {object} node
 * @param {HTMLElement} host
 */
export function mountLate(node, host) {
  if (!window.LiteGraph.vueNodesMode || host.isConnected) return;
  document.querySelector(`[data-node-id="${CSS.escape(node.id)}"]`)?.append(host);
}
