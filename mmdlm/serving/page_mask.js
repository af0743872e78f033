"use strict";
// The brush: a mask over the picture as a list of strokes, in the picture's own pixels, so that undoing is cheap however
// large the picture is. What is painted is to be drawn anew. Under "a border around it" the canvas shows the border.

const paint = find("#paint"), brush = find("#brush"), fillForm = find("#fill form");
const STRIPES = ["rgb(20 70 255)", "rgb(150 190 255)"]; // two blues: one of them is seen on any picture
const EDITOR = 512; // pixels of the editor's longer side
let strokes = [], erasing = false, current = null, cursor = null;
const layer = document.createElement("canvas");

const size = () => (picture.bitmap ? [picture.bitmap.width, picture.bitmap.height] : [model.image_size, model.image_size]);
const how = () => fillForm.elements.how.value;
const brushPixels = () => Math.max(1, Math.round((Number(brush.value) / 100) * Math.min(...size())));

// The mask as it stands: opaque where it is painted. A canvas of the picture's size.
function maskLayer() {
  const [width, height] = size(), context = layer.getContext("2d", { willReadFrequently: true });
  if (layer.width !== width || layer.height !== height) Object.assign(layer, { width, height });
  context.globalCompositeOperation = "source-over";
  context.clearRect(0, 0, width, height);
  for (const stroke of strokes) {
    context.globalCompositeOperation = { add: "source-over", remove: "destination-out", invert: "xor" }[stroke.kind];
    context.fillStyle = context.strokeStyle = "black";
    if (stroke.rectangle) context.fillRect(...stroke.rectangle);
    else {
      Object.assign(context, { lineWidth: stroke.width, lineCap: "round", lineJoin: "round" });
      context.beginPath();
      stroke.points.forEach(([x, y]) => context.lineTo(x, y));
      if (stroke.points.length === 1) context.lineTo(stroke.points[0][0] + 0.01, stroke.points[0][1]);
      context.stroke();
    }
  }
  return layer;
}

// The mask's alpha, cut at half: what the server will fill. Returns [levels, share].
function maskLevels() {
  const { width, height } = maskLayer();
  const image = layer.getContext("2d").getImageData(0, 0, width, height);
  let filled = 0;
  for (let i = 0; i < image.data.length; i += 4) {
    const level = image.data[i + 3] >= 128 ? 255 : 0;
    filled += level > 0;
    image.data.set([level, level, level, 255], i);
  }
  return [image, filled / (width * height)];
}

// The mask as a PNG of the picture's size, white where it is to be filled.
async function maskBlob() {
  const [image, share] = maskLevels();
  if (!share) throw new Error("Nothing is masked yet: paint over what is to be drawn anew, or give a rectangle.");
  const canvas = make("canvas", { width: image.width, height: image.height });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

const borders = () => ["left", "top", "right", "bottom"].map((name) => fillForm.elements[name].value.trim() || "0");
function roomInside() {
  const [left, top, right, bottom] = borders().map(Number);
  return [model.image_size - left - right, model.image_size - top - bottom];
}

// The picture scaled to the room that its borders leave: what `--extend` of the command line wants, too.
async function scaledPicture() {
  const [width, height] = roomInside();
  if (!(width >= 1 && height >= 1 && Number.isInteger(width) && Number.isInteger(height))) {
    throw new Error(`The borders leave ${width} × ${height} pixels of ${model.image_size} for the picture: make them smaller.`);
  }
  if (!picture.bitmap) throw new Error("This browser cannot open the picture: save it as a PNG first.");
  const canvas = make("canvas", { width, height }), context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white"; // what is transparent becomes white, as the server sees it
  context.fillRect(0, 0, width, height);
  context.drawImage(picture.bitmap, 0, 0, width, height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

function redraw() {
  const context = paint.getContext("2d"), extending = how() === "extend";
  const [width, height] = extending ? [model.image_size, model.image_size] : size();
  const scale = EDITOR / Math.max(width, height);
  Object.assign(paint, { width: Math.round(width * scale), height: Math.round(height * scale) });
  context.imageSmoothingEnabled = scale < 2;
  find("#room").textContent = extending && roomInside().every((side) => side >= 1)
    ? `The picture is scaled to ${roomInside().join(" × ")}, the whole is ${width} × ${height} pixels.` : "";
  if (extending) {
    const [left, top] = borders().map(Number), [inner, tall] = roomInside();
    stripe(context);
    if (inner > 0 && tall > 0) {
      const place = [left * scale, top * scale, inner * scale, tall * scale];
      context.clearRect(...place);
      if (picture.bitmap) context.drawImage(picture.bitmap, ...place);
    }
    return;
  }
  if (picture.bitmap) context.drawImage(picture.bitmap, 0, 0, paint.width, paint.height);
  const over = make("canvas", { width: paint.width, height: paint.height }), striped = over.getContext("2d");
  striped.drawImage(maskLayer(), 0, 0, over.width, over.height);
  striped.globalCompositeOperation = "source-atop";
  stripe(striped);
  context.globalAlpha = 0.7;
  context.drawImage(over, 0, 0);
  context.globalAlpha = 1;
  if (cursor && document.activeElement === paint) ring(context, scale);
}

function stripe(context) {
  const { width, height } = context.canvas;
  [context.fillStyle, context.strokeStyle] = STRIPES;
  context.lineWidth = 4;
  context.fillRect(0, 0, width, height);
  context.beginPath();
  for (let x = -height; x < width; x += 14) {
    context.moveTo(x, height);
    context.lineTo(x + height, 0);
  }
  context.stroke();
}

// Where the keyboard's brush is: black and white, to be seen on every picture.
function ring(context, scale) {
  for (const [style, width] of [["black", 5], ["white", 2]]) {
    Object.assign(context, { strokeStyle: style, lineWidth: width });
    context.beginPath();
    context.arc(cursor[0] * scale, cursor[1] * scale, Math.max(3, (brushPixels() * scale) / 2), 0, 2 * Math.PI);
    context.stroke();
  }
}

function tellMasked() {
  const share = maskLevels()[1];
  find("#masked").textContent = how() === "extend" ? "" : share
    ? `${share < 0.01 ? "Less than 1" : Math.round(share * 100)} % of the picture is masked.` : "Nothing is masked yet.";
}

function change(act) {
  act();
  redraw();
  tellMasked();
}

function placeOf(event) {
  const box = paint.getBoundingClientRect(), [width, height] = size();
  return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
}

paint.addEventListener("pointerdown", (event) => {
  if (how() === "extend" || event.button > 0) return;
  paint.setPointerCapture(event.pointerId);
  cursor = null;
  current = { kind: erasing ? "remove" : "add", width: brushPixels(), points: [placeOf(event)] };
  change(() => strokes.push(current));
});
paint.addEventListener("pointermove", (event) => {
  if (!current) return;
  current.points.push(placeOf(event));
  redraw();
});
for (const kind of ["pointerup", "pointercancel"]) {
  paint.addEventListener(kind, () => {
    if (current) change(() => { current = null; });
  });
}

paint.addEventListener("keydown", (event) => {
  if (how() === "extend") return;
  const [width, height] = size(), step = event.shiftKey ? 1 : Math.max(1, brushPixels() / 2);
  const [x, y] = cursor || [width / 2, height / 2];
  const moved = { ArrowLeft: [x - step, y], ArrowRight: [x + step, y], ArrowUp: [x, y - step], ArrowDown: [x, y + step] }[event.key];
  const dab = event.key === " " || event.key === "Enter";
  if (!moved && !dab) return;
  event.preventDefault();
  cursor = moved ? [Math.min(Math.max(moved[0], 0), width), Math.min(Math.max(moved[1], 0), height)] : [x, y];
  if (dab) change(() => strokes.push({ kind: erasing ? "remove" : "add", width: brushPixels(), points: [cursor] }));
  else redraw();
});
paint.addEventListener("focus", () => {
  const [width, height] = size();
  if (paint.matches(":focus-visible")) cursor ??= [width / 2, height / 2];
  redraw();
});
paint.addEventListener("blur", redraw);

function rectangle(kind) {
  const [left, top, width, height] = ["left", "top", "width", "height"].map((name) => Number(find("#rect-" + name).value));
  change(() => strokes.push({ kind, rectangle: [left, top, width, height] }));
}
find("#rect-add").addEventListener("click", () => rectangle("add"));
find("#rect-remove").addEventListener("click", () => rectangle("remove"));
find("#undo").addEventListener("click", () => change(() => strokes.pop()));
find("#clear").addEventListener("click", () => change(() => { strokes = []; }));
find("#invert").addEventListener("click", () => change(() => strokes.push({ kind: "invert", rectangle: [0, 0, ...size()] })));
find("#erase").addEventListener("click", (event) => {
  erasing = !erasing;
  event.target.setAttribute("aria-pressed", erasing);
});
function tellBrush() {
  find("#brush-size").textContent = `${brushPixels()} px`;
}
brush.addEventListener("input", () => {
  tellBrush();
  redraw();
});
fillForm.addEventListener("change", () => {
  for (const part of all("[data-how]", fillForm)) part.hidden = part.dataset.how !== how();
  redraw();
  tellMasked();
});
document.addEventListener("picture", () => {
  tellBrush();
  const [width, height] = size(), whole = { left: width / 4, top: height / 4, width: width / 2, height: height / 2 };
  for (const [name, value] of Object.entries(whole)) find("#rect-" + name).value = Math.round(value);
  cursor = null;
  change(() => { strokes = []; });
});
tellBrush();
redraw();
