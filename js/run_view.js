/** The Run tab: the progress of a job while it runs, and its numbers when it is done. */

import { element } from "./dom.js";
import { histogram } from "./histogram.js";
import {
  formatBytes,
  formatCount,
  formatDecibels,
  formatSeconds,
  formatShare,
  formatSizes,
  formatSmall,
} from "./numbers.js";

/**
 * @typedef {object} RunState a message of the server about a running job
 * @property {number} done bytes
 * @property {number} total bytes
 * @property {string} key the tensor that is processed next
 * @property {number} seconds since the job began
 * @property {number} [layer] layers done
 * @property {number} [layers] layers in all
 * @property {number|null} [sqnr] of the layers done, in dB; null for infinite
 *
 * @typedef {object} Summary the server's summary of a report
 * @property {string} format
 * @property {string} rounding
 * @property {number} layers quantized layers
 * @property {number} kept kept tensors
 * @property {number} bytes_before
 * @property {number} bytes_after
 * @property {number} count quantized values
 * @property {number|null} sqnr in dB; null for infinite
 * @property {number} bias
 * @property {number} saturated values
 * @property {number} flushed values
 * @property {{key: string, sqnr: number|null}[]} worst
 * @property {{chosen: number, nearest: number, worst: {key: string, error: number}[]}|null} output_error predicted
 *   errors over the outputs of the layers, as shares: medians, and the layers with the largest; null unless calibrated
 * @property {{low: number, high: number, counts: number[]}} steps
 * @property {string[]} notes
 */

/**
 * Shown before the first run.
 * @returns {HTMLElement[]}
 */
export function idleView() {
  return [element("p", { class: "muted", textContent: "Numbers appear here when this node runs." })];
}

/**
 * @param {RunState} state
 * @returns {HTMLElement[]}
 */
export function runningView(state) {
  const { share, speed, timeLeft } = progress(state);
  const percent = Math.floor(100 * share);
  const bar = element(
    "div",
    {
      class: "track",
      role: "progressbar",
      "aria-label": "Quantizing",
      "aria-valuemin": 0,
      "aria-valuemax": 100,
      "aria-valuenow": percent,
    },
    element("div", { class: "fill" }),
  );
  bar.firstChild.style.width = `${100 * share}%`;
  const finishing = share >= 1;
  const facts = [
    ["Done", `${percent} %`],
    ["Speed", speed || "…"],
    ["Time left", finishing ? formatSeconds(0) : timeLeft || "…"],
    ["SQNR so far", state.layer ? formatDecibels(state.sqnr) : "…"],
  ];
  return [
    element("div", { class: "headline", textContent: finishing ? "Finishing …" : layerText(state) }),
    bar,
    factList(facts),
    element("div", { class: "name ellipsis", title: state.key, textContent: state.key || " " }),
  ];
}

/**
 * The share that is done, the speed, and the time left.
 * @param {{done: number, total: number, seconds: number}} state bytes, and the seconds that `done` took
 * @returns {{share: number, speed: string, timeLeft: string}} share from 0 to 1; texts are empty while unknown
 */
export function progress({ done, total, seconds }) {
  const share = total ? done / total : 1;
  if (!done || !seconds) return { share, speed: "", timeLeft: "" };
  return {
    share,
    speed: `${formatBytes(done / seconds)}/s`,
    timeLeft: done < total ? formatSeconds((seconds * (total - done)) / done) : "",
  };
}

/**
 * The current layer of a job: "Layer 3 of 24".
 * @param {RunState} state
 * @returns {string}
 */
export function layerText({ layer, layers }) {
  if (!layers) return "Quantizing …";
  return `Layer ${Math.min(layer + 1, layers).toLocaleString("en")} of ${layers.toLocaleString("en")}`;
}

/**
 * Shown when a job ended early.
 * @param {string} outcome "Cancelled", "Failed" or "Ended"
 * @param {RunState} [state] the last message
 * @returns {HTMLElement[]}
 */
export function stoppedView(outcome, state) {
  const where = state?.layers ? ` after ${formatCount(state.layer ?? 0, "layer")} of ${state.layers}` : "";
  return [element("div", { class: "headline error", textContent: `${outcome}${where}` })];
}

/**
 * @param {Summary} summary
 * @returns {HTMLElement[]}
 */
export function summaryView(summary) {
  if (!summary.layers) return [element("p", { textContent: "Nothing was quantized." }), ...noteList(summary.notes)];
  const share = (count) => formatShare(summary.count ? count / summary.count : 0);
  const output = summary.output_error;
  const facts = [
    [output ? "SQNR of weights" : "SQNR", formatDecibels(summary.sqnr)],
    ["Bias", formatSmall(summary.bias)],
    ["Saturated", share(summary.saturated)],
    ["Flushed to 0", share(summary.flushed)],
  ];
  return [
    element("div", { class: "headline", textContent: formatSizes(summary.bytes_before, summary.bytes_after) }),
    element("div", {
      class: "muted",
      textContent: `${formatCount(summary.layers, "layer")} to ${summary.format}, ${summary.rounding}; ${formatCount(summary.kept, "tensor")} kept`,
    }),
    ...(output ? outputErrorView(output) : []),
    factList(facts),
    histogram(summary.steps),
    output ? worstOutputs(output.worst) : worstWeights(summary.worst),
    ...noteList(summary.notes),
  ];
}

/**
 * @param {string[]} notes
 * @returns {HTMLElement[]} one list, or nothing
 */
export function noteList(notes) {
  const items = notes.map((note) => element("li", { textContent: note }));
  return items.length ? [element("ul", { class: "notes" }, ...items)] : [];
}

function factList(facts) {
  const parts = facts.flatMap(([name, value]) => [
    element("dt", { textContent: name }),
    element("dd", { textContent: value }),
  ]);
  return element("dl", { class: "facts" }, ...parts);
}

/** What calibrated rounding is for. It moves weights further than nearest, so that their SQNR alone misleads. */
function outputErrorView({ chosen, nearest }) {
  const text =
    "Calibrated rounding lowers the error of the layer outputs. The SQNR of the weights can be lower for it.";
  return [
    factList([
      ["Predicted output error (median)", formatShare(chosen)],
      ["With nearest", formatShare(nearest)],
    ]),
    element("div", { class: "muted", textContent: text }),
  ];
}

function worstWeights(worst) {
  return layerList(
    "Lowest SQNR",
    worst.map(({ key, sqnr }) => [key, formatDecibels(sqnr)]),
  );
}

function worstOutputs(worst) {
  return layerList(
    "Largest predicted output error",
    worst.map(({ key, error }) => [key, formatShare(error)]),
  );
}

function layerList(title, rows) {
  const items = rows.map(([key, value]) =>
    element(
      "li",
      {},
      element("span", { class: "name ellipsis", title: key, textContent: key }),
      element("span", { class: "number", textContent: value }),
    ),
  );
  return element(
    "div",
    {},
    element("div", { class: "muted", textContent: title }),
    element("ol", { class: "worst" }, ...items),
  );
}
