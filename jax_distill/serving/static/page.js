"use strict";

const form = document.getElementById("form");
const pictures = document.getElementById("pictures");
const said = document.getElementById("status");
const cancel = document.getElementById("cancel");
const networks = JSON.parse(form.dataset.networks);
const gridSteps = JSON.parse(form.dataset.grid);
const first = Object.keys(networks)[0];
const MOST_SEED = 2 ** 32 - 1;
const COLUMNS = 4; // seeds of a grid
let running = null; // the AbortController of what is drawn now

const value = (name) => form.elements[name].value.trim();

function parameters(network, steps, seed) {
  const given = { prompt: value("prompt"), network, steps, seed };
  given.height = value("height");
  given.width = value("width");
  if (networks[network].guided && value("guidance")) given.guidance = value("guidance");
  return given;
}

function sideBySide() {
  const seed = Number(value("seed"));
  const names = Object.keys(networks).reverse(); // the teacher to the left
  return names.map((name) => parameters(name, value(name + "_steps"), seed));
}

function grid() {
  const rows = gridSteps.map((steps) => [first, steps]);
  for (const name of Object.keys(networks).slice(1)) rows.unshift([name, value(name + "_steps")]);
  const start = Number(value("seed"));
  const seeds = [...Array(COLUMNS).keys()].map((i) => (start + i) % (MOST_SEED + 1));
  return rows.flatMap(([name, steps]) => seeds.map((seed) => parameters(name, steps, seed)));
}

// All text goes in as text, never as HTML.
function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}

function say(text, bad = false) {
  said.textContent = text;
  said.className = bad ? "bad" : "";
}

const plural = (count, noun) => `${count} ${noun}${Number(count) === 1 ? "" : "s"}`;

function card(wanted, seeds) {
  const figure = element("figure");
  const frame = element("div", "", "frame");
  frame.style.aspectRatio = `${wanted.width} / ${wanted.height}`;
  frame.append(element("span", "waits"));
  const name = wanted.network[0].toUpperCase() + wanted.network.slice(1);
  const caption = element("figcaption");
  const facts = element("span", seeds ? `seed ${wanted.seed}` : "");
  caption.append(element("b", `${name}, ${plural(wanted.steps, "step")}`), facts);
  figure.append(frame, caption);
  pictures.append(figure);
  return { frame, facts, wanted, seeds };
}

function show(card, event) {
  if ("png" in event) {
    const image = element("img");
    image.alt = card.wanted.prompt;
    image.src = "data:image/png;base64," + event.png;
    if (card.wanted.width < 256) image.className = "small";
    card.frame.replaceChildren(image);
    const digits = event.milliseconds < 100 ? 1 : 0;
    const time = event.milliseconds.toLocaleString("en", { maximumFractionDigits: digits });
    const facts = [plural(event.evaluations, "evaluation"), `${time}\u00a0ms`];
    if (card.seeds) facts.unshift(`seed ${card.wanted.seed}`);
    card.facts.textContent = facts.join(" · ");
  } else if ("error" in event) {
    card.frame.replaceChildren(element("span", event.error, "bad"));
  } else {
    const text = event.position ? `number ${event.position} in the queue` : "is drawn now";
    card.frame.replaceChildren(element("span", text));
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part.replace(/^data: /, ""));
  }
}

async function draw(wanted, asGrid) {
  if (!form.reportValidity()) return;
  if (running) running.abort();
  const mine = (running = new AbortController());
  cancel.disabled = false;
  say("");
  try {
    const body = JSON.stringify(wanted);
    const headers = { "Content-Type": "application/json" };
    const response = await fetch("draw", { method: "POST", headers, body, signal: mine.signal });
    if (!response.ok) {
      say(await response.text(), true);
      return;
    }
    pictures.replaceChildren();
    pictures.className = asGrid ? "grid" : "";
    const cards = wanted.map((one) => card(one, asGrid));
    let left = wanted.length;
    for await (const event of events(response)) {
      show(cards[event.index], event);
      if ("png" in event || "error" in event) left -= 1;
      say(left ? `${plural(left, "picture")} to be drawn` : "");
    }
    if (left) say("the server ended before all was drawn", true);
  } catch (error) {
    if (mine.signal.aborted) {
      if (running === mine) say("cancelled");
    } else say("the server cannot be reached", true);
  } finally {
    if (running === mine) {
      running = null;
      cancel.disabled = true;
    }
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  draw(sideBySide(), false);
});
document.getElementById("grid").addEventListener("click", () => draw(grid(), true));
document.getElementById("another").addEventListener("click", () => {
  form.elements.seed.value = crypto.getRandomValues(new Uint32Array(1))[0];
  draw(sideBySide(), false);
});
cancel.addEventListener("click", () => running && running.abort());
