/** Finds the file behind a MODEL or CLIP input by following its link back to a loader. Reads the graph only. */

const MODEL_FILE = { kind: "diffusion_models", widgets: ["unet_name"] };
const CHECKPOINT = { kind: "checkpoints", widgets: ["ckpt_name"] };

/** Loader -> the kind of its files and the widgets that name them. */
const LOADERS = {
  UNETLoader: MODEL_FILE,
  CheckpointLoaderSimple: CHECKPOINT,
  CheckpointLoader: CHECKPOINT,
  ImageOnlyCheckpointLoader: CHECKPOINT,
  unCLIPCheckpointLoader: CHECKPOINT,
  CLIPLoader: { kind: "text_encoders", widgets: ["clip_name"] },
  DualCLIPLoader: { kind: "text_encoders", widgets: ["clip_name1", "clip_name2"] },
  TripleCLIPLoader: { kind: "text_encoders", widgets: ["clip_name1", "clip_name2", "clip_name3"] },
  QuadrupleCLIPLoader: {
    kind: "text_encoders",
    widgets: ["clip_name1", "clip_name2", "clip_name3", "clip_name4"],
  },
};

const SHIPPED = { StochasticFP8DemoModel: "demo/tiny_sd3_landscapes.safetensors" };

/** What a link inside a subgraph starts at when it comes from outside; newer pages write ids as text. */
const SUBGRAPH_INPUT = -10;
const MUTED = 2;
const BYPASSED = 4;
const LONGEST_WAY = 200;

/**
 * @typedef {{files: string[]} | {needs: string}} Trace files as `kind/name`, or what is missing to find them
 */

/**
 * The files that a node's input comes from.
 * @param {object} node
 * @param {string} inputName
 * @param {object} rootGraph
 * @returns {Trace}
 */
export function traceFiles(node, inputName, rootGraph) {
  const input = node.inputs?.find((slot) => slot.name === inputName);
  if (!input) return { needs: `an input named ${inputName}` };
  let way = origin(node.graph, input.link, rootGraph);
  for (let step = 0; way && step < LONGEST_WAY; step += 1) {
    const found = filesOf(way.node, rootGraph);
    if (found) return found;
    const next = back(way, input.type, rootGraph);
    if (!next) return { needs: `a loader node: ${way.node.title || way.node.type} does not say which file it uses` };
    way = next;
  }
  return { needs: `a loader node at the input ${inputName}` };
}

/** Whether an input of a node, or a widget that was made one, is connected. */
export function isLinked(node, name) {
  return Boolean(node.inputs?.some((slot) => (slot.widget?.name ?? slot.name) === name && slot.link != null));
}

/** One step back from an output: the node and slot that the value comes from. */
function back({ node, slot }, type, rootGraph) {
  if (node.mode === MUTED) return null;
  if (node.subgraph && node.mode !== BYPASSED) {
    return origin(node.subgraph, node.subgraph.outputs[slot]?.linkIds?.[0], rootGraph);
  }
  const input =
    node.inputs?.find((candidate) => candidate.type === type && candidate.link != null) ??
    node.inputs?.find((candidate) => candidate.type === "*" && candidate.link != null);
  return input ? origin(node.graph, input.link, rootGraph) : null;
}

/** The node and slot that a link starts at; through the wall of a subgraph if need be. */
function origin(graph, linkId, rootGraph) {
  const link = linkOf(graph, linkId);
  if (!link) return null;
  if (Number(link.origin_id) !== SUBGRAPH_INPUT) {
    const node = graph.getNodeById(link.origin_id);
    return node ? { node, slot: link.origin_slot } : null;
  }
  const outer = nodeOfSubgraph(rootGraph, graph);
  return outer ? origin(outer.graph, outer.inputs[link.origin_slot]?.link, rootGraph) : null;
}

function filesOf(node, rootGraph) {
  const type = node.comfyClass ?? node.type;
  if (node.mode === MUTED || node.mode === BYPASSED) return null;
  if (SHIPPED[type]) return { files: [SHIPPED[type]] };
  const loader = LOADERS[type];
  if (!loader) return null;
  const names = loader.widgets.map((name) => widgetValue(node, name, rootGraph));
  if (names.some((name) => !name)) return { needs: `a file chosen in ${node.title || type}` };
  return { files: names.map((name) => `${loader.kind}/${name}`) };
}

/** A widget's value; where it comes over a wire, that of the widget at the other end, if there is one. */
function widgetValue(node, name, rootGraph) {
  const slot = node.inputs?.find((candidate) => candidate.widget?.name === name && candidate.link != null);
  if (!slot) return node.widgets?.find((widget) => widget.name === name)?.value;
  const link = linkOf(node.graph, slot.link);
  if (Number(link?.origin_id) === SUBGRAPH_INPUT) return promotedValue(node.graph, link.origin_slot, rootGraph);
  const source = link && node.graph.getNodeById(link.origin_id);
  return source?.type === "PrimitiveNode" ? source.widgets?.[0]?.value : undefined;
}

/** The value that a subgraph's input has on the node that shows the subgraph. */
function promotedValue(subgraph, slot, rootGraph) {
  const outer = nodeOfSubgraph(rootGraph, subgraph);
  const input = outer?.inputs[slot];
  return input && widgetValue(outer, input.widget?.name ?? input.name, rootGraph);
}

function linkOf(graph, id) {
  return id == null ? null : (graph.getLink?.(id) ?? graph.links[id]);
}

/** The node that shows a subgraph, wherever it is. */
function nodeOfSubgraph(graph, subgraph) {
  for (const node of graph.nodes ?? []) {
    if (!node.subgraph) continue;
    if (node.subgraph === subgraph) return node;
    const inner = nodeOfSubgraph(node.subgraph, subgraph);
    if (inner) return inner;
  }
  return null;
}

/**
 * The node that the server calls by an id such as "7" or, in subgraphs, "5:7".
 * @param {object} rootGraph
 * @param {string} executionId
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
