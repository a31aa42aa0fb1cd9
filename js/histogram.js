/** A small histogram whose bars tell their values on hover and by arrow keys. */

import { element, uniqueId } from "./dom.js";
import { formatShare, rebin } from "./format.js";

const GROUP = 3;

/**
 * Errors in steps of the local FP8 grid.
 * @param {{low: number, high: number, counts: number[]}} steps counts in bins of equal width from low to high
 * @returns {HTMLElement}
 */
export function histogram({ low, high, counts }) {
  const bins = rebin(counts, low, high, GROUP);
  const total = counts.reduce((sum, n) => sum + n, 0) || 1;
  const largest = Math.max(...bins.map((bin) => bin.count), 1);
  const caption = element("div", {
    id: uniqueId("sfp8-bins"),
    class: "soft",
    textContent: "Error in steps of the FP8 grid",
  });
  const readout = element("span", { textContent: "0" });
  const bars = bins.map((bin) => {
    const bar = element("div");
    bar.style.setProperty("--height", `${(100 * bin.count) / largest}%`);
    return bar;
  });
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
    readout.textContent = binText(bins[current], total);
    chart.setAttribute("aria-valuenow", current);
    chart.setAttribute("aria-valuetext", readout.textContent);
  }

  chart.append(...bars);
  bars.forEach((bar, index) => bar.addEventListener("pointerenter", () => select(index)));
  chart.addEventListener("keydown", (event) => {
    const target = keyTarget(event.key, current, bins.length - 1);
    if (target === null) return;
    event.preventDefault();
    select(target);
  });
  select(current);
  const axis = element(
    "div",
    { class: "axis" },
    element("span", { textContent: stepText(low) }),
    readout,
    element("span", { textContent: stepText(high) }),
  );
  return element("div", {}, caption, chart, axis);
}

/**
 * Where a key moves the selection of a slider; null for a key that does not.
 * @param {string} key
 * @param {number} current
 * @param {number} last
 */
export function keyTarget(key, current, last) {
  switch (key) {
    case "ArrowLeft":
    case "ArrowDown":
      return current - 1;
    case "ArrowRight":
    case "ArrowUp":
      return current + 1;
    case "Home":
      return 0;
    case "End":
      return last;
    default:
      return null;
  }
}

function binText({ low, high, count }, total) {
  return `${stepText(low)} to ${stepText(high)}: ${formatShare(count / total)}`;
}

function stepText(value) {
  return value.toFixed(2).replace(/^-/, "−");
}
