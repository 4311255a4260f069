// Looks up what the engine computed and puts it on the page; the server hears of it on release.
const drawn = new WeakMap();

export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  const root = parentElement.querySelector(".dial");
  let dial = drawn.get(root);
  if (!dial) {
    dial = build(root);
    drawn.set(root, dial);
  }
  dial.data = data;
  dial.send = setTriggerValue;
  if (!dial.held) dial.place();
}

function build(root) {
  const one = (selector) => root.querySelector(selector);
  const rank = one(".rank");
  const alpha = one(".alpha");
  const figures = [...root.querySelectorAll(".figure")];
  const dial = { data: null, send: null, held: false, place, draw };

  function place() {
    const { data } = dial;
    rank.max = data.ranks.length - 1;
    alpha.max = data.alphas.length - 1;
    rank.value = data.rank_index;
    alpha.value = data.alpha_index;
    ticks(one(".rank-ticks"), data.ranks.map((entry) => entry.value));
    ticks(one(".alpha-ticks"), data.alphas.map((entry) => entry.label));
    figures.forEach((figure, i) => (figure.querySelector("dt").textContent = data.figure_words[i]));
    one(".module").textContent = data.module;
    one(".full-word").textContent = data.full_word;
    one(".full-peak").textContent = data.full_peak;
    one("svg").setAttribute("viewBox", data.canvas);
    bar(one(".bar.full"), data.full_bar, data.terms);
    one(".legend").replaceChildren(...data.terms.map(legendEntry));
    draw();
  }

  function draw() {
    const { data } = dial;
    const entry = data.ranks[rank.value];
    const chosen = data.alphas[alpha.value];
    const scaling = `${data.scaling_word} = ${data.scaling[rank.value][alpha.value]}`;
    one(".answer").textContent = entry.answer;
    one(".rank-value").textContent = entry.value;
    one(".alpha-value").textContent = chosen.label;
    one(".scaling").textContent = scaling;
    rank.setAttribute("aria-valuetext", `rank ${entry.value}`);
    alpha.setAttribute("aria-valuetext", `alpha ${chosen.label}, ${scaling}`);
    mark(rank, one(".rank-ticks"));
    mark(alpha, one(".alpha-ticks"));
    figures.forEach((figure, i) => {
      const { value, exact, change } = entry.figures[i];
      const cell = figure.querySelector(".value");
      cell.textContent = value;
      cell.title = exact;
      figure.querySelector(".change").textContent = change;
    });
    bar(one(".bar.ours"), entry.bar, data.terms);
    one(".ours-peak").textContent = entry.peak;
    const picture = entry.drawing;
    one("svg").setAttribute("aria-label", picture.words);
    for (const part of ["w0", "b", "a", "plus", "dot"]) set(one(`svg .${part}`), picture[part]);
    for (const part of ["w0", "b", "a"]) {
      const { x, y, name, size } = picture[`${part}_text`];
      label(one(`.${part}-name`), x, y, name);
      label(one(`.${part}-size`), x, y, size);
    }
  }

  function move(event) {
    dial.held = true;
    const kept = dial.data.kept_alpha_index;
    if (event.target === rank && kept) alpha.value = kept[rank.value];
    draw();
  }

  function release() {
    dial.held = false;
    dial.send("released", {
      r: dial.data.ranks[rank.value].value,
      lora_alpha: dial.data.alphas[alpha.value].value,
    });
  }

  for (const input of [rank, alpha]) {
    input.addEventListener("input", move);
    input.addEventListener("change", release);
  }
  return dial;
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
}

// A label has two lines: the name and, below it, the size.
function label(element, x, y, text) {
  element.setAttribute("x", x);
  element.setAttribute("y", y);
  element.textContent = text;
}

function ticks(row, labels) {
  const last = Math.max(1, labels.length - 1);
  row.replaceChildren(
    ...labels.map((text, i) => {
      const tick = document.createElement("span");
      tick.textContent = text;
      tick.style.left = `${(100 * i) / last}%`;
      return tick;
    }),
  );
}

function mark(input, row) {
  input.style.setProperty("--part", `${(100 * input.value) / Math.max(1, input.max)}%`);
  [...row.children].forEach((tick, i) => tick.classList.toggle("on", i === Number(input.value)));
}

function bar(element, widths, terms) {
  while (element.children.length < terms.length) element.append(document.createElement("span"));
  widths.forEach(({ width, text }, i) => {
    const part = element.children[i];
    part.style.width = width;
    part.style.background = terms[i].colour;
    part.title = text;
  });
}

function legendEntry({ word, colour }) {
  const entry = document.createElement("span");
  const swatch = document.createElement("i");
  swatch.style.background = colour;
  entry.append(swatch, word);
  return entry;
}
