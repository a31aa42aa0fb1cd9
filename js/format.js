/** Numbers and names as people read them. Pure functions. */

const UNITS = ["B", "kB", "MB", "GB", "TB"];

/**
 * A size in decimal units, three digits, that does not break over lines: "7.81 MB".
 * @param {number} bytes
 */
export function formatBytes(bytes) {
  let value = bytes;
  let unit = 0;
  while (value >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit ? threeDigits(value) : Math.round(value)}\u00a0${UNITS[unit]}`;
}

/**
 * "16.2 GB → 8.4 GB (−48 %)"
 * @param {number} before bytes
 * @param {number} after bytes
 */
export function formatSizes(before, after) {
  const sizes = `${formatBytes(before)} → ${formatBytes(after)}`;
  return before ? `${sizes} (${formatChange(after / before - 1)})` : sizes;
}

/** A relative change in whole percent with its sign: "−48 %". */
export function formatChange(change) {
  const percent = Math.round(100 * change);
  return `${percent > 0 ? "+" : percent < 0 ? "−" : "±"}${Math.abs(percent)} %`;
}

/** A share from 0 to 1 in percent; what is there but tiny is never shown as nothing. */
export function formatShare(share) {
  const percent = 100 * share;
  if (percent > 0 && percent < 0.01) return "< 0.01 %";
  return `${percent === 0 ? 0 : percent < 10 ? percent.toFixed(2) : percent.toFixed(1)} %`;
}

/** A time left or spent: "8 s", "2 min 05 s", "1 h 03 min". */
export function formatSeconds(seconds) {
  const whole = Math.max(0, Math.ceil(seconds));
  if (whole < 60) return `${whole} s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes} min ${twoDigits(whole % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${twoDigits(minutes % 60)} min`;
}

/** A ratio in dB; null, which stands for infinite, is an exact copy. */
export function formatDecibels(decibels) {
  return decibels === null || decibels === undefined ? "∞ dB" : `${signed(decibels.toFixed(1))} dB`;
}

/** A small signed number: "−3.1e-7", and "0" for none. */
export function formatSmall(value) {
  return value === 0 ? "0" : signed(value.toExponential(1));
}

/**
 * Why tensors are kept, in short.
 * @param {{pattern: string, preset: string, text: string}} reason
 */
export function formatReason({ pattern, preset, text }) {
  if (!pattern) return text;
  return preset ? `${pattern} (preset ${preset})` : `${pattern} (your pattern)`;
}

/** "1 layer", "2 layers" */
export function formatCount(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

/**
 * How fast a job is and when it will end.
 * @param {{done: number, total: number, seconds: number}} state bytes, and the seconds they took
 * @returns {{share: number, speed: string, left: string}} share from 0 to 1; empty texts where nothing can be told
 */
export function pace({ done, total, seconds }) {
  const share = total ? done / total : 1;
  if (!done || !seconds) return { share, speed: "", left: "" };
  return {
    share,
    speed: `${formatBytes(done / seconds)}/s`,
    left: done < total ? formatSeconds((seconds * (total - done)) / done) : "",
  };
}

/**
 * A histogram with a few wide bins in place of many; what is left over goes to the last one.
 * @param {number[]} counts
 * @param {number} low lower edge of the first bin
 * @param {number} high upper edge of the last bin
 * @param {number} group how many bins become one
 * @returns {{low: number, high: number, count: number}[]}
 */
export function rebin(counts, low, high, group) {
  const width = (high - low) / counts.length;
  const bins = [];
  for (let start = 0; start < counts.length; start += group) {
    const end = Math.min(start + group, counts.length);
    const count = counts.slice(start, end).reduce((sum, n) => sum + n, 0);
    bins.push({ low: low + start * width, high: low + end * width, count });
  }
  return bins;
}

function threeDigits(value) {
  return value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0);
}

function twoDigits(value) {
  return String(value).padStart(2, "0");
}

function signed(text) {
  return text.replace(/^-/, "−");
}
