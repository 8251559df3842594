// Elements made of functions: text is always text, so nothing that a model or a file is called can become markup.

const SVG = "http://www.w3.org/2000/svg";

// h("button", { class: "ghost", type: "button", on: { click } , "aria-label": "…"}, "text", child, …)
export const h = (tag, props, ...children) => filled(document.createElement(tag), props, children);
export const s = (tag, props, ...children) => filled(document.createElementNS(SVG, tag), props, children);

function filled(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "style") Object.assign(node.style, value); // by the CSSOM, which the content policy allows
    else if (name === "value" || name === "checked" || name === "disabled") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function replace(node, ...children) {
  node.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// Said by screen readers, shown to nobody.
export function announce(text) {
  document.getElementById("announce").textContent = text;
}

// The last call of a frame is made in it; what came before it is not.
export function oncePerFrame(work) {
  let waiting = null;
  return (...args) => {
    const first = waiting === null;
    waiting = args;
    if (first)
      requestAnimationFrame(() => {
        const last = waiting;
        waiting = null;
        work(...last);
      });
  };
}

// Whoever looks wants nothing to move.
export const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
