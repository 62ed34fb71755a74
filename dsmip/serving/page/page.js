"use strict";
// Texts of entities come from strangers: everything is put in as text, nothing as markup.

const byId = (id) => document.getElementById(id);
const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
let picture = null; // a File, or null
let asked = 0;

function setPicture(file) {
  const shown = byId("shown");
  if (shown.src) URL.revokeObjectURL(shown.src);
  picture = file;
  shown.hidden = picture === null;
  if (picture) shown.src = URL.createObjectURL(picture);
  else shown.removeAttribute("src");
  byId("drop-text").textContent = picture ? "Another picture" : "Drop, paste or choose a picture";
}

function say(text, kind) {
  const state = byId("state");
  state.className = "state" + (kind ? " " + kind : "");
  state.textContent = text;
}

const isPicture = (file) => file.type.startsWith("image/");

function take(files) { // the first picture of what is given; the present one stays where there is none
  const file = [...files].find(isPicture);
  if (file) {
    setPicture(file);
    if (byId("state").classList.contains("problem")) say("The picture is taken.");
  } else if (files.length) say("“" + files[0].name + "” is no picture.", "problem");
}

function bars(link) {
  const list = make("div", "bars");
  const row = (name, value, share, chosen) => {
    list.append(make("span", chosen ? "chosen" : "", chosen ? name + " (chosen)" : name));
    const meter = make("meter");
    meter.min = 0; meter.max = 1; meter.value = share;
    meter.setAttribute("aria-label", name);
    list.append(meter, make("span", "", value));
  };
  if (link.confidence !== null) row("confidence", Math.round(link.confidence * 100) + " %", link.confidence, false);
  for (const part of link.parts) row(part.name, part.score.toFixed(2), part.share, part.name === link.expert);
  if (!link.parts.length && link.confidence === null) list.append(make("span", "", "score"), make("span"), make("span", "", link.score.toFixed(3)));
  return list;
}

function card(link, number) {
  const item = make("li", number ? "card" : "card first");
  item.tabIndex = 0;
  const image = make("img");
  image.alt = "";
  image.addEventListener("error", () => image.replaceWith(make("div", "none", "no picture")));
  image.src = link.image.replace(/^\//, "");
  const text = make("div");
  const title = make("h2", "", link.name + " ");
  title.append(make("span", "id", link.entity_id));
  text.append(title, make("p", "", link.attributes), bars(link));
  item.append(image, text);
  return item;
}

function show(mention) {
  const answer = byId("answer");
  answer.classList.toggle("nil-answer", mention.is_nil);
  byId("cards").replaceChildren(...mention.links.map(card));
  if (mention.is_nil) say("“" + mention.word + "” is probably not in the knowledge base. The nearest entities:", "nil");
  else say("Best entities for “" + mention.word + "”");
}

async function link(event) {
  if (event) event.preventDefault();
  const number = ++asked;
  const form = new FormData();
  form.set("word", byId("word").value);
  form.set("sentence", byId("sentence").value);
  form.set("explain", "true");
  if (picture) form.set("image", picture);
  byId("go").disabled = true;
  byId("answer").setAttribute("aria-busy", "true");
  say("Linking …");
  try {
    const answer = await fetch("link", { method: "POST", body: form });
    const body = await answer.json();
    if (number !== asked) return;
    if (answer.ok) show(body.mentions[0]);
    else {
      byId("cards").replaceChildren();
      say(body.message || "The service refused this.", "problem");
    }
  } catch {
    if (number === asked) say("The service does not answer.", "problem");
  } finally {
    if (number === asked) {
      byId("go").disabled = false;
      byId("answer").setAttribute("aria-busy", "false");
    }
  }
}

function share() {
  const values = new URLSearchParams({ word: byId("word").value, sentence: byId("sentence").value });
  const address = location.origin + location.pathname + "#" + values;
  history.replaceState(null, "", "#" + values);
  navigator.clipboard?.writeText(address).then(() => say("The address is copied; it has no picture."), () => say(address));
}

byId("form").addEventListener("submit", link);
byId("share").addEventListener("click", share);
byId("clear").addEventListener("click", () => {
  byId("form").reset();
  setPicture(null);
  byId("cards").replaceChildren();
  history.replaceState(null, "", location.pathname);
  say("The best entities appear here.");
  byId("word").focus();
});
byId("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) link(event);
});
const drop = byId("drop");
drop.addEventListener("click", () => byId("file").click());
drop.addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); byId("file").click(); }
  if (event.key === "Delete" || event.key === "Backspace") setPicture(null);
});
byId("file").addEventListener("change", () => { take(byId("file").files); byId("file").value = ""; }); // so that it may be chosen again
const isText = (event) => !event.dataTransfer.types.includes("Files") && event.target.matches?.("input, textarea"); // the field takes it
for (const name of ["dragenter", "dragover"]) document.addEventListener(name, (event) => {
  if (isText(event)) return;
  event.preventDefault();
  drop.classList.add("over");
});
for (const name of ["dragleave", "drop"]) document.addEventListener(name, () => drop.classList.remove("over"));
document.addEventListener("drop", (event) => {
  if (isText(event)) return;
  event.preventDefault();
  take(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.some(isPicture)) event.preventDefault();
  take(files);
});
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => {
    byId("word").value = example.dataset.word;
    byId("sentence").value = example.dataset.sentence;
    link();
  });
}
const given = new URLSearchParams(location.hash.slice(1));
if (given.get("word")) {
  byId("word").value = given.get("word");
  byId("sentence").value = given.get("sentence") || "";
  link();
}
