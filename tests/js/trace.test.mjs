import assert from "node:assert/strict";
import { test } from "node:test";
import { isLinked, nodeByExecutionId, traceFiles } from "../../js/trace.js";

/** A graph as the page has it. Nodes: id -> what differs from a node without inputs; links: [id, from, slot]. */
function graph(nodes, links = []) {
  const made = { nodes: [], links: {} };
  for (const [id, node] of Object.entries(nodes)) {
    made.nodes.push({ id: Number(id), graph: made, mode: 0, inputs: [], widgets: [], ...node });
  }
  for (const [id, origin, slot] of links) made.links[id] = { origin_id: origin, origin_slot: slot };
  made.getNodeById = (id) => made.nodes.find((node) => node.id === id);
  return made;
}

const loader = (value) => ({ type: "UNETLoader", title: "Load", widgets: [{ name: "unet_name", value }] });
const model = (link) => ({ name: "model", type: "MODEL", link });
const files = (at, root) => traceFiles(at, "model", root);

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
  assert.deepEqual(traceFiles(root.getNodeById(2), "clip", root), expected);
});

test("into a subgraph and out of one", () => {
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

test("a file name that comes over a wire", () => {
  const wired = {
    ...loader("old.safetensors"),
    inputs: [{ name: "unet_name", type: "COMBO", link: 5, widget: { name: "unet_name" } }],
  };
  const target = { inputs: [model(7)] };
  const links = [
    [7, 1, 0],
    [5, 3, 0],
  ];
  const primitive = graph(
    { 1: wired, 2: target, 3: { type: "PrimitiveNode", widgets: [{ value: "new.safetensors" }] } },
    links,
  );
  assert.deepEqual(files(primitive.getNodeById(2), primitive), { files: ["diffusion_models/new.safetensors"] });
  const unknown = graph({ 1: wired, 2: target, 3: { type: "Other" } }, links);
  assert.deepEqual(files(unknown.getNodeById(2), unknown), { needs: "a file chosen in Load" });
});

test("what is missing is named", () => {
  const root = graph(
    { 1: { type: "Maker", title: "Maker" }, 2: { inputs: [model(7)] }, 3: { inputs: [model(null)] }, 4: {} },
    [[7, 1, 0]],
  );
  const needs = (id) => files(root.getNodeById(id), root).needs;
  assert.equal(needs(2), "a loader node: Maker does not say which file it uses");
  assert.equal(needs(3), "a loader node at the input model");
  assert.equal(needs(4), "an input named model");
});

test("a muted loader gives nothing", () => {
  const root = graph({ 1: { ...loader("a.safetensors"), mode: 2 }, 2: { inputs: [model(7)] } }, [[7, 1, 0]]);
  assert.equal(files(root.getNodeById(2), root).needs, "a loader node: Load does not say which file it uses");
});

test("a widget that was made an input is linked", () => {
  const node = {
    inputs: [
      { name: "x", widget: { name: "keep" }, link: 3 },
      { name: "only", link: null },
    ],
  };
  assert.deepEqual([isLinked(node, "keep"), isLinked(node, "only"), isLinked(node, "seed")], [true, false, false]);
});

test("the server's node ids lead into subgraphs", () => {
  const inner = graph({ 7: {} });
  const root = graph({ 5: { subgraph: inner }, 7: {} });
  assert.equal(nodeByExecutionId(root, "7"), root.getNodeById(7));
  assert.equal(nodeByExecutionId(root, "5:7"), inner.getNodeById(7));
  assert.equal(nodeByExecutionId(root, "6:7"), null);
});
