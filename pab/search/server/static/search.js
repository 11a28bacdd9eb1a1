// The page of photo search: form, results, viewer, marks and keys.

import { clock, element, ghosts, icon, nearestTile, ratioOf, shortName, thumbnail } from "./elements.js";
import { annotationOf, changeMark, countMarks, deleteMarks, findMark, samePicture } from "./marks.js";
import { addressOf, emptyQuery, FILTERS, hasQuery, queryOfAddress, requestOf } from "./query.js";
import { ask, askSearch, Refusal } from "./requests.js";

const KEPT_PAGES = 12; // queries whose results are kept for the back button
const LIMIT_MB = Number(document.body.dataset.limitMb);
const MOST_MARKS = Number(document.body.dataset.mostMarks);

const $ = (id) => document.getElementById(id);
const grid = $("grid"), viewer = $("viewer");
const uploads = new Map(); // id of an upload -> address of its preview
const pages = new Map(); // address of a query -> { query, results, next, indexed, scroll }

let shown = null; // entry of `pages` on the screen
let shownKey = null;
let picture = null; // picture in the dialog
let loading = null; // AbortController of the latest query

// ------------------------------------------------------------------------------------- the query

function queryOfForm() {
  const query = emptyQuery();
  query.q = $("text").value.trim();
  query.image = $("chip").dataset.image ?? "";
  query.minus = $("minus").value.split(",").map((term) => term.trim()).filter(Boolean);
  for (const name of FILTERS) query[name] = $(name)?.value.trim() ?? "";
  query.rerank = $("rerank")?.checked === false ? "0" : ""; // the box is absent without a reranker
  return query;
}

function fillForm(query) {
  $("text").value = query.q;
  $("minus").value = query.minus.join(", ");
  for (const name of FILTERS) if ($(name)) $(name).value = query[name];
  if ($("rerank")) $("rerank").checked = !query.rerank;
  const active = FILTERS.filter((name) => query[name]).length;
  $("active").hidden = !active;
  $("active").textContent = active;
  showChip(query.image);
}

function showChip(image) {
  const chip = $("chip");
  chip.hidden = !image;
  chip.dataset.image = image;
  if (!image) $("chip-picture").removeAttribute("src");
  else if (uploads.has(image)) $("chip-picture").src = uploads.get(image);
  else if (!image.startsWith("upload-")) $("chip-picture").src = `/api/thumbnails/${encodeURIComponent(image)}`;
  else $("chip-picture").src = "/static/icon.svg"; // an upload of an earlier visit
}

// ----------------------------------------------------------------------------------- the results

function go(query, { file = null } = {}) {
  if (!hasQuery(query) && !file) { $("text").focus(); return; }
  keepScroll();
  if (!file && addressOf(query) !== shownKey) history.pushState({}, "", addressOf(query));
  run(query, { file });
}

async function run(query, { file = null } = {}) {
  loading?.abort();
  loading = new AbortController();
  const { signal } = loading;
  fillForm(query);
  $("trouble").hidden = true;
  document.title = query.q ? `${query.q} – Photo search` : "Photo search";
  if (!hasQuery(query) && !file) { reset(); return; }
  document.body.dataset.state = "results";
  const key = addressOf(query);
  const known = file ? null : pages.get(key);
  shown = known ?? null;
  shownKey = key;
  if (known) {
    fillGrid(known);
    window.scrollTo(0, known.scroll);
    return;
  }
  $("all").hidden = true;
  grid.replaceChildren(...ghosts());
  window.scrollTo(0, 0);
  say("Searching");
  try {
    const answer = await askSearch(requestOf(query, 0), file, signal);
    if (file) {
      uploads.set(answer.image, URL.createObjectURL(file));
      query = { ...query, image: answer.image };
      history.pushState({}, "", addressOf(query));
      showChip(answer.image);
      shownKey = addressOf(query);
    }
    shown = { query, results: answer.results, next: answer.next, indexed: answer.indexed, scroll: 0 };
    keepPage(shownKey, shown);
    fillGrid(shown);
    if (!answer.results.length) showNothing(query);
    else say(`Pictures in the index: ${answer.indexed.toLocaleString("en")}. Time of the search: ${(answer.milliseconds / 1000).toFixed(2)} s.`);
  } catch (error) {
    if (error.name !== "AbortError") showError(error, () => run(query, { file }));
  }
}

function reset() {
  shown = shownKey = null;
  grid.replaceChildren();
  $("all").hidden = true;
  say("");
  document.body.dataset.state = "empty";
}

async function loadMore() {
  const page = shown;
  if (!page || page.next === null || page.busy) return;
  page.busy = true;
  let failed = false;
  try {
    const answer = await askSearch(requestOf(page.query, page.next), null, loading?.signal);
    page.results.push(...answer.results);
    page.next = answer.next;
    if (page === shown) addTiles(answer.results);
  } catch (error) {
    failed = error.name !== "AbortError";
    if (failed && page === shown) say(`${error.message} Scroll to load more pictures.`);
  }
  page.busy = false;
  if (page !== shown) return;
  if (failed) window.addEventListener("scroll", watchEnd, { once: true });
  else watchEnd();
}

function keepPage(key, page) {
  pages.delete(key);
  pages.set(key, page);
  if (pages.size > KEPT_PAGES) pages.delete(pages.keys().next().value);
}

const itemOf = (id) => [...grid.querySelectorAll("li[data-id]")].find((item) => samePicture(item.dataset.id, id));
const resultOf = (id) => shown?.results.find((one) => samePicture(one.id, id));

const keepScroll = () => { if (shown) shown.scroll = window.scrollY; };

function fillGrid(page) {
  grid.replaceChildren();
  addTiles(page.results);
  watchEnd();
}

const observer = new IntersectionObserver(
  (seen) => { if (seen.some((one) => one.isIntersecting)) loadMore(); }, { rootMargin: "900px" },
);

function watchEnd() {
  observer.unobserve($("sentinel"));
  if (shown?.next !== null) observer.observe($("sentinel")); // loads at once if the end is in view
  $("all").hidden = !shown?.results.length || shown.next !== null;
  $("all").textContent = `Pictures shown: ${shown?.results.length.toLocaleString("en")}.`;
}

function addTiles(results) {
  grid.append(...results.map((result) => {
    const frame = element("span", { className: "frame" });
    frame.append(thumbnail(result.id, frame));
    if (result.time_s !== null) frame.append(element("span", { className: "time", textContent: clock(result.time_s) }));
    const name = element("span", { className: "name", dir: "auto", textContent: shortName(result), title: result.name });
    const score = element("span", { className: "score", textContent: result.score.toFixed(3) });
    const tile = element("button", { type: "button", className: "tile" }, frame, element("span", { className: "under" }, name, score), element("span", { className: "judged" }));
    tile.addEventListener("click", () => open(result));
    const item = element("li", {}, tile);
    item.dataset.id = result.id;
    item.style.setProperty("--ratio", ratioOf(result).toFixed(3));
    if (shown?.query.q) {
      const buttons = ["right", "wrong"].map((kind) => {
        const button = element("button", { type: "button", className: kind, title: kind === "right" ? "Right" : "Wrong" }, icon(kind === "right" ? "right" : "close"));
        button.setAttribute("aria-label", `Mark ${result.name} ${kind}`);
        button.addEventListener("click", () => mark(result, kind === "right"));
        return button;
      });
      item.append(element("div", { className: "mark" }, ...buttons));
    }
    showMark(item, result);
    return item;
  }));
}

// ------------------------------------------------------------------------------------- messages

document.addEventListener("busy", () => say("The server is busy. Waiting for a place in the queue."));

function say(text) { $("status").textContent = text; }

function showTrouble(title, text, button, action) {
  grid.replaceChildren();
  say("");
  for (const id of ["again", "unfilter"]) { $(id).hidden = id !== button; $(id).onclick = action; }
  $("trouble-title").textContent = title;
  $("trouble-text").textContent = text;
  $("trouble").hidden = false;
}

function showNothing(query) {
  const filtered = FILTERS.some((name) => query[name]);
  const text = filtered ? "No picture for this query passes the filters." : "The index has no picture for this query.";
  showTrouble("Nothing found", text, filtered ? "unfilter" : "", () => go({ ...query, folder: "", start: "", end: "", least: "" }));
}

function showError(error, again) {
  if (error instanceof Refusal && error.status === 404) {
    showTrouble("The picture of this query is not available", "The index may have changed, or an uploaded picture may have expired. Search with the picture again.", "");
  } else if (error instanceof Refusal && error.status < 500 && error.status !== 429) {
    showTrouble("This query cannot be answered", error.message, "");
  } else if (error instanceof Refusal) {
    showTrouble("The server could not answer", error.message, "again", again);
  } else {
    showTrouble("The server cannot be reached", "Check that it is still running.", "again", again);
  }
}

// --------------------------------------------------------------------------------------- viewer

function open(result) {
  const state = { opened: true };
  const address = addressOf(shown?.query ?? queryOfAddress(), result.id);
  if (history.state?.opened) history.replaceState(state, "", address);
  else { keepScroll(); history.pushState(state, "", address); }
  showPicture(result);
}

function closeViewer() {
  if (history.state?.opened) { history.back(); return; }
  history.replaceState({}, "", addressOf(queryOfAddress()));
  hidePicture();
}

function hidePicture() {
  if (!viewer.open) return;
  viewer.close();
  const tile = picture && itemOf(picture.id)?.querySelector(".tile");
  picture = null;
  tile?.focus();
}

function showPicture(result) {
  picture = result;
  const place = shown?.results.indexOf(resultOf(result.id)) ?? -1;
  const image = $("viewer-picture");
  $("viewer-trouble").hidden = true;
  image.hidden = false;
  image.alt = result.name;
  image.src = `/api/images/${result.id}`;
  $("viewer-name").textContent = result.name;
  $("viewer-caption").textContent = result.caption ?? "";
  $("viewer-caption").hidden = !result.caption;
  const facts = [];
  if (result.rank) facts.push(["Rank", result.rank]);
  const members = Object.entries(result.scores ?? {});
  if (members.length > 1) facts.push(["Score of all members", result.score.toFixed(4)]);
  if (typeof result.rerank_score === "number") facts.push(["Score of the second look", result.rerank_score.toFixed(4)]);
  for (const [name, score] of members) facts.push([`Score of ${name}`, score.toFixed(4)]);
  if (result.time_s !== null) facts.push(["Time in the video", clock(result.time_s)]);
  if (result.width) facts.push(["Size", `${result.width} × ${result.height} px`]);
  $("viewer-facts").replaceChildren(...facts.flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]));
  $("previous").hidden = place < 1;
  $("next").hidden = place < 0 || place >= shown.results.length - 1;
  const canMark = Boolean(shown?.query.q);
  $("judge").hidden = !canMark;
  $("judge-hint").hidden = canMark;
  showJudgement();
  if (!viewer.open) viewer.showModal();
  showNear(result);
}

async function showNear(result) {
  $("near").hidden = true;
  try {
    const answer = await askSearch({ image: result.id, limit: 8 }, null);
    if (picture !== result) return;
    $("strip").replaceChildren(...answer.results.map((one) => {
      const button = element("button", { type: "button", title: one.name }, thumbnail(one.id));
      button.setAttribute("aria-label", `Open ${one.name}`);
      button.addEventListener("click", () => open(resultOf(one.id) ?? { ...one, rank: 0, scores: {} }));
      return element("li", {}, button);
    }));
    $("near").hidden = !answer.results.length;
  } catch (error) {
    if (!(error instanceof Refusal)) throw error; // perhaps no member supports image queries
  }
}

function step(by) {
  const place = (picture && shown?.results.indexOf(resultOf(picture.id))) ?? -1;
  const other = place < 0 ? null : shown.results[place + by];
  if (!other) return;
  open(other);
  if (place + by > shown.results.length - 6) loadMore();
}

// ---------------------------------------------------------------------------------------- marks

function showMarks(kept = true) {
  const { all, right, wrong } = countMarks();
  $("marks").hidden = !all;
  $("marks-count").textContent = `${right} right, ${wrong} wrong`;
  for (const id of ["download", "download-pairs"]) $(id).disabled = !right;
  if (!kept) say("The browser does not keep the marks; download them before you leave.");
}

const markOf = (result) => findMark(shown?.query.q, result.id);

function mark(result, right) {
  const text = shown?.query.q;
  if (!text) return;
  if (!markOf(result) && countMarks().all >= MOST_MARKS) {
    say(`There are ${MOST_MARKS.toLocaleString("en")} marks, and an annotation has no more. Download them, then delete all marks.`);
    return;
  }
  showMarks(changeMark(text, result.id, right));
  const item = itemOf(result.id);
  if (item) showMark(item, result);
  showJudgement();
}

function showMark(item, result) {
  const found = markOf(result);
  item.classList.toggle("is-right", found?.right === true);
  item.classList.toggle("is-wrong", found?.right === false);
  item.querySelector(".mark .right")?.setAttribute("aria-pressed", String(found?.right === true));
  item.querySelector(".mark .wrong")?.setAttribute("aria-pressed", String(found?.right === false));
  item.querySelector(".judged").textContent = found ? `, marked ${found.right ? "right" : "wrong"}` : "";
}

function showJudgement() {
  const found = picture && markOf(picture);
  $("right").setAttribute("aria-pressed", String(found?.right === true));
  $("wrong").setAttribute("aria-pressed", String(found?.right === false));
}

async function download(form) {
  try {
    const { content, lacks } = await annotationOf(form);
    const address = URL.createObjectURL(new Blob([content], { type: "application/x-ndjson" }));
    element("a", { href: address, download: `marks_${form}.jsonl` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
    say(lacks.join(" ") || "The annotation has been downloaded.");
  } catch (error) { say(`The marks cannot be downloaded: ${error.message}`); }
}

// --------------------------------------------------------------------------------------- events

function useFile(file) {
  if (!file) return;
  if (file.size > LIMIT_MB * 2 ** 20) {
    document.body.dataset.state = "results";
    showTrouble("This picture is too large", `A picture may have up to ${LIMIT_MB} MB; this one has ${(file.size / 2 ** 20).toFixed(1)} MB.`, "");
    return;
  }
  go({ ...queryOfForm(), image: "" }, { file });
}

$("search").addEventListener("submit", (event) => { event.preventDefault(); document.activeElement.blur(); go(queryOfForm()); });
$("home").addEventListener("click", (event) => { event.preventDefault(); keepScroll(); history.pushState({}, "", "/"); run(emptyQuery()); $("text").focus(); });
for (const example of document.querySelectorAll(".example")) example.addEventListener("click", () => go({ ...queryOfForm(), q: example.textContent }));
$("pick").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => { useFile($("file").files[0]); $("file").value = ""; });
$("chip-remove").addEventListener("click", () => { showChip(""); const query = queryOfForm(); if (hasQuery(query)) go(query); else $("text").focus(); });
$("more").addEventListener("click", async () => {
  const opening = $("filters").hidden;
  $("filters").hidden = !opening;
  $("more").setAttribute("aria-expanded", String(opening));
  if (!opening || $("folders").childElementCount) return;
  const found = await ask("/api/folders").then((response) => response.json()).catch(() => ({ folders: [] })); // folders are only suggestions
  $("folders").replaceChildren(...found.folders.map((value) => element("option", { value })));
});
$("rerank")?.addEventListener("change", () => { const query = queryOfForm(); if (hasQuery(query)) go(query); });
$("filters").addEventListener("change", () => { const query = queryOfForm(); if (hasQuery(query)) go(query); });
$("clear").addEventListener("click", () => { for (const name of FILTERS) if ($(name)) $(name).value = ""; const query = queryOfForm(); fillForm(query); if (hasQuery(query)) go(query); });
$("similar").addEventListener("click", () => { const query = { ...emptyQuery(), rerank: queryOfForm().rerank, image: picture.id }; hidePicture(); go(query); });
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("close").addEventListener("click", closeViewer);
$("right").addEventListener("click", () => mark(picture, true));
$("wrong").addEventListener("click", () => mark(picture, false));
$("viewer-picture").addEventListener("error", () => { $("viewer-picture").hidden = true; $("viewer-trouble").hidden = false; });
viewer.addEventListener("cancel", (event) => { event.preventDefault(); closeViewer(); });
viewer.addEventListener("click", (event) => { if (event.target === viewer) closeViewer(); });
$("download").addEventListener("click", () => download("labelled"));
$("download-pairs").addEventListener("click", () => download("pairs"));
$("marks-clear").addEventListener("click", () => {
  if (!window.confirm(`Delete all marks (${countMarks().all})?`)) return;
  showMarks(deleteMarks());
  for (const item of grid.querySelectorAll("li[data-id]")) showMark(item, resultOf(item.dataset.id));
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (viewer.open) {
    if (key === "ArrowLeft") step(-1);
    else if (key === "ArrowRight") step(1);
    else if (key === "r") mark(picture, true);
    else if (key === "w") mark(picture, false);
    return;
  }
  const item = event.target.closest?.("#grid li[data-id]");
  if (key === "/") { event.preventDefault(); $("text").focus(); $("text").select(); }
  else if (item && key.startsWith("Arrow")) {
    event.preventDefault();
    nearestTile(grid, item.querySelector(".tile"), key)?.focus();
  } else if (item && (key === "r" || key === "w")) mark(resultOf(item.dataset.id), key === "r");
});

let over = 0; // number of nested elements under a dragged file
const hasFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
document.addEventListener("dragenter", (event) => { if (hasFile(event)) { over += 1; $("drop").hidden = false; } });
document.addEventListener("dragleave", (event) => { if (hasFile(event)) { over -= 1; $("drop").hidden = over > 0 ? $("drop").hidden : true; } });
document.addEventListener("dragover", (event) => { if (hasFile(event)) event.preventDefault(); });
document.addEventListener("drop", (event) => {
  if (!hasFile(event)) return;
  event.preventDefault();
  over = 0;
  $("drop").hidden = true;
  if (viewer.open) hidePicture();
  useFile(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => { const file = [...(event.clipboardData?.files ?? [])][0]; if (file) { event.preventDefault(); useFile(file); } });

async function followAddress() {
  const query = queryOfAddress(), asked = location.search, id = new URLSearchParams(asked).get("open");
  if (!shown || addressOf(query) !== shownKey) await run(query);
  if (location.search !== asked) return; // the user has gone on meanwhile
  if (!id) { hidePicture(); return; }
  if (picture && samePicture(picture.id, id)) return;
  try {
    const result = resultOf(id) ?? { ...(await (await ask(`/api/images/${encodeURIComponent(id)}/facts`)).json()), rank: 0, scores: {} };
    if (location.search === asked) showPicture(result);
  } catch (error) { say(`The picture of this link cannot be shown: ${error.message}`); }
}

history.scrollRestoration = "manual";
window.addEventListener("popstate", followAddress);
showMarks();
followAddress();
if (document.body.dataset.state === "empty" && matchMedia("(hover: hover)").matches) $("text").focus();
