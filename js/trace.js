/** Follows links back from a node's input to a loader, to find its model file. Reads the graph, changes nothing. */

import { t } from "./words.js";

const MODEL_FILE = { kind: "diffusion_models", widgets: ["unet_name"] };
const CHECKPOINT = { kind: "checkpoints", widgets: ["ckpt_name"] };

/** Loader type -> the kind of its files, and the widgets that hold their names. */
const LOADERS = {
  UNETLoader: MODEL_FILE,
  CheckpointLoaderSimple: CHECKPOINT,
  CheckpointLoader: CHECKPOINT,
  ImageOnlyCheckpointLoader: CHECKPOINT,
  unCLIPCheckpointLoader: CHECKPOINT,
  StochasticFP8LoadCalibration: { kind: "fp8_calibrations", widgets: ["calibration_name"] },
  CLIPLoader: { kind: "text_encoders", widgets: ["clip_name"] },
  DualCLIPLoader: { kind: "text_encoders", widgets: ["clip_name1", "clip_name2"] },
  TripleCLIPLoader: { kind: "text_encoders", widgets: ["clip_name1", "clip_name2", "clip_name3"] },
  QuadrupleCLIPLoader: {
    kind: "text_encoders",
    widgets: ["clip_name1", "clip_name2", "clip_name3", "clip_name4"],
  },
};

/** Nodes that make a calibration from another one: what goes into them is not what comes out. */
const MAKERS = ["StochasticFP8Calibrate", "StochasticFP8CalibrateTextEncoder", "StochasticFP8Sensitivity"];

/** Node type -> the file in this pack that it loads. */
const BUNDLED_FILES = { StochasticFP8DemoModel: "demo/tiny_sd3_landscapes.safetensors" };

/** The origin id of links that enter a subgraph through its inputs. Newer front ends store ids as strings. */
const SUBGRAPH_INPUT = -10;
const MUTED = 2;
const BYPASSED = 4;

/** Links that are followed at most, in case the graph has a cycle. */
const MAX_STEPS = 200;

/**
 * @typedef {{files: string[]} | {hint: string}} FoundFiles files as `kind/name`, or what to do so that they are found
 * @typedef {{node: object, slot: number}} Output an output of a node
 */

/**
 * The model files behind a node's input.
 * @param {object} node
 * @param {string} inputName
 * @param {object} rootGraph
 * @returns {FoundFiles}
 */
export function findFiles(node, inputName, rootGraph) {
  const input = node.inputs?.find((slot) => slot.name === inputName);
  if (!input) return { hint: t("hintNoInput", { input: inputName }) };
  let output = linkOrigin(node.graph, input.link, rootGraph);
  for (let step = 0; output && step < MAX_STEPS; step += 1) {
    const found = loaderFiles(output.node, rootGraph);
    if (found) return found;
    const next = upstreamOutput(output, input.type, rootGraph);
    if (!next) return { hint: deadEndHint(output.node, inputName) };
    output = next;
  }
  return { hint: t("hintConnect", { input: inputName }) };
}

/**
 * Whether an input of a node is linked. Widgets have inputs too.
 * @param {object} node
 * @param {string} name of the input or widget
 * @returns {boolean}
 */
export function isLinked(node, name) {
  return Boolean(node.inputs?.some((slot) => (slot.widget?.name ?? slot.name) === name && slot.link != null));
}

/**
 * The output from which an output gets its value, one node upstream.
 * @param {Output} output
 * @param {string} type of the value, such as "MODEL"
 * @param {object} rootGraph
 * @returns {Output|null}
 */
function upstreamOutput({ node, slot }, type, rootGraph) {
  if (node.mode === MUTED || makesItsOutput(node)) return null;
  if (node.subgraph && node.mode !== BYPASSED) {
    return linkOrigin(node.subgraph, node.subgraph.outputs[slot]?.linkIds?.[0], rootGraph);
  }
  const input =
    node.inputs?.find((candidate) => candidate.type === type && candidate.link != null) ??
    node.inputs?.find((candidate) => candidate.type === "*" && candidate.link != null);
  return input ? linkOrigin(node.graph, input.link, rootGraph) : null;
}

function makesItsOutput(node) {
  return node.mode !== BYPASSED && MAKERS.includes(node.comfyClass ?? node.type);
}

/**
 * The output at which a link starts. Links from outside a subgraph are followed outside.
 * @param {object} graph
 * @param {number|null|undefined} linkId
 * @param {object} rootGraph
 * @returns {Output|null}
 */
function linkOrigin(graph, linkId, rootGraph) {
  const link = getLink(graph, linkId);
  if (!link) return null;
  if (Number(link.origin_id) !== SUBGRAPH_INPUT) {
    const node = graph.getNodeById(link.origin_id);
    return node ? { node, slot: link.origin_slot } : null;
  }
  const outer = subgraphNode(rootGraph, graph);
  return outer ? linkOrigin(outer.graph, outer.inputs[link.origin_slot]?.link, rootGraph) : null;
}

/**
 * The files that a node loads; null if it is not an active loader.
 * @param {object} node
 * @param {object} rootGraph
 * @returns {FoundFiles|null}
 */
function loaderFiles(node, rootGraph) {
  const type = node.comfyClass ?? node.type;
  if (node.mode === MUTED || node.mode === BYPASSED) return null;
  if (BUNDLED_FILES[type]) return { files: [BUNDLED_FILES[type]] };
  const loader = LOADERS[type];
  if (!loader) return null;
  const names = loader.widgets.map((name) => widgetValue(node, name, rootGraph));
  if (names.some((name) => !name)) return { hint: t("hintChooseFile", { title: titleOf(node) }) };
  return { files: names.map((name) => `${loader.kind}/${name}`) };
}

/** A widget's value. For a linked widget, the value of the widget at the other end; undefined if there is none. */
function widgetValue(node, name, rootGraph) {
  const slot = node.inputs?.find((candidate) => candidate.widget?.name === name && candidate.link != null);
  if (!slot) return node.widgets?.find((widget) => widget.name === name)?.value;
  const link = getLink(node.graph, slot.link);
  if (Number(link?.origin_id) === SUBGRAPH_INPUT) return promotedValue(node.graph, link.origin_slot, rootGraph);
  const source = link && node.graph.getNodeById(link.origin_id);
  return source?.type === "PrimitiveNode" ? source.widgets?.[0]?.value : undefined;
}

/** The value of a subgraph's input, from the widget on the subgraph's node. */
function promotedValue(subgraph, slot, rootGraph) {
  const outer = subgraphNode(rootGraph, subgraph);
  const input = outer?.inputs[slot];
  return input && widgetValue(outer, input.widget?.name ?? input.name, rootGraph);
}

function getLink(graph, id) {
  return id == null ? null : (graph.getLink?.(id) ?? graph.links[id]);
}

/** What to do when the links end at a node that loads no file. */
function deadEndHint(node, inputName) {
  const title = titleOf(node);
  return node.mode === MUTED ? t("hintMuted", { title, input: inputName }) : t("hintConnectAny", { title });
}

function titleOf(node) {
  return node.title || node.type;
}

/** The node that contains a subgraph, at any depth; null if there is none. */
function subgraphNode(graph, subgraph) {
  for (const node of graph.nodes ?? []) {
    if (!node.subgraph) continue;
    if (node.subgraph === subgraph) return node;
    const inner = subgraphNode(node.subgraph, subgraph);
    if (inner) return inner;
  }
  return null;
}

/**
 * The id under which ComfyUI's page keeps what a node reported.
 * @param {object} node
 * @returns {string} such as "7" or, in a subgraph, "<id of the subgraph>:7"
 */
export function locatorId({ id, graph }) {
  return graph.isRootGraph === false ? `${graph.id}:${id}` : String(id);
}

/**
 * The node with an execution id of the server, such as "7" or, in a subgraph, "5:7".
 * @param {object} rootGraph
 * @param {string} executionId
 * @returns {object|null}
 */
export function nodeByExecutionId(rootGraph, executionId) {
  let graph = rootGraph;
  let node = null;
  for (const id of String(executionId).split(":")) {
    node = graph?.getNodeById(Number.isNaN(Number(id)) ? id : Number(id)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}
