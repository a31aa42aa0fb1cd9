/** The plan as a table: what will be quantized, what is kept, and why. */

import { element } from "./dom.js";
import { formatBytes, formatCount, formatReason, formatSizes } from "./format.js";
import { noteList } from "./live_view.js";

/**
 * @typedef {object} Row
 * @property {number} count tensors
 * @property {number} bytes before
 * @property {{name: string, count: number}[]} names
 * @property {number} more names that are not listed
 *
 * @typedef {object} Plan the server's answer for one file
 * @property {string} source
 * @property {string} family
 * @property {number} bytes_before
 * @property {number} bytes_after
 * @property {Row & {bytes_after: number}} quantized
 * @property {(Row & {reason: string})[]} kept
 * @property {{pattern: string, count: number, yours: boolean}[]} hits
 * @property {string[]} notes
 */

/**
 * @param {Plan} plan
 * @returns {HTMLElement[]}
 */
export function planView(plan) {
  return [
    element("div", { class: "headline", textContent: formatSizes(plan.bytes_before, plan.bytes_after) }),
    element("div", { class: "soft ellipsis", title: plan.source, textContent: `${plan.source} · ${familyText(plan)}` }),
    planTable(plan),
    ...hitList(plan.hits),
    ...noteList(plan.notes),
  ];
}

/** The file whose plan cannot be made, and why. */
export function refusalView(text) {
  return [element("p", { class: "wrong", textContent: text })];
}

/** What a plan would need. */
export function needsView(text) {
  return [element("p", { class: "soft", textContent: `The plan needs ${text}.` })];
}

/** The choices that a plan leaves out. */
export function wiredView(names) {
  const text = `Not in this plan, since it comes over a wire: ${names.join(", ")}`;
  return [element("p", { class: "soft", textContent: text })];
}

/** One plan in a sentence, for a screen reader. */
export function planSentence(plan) {
  const kept = plan.kept.reduce((sum, row) => sum + row.count, 0);
  return (
    `Plan for ${plan.source}: ${formatCount(plan.quantized.count, "layer")} quantized, ${formatCount(kept, "tensor")} ` +
    `kept, ${formatBytes(plan.bytes_before)} to ${formatBytes(plan.bytes_after)}`
  );
}

function familyText({ family }) {
  return family === "unknown" ? "unknown family" : family;
}

function planTable(plan) {
  const { quantized } = plan;
  const sizes = `${formatBytes(quantized.bytes)} → ${formatBytes(quantized.bytes_after)}`;
  const body = element("tbody", {}, ...rows("Quantized", quantized, sizes));
  for (const row of plan.kept) body.append(...rows(`Kept: ${formatReason(row.reason)}`, row, formatBytes(row.bytes)));
  const heads = [
    ["What and why", ""],
    ["Tensors", "number"],
    ["Size", "number"],
  ];
  const head = heads.map(([text, name]) => element("th", { scope: "col", class: name, textContent: text }));
  return element("table", {}, element("thead", {}, element("tr", {}, ...head)), body);
}

/** A row, and the row of its names, which its button shows. */
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
  if (more) items.push(element("li", { class: "soft", textContent: `and ${formatCount(more, "more name")}` }));
  return element("ul", {}, ...items);
}

function hitList(hits) {
  if (!hits.length) return [];
  const items = hits.map(({ pattern, count, yours }) =>
    element(
      "li",
      { class: yours ? "yours" : "soft" },
      element("span", { class: "name", textContent: pattern }),
      ` × ${count}`,
    ),
  );
  return [element("ul", { class: "hits", "aria-label": "Patterns and how many tensors they match" }, ...items)];
}
