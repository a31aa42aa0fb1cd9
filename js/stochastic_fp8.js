/** Adds the panels to the nodes, and hands them what the server says. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { ABSlider } from "./ab_slider.js";
import { chain } from "./dom.js";
import { Panel } from "./panel.js";
import { PLANNED_NODES } from "./plan_request.js";
import { nodeByExecutionId } from "./trace.js";

const SLIDER_NODE = "StochasticFP8ImageCompare";
const PANEL_SIZE = { width: 380, height: 260 };
/** What the canvas leaves around an element, inside its height. */
const MARGIN = 10;
const SLIDER_SIZE = { width: 340, height: 300 };

/** @type {Map<object, Panel>} node -> its panel, as long as the node exists */
const panels = new Map();

const rootGraph = () => app.rootGraph ?? app.graph;

app.registerExtension({
  name: "stochastic_fp8",

  setup() {
    api.addEventListener("stochastic_fp8.live", ({ detail }) => showLive(detail));
    api.addEventListener("execution_interrupted", () => stopAll("Cancelled"));
    api.addEventListener("execution_error", () => stopAll("Failed"));
    api.addEventListener("graphChanged", refreshPlans);
  },

  nodeCreated(node) {
    if (PLANNED_NODES.includes(node.comfyClass)) addPanel(node);
    if (node.comfyClass === SLIDER_NODE) addSlider(node);
  },

  async afterConfigureGraph() {
    refreshPlans();
    await restoreLive();
  },
});

function addPanel(node) {
  const panel = new Panel(node, { rootGraph, fetchPlan });
  panels.set(node, panel);
  const refresh = () => queueMicrotask(() => panels.has(node) && node.graph && panel.refreshPlan());
  for (const widget of node.widgets) chain(widget, "callback", refresh);
  addElement(node, "stochastic_fp8_panel", panel.host, PANEL_SIZE);
  chain(node, "onConnectionsChange", refresh);
  chain(node, "onAdded", refresh);
  chain(node, "onExecuted", (output) => {
    const summary = output?.stochastic_fp8?.[0];
    if (summary) panel.showSummary(summary);
  });
  chain(node, "onRemoved", () => {
    panels.delete(node);
    panel.remove();
  });
}

function addSlider(node) {
  const amplify = node.widgets?.find(({ name }) => name === "amplify");
  const slider = new ABSlider({ imageUrl, amplify: () => amplify?.value ?? 8 });
  addElement(node, "stochastic_fp8_slider", slider.host, SLIDER_SIZE);
  if (amplify) chain(amplify, "callback", () => slider.refresh());
  chain(node, "onExecuted", (output) => {
    if (output?.a_images && output?.b_images) slider.show(output.a_images, output.b_images, output.names);
  });
}

/** An element as the node's last widget, which is saved neither in the workflow nor in the prompt. */
function addElement(node, name, host, { width, height }) {
  host.classList.add(name);
  host.style.minHeight = `${height}px`;
  const widget = node.addDOMWidget(name, name, host, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height + 2 * MARGIN,
  });
  widget.serialize = false;
  const [minimum, tall] = node.computeSize();
  node.setSize([Math.max(width, minimum), Math.max(tall, node.size[1])]);
}

function imageUrl({ filename, subfolder, type }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

async function fetchPlan(request, signal) {
  const answer = await api.fetchApi("/stochastic_fp8/plan", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

function refreshPlans() {
  for (const [node, panel] of panels) if (node.graph) panel.refreshPlan();
}

function stopAll(how) {
  for (const panel of panels.values()) panel.showStopped(how);
}

/** Show a message of the server, unless it is about a node of another workflow. */
function showLive(state) {
  const root = rootGraph();
  if (state.workflow && root.id && state.workflow !== root.id) return;
  const panel = panels.get(nodeByExecutionId(root, state.node));
  if (!panel) return;
  if (state.summary) panel.showSummary(state.summary);
  else panel.showRunning(state);
}

/** Show what a job that is already running has told before this page, or this workflow, was opened. */
async function restoreLive() {
  if (!panels.size) return;
  const answer = await api.fetchApi("/stochastic_fp8/live");
  if (answer.ok) (await answer.json()).forEach(showLive);
}
