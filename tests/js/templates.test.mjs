import assert from "node:assert/strict";
import { test } from "node:test";
import { restoreView, sortTemplates } from "../../js/templates.js";

test("the examples of the pack are sorted", async () => {
  const api = { getWorkflowTemplates: async () => ({ ours: ["2 b", "1 a"], theirs: ["z", "a"] }) };
  sortTemplates(api, "ours");
  assert.deepEqual(await api.getWorkflowTemplates(), { ours: ["1 a", "2 b"], theirs: ["z", "a"] });
});

test("a page without templates is left as it is", () => {
  const api = {};
  sortTemplates(api, "ours");
  assert.deepEqual(api, {});
});

/** A page that shows a graph, and whose user wants the zoom of workflows restored or not. */
function page(extra, restores = true) {
  const canvas = { ds: { scale: 0.5, offset: [0, 0] }, setDirty() {} };
  return { graph: { extra }, canvas, extensionManager: { setting: { get: () => restores } } };
}

const ds = { scale: 0.9, offset: [3, 4] };

test("an example is shown as its file says, once", () => {
  const app = page({ ds, stochastic_fp8_example: true });
  restoreView(app);
  assert.deepEqual(app.canvas.ds, ds);
  assert.deepEqual(app.graph.extra, { ds });
});

test("other workflows are left as they are", () => {
  for (const app of [page({ ds }), page(undefined), page({ ds, stochastic_fp8_example: true }, false)]) {
    restoreView(app);
    assert.equal(app.canvas.ds.scale, 0.5);
  }
});
