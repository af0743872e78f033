"use strict";
// The forms: what each asks of the server, and the command and the request that do the same again.

// The whole numbers and numbers that were given; a field left empty is left out.
function numbers(form, fields) {
  const given = {};
  for (const [field, name] of Object.entries(fields)) {
    const input = form.elements[field], text = input.value.trim();
    if (input.validity.badInput || (text !== "" && !Number.isFinite(Number(text)))) {
      throw new Error(`${input.closest("label").firstChild.textContent.trim()} is no number: write one, or leave it empty.`);
    }
    if (text !== "") given[name] = Number(text);
  }
  if (given.seed !== undefined && !Number.isSafeInteger(given.seed)) throw new Error("The seed is expected to be a whole number below 2^53.");
  return given;
}

const SAMPLING = { seed: "seed", steps: "num_inference_steps", guidance: "guidance_scale" };
const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
const fieldsOf = (form) => Object.fromEntries([...form.elements].filter((input) => input.name && input.type !== "radio").map((input) => [input.name, input.value]));
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

// Pictures as they come, each on its card. Resolves to the cards when all are finished.
async function pictures(area, path, body, signal, count, title, words) {
  const cards = Array.from({ length: count }, () => pictureCard(area, title, words));
  await stream(path, body, signal, (event) => cards[event.index].take(event));
  if (cards.some((card) => !card.done)) throw new Error("The answer broke off before the picture was finished: try again.");
  return cards;
}

function drawing(body) {
  const options = {
    "--seed": body.seed, "--steps": body.num_inference_steps, "--guidance": body.guidance_scale,
    "-n": body.n > 1 ? body.n : undefined, "-o": `picture-${body.seed}.png`,
  };
  return [command("generate", [body.prompt], options), curlJson("/v1/images/generations", body)];
}

async function generate(form, area, signal) {
  const body = { prompt: form.elements.prompt.value, seed: randomSeed(), ...numbers(form, { ...SAMPLING, n: "n" }), ...which() };
  const count = body.n ?? 1;
  const wanted = { ...body, stream: true, drafts: true };
  const entry = remember({
    task: "generate", title: body.prompt, about: `seed ${body.seed}`, lines: drawing(body), fields: { ...fieldsOf(form), seed: body.seed },
  });
  const cards = await pictures(area, "/v1/images/generations", wanted, signal, Math.min(Math.max(count, 1), 16), "", body.prompt);
  shown(entry, cards[0].done);
  return `${plural(cards.length, "picture")} drawn with seed ${body.seed}.`;
}

async function compare(form, area, signal) {
  const prompt = form.elements.prompt.value, { seed = randomSeed() } = numbers(form, { seed: "seed" });
  const sides = ["a", "b"].map((side) => ({
    prompt, seed, ...which(), ...numbers(form, { [`${side}-steps`]: "num_inference_steps", [`${side}-guidance`]: "guidance_scale" }),
  }));
  const told = sides.map((body, i) => (
    `${"AB"[i]}: ${plural(body.num_inference_steps ?? "preset", "step")}, guidance ${body.guidance_scale ?? "preset"}`));
  const entry = remember({
    task: "compare", title: prompt, about: `seed ${seed} · ${told.join(" · ")}`, lines: sides.flatMap((body, i) => (
      drawing(body).map((line) => line.replace(`-o picture-${seed}.png`, `-o picture-${seed}-${"ab"[i]}.png`)))),
    fields: { ...fieldsOf(form), seed },
  });
  const cards = (await Promise.all(sides.map((body, i) => (
    pictures(area, "/v1/images/generations", { ...body, stream: true, drafts: true }, signal, 1, told[i], prompt))))).flat();
  shown(entry, cards[1].done);
  return `Both are drawn: A in ${cards[0].seconds.toFixed(1)} s, B in ${cards[1].seconds.toFixed(1)} s, side by side in the same forwards.`;
}

// The files of an entry, where they are small enough to be kept.
async function kept(files) {
  const urls = await Promise.all(files.map(async ([name, blob]) => ({ name, url: await urlOf(blob) })));
  return urls.filter(({ url }) => url.length < LARGEST_KEPT);
}

function shown(entry, url) {
  if (url.length < LARGEST_KEPT) entry.shown = url;
  keep();
}

async function fill(form, area, signal) {
  const { name } = needPicture(), extending = how() === "extend", prompt = form.elements.prompt.value;
  const given = { seed: randomSeed(), ...numbers(form, { ...SAMPLING, n: "n" }) }, stem = name.replace(/\.\w+$/, "");
  const files = extending ? [[`${stem}-${roomInside().join("x")}.png`, await scaledPicture()]]
    : [[name, picture.blob], [`${stem}-mask.png`, await maskBlob()]];
  const extend = extending ? borders().join(",") : undefined;
  const options = {
    "--image": files[0][0], "--mask": files[1]?.[0], "--extend": extend, "--text": prompt, "--keep-pixels": true,
    "--seed": given.seed, "--steps": given.num_inference_steps, "--guidance": given.guidance_scale,
    "--variations": given.n > 1 ? given.n : undefined, "-o": `filled-${given.seed}.png`,
  };
  const fields = Object.entries({ prompt, extend, ...given, ...which() }).filter(([, value]) => value !== undefined);
  const parts = files.map(([file], i) => `-F ${quote(`${["image", "mask"][i]}=@${file}`)}`);
  parts.push(...fields.map(([field, value]) => `--form-string ${quote(`${field}=${value}`)}`));
  const entry = remember({
    task: "fill", title: prompt, about: `${extending ? `${extend} pixels around ${name}` : `a part of ${name}`} · seed ${given.seed}`,
    lines: [command("fill", [], options), curl("/v1/images/edits", ...parts)], fields: { ...fieldsOf(form), seed: given.seed },
    files: await kept(files),
  });
  const body = new FormData();
  files.forEach(([file, blob], i) => body.append(["image", "mask"][i], blob, file));
  for (const [field, value] of [...fields, ["stream", "true"], ["drafts", "true"]]) body.append(field, value);
  const cards = await pictures(area, "/v1/images/edits", body, signal, Math.min(Math.max(given.n ?? 1, 1), 16), "", prompt);
  shown(entry, cards[0].done);
  return extending ? "The border is drawn." : "The masked part is drawn, every other pixel is as it was.";
}

// A chat stream with drafts onto a card of its own; resolves to the text.
async function tell(area, title, parts, signal) {
  const card = textCard(area, title), { blob } = picture;
  const content = [...parts, { type: "image_url", image_url: { url: await urlOf(blob) } }];
  let said = null;
  const body = { messages: [{ role: "user", content }], ...which(), stream: true, drafts: true };
  await stream("/v1/chat/completions", body, signal, ({ choices }) => {
    for (const choice of choices) {
      if (choice.draft) card.draft(choice.draft);
      if (choice.finish_reason) said = card.finish(undefined, choice.confidence);
    }
  });
  if (said === null) throw new Error("The answer broke off before it was finished: try again.");
  return said;
}

async function caption(form, area, signal) {
  const { blob, name } = needPicture(), { n = 1, seed } = numbers(form, { n: "n", seed: "seed" });
  const several = n !== 1, drawn = several ? { num_captions: n, seed: seed ?? randomSeed() } : {};
  Object.assign(drawn, which());
  const parts = Object.entries(drawn).map(([field, value]) => `--form-string ${quote(`${field}=${value}`)}`);
  const lines = [curl("/v1/caption", "-F", quote(`image=@${name}`), ...parts)];
  if (!several) lines.unshift(command("caption", [name], {}));
  const entry = remember({ task: "caption", title: name, lines, fields: fieldsOf(form), files: await kept([[name, blob]]) });
  let said;
  if (several) {
    const body = new FormData();
    body.append("image", blob, name);
    for (const [field, value] of Object.entries(drawn)) body.append(field, value);
    const answer = await (await ask("/v1/caption", body, signal)).json();
    said = answer.data[0].captions.map(({ text, confidence }) => textCard(area, "").finish(text, confidence));
  } else said = [await tell(area, name, [], signal)];
  entry.title = said[0];
  entry.about = name;
  await showSmall(entry);
  return `${plural(said.length, "caption")}: ${said[0]}`;
}

async function answer(form, area, signal) {
  const { blob, name } = needPicture(), question = form.elements.question.value.trim();
  if (!question) throw new Error('The question is empty, expected for example "what color is it?".');
  // The picture goes into the body where it is read, so that the line stays short and a shell's limit is not met.
  const [before, after] = JSON.stringify({
    messages: [{ role: "user", content: [{ type: "text", text: question }, { type: "image_url", image_url: { url: "\u0000" } }] }], ...which(),
  }).split("\\u0000");
  const kind = blob.type || "image/png";
  const request = `(printf %s ${quote(before)}; printf %s ${quote(`data:${kind};base64,`)}; base64 < ${quote(name)} | tr -d '\\n'; printf %s ${quote(after)}) | `
    + curl("/v1/chat/completions", "-H 'content-type: application/json'", "-d @-");
  const entry = remember({
    task: "ask", title: question, about: name, lines: [command("ask", [name, question], {}), request], fields: fieldsOf(form),
    files: await kept([[name, blob]]),
  });
  const said = await tell(area, question, [{ type: "text", text: question }], signal);
  entry.title = `${question} ${said}`;
  await showSmall(entry);
  return said;
}

async function showSmall(entry) {
  const url = await urlOf(picture.blob);
  if (picture.bitmap) shown(entry, url);
  else keep();
}

// One form at a time is one request at a time; other tabs may run beside it, the server shares its forwards.
const TASKS = { generate, caption, ask: answer, fill, compare };
for (const [name, task] of Object.entries(TASKS)) {
  const form = find(`#${name} form`), submit = find("[type=submit]", form), stop = find(".stop", form);
  const area = find(`.results[data-of=${name}]`);
  let running = null;
  const visible = () => !form.closest("[role=tabpanel]").hidden;
  stop.addEventListener("click", () => running && running.abort());
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return;
    running = new AbortController();
    problem.textContent = "";
    status.textContent = "Asked the server ...";
    area.replaceChildren();
    area.classList.toggle("words", name === "caption" || name === "ask");
    submit.disabled = true;
    stop.disabled = false;
    form.dataset.running = "yes";
    // On a phone the answer comes below the form: show where.
    if (find(".right").getBoundingClientRect().top > 0.8 * innerHeight) find(".right").scrollIntoView();
    try {
      const told = await task(form, area, running.signal);
      if (visible()) status.textContent = told;
    } catch (error) {
      running.abort();
      for (const card of all("figure:not([data-done])", area)) card.remove();
      status.textContent = "";
      if (visible()) problem.textContent = error.name === "AbortError" ? "Stopped." : error.message;
    } finally {
      running = null;
      submit.disabled = false;
      stop.disabled = true;
      delete form.dataset.running;
    }
  });
}
