import assert from "node:assert/strict";
import { test } from "node:test";
import {
  formatBytes,
  formatChange,
  formatCount,
  formatDecibels,
  formatReason,
  formatSeconds,
  formatShare,
  formatSizes,
  formatSmall,
  pace,
  rebin,
} from "../../js/format.js";

const cases = (name, format, table) =>
  test(name, () => {
    for (const [input, expected] of table) assert.equal(format(input), expected);
  });

cases("bytes", formatBytes, [
  [0, "0\u00a0B"],
  [999, "999\u00a0B"],
  [1000, "1.00\u00a0kB"],
  [9_995, "10.0\u00a0kB"],
  [99_950, "100\u00a0kB"],
  [999_499, "999\u00a0kB"],
  [999_500, "1.00\u00a0MB"],
  [23_802_932_552, "23.8\u00a0GB"],
  [5e15, "5000\u00a0TB"],
]);

cases("seconds", formatSeconds, [
  [-1, "0 s"],
  [0.2, "1 s"],
  [59, "59 s"],
  [59.5, "1 min 00 s"],
  [125, "2 min 05 s"],
  [3780, "1 h 03 min"],
]);

cases("shares", formatShare, [
  [0, "0 %"],
  [0.00001, "< 0.01 %"],
  [0.0821, "8.21 %"],
  [0.5, "50.0 %"],
  [1, "100.0 %"],
]);

cases("decibels", formatDecibels, [
  [null, "∞ dB"],
  [28.64, "28.6 dB"],
  [-3.06, "−3.1 dB"],
]);

cases("small numbers", formatSmall, [
  [0, "0"],
  [-6.84e-7, "−6.8e-7"],
  [0.5, "5.0e-1"],
]);

cases("changes", formatChange, [
  [-0.484, "−48 %"],
  [0.001, "±0 %"],
  [0.2, "+20 %"],
]);

cases("reasons", formatReason, [
  [{ pattern: "img_in", preset: "flux", text: "…" }, "img_in (preset flux)"],
  [{ pattern: "blocks.0", preset: "", text: "…" }, "blocks.0 (your pattern)"],
  [{ pattern: "", preset: "", text: "not a Linear layer" }, "not a Linear layer"],
]);

test("sizes before and after", () => {
  assert.equal(formatSizes(2_000_000, 1_000_000), "2.00\u00a0MB → 1.00\u00a0MB (−50 %)");
  assert.equal(formatSizes(0, 0), "0\u00a0B → 0\u00a0B");
});

test("counts", () => {
  assert.equal(formatCount(1, "layer"), "1 layer");
  assert.equal(formatCount(12_000, "layer"), "12,000 layers");
});

test("the pace of a job", () => {
  const told = { share: 0.25, speed: "1.00\u00a0GB/s", left: "3 s" };
  assert.deepEqual(pace({ done: 1e9, total: 4e9, seconds: 1 }), told);
  assert.deepEqual(pace({ done: 0, total: 4e9, seconds: 1 }), { share: 0, speed: "", left: "" });
  assert.deepEqual(pace({ done: 0, total: 0, seconds: 0 }), { share: 1, speed: "", left: "" });
});

test("wide bins hold what the narrow ones held", () => {
  const bins = rebin([1, 2, 3, 4, 5], -5, 5, 2);
  assert.deepEqual(bins, [
    { low: -5, high: -1, count: 3 },
    { low: -1, high: 3, count: 7 },
    { low: 3, high: 5, count: 5 },
  ]);
});
