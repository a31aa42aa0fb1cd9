import assert from "node:assert/strict";
import { test } from "node:test";
import { planRequests } from "../../js/plan_request.js";

/** A graph with a loader (1), other nodes, and a quantize node (9) with these widgets and links to its inputs. */
function graph(widgets, { calibration = null, others = {}, links = [] } = {}) {
  const created = { nodes: [], links: {} };
  const quantize = {
    comfyClass: "StochasticFP8Quantize",
    inputs: [
      { name: "model", type: "MODEL", link: 100 },
      { name: "calibration", type: "FP8_CALIBRATION", link: calibration },
    ],
    widgets: Object.entries(widgets).map(([name, value]) => ({ name, value })),
  };
  const loader = { type: "UNETLoader", widgets: [{ name: "unet_name", value: "a.safetensors" }] };
  for (const [id, node] of Object.entries({ 1: loader, ...others, 9: quantize })) {
    created.nodes.push({ id: Number(id), graph: created, mode: 0, inputs: [], widgets: [], ...node });
  }
  for (const [id, origin] of [[100, 1], ...links]) created.links[id] = { origin_id: origin, origin_slot: 0 };
  created.getNodeById = (id) => created.nodes.find((node) => node.id === id);
  return created;
}

const requests = (root) => planRequests(root.getNodeById(9), root);
const CHOICES = { rounding: "calibrated", layers: "measured", size_limit: 12, target_quality: 0 };
const LOAD = { type: "StochasticFP8LoadCalibration", widgets: [{ name: "calibration_name", value: "c.safetensors" }] };
const HINT = /needs a calibration file\. Connect Load Calibration/;

test("a preset needs neither rounding nor calibration", () => {
  const root = graph({ ...CHOICES, layers: "auto" }, { calibration: 101, others: { 2: LOAD }, links: [[101, 2]] });
  assert.deepEqual(requests(root).requests, [
    { file: "diffusion_models/a.safetensors", part: "model", layers: "auto", size_limit: 12, target_quality: 0 },
  ]);
});

test("layers measured name the calibration file and the rounding", () => {
  const root = graph(CHOICES, { calibration: 101, others: { 2: LOAD }, links: [[101, 2]] });
  const [request] = requests(root).requests;
  assert.equal(request.calibration, "fp8_calibrations/c.safetensors");
  assert.equal(request.rounding, "calibrated");
});

test("layers measured without a calibration file", () => {
  assert.match(requests(graph(CHOICES)).hint, HINT);
});

test("a calibration that is measured anew is not the file that goes into it", () => {
  const sensitivity = {
    comfyClass: "StochasticFP8Sensitivity",
    inputs: [{ name: "calibration", type: "FP8_CALIBRATION", link: 102 }],
  };
  const links = [
    [101, 3],
    [102, 2],
  ];
  const root = graph(CHOICES, { calibration: 101, others: { 2: LOAD, 3: sensitivity }, links });
  assert.match(requests(root).hint, HINT);
});

test("calibrated rounding without a calibration is a problem", () => {
  const problems = (widgets, links) => requests(graph(widgets, links)).problems;
  const linked = { calibration: 101, others: { 2: LOAD }, links: [[101, 2]] };
  assert.match(problems({ rounding: "calibrated" })[0], /needs a calibration/);
  assert.deepEqual(problems({ rounding: "calibrated" }, linked), []);
  assert.deepEqual(problems({ rounding: "nearest" }), []);
});
