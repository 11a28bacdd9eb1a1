// Marks of right and wrong pictures, kept by the browser.

import { ask } from "./requests.js";

const KEY = `marks ${document.body.dataset.index}`;

// An id is ROW-HASH. An update of the index changes rows but never the hash of a picture.
const hashOf = (id) => id.slice(id.lastIndexOf("-") + 1);
export const samePicture = (one, other) => hashOf(one) === hashOf(other);

let marks = read();

function read() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    if (!Array.isArray(found)) return [];
    return found.filter((one) => typeof one?.text === "string" && typeof one.image === "string" && typeof one.right === "boolean");
  } catch { return []; } // the browser forbids storage, or the value is invalid
}

// Returns whether the browser keeps the marks.
function keep() {
  try { localStorage.setItem(KEY, JSON.stringify(marks)); return true; } catch { return false; }
}

export function countMarks() {
  const right = marks.filter((one) => one.right).length;
  return { all: marks.length, right, wrong: marks.length - right };
}

const isOf = (one, text, id) => one.text === text && samePicture(one.image, id);

export const findMark = (text, id) => marks.find((one) => isOf(one, text, id));

// Choosing the same mark twice removes it.
export function changeMark(text, id, right) {
  const before = findMark(text, id);
  marks = marks.filter((one) => !isOf(one, text, id));
  if (before?.right !== right) marks.push({ text, image: id, right });
  return keep();
}

export function deleteMarks() {
  marks = [];
  return keep();
}

// Returns the annotation, and sentences about the marks that it lacks.
export async function annotationOf(form) {
  const headers = { "Content-Type": "application/json" };
  const sent = marks.map(({ text, image, right }) => ({ text, image, right }));
  const response = await ask("/api/annotation", { method: "POST", headers, body: JSON.stringify({ marks: sent, form }) });
  const skipped = Number(response.headers.get("X-Skipped-Marks")), content = await response.text();
  const written = new Set(content.trim().split("\n").flatMap((line) => JSON.parse(line).caption));
  const missing = [...new Set(sent.map((one) => one.text))].filter((text) => !written.has(text));
  const lacks = [];
  if (skipped) lacks.push(`Marks of pictures that the index no longer has: ${skipped}. They are not in the file.`);
  if (missing.length) lacks.push(`Texts without a right picture are not in the file: ${missing.join("; ")}`);
  return { content, lacks };
}
