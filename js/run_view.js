/** The Run tab: the progress of a job while it runs, and its numbers when it is done. */

import { element } from "./dom.js";
import { histogram } from "./histogram.js";
import { formatBytes, formatDecibels, formatSeconds, formatShare, formatSizes, formatSmall } from "./numbers.js";
import { t } from "./words.js";

/** How a job ended early -> the texts for it, before and after the first message. "ended": it is not known how. */
const OUTCOMES = {
  cancelled: ["runCancelled", "runCancelledAfter"],
  failed: ["runFailed", "runFailedAfter"],
  ended: ["runEnded", "runEndedAfter"],
};

/** dB that nearest must be closer to be mentioned. */
const LEAST_GAIN = 0.05;

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
 * @property {number|null} nearest_gain by how many dB rounding to nearest would raise the SQNR; null if not known
 * @property {{low: number, high: number, counts: number[]}} steps
 * @property {string[]} notes
 * @property {string[]} elsewhere what other versions of ComfyUI make of the file
 */

/**
 * Shown before the first run.
 * @returns {HTMLElement[]}
 */
export function idleView() {
  return [element("p", { class: "muted", textContent: t("runIdle") })];
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
      "aria-label": t("runQuantizing"),
      "aria-valuemin": 0,
      "aria-valuemax": 100,
      "aria-valuenow": percent,
    },
    element("div", { class: "fill" }),
  );
  bar.firstChild.style.width = `${100 * share}%`;
  const finishing = share >= 1;
  const facts = [
    [t("runDone"), `${percent} %`],
    [t("runSpeed"), speed || "…"],
    [t("runTimeLeft"), finishing ? formatSeconds(0) : timeLeft || "…"],
    [t("runQualitySoFar"), state.layer ? formatDecibels(state.sqnr) : "…"],
  ];
  return [
    element("div", { class: "headline", textContent: finishing ? t("runFinishing") : layerText(state) }),
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
  if (!layers) return t("runStarting");
  return t("runLayer", { number: Math.min(layer + 1, layers), total: layers });
}

/**
 * How a job ended early.
 * @param {keyof typeof OUTCOMES} outcome
 * @param {RunState} [state] the last message
 * @returns {string} such as "Cancelled after 3 of 24 layers"
 */
export function outcomeText(outcome, state) {
  const [alone, after] = OUTCOMES[outcome];
  return state?.layers ? t(after, { done: state.layer ?? 0, total: state.layers }) : t(alone);
}

/**
 * Shown when a job ended early.
 * @param {string} text
 * @returns {HTMLElement[]}
 */
export function stoppedView(text) {
  return [element("div", { class: "headline error", textContent: text })];
}

/**
 * @param {Summary} summary
 * @param {(() => void)|null} [useNearest] sets the node's rounding to nearest; null where that is not possible
 * @returns {HTMLElement[]}
 */
export function summaryView(summary, useNearest = null) {
  if (!summary.layers) return [element("p", { textContent: t("resultNothing") }), ...noteList(summary.notes)];
  const share = (count) => formatShare(summary.count ? count / summary.count : 0);
  const output = summary.output_error;
  const facts = [
    [output ? t("resultSqnrOfWeights") : t("resultSqnr"), formatDecibels(summary.sqnr)],
    [t("resultBias"), formatSmall(summary.bias)],
    [t("resultSaturated"), share(summary.saturated)],
    [t("resultFlushed"), share(summary.flushed)],
  ];
  return [
    element("div", { class: "headline", textContent: formatSizes(summary.bytes_before, summary.bytes_after) }),
    element("div", { class: "muted", textContent: countsText(summary) }),
    ...(output ? outputErrorView(output) : []),
    factList(facts),
    ...(summary.nearest_gain >= LEAST_GAIN ? [nearestView(summary.nearest_gain, useNearest)] : []),
    histogram(summary.steps),
    output ? worstOutputs(output.worst) : worstWeights(summary.worst),
    ...noteList(summary.notes),
    ...elsewhereList(summary.elsewhere),
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

/**
 * What other versions of ComfyUI make of the file, behind a fold.
 * @param {string[]} [texts]
 * @returns {HTMLElement[]}
 */
export function elsewhereList(texts = []) {
  if (!texts.length) return [];
  const title = element("summary", { textContent: t("planElsewhere") });
  return [element("details", { class: "elsewhere" }, title, ...noteList(texts))];
}

function countsText({ layers, format, rounding, kept }) {
  return t("resultCounts", {
    layers: t("layers", { count: layers }),
    format,
    rounding,
    tensors: t("tensors", { count: kept }),
  });
}

/** What nearest would give, and a button that chooses it. */
function nearestView(gain, useNearest) {
  const text = t("resultNearestCloser", { decibels: formatDecibels(gain) });
  const line = element("div", { class: "advice", role: "status" }, element("span", { textContent: text }));
  const click = () => {
    useNearest();
    line.replaceChildren(t("resultNearestSet"));
  };
  if (useNearest) line.append(element("button", { type: "button", textContent: t("resultUseNearest"), click }));
  return line;
}

function factList(facts) {
  const parts = facts.map(([name, value]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value })),
  );
  return element("dl", { class: "facts" }, ...parts);
}

/** What calibrated rounding is for. It moves weights further than nearest, so that their SQNR alone misleads. */
function outputErrorView({ chosen, nearest }) {
  return [
    factList([
      [t("resultOutputError"), formatShare(chosen)],
      [t("resultWithNearest"), formatShare(nearest)],
    ]),
    element("div", { class: "muted", textContent: t("resultCalibrated") }),
  ];
}

function worstWeights(worst) {
  return layerList(
    t("resultLowestSqnr"),
    worst.map(({ key, sqnr }) => [key, formatDecibels(sqnr)]),
  );
}

function worstOutputs(worst) {
  return layerList(
    t("resultLargestOutputError"),
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
