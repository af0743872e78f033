// Caption a picture and stream an answer about it, with Node 18 or later and no packages:
//   node client.mjs apple.png "what color is it?" [http://127.0.0.1:8000]
import { readFile } from "node:fs/promises";

const [path, question, server = "http://127.0.0.1:8000"] = process.argv.slice(2);
const headers = { authorization: `Bearer ${process.env.MMDLM_API_KEY ?? "none"}` };
const content = await readFile(path);

const form = new FormData();
form.append("image", new Blob([content]), "picture");
const { data } = await answered(await fetch(`${server}/v1/caption`, { method: "POST", headers, body: form }));
console.log(data[0].captions[0].text);

const url = `data:;base64,${content.toString("base64")}`;
const message = { role: "user", content: [{ type: "text", text: question }, { type: "image_url", image_url: { url } }] };
const response = await fetch(`${server}/v1/chat/completions`, {
  method: "POST",
  headers: { ...headers, "content-type": "application/json" },
  body: JSON.stringify({ messages: [message], stream: true }),
});
if (!response.ok) await answered(response);
let rest = "";
for await (const part of response.body.pipeThrough(new TextDecoderStream())) {
  const lines = (rest + part).split("\n");
  rest = lines.pop();
  for (const line of lines.filter((one) => one.startsWith("data: {"))) {
    const event = JSON.parse(line.slice("data: ".length));
    if (event.error) throw new Error(event.error.message);
    process.stdout.write(event.choices[0].delta.content ?? "");
  }
}
console.log();

async function answered(response) {
  const body = await response.json();
  if (!response.ok) throw new Error(body.error.message);
  return body;
}
