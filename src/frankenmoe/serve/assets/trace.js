// What the routers decided for the tokens of a reply. One array of numbers: as objects, 32 layers of a long reply are megabytes.

export const ALL = -1; // in place of a layer: the whole model, where an expert counts by its weight in all layers
const NOBODY = -1;

export class Trace {
  constructor({ experts, layers = 0, width = 0, numbers = "" }) {
    Object.assign(this, { experts, layers, width, length: 0, most: [] });
    this.numbers = numbers ? floats(numbers) : new Float32Array(1024);
    if (numbers) for (; this.length < this.numbers.length / (layers * width); this.length++) this.most.push(this.#most(this.length));
  }

  // per layer: {experts, weights, next}; the row of a layer is next, expert, weight, expert, weight ...
  push(layers) {
    if (!this.length) {
      this.layers = layers.length;
      this.width = 1 + 2 * Math.max(...layers.map(({ experts }) => experts.length));
    }
    const size = this.layers * this.width, start = this.length * size;
    if (start + size > this.numbers.length) {
      const larger = new Float32Array(2 * (start + size));
      larger.set(this.numbers);
      this.numbers = larger;
    }
    this.numbers.fill(NaN, start, start + size);
    layers.forEach(({ experts, weights, next }, layer) => {
      const at = start + layer * this.width;
      this.numbers[at] = next ?? NOBODY;
      experts.forEach((expert, k) => this.numbers.set([expert, weights[k]], at + 1 + 2 * k));
    });
    this.most.push(this.#most(this.length++));
  }

  // [{expert, weight}], the largest weight first; of ALL: shares of the weight of all layers
  chosen(layer, token) {
    if (layer === ALL) return this.#shares(token);
    const at = this.#at(layer, token), found = [];
    for (let k = 1; k < this.width && !Number.isNaN(this.numbers[at + k]); k += 2) {
      found.push({ expert: this.numbers[at + k], weight: this.numbers[at + k + 1] });
    }
    return found;
  }

  first(layer, token) {
    return layer === ALL ? this.most[token] : this.numbers[this.#at(layer, token) + 1];
  }

  // the expert that a little more would have chosen, or NOBODY
  next(layer, token) {
    return this.numbers[this.#at(layer, token)];
  }

  // how many tokens went first to each expert
  counts(layer) {
    const counts = new Array(this.experts).fill(0);
    for (let token = 0; token < this.length; token++) {
      const expert = this.first(layer, token);
      if (expert >= 0) counts[expert]++;
    }
    return counts;
  }

  kept() {
    const { experts, layers, width, length, numbers } = this;
    return length ? { experts, layers, width, numbers: text(numbers.subarray(0, length * layers * width)) } : null;
  }

  #at(layer, token) {
    return (token * this.layers + Math.min(layer, this.layers - 1)) * this.width;
  }

  #sums(token) {
    const sums = new Float32Array(this.experts);
    for (let layer = 0; layer < this.layers; layer++) {
      const at = this.#at(layer, token);
      for (let k = 1; k < this.width; k += 2) {
        const expert = this.numbers[at + k];
        if (expert >= 0) sums[expert] += this.numbers[at + k + 1];
      }
    }
    return sums;
  }

  #most(token) {
    const sums = this.#sums(token), most = sums.indexOf(Math.max(...sums));
    return sums[most] > 0 ? most : NOBODY;
  }

  #shares(token) {
    const sums = this.#sums(token), whole = sums.reduce((sum, each) => sum + each, 0) || 1;
    const found = Array.from(sums, (sum, expert) => ({ expert, weight: sum / whole })).filter(({ weight }) => weight > 0);
    return found.sort((one, two) => two.weight - one.weight);
  }
}

const text = (numbers) => {
  const bytes = new Uint8Array(numbers.buffer, numbers.byteOffset, numbers.byteLength);
  let letters = "";
  for (let at = 0; at < bytes.length; at += 8192) letters += String.fromCharCode(...bytes.subarray(at, at + 8192));
  return btoa(letters);
};
const floats = (encoded) => new Float32Array(Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0)).buffer);
