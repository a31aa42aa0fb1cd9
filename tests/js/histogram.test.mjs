import assert from "node:assert/strict";
import { test } from "node:test";
import { mergeBins } from "../../js/histogram.js";

test("merged bins hold the counts of the bins they replace", () => {
  const bins = mergeBins([1, 2, 3, 4, 5], -5, 5, 2);
  assert.deepEqual(bins, [
    { low: -5, high: -1, count: 3 },
    { low: -1, high: 3, count: 7 },
    { low: 3, high: 5, count: 5 },
  ]);
});
