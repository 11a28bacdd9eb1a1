"use strict";
// Filters, sorting and enlarged images. Without this script, the page shows all queries and tables.
document.documentElement.classList.add("js");

const form = document.getElementById("filters");
const queries = [...document.querySelectorAll("article")];
const orders = {
  best: (a, b) => a.dataset.rank - b.dataset.rank,
  action: (a, b) => a.dataset.action.localeCompare(b.dataset.action),
  id: (a, b) => a.dataset.id.localeCompare(b.dataset.id, undefined, {numeric: true}),
};
let order = "";
const spaced = text => " " + text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, " ");  // words match by prefix
function apply() {
  const wanted = Object.fromEntries(new FormData(form));
  const words = spaced(wanted.words).split(" ");
  let shown = 0;
  for (const query of queries) {
    const caption = spaced(query.querySelector(".caption").textContent);
    const fits = ["outcome", "kind", "action"].every(name => !wanted[name] || query.dataset[name] === wanted[name])
      && (!wanted.failure || query.dataset.failure.split(" ").includes(wanted.failure))
      && words.every(word => caption.includes(" " + word));
    query.hidden = !fits;
    shown += fits;
  }
  if (wanted.order !== order) {
    order = wanted.order;
    document.getElementById("list").append(...(order ? [...queries].sort(orders[order]) : queries));
  }
  document.getElementById("count").textContent = `${shown} of ${queries.length} queries`;
}
form.hidden = false;
form.addEventListener("input", apply);
form.addEventListener("reset", () => setTimeout(apply));  // after the fields are reset
form.addEventListener("submit", event => event.preventDefault());

// Images: a click, Enter or the space bar enlarges an image. Arrow keys move to its neighbours, so each query needs only one tab stop.
const zoom = document.getElementById("zoom");
let current = null;
const visible = from => [...from.closest("article, .step").querySelectorAll(".shot")].filter(shot => shot.getClientRects().length);
function focusOn(shot) {
  shot.tabIndex = -1;
  shot.setAttribute("role", "button");
  shot.focus();
}
function show(shot) {
  current = shot;
  const place = shot.closest("article, .step");
  zoom.querySelector("use").setAttribute("href", shot.firstElementChild.getAttribute("href"));
  zoom.querySelector(".name").textContent = `${shot.closest("ol").getAttribute("aria-label")}: ${shot.getAttribute("aria-label")}`;
  zoom.querySelector(".soft").textContent = place.querySelector(".caption").textContent;
  if (!zoom.open) zoom.showModal();
}
function neighbour(from, step) {
  const shots = visible(from);
  return shots[Math.min(Math.max(shots.indexOf(from) + step, 0), shots.length - 1)];
}
document.addEventListener("click", event => {
  const shot = event.target.closest(".shot");
  if (shot) show(shot);
  else if (event.target === zoom) zoom.close();
  else if (event.target.dataset.step) show(neighbour(current, Number(event.target.dataset.step)));
});
document.addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  const target = event.target;
  if (zoom.open) {
    if (step) show(neighbour(current, step));
  } else if (target.closest("article, .step")) {
    if (step) focusOn(neighbour(target, step));
    else if (target.matches(".shot") && (event.key === "Enter" || event.key === " ")) show(target);
    else return;
    event.preventDefault();
  }
});
zoom.addEventListener("close", () => focusOn(current));

// Tables: a click on a column header sorts the rows.
for (const head of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const falls = head.getAttribute("aria-sort") !== "descending";
    const body = head.closest("table").tBodies[0];
    const value = row => {
      const text = row.cells[head.cellIndex].textContent.replaceAll(",", "");
      return Number.isNaN(parseFloat(text)) ? text : parseFloat(text);
    };
    const rows = [...body.rows].sort((a, b) => (value(a) > value(b)) - (value(a) < value(b)));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falls ? "descending" : "ascending");
    body.append(...(falls ? rows.reverse() : rows));
  });
}
