// The page works without this: choosing names is done by the style sheet. Here: the pointer's highlight, and the numbers under it.
"use strict";
const body = document.body;
const owner = (event) => (event.target.closest ? event.target.closest("[data-k]") : null);
document.addEventListener("pointerover", (event) => {
  const found = event.pointerType === "touch" ? null : owner(event);
  if (found) body.dataset.hover = found.dataset.k;
  else delete body.dataset.hover;
});
document.addEventListener("click", (event) => {
  const found = owner(event);
  if (!found || found.tagName === "LABEL") return;
  const pick = document.getElementById("pick-" + found.dataset.k);
  pick.checked = !pick.checked;
});
for (const figure of document.querySelectorAll("figure")) {
  const drawing = figure.querySelector("svg[role=img]"), readout = figure.querySelector(".readout");
  if (!drawing || !readout) continue;
  const table = figure.querySelector("table");
  const header = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  const epochs = [...table.tBodies[0].rows].map((row) => Number(row.cells[0].textContent));
  const names = new Map([...document.querySelectorAll(".chip")].map((chip) => [chip.dataset.k, chip.textContent.trim()]));
  drawing.addEventListener("pointermove", (event) => {
    const found = owner(event);
    if (!found) readout.textContent = "";
    else if (found.dataset.text) readout.textContent = found.dataset.text;
    else if (drawing.dataset.left) {
      const { first, last, left, right } = Object.fromEntries(Object.entries(drawing.dataset).map(([key, text]) => [key, Number(text)]));
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
      const wanted = first + (last - first) * Math.min(Math.max((point.x - left) / (right - left), 0), 1);
      const at = epochs.reduce((best, epoch, index) => (Math.abs(epoch - wanted) < Math.abs(epochs[best] - wanted) ? index : best), 0);
      const column = header.indexOf(names.get(found.dataset.k));
      if (column > 0) readout.textContent = `Epoch ${epochs[at]}, ${header[column]}: ${table.tBodies[0].rows[at].cells[column].textContent}`;
    }
  });
  drawing.addEventListener("pointerleave", () => { readout.textContent = ""; });
}
