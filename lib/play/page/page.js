"use strict";
// Settings go to the server as JSON. Its answer is a JSON object a line: status, seeds and notes, image, saved, error, done.

const at = id => document.getElementById(id);
const FIELDS = ["prompt", "seeds", "steps", "guidance_scale", "adapter", "scale", "second_adapter", "second_scale"];
const SETTLED = 150; // milliseconds after which a slider counts as at rest
const columns = [...document.querySelectorAll("#columns section")];
let current = null; // the AbortController of the request under way
let timer = null;

function say(text, bad = false) {
  at("status").textContent = text;
  at("status").classList.toggle("bad", bad);
}

function settings() {
  return Object.fromEntries(FIELDS.map(id => [id, at(id).value]));
}

function lay() {
  const unused = !at("second_adapter").value;
  columns[2].classList.toggle("unused", unused);
  at("more").hidden = !unused;
  for (const label of document.querySelectorAll(".scale"))
    label.querySelector("output").value = Number(label.querySelector("input").value).toFixed(2);
}

// A figure for each seed in each column. Those that exist stay, so that nothing flickers.
function places(seeds) {
  at("columns").style.setProperty("--across", seeds.length > 1 ? 2 : 1);
  for (const column of columns) {
    const box = column.querySelector(".images");
    const old = new Map([...box.children].map(figure => [figure.dataset.seed, figure]));
    box.replaceChildren(...seeds.map(seed => old.get(seed) || place(column, seed)));
  }
  fit();
}

// Images whose settings are no longer those of the page are pale until theirs arrive.
function pale(on) {
  for (const figure of document.querySelectorAll("figure"))
    figure.classList.toggle("pending", on && !figure.closest(".unused"));
}

function place(column, seed) {
  const figure = document.createElement("figure"), button = document.createElement("button");
  const caption = document.createElement("figcaption");
  figure.dataset.seed = seed;
  caption.textContent = `seed ${seed}`;
  button.type = "button";
  button.append(document.createElement("img"));
  button.addEventListener("click", () => enlarge(columns.indexOf(column), seed));
  figure.append(button, caption);
  return figure;
}

function figureOf(column, seed) {
  return [...columns[column].querySelectorAll("figure")].find(figure => figure.dataset.seed === seed);
}

function nameOf(column) {
  if (!column) return "base model";
  const [name, scale] = column === 1 ? [at("adapter"), at("scale")] : [at("second_adapter"), at("second_scale")];
  return `${name.value}, scale ${Number(scale.value)}`;
}

function show({column, seed, url}) {
  const figure = figureOf(column, seed);
  if (!figure) return;
  const image = figure.querySelector("img");
  image.alt = `${nameOf(column)}, seed ${seed}: ${at("prompt").value}`;
  image.onload = () => {
    document.documentElement.style.setProperty("--shape", `${image.naturalWidth} / ${image.naturalHeight}`);
    document.documentElement.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
    fit();
    figure.classList.remove("pending");
  };
  image.src = url;
}

async function ask(path) {
  clearTimeout(timer);
  current?.abort();
  const controller = current = new AbortController();
  const asked = settings(), start = performance.now();
  history.replaceState(null, "", "#" + new URLSearchParams(asked));
  pale(true);
  say("Asking …");
  let ended = false, saved = "";
  try {
    const answer = await fetch(path, {
      method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(asked), signal: controller.signal,
    });
    if (!answer.ok) throw new Error(answer.status);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "";;) {
      const {value, done} = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const event of lines.map(line => JSON.parse(line))) {
        if (event.status) say(event.status);
        if (event.seeds) { notes(event.notes); places(event.seeds); pale(true); }
        if (event.image) show(event.image);
        if (event.saved) saved = `Saved in ${event.saved}`;
        if (event.error) { say(event.error, true); pale(false); }
        if (event.done) say(saved || `Done in ${((performance.now() - start) / 1000).toFixed(1)} s`);
        ended ||= Boolean(event.done || event.error);
      }
    }
    if (!ended) throw new Error("the answer broke off");
  } catch (problem) {
    if (controller.signal.aborted) return;
    pale(false);
    say("The server does not answer. Is play.py still running?", true);
  }
}

function notes(sentences) {
  at("notes").replaceChildren(...sentences.map(sentence => {
    const line = document.createElement("p");
    line.textContent = sentence;
    return line;
  }));
}

// At a desk an image may be as tall as what is left below the controls, so that models are compared without scrolling.
function fit() {
  const first = columns[0].querySelector(".images"), root = document.documentElement.style;
  const left = window.innerHeight - (first.getBoundingClientRect().top + window.scrollY) - 40;
  const rows = Math.min(2, Math.ceil(first.children.length / 2)) || 1;
  const ratio = Number(getComputedStyle(document.documentElement).getPropertyValue("--ratio")) || 1;
  if (window.innerWidth > 760) root.setProperty("--tallest", `${Math.max(200, (left / rows - 28) * ratio)}px`);
  else root.removeProperty("--tallest");
}

// One image large; the arrow keys, or a click, put another model's image of the same seed in its place.
const large = at("large");
function enlarge(column, seed) {
  const figure = figureOf(column, seed);
  if (!figure?.querySelector("img").src) return;
  Object.assign(large.dataset, {column, seed});
  large.querySelector("img").src = figure.querySelector("img").src;
  large.querySelector("p").textContent = `${nameOf(column)}, seed ${seed}`;
  if (!large.open) large.showModal();
}
function turn(by) {
  const count = at("second_adapter").value ? 3 : 2;
  enlarge((Number(large.dataset.column) + by + count) % count, large.dataset.seed);
}
large.addEventListener("keydown", event => {
  if (event.key === "ArrowRight" || event.key === "ArrowLeft") turn(event.key === "ArrowRight" ? 1 : -1);
});
large.querySelector("img").addEventListener("click", () => turn(1));

function fill(select, names, chosen, none) {
  const options = [...(none ? [[none, ""]] : []), ...names.map(name => [name, name])];
  select.replaceChildren(...options.map(([text, value]) => new Option(text, value)));
  if (names.includes(chosen)) select.value = chosen;
}

async function start() {
  try {
    const state = await (await fetch("state")).json();
    const kept = Object.fromEntries(new URLSearchParams(location.hash.slice(1))); // a reload keeps the settings
    const first = {scale: 1, second_scale: 1, ...state, adapter: state.adapters[0], ...kept};
    fill(at("adapter"), state.adapters, first.adapter);
    fill(at("second_adapter"), state.adapters, first.second_adapter, "no second adapter");
    for (const id of FIELDS) if (at(id).tagName === "INPUT") at(id).value = first[id];
    at("base").textContent = state.base_model;
    lay();
    fit();
    if (state.problem) say(state.problem, true);
    else ask("generate");
  } catch {
    say("The server does not answer. Is play.py still running?", true);
  }
}

at("settings").addEventListener("submit", event => { event.preventDefault(); ask("generate"); });
at("more").addEventListener("click", () => { // another adapter, or the only one at another scale
  const names = [...at("adapter").options].map(option => option.value);
  at("second_adapter").value = names.find(name => name !== at("adapter").value) || names[0];
  lay();
  ask("generate");
});
at("save").addEventListener("click", () => ask("save"));
at("other").addEventListener("click", () => {
  const first = Math.floor(Math.random() * 1e6), count = columns[0].querySelectorAll("figure").length || 1;
  at("seeds").value = Array.from({length: count}, (_, number) => first + number).join(", ");
  ask("generate");
});
for (const id of ["seeds", "steps", "guidance_scale", "adapter", "second_adapter"])
  at(id).addEventListener("change", () => { lay(); ask("generate"); });
for (const id of ["scale", "second_scale"])
  at(id).addEventListener("input", () => { lay(); clearTimeout(timer); timer = setTimeout(() => ask("generate"), SETTLED); });
window.addEventListener("resize", fit);
start();
