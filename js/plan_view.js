/** The Plan tab: which tensors will be quantized, which are kept, and why. */

import { element } from "./dom.js";
import { formatBytes, formatSizes } from "./numbers.js";
import { elsewhereList, noteList } from "./run_view.js";
import { t } from "./words.js";

/**
 * @typedef {object} Row
 * @property {number} count tensors
 * @property {number} bytes before
 * @property {{name: string, count: number}[]} names
 * @property {number} more names that are not listed
 *
 * @typedef {object} Reason why tensors are kept
 * @property {string} kind
 * @property {string} pattern the pattern that matched, or ""
 * @property {string} preset the preset that the pattern belongs to; "" for a user's pattern
 * @property {string} text
 *
 * @typedef {object} Plan the server's answer for one file
 * @property {string} source
 * @property {string} family
 * @property {number} bytes_before
 * @property {number} bytes_after
 * @property {Row & {bytes_after: number}} quantized
 * @property {(Row & {reason: Reason})[]} kept
 * @property {{pattern: string, count: number, yours: boolean}[]} hits
 * @property {string[]} problems what makes the run fail, or the file bad in the running ComfyUI
 * @property {string[]} notes
 * @property {string[]} elsewhere what other versions of ComfyUI make of the file
 */

/**
 * @param {Plan} plan
 * @returns {HTMLElement[]}
 */
export function planView(plan) {
  const source = `${plan.source} · ${familyText(plan)}`;
  return [
    ...problemList(plan.problems),
    element("div", { class: "headline", textContent: formatSizes(plan.bytes_before, plan.bytes_after) }),
    element("div", { class: "muted ellipsis", title: plan.source, textContent: source }),
    planTable(plan),
    ...hitList(plan.hits.filter(({ count }) => count)),
    ...noteList(plan.notes),
    ...elsewhereList(plan.elsewhere),
  ];
}

/**
 * What makes a run fail or harms the image.
 * @param {string[]} problems
 * @returns {HTMLElement[]}
 */
export function problemList(problems) {
  return problems.flatMap(errorView);
}

/**
 * Shown when the server cannot make a plan.
 * @param {string} text the server's reason
 * @returns {HTMLElement[]}
 */
export function errorView(text) {
  return [element("p", { class: "error", textContent: text })];
}

/**
 * Shown while something is missing for a plan.
 * @param {string} text what to do
 * @returns {HTMLElement[]}
 */
export function hintView(text) {
  return [element("p", { class: "muted", textContent: text })];
}

/**
 * Names the inputs whose values the plan cannot know.
 * @param {string[]} names
 * @returns {HTMLElement[]}
 */
export function linkedView(names) {
  return [element("p", { class: "muted", textContent: t("planLinked", { names: names.join(", ") }) })];
}

/**
 * The plan in one sentence, for screen readers.
 * @param {Plan} plan
 * @returns {string}
 */
export function planSentence(plan) {
  const kept = plan.kept.reduce((sum, row) => sum + row.count, 0);
  return t("planSpoken", {
    source: plan.source,
    quantized: t("layers", { count: plan.quantized.count }),
    kept: t("tensors", { count: kept }),
    before: formatBytes(plan.bytes_before),
    after: formatBytes(plan.bytes_after),
  });
}

/**
 * The short text of a reason.
 * @param {Reason} reason
 * @returns {string}
 */
export function reasonText({ pattern, preset, text }) {
  if (!pattern) return text;
  return preset ? t("planPreset", { pattern, preset }) : t("planPattern", { pattern });
}

function familyText({ family }) {
  return family === "unknown" ? t("planUnknownFamily") : family;
}

function planTable(plan) {
  const { quantized } = plan;
  const sizes = `${formatBytes(quantized.bytes)} → ${formatBytes(quantized.bytes_after)}`;
  const body = element("tbody", {}, ...rows(t("planQuantized"), quantized, sizes));
  for (const row of plan.kept) {
    body.append(...rows(t("planKept", { reason: reasonText(row.reason) }), row, formatBytes(row.bytes)));
  }
  const heads = [
    [t("planResult"), ""],
    [t("planTensors"), "number"],
    [t("planSize"), "number"],
  ];
  const head = heads.map(([text, name]) => element("th", { scope: "col", class: name, textContent: text }));
  return element("table", {}, element("thead", {}, element("tr", {}, ...head)), body);
}

/** A row with a button, and below it the row of tensor names that the button shows or hides. */
function rows(title, row, size) {
  const names = element("tr", { class: "names", hidden: true }, element("td", { colSpan: 3 }, nameList(row)));
  const button = element("button", {
    type: "button",
    "aria-expanded": "false",
    textContent: title,
    click() {
      names.hidden = !names.hidden;
      button.setAttribute("aria-expanded", String(!names.hidden));
    },
  });
  return [
    element(
      "tr",
      {},
      element("td", {}, button),
      element("td", { class: "number", textContent: row.count.toLocaleString("en") }),
      element("td", { class: "number", textContent: size }),
    ),
    names,
  ];
}

function nameList({ names, more }) {
  const items = names.map(({ name, count }) =>
    element("li", { class: "name", textContent: count > 1 ? `${name} × ${count}` : name }),
  );
  if (more) items.push(element("li", { class: "muted", textContent: t("planMoreNames", { count: more }) }));
  return element("ul", {}, ...items);
}

function hitList(hits) {
  if (!hits.length) return [];
  const items = hits.map(({ pattern, count, yours }) =>
    element(
      "li",
      { class: yours ? "yours" : "muted" },
      element("span", { class: "name", textContent: pattern }),
      ` × ${count}`,
    ),
  );
  return [element("ul", { class: "hits", "aria-label": t("planPatterns") }, ...items)];
}
