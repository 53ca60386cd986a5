// The load: what share of the choices went to each expert, as bars.

import { percent, svg } from "./dom.js";

const WIDTH = 640;
const HEIGHT = 120;

/** Draws shares (E) into an SVG element; the dashed line is what a perfectly even load would give each. */
export function drawHistogram(into, shares, { label, policyOf }) {
  const even = 1 / shares.length;
  const most = Math.max(even * 2, ...shares);
  const step = WIDTH / shares.length;
  const bars = Array.from(shares, (share, expert) => {
    const height = share > 0 ? Math.max(1.5, (share / most) * (HEIGHT - 4)) : 0;
    const { banned, bias } = policyOf(expert);
    const kind = banned ? " banned" : bias > 0 ? " boosted" : bias < 0 ? " weakened" : "";
    const bar = svg("rect", {
      class: `bar${kind}`, "x": expert * step + step * 0.12, "y": HEIGHT - height, "width": step * 0.76, height, "rx": 1,
    });
    // The whole column can be clicked, however short its bar is.
    const column = svg("rect", { class: "column", "x": expert * step, "y": 0, "width": step, "height": HEIGHT });
    column.dataset.expert = expert;
    const title = svg("title");
    title.textContent = `Expert ${expert}: ${percent(share)}`;
    column.append(title);
    return [column, bar];
  }).flat();
  const y = HEIGHT - (even / most) * (HEIGHT - 4);
  const line = svg("line", { class: "even", "x1": 0, "x2": WIDTH, "y1": y, "y2": y });
  into.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  into.setAttribute("preserveAspectRatio", "none");
  into.setAttribute("aria-label", `${label}. ${summary(shares)}`);
  into.replaceChildren(...bars, line);
}

/** The load in a sentence. */
export function summary(shares) {
  const order = Array.from(shares.keys()).sort((a, b) => shares[b] - shares[a]);
  if (!shares[order[0]]) return "Nothing has been generated yet.";
  const used = shares.filter((share) => share > 0).length;
  const top = order.slice(0, 3).filter((e) => shares[e] > 0).map((e) => `E${e} ${percent(shares[e])}`);
  return `${used} of ${shares.length} experts used; busiest ${top.join(", ")}; even would be ${percent(1 / shares.length)}.`;
}
