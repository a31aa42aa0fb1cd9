/** Small helpers for elements. */

let lastId = 0;

/**
 * An element. Properties whose value is a function are event listeners; `class` and those with a dash are attributes.
 * @param {string} tag
 * @param {Object<string, any>} properties
 * @param {...(Node|string|null|false)} children
 * @returns {HTMLElement}
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (name.includes("-") || ["class", "role", "for"].includes(name)) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== false));
  return made;
}

/** An id that no other element has. */
export function uniqueId(name) {
  lastId += 1;
  return `${name}-${lastId}`;
}

/**
 * A host element with a shadow root, so that no style gets in or out.
 * @param {string} css
 * @param {...Node} children
 * @returns {HTMLElement}
 */
export function shadowHost(css, ...children) {
  const host = element("div", { "data-capture-wheel": "true" });
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(css);
  const root = host.attachShadow({ mode: "open" });
  root.adoptedStyleSheets = [sheet];
  root.append(...children);
  return host;
}

/** Keep what happens in an element from moving, scrolling or editing the graph below it. */
export function keepFromGraph(target) {
  const stop = (event) => event.stopPropagation();
  for (const name of ["pointerdown", "mousedown", "dblclick", "contextmenu", "wheel"]) {
    target.addEventListener(name, (event) => isLeftOrWheel(event) && stop(event), { passive: true });
  }
  target.addEventListener("keydown", (event) => !event.ctrlKey && !event.metaKey && stop(event));
}

function isLeftOrWheel(event) {
  return event.type === "wheel" ? canScroll(event) : event.button !== 1;
}

/** Whether a wheel turn would scroll something inside rather than zoom the graph. */
function canScroll(event) {
  if (event.ctrlKey) return false;
  return event.composedPath().some((part) => part.scrollHeight > part.clientHeight + 1 && isScroller(part));
}

function isScroller(part) {
  return part instanceof HTMLElement && getComputedStyle(part).overflowY === "auto";
}

/**
 * Call a node's own callback first, then ours.
 * @param {object} target the node or widget
 * @param {string} name of the callback, such as onRemoved
 * @param {Function} added
 */
export function chain(target, name, added) {
  const original = target[name];
  target[name] = function (...args) {
    const result = original?.apply(this, args);
    added.apply(this, args);
    return result;
  };
}
