/** What a job does while it runs, and its numbers when it is done. */

import { element } from "./dom.js";
import { formatCount, formatDecibels, formatSeconds, formatShare, formatSizes, formatSmall, pace } from "./format.js";
import { histogram } from "./histogram.js";

/**
 * @typedef {object} LiveState a message of the server
 * @property {number} done bytes
 * @property {number} total bytes
 * @property {string} key the tensor that comes next
 * @property {number} seconds since the job began
 * @property {number} [layer] layers done
 * @property {number} [layers] layers in all
 * @property {number|null} [sqnr] of the layers done, in dB
 */

/** Shown before anything ran. */
export function idleView() {
  return [element("p", { class: "soft", textContent: "Numbers appear here when this node runs." })];
}

/**
 * @param {LiveState} state
 * @returns {HTMLElement[]}
 */
export function runningView(state) {
  const { share, speed, left } = pace(state);
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
  const ending = share >= 1;
  const facts = [
    ["Done", `${percent} %`],
    ["Speed", speed || "…"],
    ["Time left", ending ? formatSeconds(0) : left || "…"],
    ["SQNR so far", state.layer ? formatDecibels(state.sqnr) : "…"],
  ];
  return [
    element("div", { class: "headline", textContent: ending ? "Finishing …" : layerText(state) }),
    bar,
    factList(facts),
    element("div", { class: "name ellipsis", title: state.key, textContent: state.key || " " }),
  ];
}

/** Which layer a job is at, in words. */
export function layerText({ layer, layers }) {
  if (!layers) return "Quantizing …";
  return `Layer ${Math.min(layer + 1, layers).toLocaleString("en")} of ${layers.toLocaleString("en")}`;
}

/** Shown when a job ended early. `how`: "cancelled" or "failed". */
export function stoppedView(how, state) {
  const where = state?.layers ? ` after ${formatCount(state.layer ?? 0, "layer")} of ${state.layers}` : "";
  return [element("div", { class: "headline wrong", textContent: `${how}${where}` })];
}

/**
 * @param {object} summary the server's summary of a report
 * @returns {HTMLElement[]}
 */
export function summaryView(summary) {
  if (!summary.layers) return [element("p", { textContent: "Nothing was quantized." }), ...noteList(summary.notes)];
  const share = (count) => formatShare(summary.count ? count / summary.count : 0);
  const facts = [
    ["SQNR", formatDecibels(summary.sqnr)],
    ["Bias", formatSmall(summary.bias)],
    ["Saturated", share(summary.saturated)],
    ["To zero", share(summary.flushed)],
  ];
  return [
    element("div", { class: "headline", textContent: formatSizes(summary.bytes_before, summary.bytes_after) }),
    element("div", {
      class: "soft",
      textContent: `${formatCount(summary.layers, "layer")} to ${summary.format}, ${summary.rounding}; ${formatCount(summary.kept, "tensor")} kept`,
    }),
    factList(facts),
    histogram(summary.steps),
    worstList(summary.worst),
    ...noteList(summary.notes),
  ];
}

/** Remarks as a list; nothing for none. */
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

function worstList(worst) {
  const items = worst.map(({ key, sqnr }) =>
    element(
      "li",
      {},
      element("span", { class: "name ellipsis", title: key, textContent: key }),
      element("span", { class: "number", textContent: formatDecibels(sqnr) }),
    ),
  );
  return element(
    "div",
    {},
    element("div", { class: "soft", textContent: "Lowest SQNR" }),
    element("ol", { class: "worst" }, ...items),
  );
}
