/** The example workflows: their order in the list of templates, and the zoom at which they open. */

/**
 * Sort the examples of one pack by name wherever the page asks for them. The server lists them in the order of its disk.
 * @param {{getWorkflowTemplates?: () => Promise<Record<string, string[]>>}} api of the page
 * @param {string} pack the name of its folder
 */
export function sortTemplates(api, pack) {
  const read = api.getWorkflowTemplates?.bind(api);
  if (!read) return;
  api.getWorkflowTemplates = async () => {
    const templates = await read();
    templates[pack]?.sort();
    return templates;
  };
}

/**
 * Show an example at the zoom of its file. Newer pages fit a template to the window, where its text is too small to read.
 * The mark of an example is used up by that: undo and copies leave the zoom to the page.
 */
export function restoreView({ graph, canvas, extensionManager }) {
  const { ds, stochastic_fp8_example: isExample } = graph.extra ?? {};
  delete graph.extra?.stochastic_fp8_example;
  if (!isExample || !ds || !extensionManager.setting.get("Comfy.EnableWorkflowViewRestore")) return;
  canvas.ds.scale = ds.scale;
  canvas.ds.offset = [...ds.offset];
  canvas.setDirty(true, true);
}
