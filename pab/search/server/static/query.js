// The query, its address, and its request. The address holds the whole query, so that links can be
// shared and the back button works: q, image (id), minus, folder, start, end, least, and rerank=0 if
// the second look is off. It also holds the id of the picture in the viewer (open).

export const PAGE = 40; // results per request
export const FILTERS = ["folder", "start", "end", "least"];

export const emptyQuery = () => ({ q: "", image: "", minus: [], folder: "", start: "", end: "", least: "", rerank: "" });

export function queryOfAddress() {
  const fields = new URLSearchParams(location.search);
  const query = emptyQuery();
  for (const name of ["q", "image", ...FILTERS]) query[name] = fields.get(name) ?? "";
  query.minus = fields.getAll("minus").filter(Boolean);
  query.rerank = fields.get("rerank") === "0" ? "0" : "";
  return query;
}

export function addressOf(query, open = "") {
  const fields = new URLSearchParams();
  for (const name of ["q", "image"]) if (query[name]) fields.set(name, query[name]);
  for (const term of query.minus) fields.append("minus", term);
  for (const name of FILTERS) if (query[name]) fields.set(name, query[name]);
  if (query.rerank) fields.set("rerank", query.rerank);
  if (open) fields.set("open", open);
  const text = fields.toString();
  return text ? `/?${text}` : "/";
}

export function requestOf(query, offset) {
  const number = (text) => (text === "" || Number.isNaN(Number(text)) ? null : Number(text));
  return {
    text: query.q || null, image: query.image || null, minus: query.minus, folder: query.folder,
    start_s: number(query.start), end_s: number(query.end), least: number(query.least),
    rerank: query.rerank ? false : null, // null: re-rank if the server has a reranker
    offset, limit: PAGE,
  };
}

export const hasQuery = (query) => Boolean(query.q || query.image);
