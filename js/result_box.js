/** The box on a node that writes or checks a file: the file's name, folder and size, or what was found. */

import { element, isolateEvents, shadowHost } from "./dom.js";
import { formatBytes } from "./numbers.js";
import { RESULT } from "./styles.js";
import { t } from "./words.js";

/**
 * @typedef {object} SavedFile
 * @property {string} name as ComfyUI's loaders list it
 * @property {string} folder under ComfyUI's folder, such as output/diffusion_models
 * @property {number} bytes
 */

export class ResultBox {
  constructor() {
    this.content = element("div", { class: "content", tabIndex: 0, role: "status", "aria-label": t("box") });
    const frame = element("div", { class: "frame" }, this.content);
    isolateEvents(frame);
    this.host = shadowHost(RESULT, frame);
    this.#fill([element("p", { class: "muted", textContent: t("boxIdle") })]);
  }

  /**
   * @param {SavedFile[]} [files]
   * @param {string[]} [texts] shown if there are no files
   */
  show(files, texts) {
    if (files?.length) this.#fill(savedFiles(files));
    else if (texts?.length) this.#fill(texts.map((text) => element("p", { class: "text", textContent: text })));
  }

  /** @param {string} message */
  showError(message) {
    this.#fill([element("p", { class: "error", role: "alert", textContent: message })]);
  }

  #fill(children) {
    this.content.replaceChildren(...children);
  }
}

/**
 * @param {SavedFile[]} files
 * @returns {HTMLElement[]}
 */
export function savedFiles(files) {
  return files.map(({ name, folder, bytes }) =>
    element(
      "div",
      {},
      element("div", { class: "name", textContent: name }),
      element("div", { class: "muted", textContent: t("boxFile", { size: formatBytes(bytes), folder }) }),
    ),
  );
}
