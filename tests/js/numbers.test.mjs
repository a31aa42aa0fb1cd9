import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import {
  formatBytes,
  formatChange,
  formatCount,
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
  count: formatCount,
};

test("every kind of number in the shared table has a function here", () => {
  assert.deepEqual(Object.keys(DISPLAY_CASES).sort(), Object.keys(FUNCTIONS).sort());
});

for (const [kind, cases] of Object.entries(DISPLAY_CASES)) {
  test(`${kind}: the same text as in Python`, () => {
    for (const [input, expected] of cases) {
      const text = FUNCTIONS[kind](...[input].flat());
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
