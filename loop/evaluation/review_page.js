"use strict";
// The ratings leave this page only as the file that the reviewer saves.
let unsaved = false;
function cell(text) {
  // A spreadsheet would compute a text that begins like a formula.
  const safe = /^[=+\-@\t\r]/.test(text) ? "'" + text : text;
  return '"' + safe.replaceAll('"', '""') + '"';
}
function ratings() {
  const rater = document.getElementById("rater").value;
  const forms = [...document.querySelectorAll(".rating")];
  const names = [...forms[0].querySelectorAll("[data-item]")].map((field) => field.dataset.item);
  const lines = [["rater", "id", "note", ...names]];
  for (const form of forms) {
    const values = [...form.querySelectorAll("[data-item]")].map((field) => field.value);
    lines.push([rater, form.dataset.id, form.dataset.note, ...values]);
  }
  return lines.map((line) => line.map(cell).join(",") + "\r\n").join("");
}
document.addEventListener("input", () => { unsaved = true; });
addEventListener("beforeunload", (event) => { if (unsaved) event.preventDefault(); });
document.getElementById("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([ratings()], { type: "text/csv" }));
  link.download = "ratings.csv";
  link.click();
  unsaved = false;
});
