/** The request for a node's plan, from the node's widgets and links. */

import { findFiles, isLinked } from "./trace.js";
import { t } from "./words.js";

/** Node type -> the part of the file that it quantizes, and its input for the model. */
const PLANNED = {
  StochasticFP8Quantize: { part: "model", input: "model" },
  StochasticFP8QuantizeTextEncoder: { part: "clip", input: "clip" },
  StochasticFP8QuantizeFile: { part: "file", input: null },
};

const LIMITS = ["size_limit", "target_quality"];
const CHOICES = [
  "format",
  "layers",
  "keep",
  "only",
  "layout",
  "matmul",
  "requantize",
  "for_another_comfyui",
  ...LIMITS,
];

/** The types of the nodes that have a plan. */
export const PLANNED_NODES = Object.keys(PLANNED);

/**
 * @param {object} node
 * @param {object} rootGraph
 * @returns {{requests: object[], linked: string[], problems: string[]} | {hint: string}} one request per file, the
 *   choices left out because their inputs are linked, and what is missing for a run; or what to do before there can be a
 *   plan
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
  if (choices.layers === "measured") {
    const calibration = findFiles(node, "calibration", rootGraph);
    if (calibration.hint) return { hint: t("hintMeasured") };
    choices.calibration = calibration.files[0];
    if (isLinked(node, "rounding")) linked.push("rounding");
    else choices.rounding = widgetValue(node, "rounding");
  }
  const problems = findProblems(node);
  return { requests: found.files.map((file) => ({ file, part, ...choices })), linked, problems };
}

/** What makes a run fail that the server cannot know. */
function findProblems(node) {
  const isCalibrated = widgetValue(node, "rounding") === "calibrated" && !isLinked(node, "rounding");
  return isCalibrated && !isLinked(node, "calibration") ? [t("problemCalibrated")] : [];
}

function widgetValue(node, name) {
  return node.widgets?.find((widget) => widget.name === name)?.value;
}

function chosenFile(node) {
  const value = isLinked(node, "file") ? "" : widgetValue(node, "file");
  return value ? { files: [value] } : { hint: t("hintChooseFileHere") };
}
