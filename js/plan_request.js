/** What to ask the server for a node's plan, read off the node's widgets and links. */

import { isLinked, traceFiles } from "./trace.js";

/** Node -> the input whose model is planned, and which part of the file it is. */
const PLANNED = {
  StochasticFP8Quantize: { part: "model", input: "model" },
  StochasticFP8QuantizeTextEncoder: { part: "clip", input: "clip" },
  StochasticFP8QuantizeFile: { part: "file", input: null },
};

const CHOICES = ["format", "layers", "keep", "only", "layout", "matmul", "requantize"];

/** The nodes that have a plan. */
export const PLANNED_NODES = Object.keys(PLANNED);

/**
 * @param {object} node
 * @param {object} rootGraph
 * @returns {{requests: object[], wired: string[]} | {needs: string}} one request a file, and the choices that are left
 *   out because their value comes over a wire
 */
export function planRequests(node, rootGraph) {
  const { part, input } = PLANNED[node.comfyClass];
  const trace = input ? traceFiles(node, input, rootGraph) : chosenFile(node);
  if (trace.needs) return { needs: trace.needs };
  const wired = CHOICES.filter((name) => isLinked(node, name));
  const choices = {};
  for (const { name, value } of node.widgets ?? []) {
    if (CHOICES.includes(name) && !wired.includes(name)) choices[name] = value;
  }
  return { requests: trace.files.map((file) => ({ file, part, ...choices })), wired };
}

function chosenFile(node) {
  const value = isLinked(node, "file") ? "" : node.widgets?.find(({ name }) => name === "file")?.value;
  return value ? { files: [value] } : { needs: "a file chosen in this node" };
}
