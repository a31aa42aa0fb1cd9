import assert from "node:assert/strict";
import { test } from "node:test";
import { planSentence, reasonText } from "../../js/plan_view.js";

test("reasons", () => {
  const preset = { kind: "preset_pattern", pattern: "img_in", preset: "flux", text: "kept by pattern 'img_in'" };
  const own = { kind: "keep_pattern", pattern: "blocks.0", preset: "", text: "kept by pattern 'blocks.0'" };
  const other = { kind: "not_linear", pattern: "", preset: "", text: "not a Linear layer" };
  assert.deepEqual([preset, own, other].map(reasonText), [
    "img_in (preset flux)",
    "blocks.0 (your pattern)",
    "not a Linear layer",
  ]);
});

test("a plan in one sentence", () => {
  const plan = {
    source: "a.safetensors",
    bytes_before: 2_000_000,
    bytes_after: 1_100_000,
    quantized: { count: 1 },
    kept: [{ count: 3 }, { count: 4 }],
  };
  const expected = "Plan for a.safetensors: 1 layer quantized, 7 tensors kept, 2.00\u00a0MB to 1.10\u00a0MB";
  assert.equal(planSentence(plan), expected);
});
