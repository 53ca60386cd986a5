// Small ways to make nodes. There is no innerHTML anywhere, and the page's policy would refuse it.

/** An element: `properties` are set as such, those with a dash (and `role`) as attributes, `on` holds listeners. */
export function el(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (key === "on") for (const [type, listener] of Object.entries(value)) made.addEventListener(type, listener);
    else if (key === "data") Object.assign(made.dataset, value);
    else if (key.includes("-") || key === "role") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const button = (label, className, click, properties = {}) =>
  el("button", { type: "button", className, textContent: label, on: { click }, ...properties });

const SVG = "http://www.w3.org/2000/svg";

export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Puts a text on the clipboard; says whether it did. Without a secure context browsers leave only the old way. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = el("textarea", { value: text, className: "off-screen", readOnly: true });
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

/** Shows on a button for a moment that it did its work. */
export async function copyFrom(source, text) {
  const label = source.textContent;
  source.textContent = (await copyText(text)) ? "Copied" : "Not copied";
  setTimeout(() => (source.textContent = label), 1200);
}

/** Says something to screen readers. */
export function announce(sentence) {
  document.getElementById("status").textContent = sentence;
}

/** Web storage that may be switched off: then nothing is remembered. */
export const stored = {
  get(area, key) {
    try {
      return window[area].getItem(key);
    } catch {
      return null;
    }
  },
  set(area, key, value) {
    try {
      if (value) window[area].setItem(key, value);
      else window[area].removeItem(key);
    } catch {
      // Private windows may refuse.
    }
  },
};

/** A token's text so that all of it can be seen. */
export const visible = (text) =>
  text === "" ? "∅" : text.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥");

export const percent = (share) => {
  const p = share * 100;
  return `${p >= 10 || p === 0 ? p.toFixed(0) : p >= 0.1 ? p.toFixed(1) : "<0.1"} %`;
};
