// Brings the fragments of html.py to life: overlays, the order of choice, a patch's numbers, PNG and JSON.
(() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const cells = (numbers, columns) =>
    numbers.map((n) => `M${n % columns} ${Math.floor(n / columns)}h1v1h-1z`).join("");
  const number = (value) => (Number.isInteger(value) ? String(value) : value.toPrecision(3));
  const named = (name) => name.replaceAll("_", " ");

  // Dark blue through red to yellow: brightness grows with the value, in colour-blind eyes as well.
  const STOPS = [[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]];
  const colour = (share) => {
    const place = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
    const low = Math.min(Math.floor(place), STOPS.length - 2);
    return STOPS[low].map((value, i) => Math.round(value + (STOPS[low + 1][i] - value) * (place - low)));
  };

  class Stage {
    constructor(element, view, look, first) {
      Object.assign(this, { element, view, look, first });
      this.columns = view.columns;
      this.count = view.rows * view.columns;
      this.kept = new Set(view.kept);
      this.outside = new Set(view.outside || []);
      this.step = new Map((view.order || []).map((step, i) => [view.kept[i], step]));
      this.dim = element.querySelector(".sv-dim path");
      this.canvas = make("canvas", { width: view.columns, height: view.rows, hidden: true });
      this.marks = document.createElementNS(SVG, "svg");
      this.marks.setAttribute("class", "sv-marks");
      this.marks.setAttribute("viewBox", `0 0 ${view.columns} ${view.rows}`);
      this.marks.setAttribute("preserveAspectRatio", "none");
      this.marks.setAttribute("aria-hidden", "true");
      this.paths = {};
      for (const kind of ["kept", "gained", "lost", "near", "here"]) {
        this.paths[kind] = document.createElementNS(SVG, "path");
        this.paths[kind].setAttribute("class", `sv-${kind}`);
        this.marks.append(this.paths[kind]);
      }
      element.querySelector(".sv-cover").append(this.canvas, this.marks);
    }
    values(overlay) {
      if (overlay !== "order of choice") return this.view.scores[overlay] || null;
      if (!this.view.order) return null;
      const last = Math.max(1, ...this.view.order);
      const values = new Array(this.count).fill(null);
      this.step.forEach((step, cell) => { values[cell] = last - step; });
      return values;
    }
    showOverlay(overlay) {
      const values = overlay && this.values(overlay);
      this.canvas.hidden = !values;
      const missing = overlay && !values;
      this.element.dataset.missing = missing ? `no ${named(overlay)}: this method computes none` : "";
      this.paths.kept.setAttribute("d", values ? cells([...this.kept], this.columns) : "");
      if (!values) return;
      const known = values.filter((value) => value !== null);
      const low = Math.min(...known), high = Math.max(...known);
      const context = this.canvas.getContext("2d");
      const image = context.createImageData(this.columns, this.view.rows);
      values.forEach((value, i) => {
        if (value === null) return;
        const [r, g, b] = colour(high > low ? (value - low) / (high - low) : 1);
        image.data.set([r, g, b, 165], i * 4);
      });
      context.putImageData(image, 0, 0);
    }
    showUntil(steps) {
      if (!this.dim) return;
      const shown = (cell) => this.kept.has(cell) && (!this.view.order || this.step.get(cell) < steps);
      const dark = [];
      for (let cell = 0; cell < this.count; cell++) if (!shown(cell)) dark.push(cell);
      this.dim.setAttribute("d", cells(dark, this.columns));
    }
    markChanges(on) {
      const before = this.first && this.first.count === this.count ? this.first.kept : null;
      const show = on && before && this.first !== this;
      const more = show ? [...this.kept].filter((cell) => !before.has(cell)) : [];
      const gained = more.length > this.count / 2 ? [] : more; // frames around nearly everything would hide it
      const lost = show ? [...before].filter((cell) => !this.kept.has(cell)) : [];
      this.paths.gained.setAttribute("d", cells(gained, this.columns));
      this.paths.lost.setAttribute("d", cells(lost, this.columns));
    }
    describe(cell) {
      const parts = [`${this.view.title}, row ${Math.floor(cell / this.columns) + 1}, column ${(cell % this.columns) + 1}`];
      if (this.outside.has(cell)) return `${parts[0]}; takes no part: padding`;
      if (!this.kept.has(cell)) parts.push("dropped");
      else if (this.step.has(cell)) parts.push(`kept, chosen as number ${this.step.get(cell) + 1}`);
      else parts.push("kept");
      for (const [name, values] of Object.entries(this.view.scores)) {
        const flag = values.every((value) => value === 0 || value === 1 || value === null);
        if (values[cell] !== null) parts.push(`${named(name)} ${flag ? (values[cell] ? "yes" : "no") : number(values[cell])}`);
      }
      const near = this.view.closest ? this.view.closest[cell] : -1;
      if (near >= 0) {
        const [title, inside] = this.placeOf(near);
        const place = `row ${Math.floor(inside / this.columns) + 1}, column ${(inside % this.columns) + 1}`;
        const where = title === this.view.title ? place : `${title}, ${place}`;
        parts.push(`${this.kept.has(cell) ? "most like the kept token at" : "made redundant by the kept token at"} ${where} (cosine ${number(this.view.cosine[cell])})`);
      }
      return parts.join("; ");
    }
    placeOf(flat) {
      for (const view of this.views) {
        if (flat < view.rows * view.columns) return [view.title, flat];
        flat -= view.rows * view.columns;
      }
      return ["", 0];
    }
    point(cell) {
      this.paths.here.setAttribute("d", cell === null ? "" : cells([cell], this.columns));
      const near = cell !== null && this.view.closest ? this.view.closest[cell] : -1;
      const [title, inside] = near >= 0 ? this.placeOf(near) : ["", 0];
      this.paths.near.setAttribute("d", title === this.view.title ? cells([inside], this.columns) : "");
    }
  }

  function saveAs(name, blob) {
    const link = make("a", { href: URL.createObjectURL(blob), download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  async function png(root, stages, looks) {
    const side = 336, gap = 12, line = 22;
    const rows = looks.map((_, look) => stages.filter((stage) => stage.lookNumber === look).slice(0, 12));
    const across = rows.every((row) => row.length < 2); // looks at one view stand beside each other, others below
    const width = across ? rows.length * (side + gap) + gap : Math.max(...rows.map((row) => row.length * (side + gap) + gap));
    const canvas = make("canvas", { width, height: (across ? 1 : rows.length) * (side + 4 * line + gap) + gap });
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    for (const [look, row] of rows.entries()) {
      const top = gap + (across ? 0 : look) * (side + 4 * line + gap), left = gap + (across ? look : 0) * (side + gap);
      const most = across ? side : width - 2 * gap;
      context.fillStyle = "#000";
      context.font = "600 16px sans-serif";
      context.fillText([looks[look].keep === "full" ? "all tokens" : `${looks[look].method} ${looks[look].keep}`, ...looks[look].options].join(" "), left, top + 16, most);
      context.font = "15px sans-serif";
      context.fillText(looks[look].question, left, top + 16 + line, most);
      context.fillStyle = "#0b57d0";
      context.fillText(looks[look].answer, left, top + 16 + 2 * line, most);
      for (const [place, stage] of row.entries()) {
        const x = left + place * (side + gap), y = top + 3 * line;
        const address = getComputedStyle(stage.element).backgroundImage.replace(/^url\("?|"?\)$/g, "");
        const image = make("img", { src: address });
        await image.decode();
        context.drawImage(image, x, y, side, side);
        const share = parseFloat(stage.element.querySelector(".sv-cover").style.width) / 100;
        const [wide, high] = [(side * share) / stage.columns, (side * share) / stage.view.rows];
        const draw = (path, style) => {
          const shape = new Path2D(), scaled = new Path2D(path.getAttribute("d") || "");
          shape.addPath(scaled, new DOMMatrix([wide, 0, 0, high, x, y]));
          style(shape);
        };
        if (stage.dim) draw(stage.dim, (shape) => { context.fillStyle = "rgba(0,0,0,.68)"; context.fill(shape); });
        if (!stage.canvas.hidden) {
          context.imageSmoothingEnabled = false;
          context.drawImage(stage.canvas, x, y, side * share, side * share);
          context.imageSmoothingEnabled = true;
        }
        draw(stage.paths.gained, (shape) => { context.strokeStyle = "#16a34a"; context.lineWidth = 2; context.stroke(shape); });
        draw(stage.paths.lost, (shape) => { context.strokeStyle = "#dc2626"; context.stroke(shape); });
      }
    }
    return new Promise((done) => canvas.toBlob(done, "image/png"));
  }

  function start(root) {
    root.dataset.ready = "yes";
    const data = JSON.parse(root.querySelector(".sv-data").textContent);
    const stages = [];
    data.looks.forEach((look, l) => look.pictures.forEach((picture, p) => picture.views.forEach((view, v) => {
      const element = document.getElementById(`${root.id}-${l}-${p}-${v}`);
      const first = stages.find((stage) => stage.lookNumber === 0 && stage.place === `${p}-${v}`);
      const stage = new Stage(element, view, look, first);
      Object.assign(stage, { lookNumber: l, place: `${p}-${v}`, views: picture.views });
      stages.push(stage);
    })));
    const bar = root.querySelector(".sv-bar"), told = root.querySelector(".sv-cell");
    bar.hidden = false;

    const overlays = [...new Set(stages.flatMap((stage) => [
      ...Object.keys(stage.view.scores), ...(stage.view.order ? ["order of choice"] : [])]))];
    const select = make("select", {}, make("option", { value: "", textContent: "none" }),
      ...overlays.map((name) => make("option", { value: name, textContent: named(name) })));
    const scale = make("span", { className: "sv-scale", hidden: true }, "", make("i"), "");
    select.onchange = () => {
      stages.forEach((stage) => stage.showOverlay(select.value));
      scale.hidden = !select.value;
      scale.lastChild.textContent = select.value === "order of choice" ? " first" : " highest of the picture";
      scale.firstChild.textContent = select.value === "order of choice" ? "last " : "lowest ";
    };
    if (overlays.length) bar.append(make("label", {}, "Overlay ", select), scale);

    const most = Math.max(0, ...stages.flatMap((stage) => (stage.view.order || []).map((step) => step + 1)));
    if (most > 1) {
      const slider = make("input", { type: "range", min: 1, max: most, value: most, step: 1 });
      const output = make("output", { textContent: `${most} of ${most}` });
      const play = make("button", { type: "button", textContent: "▶ Play the order" });
      let timer = null;
      const show = () => {
        output.textContent = `${slider.value} of ${most}`;
        stages.forEach((stage) => stage.showUntil(Number(slider.value)));
      };
      const halt = () => { clearInterval(timer); timer = null; play.textContent = "▶ Play the order"; };
      slider.oninput = () => { halt(); show(); };
      play.onclick = () => {
        if (timer) return halt();
        slider.value = 1;
        show();
        play.textContent = "■ Stop";
        const pause = Math.max(40, Math.min(400, 8000 / most));
        const jump = Math.max(1, Math.round(most / 200));
        timer = setInterval(() => {
          if (Number(slider.value) >= most || !root.isConnected) return halt();
          slider.value = Number(slider.value) + jump;
          show();
        }, pause);
      };
      bar.append(play, make("label", {}, "Chosen ", slider, output));
    }
    if (data.looks.length > 1 && stages.length) {
      const box = make("input", { type: "checkbox", checked: true });
      box.onchange = () => stages.forEach((stage) => stage.markChanges(box.checked));
      bar.append(make("label", {}, box, "Mark what differs from the first"));
      box.onchange();
    }
    const pngButton = make("button", { type: "button", textContent: "Save PNG" });
    pngButton.onclick = async () => saveAs("kept-tokens.png", await png(root, stages, data.looks));
    const jsonButton = make("button", { type: "button", textContent: "Save JSON" });
    jsonButton.onclick = () => saveAs("kept-tokens.json", new Blob([JSON.stringify(data, null, 1)], { type: "application/json" }));
    bar.append(pngButton, jsonButton);

    told.textContent = stages.length ? "Point at a patch, or focus a picture and use the arrow keys." : "";
    const tell = (stage, cell) => {
      stages.forEach((other) => other.point(other.place === stage.place && other.count === stage.count ? cell : null));
      told.textContent = cell === null ? "" : (data.looks.length > 1 ? `${stage.look.method} ${stage.look.keep}: ` : "") + stage.describe(cell);
      stage.element.title = told.textContent;
      stage.at = cell;
    };
    for (const stage of stages) {
      const cover = stage.element.querySelector(".sv-cover");
      const under = (event) => {
        const box = cover.getBoundingClientRect();
        const x = Math.floor(((event.clientX - box.left) / box.width) * stage.columns);
        const y = Math.floor(((event.clientY - box.top) / box.height) * stage.view.rows);
        if (x >= 0 && y >= 0 && x < stage.columns && y < stage.view.rows) tell(stage, y * stage.columns + x);
      };
      stage.element.onpointermove = under;
      stage.element.onpointerdown = under;
      stage.element.onkeydown = (event) => {
        const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -stage.columns, ArrowDown: stage.columns }[event.key];
        if (move === undefined) return;
        event.preventDefault();
        const next = stage.at === undefined ? stage.view.kept[0] ?? 0 : stage.at + move;
        if (next >= 0 && next < stage.count) tell(stage, next);
      };
    }
  }

  const startAll = () => document.querySelectorAll(".sv:not([data-ready])").forEach(start);
  startAll();
  new MutationObserver(startAll).observe(document.documentElement, { childList: true, subtree: true });
})();
