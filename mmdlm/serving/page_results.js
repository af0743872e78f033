"use strict";
// What comes back: pictures with all their frames and how sure the model was of every place, and texts that firm up.

// Viridis at five points: the same scale as the legend's in page.css, readable without seeing colours.
const SCALE = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

function colour(percent) {
  const at = (Math.min(Math.max(percent, 0), 100) / 100) * (SCALE.length - 1);
  const low = Math.min(Math.floor(at), SCALE.length - 2);
  return SCALE[low].map((level, i) => Math.round(level + (at - low) * (SCALE[low + 1][i] - level)));
}

// One cell a code: rows of percentages onto a canvas of as many pixels.
function drawMap(canvas, grid) {
  canvas.width = grid[0].length;
  canvas.height = grid.length;
  const image = new ImageData(canvas.width, canvas.height);
  grid.flat().forEach((percent, i) => image.data.set([...colour(percent), 255], 4 * i));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// A card for one picture on its way. `take(event)` gets the server's events, `done` is the last one's data URL.
function pictureCard(area, title, words) {
  const node = make("figure", { class: "card" }, area);
  if (title) make("h2", { text: title }, node);
  const views = make("div", { class: "views" }, node);
  const left = make("div", {}, views), right = make("div", {}, views);
  const image = make("img", { class: "frame", alt: words, src: "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==" }, left);
  const map = make("canvas", { role: "img", class: "map", width: 16, height: 16 }, right);
  const about = make("span", { text: "waiting for room ..." }, left);
  const legend = make("div", {}, right);
  make("div", { class: "legend" }, legend);
  const ends = make("span", { class: "ends" }, legend);
  make("span", { text: "unsure" }, ends);
  make("span", { text: "sure" }, ends);
  const bar = make("progress", { max: 1, value: 0, "aria-label": "share decided" }, node);
  const scrub = make("label", { class: "scrub", text: "Step" }, node);
  const range = make("input", { type: "range", min: 1, max: 1, value: 1, disabled: true }, scrub);
  const told = make("output", {}, scrub);
  const caption = make("figcaption", {}, node), actions = make("div", { class: "buttons" }, node);
  const frames = [], started = performance.now();
  const card = { node, frames, done: "", seconds: 0, take };

  function look(number) {
    const frame = frames[number - 1];
    image.src = frame.url;
    told.textContent = `${frame.step} · ${Math.round(frame.undecided * 100)} % undecided`;
    about.textContent = frame.finished ? "finished" : "as it stands";
    if (frame.grid) {
      drawMap(map, frame.grid);
      const values = frame.grid.flat(), sure = Math.round(values.reduce((sum, one) => sum + one, 0) / values.length);
      about.textContent += ` · ${sure} % sure`;
      map.setAttribute("aria-label", `How sure the model is of each place: ${sure} percent on average`);
    }
  }
  range.addEventListener("input", () => look(Number(range.value)));

  function take(event) {
    const url = "data:image/png;base64," + event.b64_json;
    if (event.draft) {
      frames.push({ url, step: event.draft.step, undecided: event.draft.undecided, grid: event.draft.confidence });
    } else {
      // The finished picture replaces the last draft: they show the same codes, but this one is whole.
      const last = frames.pop() || { step: 1, grid: null };
      frames.push({ ...last, url, undecided: 0, finished: true });
      Object.assign(card, { done: url, seconds: (performance.now() - started) / 1000 });
      finish(event.seed);
    }
    node.dataset.frames = range.max = range.value = frames.length;
    range.disabled = frames.length < 2;
    bar.value = 1 - frames.at(-1).undecided;
    look(frames.length);
  }

  function finish(seed) {
    caption.textContent = `seed ${seed} · ${frames.at(-1).step} steps · ${card.seconds.toFixed(1)} s`;
    bar.hidden = true;
    node.dataset.done = seed;
    const name = `picture-${seed}.png`;
    make("a", { class: "button", href: card.done, download: name, text: "Save" }, actions);
    for (const [text, tab] of [["Caption", "caption"], ["Ask", "ask"], ["Fill", "fill"]]) {
      const go = button(text, actions, async () => {
        await takePicture(blobOf(card.done), name);
        if (tab === "fill") find("#fill [name=prompt]").value = words;
        show(tab);
        find("#tab-" + tab).focus();
      });
      go.setAttribute("aria-label", `${text}: take this picture there`);
    }
  }
  return card;
}

// A text that firms up: masked places are shown as they are, and the model's guess at them below.
function textCard(area, title) {
  const node = make("figure", { class: "card" }, area);
  if (title) make("p", { class: "asked hint", text: title }, node);
  const said = make("div", { class: "said" }, node), line = make("p", {}, said), guess = make("small", {}, said);
  const bar = make("progress", { max: 1, value: 0, "aria-label": "share decided" }, node);
  const caption = make("figcaption", { text: "waiting for room ..." }, node);
  let drafts = 0, last = "";

  function draft({ text, guess: best, step, undecided }) {
    drafts += 1;
    node.dataset.frames = drafts;
    last = text;
    line.replaceChildren(...text.split(/(\u2592+)/).map((part) => (
      part.startsWith("\u2592") ? make("span", { class: "masked", text: part }) : document.createTextNode(part))));
    guess.textContent = undecided > 0 && best ? `its guess: ${best}` : "";
    bar.value = 1 - undecided;
    caption.textContent = `step ${step} · ${Math.round(undecided * 100)} % undecided`;
  }
  function finish(text, confidence) {
    line.textContent = (text ?? last).trim() || "(no words)";
    guess.textContent = "";
    bar.hidden = true;
    caption.textContent = `${Math.round(confidence * 100)} % sure`;
    node.dataset.done = "yes";
    return line.textContent;
  }
  return { node, draft, finish };
}
