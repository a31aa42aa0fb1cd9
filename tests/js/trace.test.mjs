import assert from "node:assert/strict";
import { test } from "node:test";
import { findFiles, isLinked, locatorId, nodeByExecutionId } from "../../js/trace.js";

/** A graph as in the page. nodes: id -> changes to a node without inputs. links: [id, origin node, origin slot]. */
function graph(nodes, links = []) {
  const created = { nodes: [], links: {} };
  for (const [id, node] of Object.entries(nodes)) {
    created.nodes.push({ id: Number(id), graph: created, mode: 0, inputs: [], widgets: [], ...node });
  }
  for (const [id, origin, slot] of links) created.links[id] = { origin_id: origin, origin_slot: slot };
  created.getNodeById = (id) => created.nodes.find((node) => node.id === id);
  return created;
}

const loader = (value) => ({ type: "UNETLoader", title: "Load", widgets: [{ name: "unet_name", value }] });
const model = (link) => ({ name: "model", type: "MODEL", link });
const files = (node, root) => findFiles(node, "model", root);

test("a loader next to the node", () => {
  const root = graph({ 1: loader("a.safetensors"), 2: { inputs: [model(7)] } }, [[7, 1, 0]]);
  assert.deepEqual(files(root.getNodeById(2), root), { files: ["diffusion_models/a.safetensors"] });
});

test("through a LoRA and a bypassed loader of another kind", () => {
  const lora = { type: "LoraLoader", inputs: [model(7), { name: "clip", type: "CLIP", link: 9 }] };
  const root = graph(
    { 1: loader("a.safetensors"), 2: lora, 3: { ...lora, mode: 4, inputs: [model(8)] }, 4: { inputs: [model(6)] } },
    [
      [7, 1, 0],
      [8, 2, 0],
      [6, 3, 0],
    ],
  );
  assert.deepEqual(files(root.getNodeById(4), root), { files: ["diffusion_models/a.safetensors"] });
});

test("two text encoders are two files", () => {
  const dual = {
    type: "DualCLIPLoader",
    widgets: [
      { name: "clip_name1", value: "l.safetensors" },
      { name: "clip_name2", value: "t5.safetensors" },
    ],
  };
  const root = graph({ 1: dual, 2: { inputs: [{ name: "clip", type: "CLIP", link: 7 }] } }, [[7, 1, 0]]);
  const expected = { files: ["text_encoders/l.safetensors", "text_encoders/t5.safetensors"] };
  assert.deepEqual(findFiles(root.getNodeById(2), "clip", root), expected);
});

test("into and out of a subgraph", () => {
  const inner = graph({ 1: loader("in.safetensors"), 5: { inputs: [model(3)] } }, [
    [2, 1, 0],
    [3, "-10", 0],
  ]);
  inner.outputs = [{ linkIds: [2] }];
  const root = graph(
    { 8: loader("out.safetensors"), 9: { subgraph: inner, inputs: [model(6)] }, 4: { inputs: [model(7)] } },
    [
      [6, 8, 0],
      [7, 9, 0],
    ],
  );
  assert.deepEqual(files(root.getNodeById(4), root), { files: ["diffusion_models/in.safetensors"] });
  assert.deepEqual(files(inner.getNodeById(5), root), { files: ["diffusion_models/out.safetensors"] });
});

test("a linked file name", () => {
  const linked = {
    ...loader("old.safetensors"),
    inputs: [{ name: "unet_name", type: "COMBO", link: 5, widget: { name: "unet_name" } }],
  };
  const target = { inputs: [model(7)] };
  const links = [
    [7, 1, 0],
    [5, 3, 0],
  ];
  const primitive = graph(
    { 1: linked, 2: target, 3: { type: "PrimitiveNode", widgets: [{ value: "new.safetensors" }] } },
    links,
  );
  assert.deepEqual(files(primitive.getNodeById(2), primitive), { files: ["diffusion_models/new.safetensors"] });
  const unknown = graph({ 1: linked, 2: target, 3: { type: "Other" } }, links);
  assert.deepEqual(files(unknown.getNodeById(2), unknown), { hint: "Choose a file in Load to see the plan." });
});

test("a hint says what to do where no file is found", () => {
  const root = graph(
    { 1: { type: "Maker", title: "Maker" }, 2: { inputs: [model(7)] }, 3: { inputs: [model(null)] }, 4: {} },
    [[7, 1, 0]],
  );
  const hint = (id) => files(root.getNodeById(id), root).hint;
  assert.equal(hint(2), "Maker names no model file. Connect a loader node to see the plan.");
  assert.equal(hint(3), "Connect a loader node to model to see the plan.");
  assert.equal(hint(4), "This node has no input named model.");
});

test("a muted loader is not used", () => {
  const root = graph({ 1: { ...loader("a.safetensors"), mode: 2 }, 2: { inputs: [model(7)] } }, [[7, 1, 0]]);
  const expected = "Load is muted. Connect a loader node to model to see the plan.";
  assert.equal(files(root.getNodeById(2), root).hint, expected);
});

test("inputs and widgets that are linked", () => {
  const node = {
    inputs: [
      { name: "x", widget: { name: "keep" }, link: 3 },
      { name: "only", link: null },
    ],
  };
  assert.deepEqual([isLinked(node, "keep"), isLinked(node, "only"), isLinked(node, "seed")], [true, false, false]);
});

test("execution ids of nodes in subgraphs", () => {
  const inner = graph({ 7: {} });
  const root = graph({ 5: { subgraph: inner }, 7: {} });
  assert.equal(nodeByExecutionId(root, "7"), root.getNodeById(7));
  assert.equal(nodeByExecutionId(root, "5:7"), inner.getNodeById(7));
  assert.equal(nodeByExecutionId(root, "6:7"), null);
});

test("the id under which the page keeps a node's outputs", () => {
  assert.equal(locatorId({ id: 7, graph: {} }), "7");
  assert.equal(locatorId({ id: 7, graph: { id: "a-b", isRootGraph: true } }), "7");
  assert.equal(locatorId({ id: 7, graph: { id: "a-b", isRootGraph: false } }), "a-b:7");
});
