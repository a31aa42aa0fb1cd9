import assert from "node:assert/strict";
import { test } from "node:test";
import { describeBin, mergeBins } from "../../js/histogram.js";

test("merged bins hold the counts of the bins they replace", () => {
  const bins = mergeBins([1, 2, 3, 4, 5], -5, 5, 2);
  assert.deepEqual(bins, [
    { low: -5, high: -1, count: 3 },
    { low: -1, high: 3, count: 7 },
    { low: 3, high: 5, count: 5 },
  ]);
});

test("the outermost bins hold everything beyond the axis", () => {
  const bin = { low: 1, high: 1.5, count: 1 };
  assert.equal(describeBin(bin, 4), "1.00 to 1.50: 25 %");
  assert.equal(describeBin(bin, 4, { isLast: true }), "above 1.00: 25 %");
  assert.equal(describeBin({ ...bin, low: -1.5, high: -1 }, 4, { isFirst: true }), "below −1.00: 25 %");
});
