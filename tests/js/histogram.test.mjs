import assert from "node:assert/strict";
import { test } from "node:test";
import { barsOf, describeBin, mergeBins } from "../../js/histogram.js";

test("merged bins hold the counts of the bins they replace", () => {
  const bins = mergeBins([1, 2, 3, 4, 5], -5, 5, 2);
  assert.deepEqual(bins, [
    { low: -5, high: -1, count: 3 },
    { low: -1, high: 3, count: 7 },
    { low: 3, high: 5, count: 5 },
  ]);
});

test("1/2 and 1 are edges of bars, and 0 has a bar of its own", () => {
  const counts = Array.from({ length: 81 }, (_, index) => index);
  const bars = barsOf(counts, -1.25, 1.25);
  assert.equal(bars.length, 21);
  assert.deepEqual(bars[10], { low: 0, high: 0, count: 40 });
  assert.deepEqual(bars[9], { low: -0.125, high: 0, count: 36 + 37 + 38 + 39 });
  assert.deepEqual(bars[11], { low: 0, high: 0.125, count: 41 + 42 + 43 + 44 });
  const edges = bars.map((bar) => bar.high);
  for (const edge of [-1, -0.5, 0.5, 1]) assert.ok(edges.includes(edge), `${edge}`);
  assert.equal(describeBin(bars[10], 80), "at 0: 50 %");
});

test("the outermost bins hold everything beyond the axis", () => {
  const bin = { low: 1, high: 1.5, count: 1 };
  assert.equal(describeBin(bin, 4), "1.00 to 1.50: 25 %");
  assert.equal(describeBin(bin, 4, { isLast: true }), "above 1.00: 25 %");
  assert.equal(describeBin({ ...bin, low: -1.5, high: -1 }, 4, { isFirst: true }), "below −1.00: 25 %");
});
