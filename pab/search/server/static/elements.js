// Functions that create, describe and find elements of the page. None reads the state of search.js.

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `/static/icons.svg#${name}`);
  svg.append(use);
  return svg;
}

export function thumbnail(id, frame) {
  const image = element("img", { alt: "", loading: "lazy", decoding: "async" });
  let attempts = 0;
  image.addEventListener("load", () => image.classList.add("loaded"));
  image.addEventListener("error", () => {
    attempts += 1; // try again, because the queue for pictures may have been full
    if (attempts < 3) setTimeout(() => { image.src = `/api/thumbnails/${id}?again=${attempts}`; }, 1500 * attempts);
    else frame?.classList.add("broken");
  });
  image.src = `/api/thumbnails/${id}`;
  return image;
}

// A frame is named VIDEO/TIME. Its tile shows the time on the picture, and the video as its name.
export const shortName = (result) => result.name.split("/").at(result.time_s === null ? -1 : -2) ?? result.name;

export function ratioOf(result) {
  const ratio = result.width && result.height ? result.width / result.height : 1.33;
  return Math.min(Math.max(ratio, 0.55), 2.4);
}

export const clock = (seconds) => {
  const hundredths = Math.round(seconds * 100), pad = (number) => String(Math.floor(number)).padStart(2, "0");
  const whole = Math.floor(hundredths / 100), hours = Math.floor(whole / 3600);
  return `${hours ? `${hours}:` : ""}${pad((whole / 60) % 60)}:${pad(whole % 60)}.${pad(hundredths % 100)}`;
};

// Tiles to show until the results arrive.
export const ghosts = () => [1.33, 0.75, 1.5, 1.33, 1, 1.33, 0.75, 1.33].map((ratio) => {
  const item = element("li", { className: "ghost", ariaHidden: "true" }, element("span", { className: "frame" }), element("span", { className: "under" }));
  item.style.setProperty("--ratio", ratio);
  return item;
});

export function nearestTile(grid, from, key) {
  const tiles = [...grid.querySelectorAll(".tile")], place = tiles.indexOf(from);
  if (key === "ArrowLeft") return tiles[place - 1];
  if (key === "ArrowRight") return tiles[place + 1];
  const here = from.getBoundingClientRect(), down = key === "ArrowDown";
  const middle = here.left + here.width / 2;
  const boxes = tiles.map((tile) => [tile, tile.getBoundingClientRect()]);
  const others = boxes.filter(([, box]) => (down ? box.top > here.top + 4 : box.top < here.top - 4));
  const row = others.length ? others[down ? 0 : others.length - 1][1].top : 0;
  const distance = (box) => Math.abs(box.left + box.width / 2 - middle);
  return others.filter(([, box]) => Math.abs(box.top - row) < 4).sort(([, a], [, b]) => distance(a) - distance(b))[0]?.[0];
}
