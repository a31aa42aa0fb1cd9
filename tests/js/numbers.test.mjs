import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import {
  formatBytes,
  formatChange,
  formatDecibels,
  formatSeconds,
  formatShare,
  formatSizes,
  formatSmall,
} from "../../js/numbers.js";

/** The table that kernels/display.py is tested against as well. */
const DISPLAY_CASES = JSON.parse(readFileSync(new URL("../display_cases.json", import.meta.url), "utf8"));

const FUNCTIONS = {
  bytes: formatBytes,
  share: formatShare,
  decibels: formatDecibels,
  seconds: formatSeconds,
  small: formatSmall,
};

/** Nouns of the page are in the table of words. */
const PYTHON_ONLY = ["count"];

test("every kind of number in the shared table has a function here", () => {
  assert.deepEqual(Object.keys(DISPLAY_CASES).sort(), [...Object.keys(FUNCTIONS), ...PYTHON_ONLY].sort());
});

for (const [kind, format] of Object.entries(FUNCTIONS)) {
  test(`${kind}: the same text as in Python`, () => {
    for (const [input, expected] of DISPLAY_CASES[kind]) {
      const text = format(input);
      assert.equal(text.replaceAll("\u00a0", " "), expected);
    }
  });
}

test("sizes before and after, with spaces that do not break", () => {
  assert.equal(formatSizes(2_000_000, 1_000_000), "2.00\u00a0MB → 1.00\u00a0MB (−50 %)");
  assert.equal(formatSizes(0, 0), "0\u00a0B → 0\u00a0B");
});

test("changes", () => {
  assert.deepEqual([-0.484, 0.001, 0.2].map(formatChange), ["−48 %", "±0 %", "+20 %"]);
});
