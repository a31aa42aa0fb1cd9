/** A small histogram. Hovering and the arrow keys show the value of a bar. */

import { element, indexForKey, uniqueId } from "./dom.js";
import { formatShare, withMinus } from "./numbers.js";
import { t } from "./words.js";

/** Bins of the report that share one bar. */
const BINS_PER_BAR = 4;

/**
 * The errors of a report, in steps of the local FP8 grid.
 * @param {{low: number, high: number, counts: number[]}} steps the middle count is of errors of 0; the others are in
 *   bins of equal width from low to 0 and from 0 to high
 * @returns {HTMLElement}
 */
export function histogram({ low, high, counts }) {
  const bins = barsOf(counts, low, high);
  const total = counts.reduce((sum, n) => sum + n, 0) || 1;
  const largest = Math.max(...bins.map((bin) => bin.count), 1);
  const caption = element("div", {
    id: uniqueId("sfp8-bins"),
    class: "muted",
    textContent: t("resultSteps"),
  });
  const readout = element("span", { textContent: "0" });
  const last = bins.length - 1;
  const bars = bins.map((bin) => {
    const bar = element("div");
    bar.style.setProperty("--height", `${(100 * bin.count) / largest}%`);
    return bar;
  });
  bars[Math.floor(bins.length / 2)].classList.add("zero");
  for (const end of [bars[0], bars[last]]) end.classList.add("beyond");
  const chart = element("div", {
    class: "bars",
    role: "slider",
    tabIndex: 0,
    "aria-labelledby": caption.id,
    "aria-valuemin": 0,
    "aria-valuemax": bins.length - 1,
  });
  let current = Math.floor(bins.length / 2);

  function select(index) {
    bars[current].classList.remove("current");
    current = Math.max(0, Math.min(bins.length - 1, index));
    bars[current].classList.add("current");
    readout.textContent = describeBin(bins[current], total, { isFirst: current === 0, isLast: current === last });
    chart.setAttribute("aria-valuenow", current);
    chart.setAttribute("aria-valuetext", readout.textContent);
  }

  chart.append(...bars);
  bars.forEach((bar, index) => bar.addEventListener("pointerenter", () => select(index)));
  chart.addEventListener("keydown", (event) => {
    const index = indexForKey(event.key, current, bins.length - 1);
    if (index === null) return;
    event.preventDefault();
    select(index);
  });
  select(current);
  const axis = element(
    "div",
    { class: "axis" },
    element("span", { textContent: `< ${formatEdge(bins[0].high)}` }),
    readout,
    element("span", { textContent: `> ${formatEdge(bins[last].low)}` }),
  );
  return element("div", {}, caption, chart, axis);
}

/**
 * The bars of a histogram: neighbouring bins together, and the bin of 0 by itself.
 * @param {number[]} counts see histogram
 * @param {number} low
 * @param {number} high
 * @returns {{low: number, high: number, count: number}[]}
 */
export function barsOf(counts, low, high) {
  const middle = (counts.length - 1) / 2;
  return [
    ...mergeBins(counts.slice(0, middle), low, 0, BINS_PER_BAR),
    { low: 0, high: 0, count: counts[middle] },
    ...mergeBins(counts.slice(middle + 1), 0, high, BINS_PER_BAR),
  ];
}

/**
 * Merge neighbouring bins of a histogram. The last merged bin may hold fewer.
 * @param {number[]} counts
 * @param {number} low lower edge of the first bin
 * @param {number} high upper edge of the last bin
 * @param {number} size bins in each merged bin
 * @returns {{low: number, high: number, count: number}[]}
 */
export function mergeBins(counts, low, high, size) {
  const width = (high - low) / counts.length;
  const bins = [];
  for (let start = 0; start < counts.length; start += size) {
    const end = Math.min(start + size, counts.length);
    const count = counts.slice(start, end).reduce((sum, n) => sum + n, 0);
    bins.push({ low: low + start * width, high: low + end * width, count });
  }
  return bins;
}

/**
 * A bin and its share: "0.13 to 0.25: 8.21 %". The first and the last also hold everything beyond the axis.
 * @param {{low: number, high: number, count: number}} bin
 * @param {number} total
 * @param {{isFirst?: boolean, isLast?: boolean}} place
 * @returns {string}
 */
export function describeBin({ low, high, count }, total, { isFirst, isLast } = {}) {
  const share = formatShare(count / total);
  if (low === high) return t("resultStepsZero", { share });
  if (isFirst) return t("resultStepsBelow", { edge: formatEdge(high), share });
  if (isLast) return t("resultStepsAbove", { edge: formatEdge(low), share });
  return t("resultStepsBetween", { low: formatEdge(low), high: formatEdge(high), share });
}

function formatEdge(value) {
  return withMinus(value.toFixed(2));
}
