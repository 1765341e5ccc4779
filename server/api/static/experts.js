// Experts as they look: a colour of eight (Okabe and Ito's, safe for colour-blind eyes) and one of five line styles, so
// that they can be told apart without colour too. Weights as shares.

const COLOURS = 8;
const LINES = 5;
const TIE = 0.005; // shares closer than this: no expert weighed most

export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

export function dress(node, expert) {
  node.classList.add(`colour-${expert % COLOURS}`, `line-${expert % LINES}`);
  return node;
}

export function percent(share) {
  const value = share * 100;
  return value > 0 && value < 1 ? "<1 %" : `${Math.round(value)} %`;
}

// |weight| as parts of 1. Weights may be negative: contrastive decoding subtracts an expert.
export function shares(weights) {
  const total = weights.reduce((sum, weight) => sum + Math.abs(weight), 0);
  return weights.map((weight) => (total ? Math.abs(weight) / total : 0));
}

// Index of the largest share, -1 if the two largest are equal.
export function decisive(parts) {
  const best = parts.indexOf(Math.max(...parts));
  return parts.some((part, index) => index !== best && parts[best] - part < TIE) ? -1 : best;
}

// In bits; 0 when one expert has all the weight.
export function entropy(parts) {
  return parts.reduce((sum, part) => sum - (part ? part * Math.log2(part) : 0), 0);
}

export function legendItem(name, index) {
  const item = element("li");
  item.append(dress(element("span", "sample", name), index));
  return item;
}

// A bar of shares that grows with an answer, and its figures.
export class ShareBar {
  constructor(names) {
    this.node = element("div", "shares");
    this.bar = element("div", "bar");
    this.bar.setAttribute("aria-hidden", "true"); // the figures say it
    this.figures = element("ul", "figures");
    this.figures.setAttribute("aria-label", "Mean share of the weights");
    this.segments = names.map((_, index) => dress(element("span"), index));
    this.values = names.map((name, index) => {
      const item = element("li");
      const value = element("b", "", "0 %");
      item.append(dress(element("span", "sample", name), index), " ", value);
      item.hidden = true; // until it has a share: an expert alone is all there is
      this.figures.append(item);
      return value;
    });
    this.bar.append(...this.segments);
    this.node.append(this.bar, this.figures);
    this.sums = names.map(() => 0);
    this.count = 0;
  }

  add(parts) {
    this.count += 1;
    parts.forEach((part, index) => {
      this.sums[index] += part;
      const mean = this.sums[index] / this.count;
      this.segments[index].style.flexGrow = mean.toFixed(4);
      this.segments[index].hidden = mean < 0.001;
      this.values[index].textContent = percent(mean);
      this.values[index].parentNode.hidden = !mean;
    });
    this.bar.hidden = this.sums.filter(Boolean).length < 2; // nothing to compare
  }
}
