// Draws the nuclei over the slide: contours when zoomed in, density when zoomed out. All positions are level-0 pixels;
// OpenSeadragon gives the transform, and the canvas is redrawn whenever it changes.
"use strict";

const NUCLEUS_UM = 10;
const SEEN_AT = 8; // side in screen pixels of a typical nucleus from which contours are drawn
const LINE = 1.5; // width in screen pixels, approximately
const CELL = 4; // minimum side in screen pixels of a density cell
const KEPT = 400; // maximum number of tiles of each kind in memory
const AT_ONCE = 4; // concurrent requests
const $ = (id) => document.getElementById(id);

ask("info.json").then((answer) => answer.json()).then(start);

// Returns the server's answer, which may be an error; if the server is gone, tells the user.
async function ask(path) {
  try {
    return await window.fetch(path);
  } catch (error) {
    say("hover-batch view has ended. Start it again, and open the address that it prints.");
    throw error;
  }
}

function start(info) {
  document.title = `${info.slide_id} – hover-batch`;
  $("title").textContent = info.slide_id;
  $("number").max = info.nuclei.count;
  $("flags").append(...info.flags.map(flagged));
  if (info.missing) say(`Shown on the run's thumbnail: ${info.missing}`);

  const shown = new Set(info.classes.keys());
  const viewer = openSlide(info);
  const canvas = document.createElement("canvas");
  canvas.className = "nuclei";
  viewer.canvas.append(canvas);
  const layer = new Layer(info, shown, canvas);
  const tiles = new Tiles(() => soon());
  const pointer = { at: null, sought: null, hit: null }; // `sought`: the position that the user went to, in level-0 pixels
  let last = "";

  function draw(changed) {
    const place = placeOf(viewer, info);
    const state = [place.x, place.y, place.scale, place.width, place.height].join();
    if (!changed && state === last) return;
    last = state;
    const near = (NUCLEUS_UM / info.mpp[0]) * place.scale >= SEEN_AT;
    layer.clear(place, Number($("opacity").value));
    const there = near ? layer.contours(place, tiles) : layer.density(place, tiles);
    $("state").textContent = near ? `${there.toLocaleString("en")} nuclei in view` : "Density of nuclei";
    $("scale").firstChild.textContent = scaleBar($("scale").firstChild, info.mpp[0] / place.scale);
    // For tests, which wait for it.
    document.body.dataset.drawn = near ? "contours" : "density";
    document.body.dataset.waiting = tiles.waiting;
    const under = pointer.at && [(pointer.at[0] - place.x) / place.scale, (pointer.at[1] - place.y) / place.scale];
    const at = near && (pointer.sought ?? under);
    const hit = at ? layer.hit(at) : null;
    if (hit) layer.highlight(hit, place);
    if (hit?.id !== pointer.hit?.id) showNucleus(hit, info);
    if (!hit) $("hint").textContent = near ? "Point at a nucleus." : "Zoom in until nuclei are outlined.";
    pointer.hit = hit;
  }

  // Changes that do not move the slide are drawn at most once per frame.
  let due = false;
  function soon() {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      draw(true);
    });
  }

  viewer.addHandler("update-viewport", () => draw(false)); // at once, or the nuclei would lag behind the slide
  // OpenSeadragon does not report the reason; the server does.
  viewer.addHandler("tile-load-failed", async (event) => {
    const answer = await ask(event.tile.getUrl());
    if (!answer.ok) say(`The slide cannot be read: ${await answer.text()}`);
  });
  // Disable OpenSeadragon's keys that rotate and mirror the slide, since nuclei are not transformed with it.
  viewer.addHandler("canvas-key", (event) => {
    if (/^[rf]$/i.test(event.originalEvent.key)) event.preventDefaultAction = true;
  });
  viewer.canvas.addEventListener("pointermove", (event) => {
    const frame = viewer.canvas.getBoundingClientRect();
    pointer.sought = null;
    pointer.at = [event.clientX - frame.left, event.clientY - frame.top];
    soon();
  });
  viewer.canvas.addEventListener("pointerleave", () => {
    pointer.at = null;
    soon();
  });
  listClasses(info, shown, soon);
  $("opacity").addEventListener("input", soon);
  $("in").addEventListener("click", () => viewer.viewport.zoomBy(2).applyConstraints());
  $("out").addEventListener("click", () => viewer.viewport.zoomBy(0.5).applyConstraints());
  $("home").addEventListener("click", () => viewer.viewport.goHome());
  $("find").addEventListener("submit", async (event) => {
    event.preventDefault();
    const row = await rowOf($("number").value);
    if (!row) return say(`There is no nucleus ${$("number").value}; they are numbered 1 to ${info.nuclei.count}.`);
    const wide = viewer.container.clientWidth / info.width; // pixels on the screen per level-0 pixel at zoom 1
    viewer.viewport.zoomTo(Math.max(viewer.viewport.getZoom(), (6 * SEEN_AT * info.mpp[0]) / NUCLEUS_UM / wide));
    viewer.viewport.panTo(new OpenSeadragon.Point(row.centroid_x / info.width, row.centroid_y / info.width));
    pointer.sought = [row.centroid_x, row.centroid_y];
    soon();
  });
}

function say(text) {
  $("note").hidden = false;
  $("note").textContent = text;
}

function flagged(flag) {
  const item = document.createElement("li");
  const name = document.createElement("b");
  item.className = "note";
  name.textContent = flag.name;
  item.append(name, flag.sentence);
  return item;
}

function openSlide(info) {
  const { finest, max_level, tile } = info.slide;
  return OpenSeadragon({
    element: $("slide"),
    drawer: "canvas",
    showNavigationControl: false,
    crossOriginPolicy: false,
    maxImageCacheCount: 400,
    maxZoomPixelRatio: 8 * finest,
    visibilityRatio: 0.3,
    animationTime: 0.5,
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
    tileSources: {
      // Fractional sizes at the finest level keep the aspect ratio.
      width: info.width / finest,
      height: info.height / finest,
      tileSize: tile,
      minLevel: 0,
      maxLevel: max_level,
      getTileUrl: (level, x, y) => `slide/${level}/${x}/${y}`,
    },
  });
}

// Returns the screen position of level-0 (0, 0), and the screen pixels per level-0 pixel.
function placeOf(viewer, info) {
  const corner = viewer.viewport.pixelFromPoint(new OpenSeadragon.Point(0, 0), true);
  const { clientWidth: width, clientHeight: height } = viewer.canvas;
  return { x: corner.x, y: corner.y, scale: (viewer.viewport.getZoom(true) * width) / info.width, width, height };
}

function scaleBar(bar, umPerPixel) {
  const most = 160 * umPerPixel;
  const ten = 10 ** Math.floor(Math.log10(most));
  const um = [5, 2, 1].map((n) => n * ten).find((n) => n <= most);
  bar.style.width = `${um / umPerPixel}px`;
  return um >= 1000 ? `${um / 1000} mm` : `${um} µm`;
}

function listClasses(info, shown, changed) {
  const item = (name, count, color) => {
    const row = document.createElement("li");
    row.innerHTML =
      '<label><input type="checkbox" checked><svg viewBox="0 0 12 12" aria-hidden="true"><rect width="12" height="12" rx="3"/></svg>' +
      '<span class="name"></span> <span class="count"></span></label>';
    if (color) row.querySelector("rect").setAttribute("fill", `rgb(${color})`);
    else row.querySelector("svg").remove();
    row.querySelector(".name").textContent = name;
    row.querySelector(".count").textContent = count.toLocaleString("en");
    $("classes").append(row);
    return row.querySelector("input");
  };
  const all = item("all", info.nuclei.count, null);
  const boxes = new Map();
  info.classes.forEach((kind, id) => id > 0 && boxes.set(id, item(kind.name, kind.count, kind.color)));
  const settle = () => {
    const on = [...boxes.values()].filter((box) => box.checked).length;
    all.checked = on === boxes.size;
    all.indeterminate = on > 0 && on < boxes.size;
    boxes.forEach((box, id) => (box.checked ? shown.add(id) : shown.delete(id)));
    changed();
  };
  boxes.forEach((box) => box.addEventListener("change", settle));
  all.addEventListener("change", () => {
    boxes.forEach((box) => (box.checked = all.checked));
    settle();
  });
}

async function rowOf(id) {
  const answer = await ask(`nucleus/${id}`);
  return answer.ok ? answer.json() : null;
}

// Shows the nucleus under the pointer: at once what its tile holds, then its whole row of the table.
let latest = 0;
function showNucleus(nucleus, info) {
  const turn = ++latest;
  $("hint").hidden = Boolean(nucleus);
  $("nucleus").hidden = !nucleus;
  if (!nucleus) return;
  const list = (row) =>
    $("nucleus").tBodies[0].replaceChildren(
      ...Object.entries(row).map(([name, value]) => {
        const line = document.createElement("tr");
        const [head, cell] = [document.createElement("th"), document.createElement("td")];
        head.textContent = name;
        const rounded = () => Number(value >= 1000 ? value.toFixed(1) : value.toPrecision(4));
        cell.textContent = typeof value === "number" && !Number.isInteger(value) ? rounded() : (value ?? "–");
        line.append(head, cell);
        return line;
      }),
    );
  list({ nucleus_id: nucleus.id, type: info.classes[nucleus.type].name });
  setTimeout(async () => {
    if (turn !== latest) return;
    const row = await rowOf(nucleus.id).catch(() => null);
    if (turn === latest && row) list(row);
  }, 40);
}

// Cache of tiles by path. The latest requests are sent first; the least recently used tiles are dropped.
class Tiles {
  constructor(arrived) {
    this.arrived = arrived;
    this.held = new Map();
    this.wanted = [];
    this.under = new Set();
  }

  get waiting() {
    return this.wanted.length + this.under.size;
  }

  // Returns the tiles in memory among `paths`, a Map from path to decoder, and requests the others in this order.
  get(paths) {
    const there = new Map();
    this.wanted = [];
    for (const [path, make] of paths) {
      const tile = this.held.get(path);
      if (tile === undefined) {
        if (!this.under.has(path)) this.wanted.push([path, make]);
        continue;
      }
      this.held.delete(path);
      this.held.set(path, tile);
      if (tile) there.set(path, tile);
    }
    this.fetch();
    return there;
  }

  fetch() {
    while (this.under.size < AT_ONCE && this.wanted.length) {
      const [path, make] = this.wanted.shift();
      this.under.add(path);
      ask(path)
        .then(async (answer) => {
          if (answer.ok) return make(await answer.arrayBuffer());
          say(`Nuclei are missing: ${await answer.text()}`);
          return null;
        })
        .catch(() => null) // reported already
        .then((tile) => {
          this.under.delete(path);
          this.held.set(path, tile);
          for (const old of this.held.keys()) {
            if (this.held.size <= KEPT) break;
            this.held.delete(old);
          }
          this.fetch();
          this.arrived();
        });
    }
  }
}

// Canvas over the slide.
class Layer {
  constructor(info, shown, canvas) {
    Object.assign(this, { info, shown, canvas });
    this.context = canvas.getContext("2d");
    this.near = new Map(); // contour tiles that are drawn
    this.before = new Map(); // density tiles that were drawn when all had arrived
  }

  clear(place, opacity) {
    this.dense = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(place.width * this.dense), Math.round(place.height * this.dense)];
    if (this.canvas.width !== width) this.canvas.width = width;
    if (this.canvas.height !== height) this.canvas.height = height;
    this.context.setTransform(1, 0, 0, 1, 0, 0);
    this.context.clearRect(0, 0, width, height);
    this.canvas.style.opacity = opacity;
  }

  // Returns [column, row] of the tiles of `side` that meet the window and its `margin`, middle first.
  inView(place, side, margin) {
    const range = (offset, extent, whole) => {
      const first = Math.max(0, Math.floor((-offset / place.scale - margin) / side));
      const last = Math.min(Math.ceil(whole / side) - 1, Math.floor(((extent - offset) / place.scale + margin) / side));
      return Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => first + i);
    };
    const columns = range(place.x, place.width, this.info.width);
    const rows = range(place.y, place.height, this.info.height);
    const off = ([column, row]) =>
      Math.hypot(column - columns[columns.length >> 1], row - rows[rows.length >> 1]);
    return rows.flatMap((row) => columns.map((column) => [column, row])).sort((a, b) => off(a) - off(b));
  }

  contours(place, tiles) {
    const side = this.info.nuclei.tile;
    const paths = new Map(
      this.inView(place, side, side / 8).map(([column, row]) => [
        `nuclei/${column}/${row}`,
        (bytes) => new NucleiTile(bytes, column * side, row * side, this.info.nuclei.step),
      ]),
    );
    const before = this.near;
    this.near = tiles.get(paths);
    for (const [path, tile] of before) if (!this.near.has(path)) tile.forget();
    let count = 0;
    for (const tile of this.near.values()) {
      this.at(tile, place);
      const indices = tile.inWindow(place, this.shown);
      if (place.scale >= 1) tile.draw(this.context, indices, LINE / place.scale, 0, this.info.classes);
      else tile.show(this.context, Math.round(Math.log2(1 / place.scale)), this.dense, this.shown, this.info);
      count += indices.length;
    }
    return count;
  }

  // The corner of the tile becomes the origin, since canvases round positions far from it.
  at(tile, place) {
    const unit = place.scale * this.dense;
    this.context.setTransform(
      unit, 0, 0, unit, (place.x + tile.x * place.scale) * this.dense, (place.y + tile.y * place.scale) * this.dense,
    );
  }

  hit([x, y]) {
    for (const tile of this.near.values()) {
      const index = tile.find(x, y, this.shown, this.context);
      if (index !== null) return { tile, index, id: tile.ids[index], type: tile.types[index] };
    }
    return null;
  }

  highlight({ tile, index, type }, place) {
    const path = tile.path([index], 0);
    this.at(tile, place);
    for (const [width, color] of [[6, "#fff"], [3, `rgb(${this.info.classes[type].color})`]]) {
      this.context.lineWidth = width / place.scale;
      this.context.strokeStyle = color;
      this.context.stroke(path);
    }
  }

  density(place, tiles) {
    for (const tile of this.near.values()) tile.forget();
    this.near = new Map();
    const level = Math.max(0, Math.ceil(Math.log2(CELL / place.scale)));
    const side = this.info.nuclei.cells * 2 ** level;
    const paths = new Map(
      this.inView(place, side, 0).map(([column, row]) => [
        `density/${level}/${column}/${row}`,
        (bytes) => new DensityTile(bytes, column * side, row * side, 2 ** level, this.info),
      ]),
    );
    const there = tiles.get(paths);
    // Until all have arrived, the tiles that were drawn last are shown beneath.
    const complete = there.size === paths.size;
    for (const tile of complete ? there.values() : [...this.before.values(), ...there.values()]) this.cells(tile, place);
    if (complete) this.before = there;
  }

  cells(tile, place) {
    // Whole pixels, so that no seams appear between tiles.
    const edge = (offset, position) => Math.round((offset + position * place.scale) * this.dense);
    const [x0, y0] = [edge(place.x, tile.x), edge(place.y, tile.y)];
    const [x1, y1] = [edge(place.x, tile.x + tile.side), edge(place.y, tile.y + tile.side)];
    this.context.setTransform(1, 0, 0, 1, 0, 0);
    this.context.clearRect(x0, y0, x1 - x0, y1 - y0);
    this.context.imageSmoothingEnabled = false;
    this.context.drawImage(tile.picture(this.shown), x0, y0, x1 - x0, y1 - y0);
  }
}

// Nuclei of one contour tile, in the layout of hover_batch/view/nuclei.py; (x, y): its corner.
class NucleiTile {
  constructor(bytes, x, y, step) {
    Object.assign(this, { x, y, step });
    const n = new Uint32Array(bytes, 0, 1)[0];
    this.ids = new Uint32Array(bytes, 4, n);
    this.ends = new Uint32Array(bytes, 4 + 4 * n, n);
    this.corners = new Float32Array(bytes, 4 + 8 * n, 2 * n);
    this.points = new Uint16Array(bytes, 4 + 16 * n, n ? 2 * this.ends[n - 1] : 0);
    this.types = new Uint8Array(bytes, 4 + 16 * n + this.points.byteLength, n);
    this.boxes = new Float32Array(4 * n); // x0, y0, x1, y1 of each contour, from the tile's corner
    for (let i = 0; i < n; i++) {
      let [right, low] = [0, 0];
      for (let p = this.start(i); p < this.ends[i]; p++) {
        right = Math.max(right, this.points[2 * p]);
        low = Math.max(low, this.points[2 * p + 1]);
      }
      const [x0, y0] = [this.corners[2 * i] - x, this.corners[2 * i + 1] - y];
      this.boxes.set([x0, y0, x0 + right * step, y0 + low * step], 4 * i);
    }
  }

  start(index) {
    return index ? this.ends[index - 1] : 0;
  }

  // Returns one path of these contours, without points closer than `apart` level-0 pixels to the previous one.
  path(indices, apart) {
    const path = new Path2D();
    const square = (apart / this.step) ** 2;
    for (const i of indices) {
      const [x0, y0] = [this.boxes[4 * i], this.boxes[4 * i + 1]];
      let [px, py] = [Infinity, Infinity];
      for (let p = this.start(i); p < this.ends[i]; p++) {
        const [x, y] = [this.points[2 * p], this.points[2 * p + 1]];
        if ((x - px) ** 2 + (y - py) ** 2 < square) continue;
        if (px === Infinity) path.moveTo(x0 + x * this.step, y0 + y * this.step);
        else path.lineTo(x0 + x * this.step, y0 + y * this.step);
        [px, py] = [x, y];
      }
      path.closePath();
    }
    return path;
  }

  // Draws these contours into a context whose unit is a level-0 pixel and whose origin is the tile's corner.
  draw(context, indices, width, apart, classes) {
    const byType = new Map();
    for (const i of indices) (byType.get(this.types[i]) ?? byType.set(this.types[i], []).get(this.types[i])).push(i);
    context.lineWidth = width;
    for (const [type, list] of byType) {
      const path = this.path(list, apart);
      context.strokeStyle = context.fillStyle = `rgb(${classes[type].color})`;
      if (apart > 1) {
        // Fill nuclei that are small on the screen; in large ones, the fill would hide the stain.
        context.globalAlpha = 0.25;
        context.fill(path);
        context.globalAlpha = 1;
      }
      context.stroke(path);
    }
  }

  // Draws all nuclei from a cached picture, which is faster for many. At `detail` d, its pixel is 2^d level-0 pixels, within
  // a factor of √2 of the screen's. It is redrawn only when the detail or the shown classes change.
  show(context, detail, dense, shown, info) {
    const unit = dense / 2 ** detail;
    const margin = Math.ceil(info.nuclei.tile / 8);
    const extent = info.nuclei.tile + 2 * margin;
    const key = `${unit} ${[...shown].sort()}`;
    if (this.key !== key) {
      this.key = key;
      this.canvas ??= document.createElement("canvas");
      this.canvas.width = this.canvas.height = Math.ceil(extent * unit);
      const inner = this.canvas.getContext("2d");
      inner.setTransform(unit, 0, 0, unit, margin * unit, margin * unit);
      const indices = [...this.types.keys()].filter((i) => shown.has(this.types[i]));
      this.draw(inner, indices, LINE * 2 ** detail, 2 ** detail, info.classes);
    }
    context.drawImage(this.canvas, -margin, -margin, this.canvas.width / unit, this.canvas.height / unit);
  }

  // The picture takes many times the memory of the contours.
  forget() {
    if (this.canvas) this.canvas.width = this.canvas.height = 0;
    this.key = null;
  }

  // Returns the indices of the nuclei of these classes that intersect the window.
  inWindow(place, shown) {
    const [x0, y0] = [-place.x / place.scale - this.x, -place.y / place.scale - this.y];
    const [x1, y1] = [x0 + place.width / place.scale, y0 + place.height / place.scale];
    const found = [];
    for (let i = 0; i < this.types.length; i++) {
      const b = 4 * i;
      const meets = this.boxes[b] < x1 && this.boxes[b + 2] > x0 && this.boxes[b + 1] < y1 && this.boxes[b + 3] > y0;
      if (meets && shown.has(this.types[i])) found.push(i);
    }
    return found;
  }

  find(x, y, shown, context) {
    [x, y] = [x - this.x, y - this.y];
    context.setTransform(1, 0, 0, 1, 0, 0);
    for (let i = 0; i < this.types.length; i++) {
      const b = 4 * i;
      const inBox = this.boxes[b] <= x && x <= this.boxes[b + 2] && this.boxes[b + 1] <= y && y <= this.boxes[b + 3];
      if (inBox && shown.has(this.types[i]) && context.isPointInPath(this.path([i], 0), x, y)) return i;
    }
    return null;
  }
}

// Counts of one density tile by class and cell; `cell`: side of a cell.
class DensityTile {
  constructor(bytes, x, y, cell, info) {
    Object.assign(this, { x, y, cell, info, side: cell * info.nuclei.cells });
    this.counts = new Uint32Array(bytes);
  }

  // One pixel per cell: the classes' colours mixed by their shares; denser cells are less transparent.
  picture(shown) {
    const key = [...shown].sort().join();
    if (this.key === key) return this.canvas;
    this.key = key;
    const cells = this.info.nuclei.cells;
    this.canvas ??= Object.assign(document.createElement("canvas"), { width: cells, height: cells });
    const image = new ImageData(cells, cells);
    const classes = [...shown].map((id) => [id, this.info.classes[id].color]);
    const top = Math.max(...classes.map(([id]) => this.info.classes[id].peak), 0) * this.cell ** 2;
    for (let at = 0; at < cells * cells; at++) {
      let [count, red, green, blue] = [0, 0, 0, 0];
      for (const [id, color] of classes) {
        const here = this.counts[id * cells * cells + at];
        count += here;
        red += here * color[0];
        green += here * color[1];
        blue += here * color[2];
      }
      if (count) image.data.set([red / count, green / count, blue / count, 55 + 200 * Math.sqrt(Math.min(1, count / top))], 4 * at);
    }
    this.canvas.getContext("2d").putImageData(image, 0, 0);
    return this.canvas;
  }
}
