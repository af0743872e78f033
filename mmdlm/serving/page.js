"use strict";
// What every part of the page stands on: finding and making nodes, tabs, requests, the picture that the tabs share, and
// the history of this browser tab. No library, nothing from elsewhere, no markup made from text.

const find = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const problem = find("#problem"), status = find("#status");
const model = { id: "", hash: "", image_size: 64 };

// A new node: make("p", { class: "hint", text: "..." }, parent). `text` is the content, other names are attributes.
function make(name, properties = {}, parent = null) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "text") node.textContent = value;
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  if (parent) parent.append(node);
  return node;
}

function button(text, parent, act) {
  const node = make("button", { type: "button", text }, parent);
  node.addEventListener("click", act);
  return node;
}

// ---------------------------------------------------------------------------------------------------------------- tabs

const tabs = all("[role=tab]"), WITH_PICTURE = ["caption", "ask", "fill"];
const nameOf = (tab) => tab.getAttribute("aria-controls");

function show(name) {
  for (const tab of tabs) {
    const chosen = nameOf(tab) === name;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    find("#" + nameOf(tab)).hidden = !chosen;
    if (chosen) tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  for (const area of all(".results")) area.hidden = area.dataset.of !== name;
  find("#picture").hidden = !WITH_PICTURE.includes(name);
  find(".left").hidden = find(".right").hidden = name === "history";
  problem.textContent = status.textContent = "";
}

tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => show(nameOf(tab)));
  tab.addEventListener("keydown", (event) => {
    const next = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const chosen = tabs[(next + tabs.length) % tabs.length];
    show(nameOf(chosen));
    chosen.focus();
  });
});

// ------------------------------------------------------------------------------------------------------------ requests

function headers() {
  const key = find("#key").value.trim();
  return key ? { authorization: "Bearer " + key } : {};
}

// One request; what goes wrong is an Error whose message is the server's own sentence.
async function ask(path, body, signal) {
  const form = body instanceof FormData;
  const type = form || body === undefined ? {} : { "content-type": "application/json" };
  let answer;
  try {
    answer = await fetch(path, {
      method: body === undefined ? "GET" : "POST", headers: { ...headers(), ...type },
      body: form || body === undefined ? body : JSON.stringify(body), signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: see whether it is still running, then try again.");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) find("#access").open = true;
  let message = `The server answered with status ${answer.status}: try again.`;
  try { message = (await answer.json()).error.message; } catch { /* no JSON: the sentence above stands */ }
  throw new Error(message);
}

// Server-sent events: each event's JSON goes to `take`. An error event ends it as a refusal would.
async function stream(path, body, signal, take) {
  const reader = (await ask(path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (!data || data === "data: [DONE]") continue;
      const event = JSON.parse(data.slice(6));
      if (event.error) throw new Error(event.error.message);
      take(event);
    }
  }
}

async function meet() {
  try {
    const { data } = await (await ask("/v1/models")).json(), choice = find("#models");
    Object.assign(model, data[0]);
    // the model, and the adapters that were loaded with it
    choice.replaceChildren(...data.map(({ id }) => make("option", { value: id, text: id })));
    choice.hidden = data.length < 2;
    find("#model").textContent = `${model.id} · ${model.image_size} × ${model.image_size}`;
  } catch (error) { find("#model").textContent = error.message; }
}
find("#key").addEventListener("change", meet);

// What a request says of the model: nothing, unless an adapter is chosen.
function which() {
  const chosen = find("#models").value;
  return chosen && chosen !== model.id ? { model: chosen } : {};
}

// ---------------------------------------------------------------------------------------- the picture of several tabs

const picture = { blob: null, name: "", url: "", bitmap: null };

// Take a Blob as the picture that Caption, Ask and Fill are about. `changed` is told, see page_mask.js.
async function takePicture(blob, name) {
  if (picture.url) URL.revokeObjectURL(picture.url);
  Object.assign(picture, { blob, name, url: URL.createObjectURL(blob), bitmap: null });
  find("#picture-name").textContent = `${name}, ${Math.max(1, Math.round(blob.size / 1024))} kB`;
  const seen = find("#seen");
  seen.src = picture.url;
  seen.alt = name;
  seen.hidden = false;
  // A file the browser cannot show may still be one that the server can read, or has a sentence about.
  try { picture.bitmap = await createImageBitmap(blob); } catch { seen.hidden = true; }
  if (picture.blob === blob) document.dispatchEvent(new Event("picture"));
}

function needPicture() {
  if (!picture.blob) throw new Error("There is no picture yet: choose a file, or draw one under Generate.");
  return picture;
}

find("#file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) takePicture(file, file.name);
  event.target.value = "";
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    find(".drop").classList.toggle("over", kind === "dragover");
    const [file] = kind === "drop" ? event.dataTransfer.files : [];
    if (!file) return;
    if (find("#picture").hidden) show("caption");
    takePicture(file, file.name);
  });
}

// fetch() of a data URL would be a connection elsewhere, which the content policy forbids.
function blobOf(url) {
  const bytes = Uint8Array.from(atob(url.slice(url.indexOf(",") + 1)), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: url.slice(5, url.indexOf(";")) });
}

const urlOf = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(new Error("The file cannot be read: choose another."));
  reader.readAsDataURL(blob);
});

// ------------------------------------------------------------------------------------------------------------- history

const KEPT = 40, LARGEST_KEPT = 200_000; // entries; characters of a file that is kept to be saved again
let entries = [];
try { entries = JSON.parse(sessionStorage.getItem("history") || "[]"); } catch { /* another page's, or broken */ }

// A word as a POSIX shell takes it.
const quote = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? String(word) : `'${String(word).replaceAll("'", "'\\''")}'`);
// `mmdlm generate ...`: options that are undefined are left out; the model is named where the command would take another.
// Where its directory and an adapter's lie on the server is not told to pages: those two are to be filled in.
function command(name, words, options) {
  const other = document.documentElement.dataset.shipped === model.hash ? undefined : "MODEL_DIRECTORY";
  const adapter = which().model && `DIRECTORY_OF_${which().model}`;
  const given = Object.entries({ ...options, "--model": other, "--adapter": adapter }).filter(([, value]) => value !== undefined);
  const flags = given.map(([key, value]) => (value === true ? key : `${key} ${quote(value)}`));
  const dashed = words.some((word) => String(word).startsWith("-")) ? ["--"] : [];
  return ["mmdlm", name, ...flags, ...dashed, ...words.map(quote)].join(" ");
}
// curl, with the key from the environment where the page was given one: it is written down nowhere.
function curl(path, ...parts) {
  const key = find("#key").value.trim() ? [`-H "Authorization: Bearer $MMDLM_KEY"`] : [];
  return ["curl", quote(location.origin + path), ...key, ...parts].join(" ");
}
const curlJson = (path, body) => curl(path, "-H 'content-type: application/json'", "-d", quote(JSON.stringify(body)));

// Keep an entry: { task, title, about, lines: [commands], fields: {name: value}, files: [{name, url}], shown: data URL }.
function remember(entry) {
  entries = [{ ...entry, at: new Date().toLocaleTimeString() }, ...entries].slice(0, KEPT);
  keep();
  return entries[0];
}

function keep() {
  for (let most = entries.length; most >= 0; most -= 1) {
    try {
      sessionStorage.setItem("history", JSON.stringify(entries.slice(0, most)));
      break;
    } catch { /* no room: without the oldest */ }
  }
  const list = find("#entries");
  list.replaceChildren(...entries.map(entryNode));
  find("#no-history").hidden = entries.length > 0;
  find("#forget").hidden = entries.length === 0;
  find("#count").hidden = entries.length === 0;
  find("#count").textContent = entries.length;
}

function entryNode(entry) {
  const item = make("li", { class: "card", "data-task": entry.task });
  if (entry.shown) make("img", { alt: "", src: entry.shown }, item);
  const body = make("div", {}, item);
  make("h2", { text: entry.title }, body);
  make("p", { class: "hint", text: `${entry.at} · ${entry.task}${entry.about ? " · " + entry.about : ""}` }, body);
  for (const text of entry.lines) {
    const line = make("div", { class: "line" }, body);
    const shown = make("pre", { text, tabindex: "0" }, line);
    const copy = button("Copy", line, async () => {
      try {
        await navigator.clipboard.writeText(text);
        copy.textContent = "Copied";
      } catch { // no clipboard without HTTPS: select it, and the person copies
        getSelection().selectAllChildren(shown);
        copy.textContent = "Selected";
      }
    });
  }
  const actions = make("div", { class: "buttons" }, body);
  button("Take these settings", actions, () => takeSettings(entry));
  for (const file of entry.files || []) {
    make("a", { class: "button", href: file.url, download: file.name, text: `Save ${file.name}` }, actions);
  }
  return item;
}

function takeSettings(entry) {
  show(entry.task);
  const form = find(`#${entry.task} form`);
  for (const [name, value] of Object.entries(entry.fields)) if (form.elements[name]) form.elements[name].value = value;
  form.dispatchEvent(new Event("change"));
  find("input", form).focus();
}

find("#forget").addEventListener("click", () => {
  entries = [];
  keep();
});
keep();
meet();
