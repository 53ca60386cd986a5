// Which tokens of an answer are not in the previous one.

const MOST_CELLS = 4_000_000; // of the table: 2000 tokens against 2000

/** Indexes of the tokens of `now` outside a longest common subsequence with `before`. */
export function changedTokens(before, now) {
  let head = 0;
  while (head < before.length && head < now.length && before[head] === now[head]) head++;
  let tail = 0;
  while (tail < before.length - head && tail < now.length - head && before.at(-1 - tail) === now.at(-1 - tail)) tail++;
  const a = before.slice(head, before.length - tail);
  const b = now.slice(head, now.length - tail);
  const changed = new Set(b.map((_, i) => head + i));
  const width = b.length + 1;
  if ((a.length + 1) * width > MOST_CELLS) return changed;
  const best = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      best[i * width + j] = a[i] === b[j]
        ? best[(i + 1) * width + j + 1] + 1
        : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
    }
  }
  let [i, j] = [0, 0];
  while (i < a.length && j < b.length) {
    if (a[i] === b[j]) {
      changed.delete(head + j);
      i++;
      j++;
    } else if (best[(i + 1) * width + j] >= best[i * width + j + 1]) i++;
    else j++;
  }
  return changed;
}
