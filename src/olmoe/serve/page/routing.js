// Routing as the server sends it: for each token the chosen experts of each layer, and their weights.

export const NO_EXPERT = 65535;

function bytesOf(base64) {
  const binary = atob(base64);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/** The number that 16 bits of IEEE half precision stand for. */
export function halfToNumber(bits) {
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  const size = exponent === 0 ? fraction * 2 ** -24
    : exponent === 31 ? (fraction ? NaN : Infinity)
    : (1 + fraction / 1024) * 2 ** (exponent - 15);
  return bits & 0x8000 ? -size : size;
}

/** The tokens of one message: a list of {experts: Uint16Array (L·K), weights: Float32Array (L·K)}. */
export function decodeRouting(wire) {
  const { tokens, layers, k } = wire;
  const raw = bytesOf(wire.experts);
  const halves = bytesOf(wire.weights);
  const wide = wire.dtype === "uint16";
  const count = tokens * layers * k;
  if (raw.length !== count * (wide ? 2 : 1) || halves.length !== count * 2) {
    throw new Error(`The server sent routing of the wrong size for ${tokens} tokens.`);
  }
  const size = layers * k;
  return Array.from({ length: tokens }, (_, t) => {
    const experts = new Uint16Array(size);
    const weights = new Float32Array(size);
    for (let j = 0; j < size; j++) {
      const i = t * size + j;
      const id = wide ? raw[2 * i] | (raw[2 * i + 1] << 8) : raw[i];
      experts[j] = !wide && id === 255 ? NO_EXPERT : id;
      weights[j] = halfToNumber(halves[2 * i] | (halves[2 * i + 1] << 8));
    }
    return { experts, weights, layers, k };
  });
}

/** How often each expert was chosen: counts (L·E), and how many choices each layer made. */
export class Load {
  constructor(layers, experts) {
    this.layers = layers;
    this.experts = experts;
    this.counts = new Uint32Array(layers * experts);
    this.tokens = 0;
  }

  add(route) {
    this.tokens++;
    for (let layer = 0; layer < Math.min(route.layers, this.layers); layer++) {
      for (let j = 0; j < route.k; j++) {
        const id = route.experts[layer * route.k + j];
        if (id < this.experts) this.counts[layer * this.experts + id]++;
      }
    }
  }

  /** The share of a layer's choices (of all layers' where `layer` is null) that went to each expert. */
  shares(layer = null) {
    const sums = new Float64Array(this.experts);
    const [from, to] = layer === null ? [0, this.layers] : [layer, layer + 1];
    for (let l = from; l < to; l++) for (let e = 0; e < this.experts; e++) sums[e] += this.counts[l * this.experts + e];
    const total = sums.reduce((a, b) => a + b, 0);
    return total ? sums.map((n) => n / total) : sums;
  }
}
