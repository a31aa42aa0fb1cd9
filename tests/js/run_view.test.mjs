import assert from "node:assert/strict";
import { test } from "node:test";
import { layerText, progress } from "../../js/run_view.js";

test("share, speed and time left", () => {
  const running = { share: 0.25, speed: "1.00\u00a0GB/s", timeLeft: "3 s" };
  assert.deepEqual(progress({ done: 1e9, total: 4e9, seconds: 1 }), running);
  assert.deepEqual(progress({ done: 0, total: 4e9, seconds: 1 }), { share: 0, speed: "", timeLeft: "" });
  assert.deepEqual(progress({ done: 0, total: 0, seconds: 0 }), { share: 1, speed: "", timeLeft: "" });
});

test("the current layer", () => {
  assert.equal(layerText({}), "Quantizing …");
  assert.equal(layerText({ layer: 2, layers: 1200 }), "Layer 3 of 1,200");
  assert.equal(layerText({ layer: 24, layers: 24 }), "Layer 24 of 24");
});
