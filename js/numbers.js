/** Numbers as people read them. Pure functions. kernels/display.py is the same for Python. */

const UNITS = ["B", "kB", "MB", "GB", "TB"];

/**
 * A size in decimal units with three digits: "516 B", "7.80 MB". The space does not break.
 * @param {number} bytes
 * @returns {string}
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
 * Two sizes and the change: "16.2 GB → 8.40 GB (−48 %)".
 * @param {number} before bytes
 * @param {number} after bytes
 * @returns {string}
 */
export function formatSizes(before, after) {
  const sizes = `${formatBytes(before)} → ${formatBytes(after)}`;
  return before ? `${sizes} (${formatChange(after / before - 1)})` : sizes;
}

/**
 * A relative change in whole percent with its sign: "−48 %".
 * @param {number} change
 * @returns {string}
 */
export function formatChange(change) {
  const percent = Math.round(100 * change);
  return `${percent > 0 ? "+" : percent < 0 ? "−" : "±"}${Math.abs(percent)} %`;
}

/**
 * A share in percent with up to three significant digits: "8.21 %", "50 %". Only 0 is "0 %".
 * @param {number} share 1 for all
 * @returns {string}
 */
export function formatShare(share) {
  if (share > 0 && share < 1e-5) return "<0.001 %";
  return `${Number((100 * share).toPrecision(3))} %`;
}

/**
 * A duration, rounded up to seconds: "8 s", "2 min 05 s", "1 h 03 min".
 * @param {number} seconds
 * @returns {string}
 */
export function formatSeconds(seconds) {
  const whole = Math.max(0, Math.ceil(seconds));
  if (whole < 60) return `${whole} s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes} min ${twoDigits(whole % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${twoDigits(minutes % 60)} min`;
}

/**
 * A level with one decimal: "28.6 dB".
 * @param {number|null|undefined} decibels null or undefined for infinite: nothing was lost
 * @returns {string}
 */
export function formatDecibels(decibels) {
  if (decibels === null || decibels === undefined) return "∞ dB";
  const text = decibels.toFixed(1);
  return `${text === "-0.0" ? "0.0" : withMinus(text)} dB`;
}

/**
 * A number near 0, such as a bias, with two digits and a power of ten: "−3.1e−7". 0 is "0".
 * @param {number} value
 * @returns {string}
 */
export function formatSmall(value) {
  return value === 0 ? "0" : withMinus(value.toExponential(1).replace("+", ""));
}

/**
 * The text of a number with minus signs in place of hyphens.
 * @param {string} text
 * @returns {string}
 */
export function withMinus(text) {
  return text.replaceAll("-", "−");
}

function threeDigits(value) {
  return value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0);
}

function twoDigits(value) {
  return String(value).padStart(2, "0");
}
