"use strict";
// The ratings leave this page only as the file that the reviewer saves.
const FORMULA = /^[=+\-@\t\r]/; // a spreadsheet would compute a text that begins so
const forms = [...document.querySelectorAll(".rating")];
const rater = document.getElementById("rater");
let unsaved = false;

function fieldsOf(form) {
  return [...form.querySelectorAll("[data-item]")];
}
function say(text) {
  document.getElementById("status").textContent = text;
}
function countRated() {
  let complete = 0;
  for (const form of forms) {
    const points = [...form.querySelectorAll("select")];
    const filled = points.filter((field) => field.value).length;
    complete += filled === points.length;
    const cell = document.querySelector(`[data-rated="${form.id}"]`);
    cell.textContent = filled ? `${filled} of ${points.length}` : "";
  }
  return `${complete} of ${forms.length} notes are rated`;
}

// ---- CSV, as RFC 4180 has it

function cell(text) {
  const safe = FORMULA.test(text) ? "'" + text : text;
  return '"' + safe.replaceAll('"', '""') + '"';
}
function ratings() {
  const names = fieldsOf(forms[0]).map((field) => field.dataset.item);
  const lines = [["rater", "id", "note", ...names]];
  for (const form of forms) {
    const values = fieldsOf(form).map((field) => field.value);
    lines.push([rater.value, form.dataset.id, form.dataset.note, ...values]);
  }
  return lines.map((line) => line.map(cell).join(",") + "\r\n").join("");
}
function parse(text) {
  const lines = [];
  let line = [];
  // A cell in quotes or without, and what ends it.
  const pattern = /(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r?\n|$)/gy;
  for (const [, quoted, plain, end] of text.replace(/^\ufeff/, "").matchAll(pattern)) {
    const value = quoted === undefined ? plain : quoted.replaceAll('""', '"');
    line.push(value.startsWith("'") && FORMULA.test(value.slice(1)) ? value.slice(1) : value);
    if (end === ",") continue;
    if (line.length > 1) lines.push(line);
    line = [];
  }
  return lines;
}
function restore(text) {
  const [names, ...lines] = parse(text);
  let found = 0;
  for (const line of lines) {
    const saved = Object.fromEntries(names.map((name, i) => [name, line[i]]));
    const isOf = (form) => form.dataset.id === saved.id && form.dataset.note === saved.note;
    const form = forms.find(isOf);
    if (!form) continue;
    found += 1;
    rater.value = saved.rater;
    for (const field of fieldsOf(form)) field.value = saved[field.dataset.item] ?? "";
  }
  return found;
}

document.addEventListener("input", (event) => {
  if (event.target.id === "load") return;
  unsaved = true;
  say(`${countRated()}, not saved yet`);
});
addEventListener("beforeunload", (event) => { if (unsaved) event.preventDefault(); });
document.getElementById("save").addEventListener("click", () => {
  if (!rater.value.trim()) {
    say("name the rater first");
    rater.focus();
    return;
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([ratings()], { type: "text/csv" }));
  link.download = `ratings-${rater.value.trim().replace(/[^\p{L}\p{N}]+/gu, "-")}.csv`;
  link.click();
  unsaved = false;
  say(`saved: ${countRated()}`);
});
document.getElementById("load").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (!file) return;
  const found = restore(await file.text());
  say(found ? countRated() : "no note of this page is in that file");
});
countRated(); // what the browser remembers of an earlier visit counts
