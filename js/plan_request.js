/** The request for a node's plan, from the node's widgets and links. */

import { findFiles, isLinked } from "./trace.js";

/** Node type -> the part of the file that it quantizes, and its input for the model. */
const PLANNED = {
  StochasticFP8Quantize: { part: "model", input: "model" },
  StochasticFP8QuantizeTextEncoder: { part: "clip", input: "clip" },
  StochasticFP8QuantizeFile: { part: "file", input: null },
};

const CHOICES = ["format", "layers", "keep", "only", "layout", "matmul", "requantize"];

/** The types of the nodes that have a plan. */
export const PLANNED_NODES = Object.keys(PLANNED);

/**
 * @param {object} node
 * @param {object} rootGraph
 * @returns {{requests: object[], linked: string[]} | {hint: string}} one request per file, and the choices left out
 *   because their inputs are linked; or what to do before there can be a plan
 */
export function planRequests(node, rootGraph) {
  const { part, input } = PLANNED[node.comfyClass];
  const found = input ? findFiles(node, input, rootGraph) : chosenFile(node);
  if (found.hint) return { hint: found.hint };
  const linked = CHOICES.filter((name) => isLinked(node, name));
  const choices = {};
  for (const { name, value } of node.widgets ?? []) {
    if (CHOICES.includes(name) && !linked.includes(name)) choices[name] = value;
  }
  return { requests: found.files.map((file) => ({ file, part, ...choices })), linked };
}

function chosenFile(node) {
  const value = isLinked(node, "file") ? "" : node.widgets?.find(({ name }) => name === "file")?.value;
  return value ? { files: [value] } : { hint: "Choose a file in this node to see the plan." };
}
