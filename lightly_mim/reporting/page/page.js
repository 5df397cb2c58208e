"use strict";
// Draws what stands in the page's data. Text from a run is put in by textContent alone.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (selector, root = document) => [...root.querySelectorAll(selector)];
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  function html(tag, options = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) {
      if (name === "text") node.textContent = value;
      else if (name.startsWith("--")) node.style.setProperty(name, value);
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  function svg(tag, options = {}, text = "") {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(options)) node.setAttribute(name, value);
    if (text) node.textContent = text;
    return node;
  }

  const exact = (value) => (value === null ? "not finite" : String(Number(value.toPrecision(6))));
  const colour = (number) => `var(--c${number % 8})`;

  function short(value, step) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-4) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
    return value.toFixed(clamp(-Math.floor(Math.log10(step) + 1e-9), 0, 6));
  }

  function ticks(low, high, count) {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
    return { found, step };
  }

  // A scale from values to pixels, with its ticks.
  function scale(low, high, from, to, count, log) {
    if (low === high) { const pad = log ? low / 2 : Math.abs(low) / 10 || 1; low -= pad; high += pad; }
    const warp = log ? Math.log10 : (value) => value;
    const [a, b] = [warp(low), warp(high)];
    const at = (value) => from + ((warp(value) - a) / (b - a)) * (to - from);
    let marks;
    if (log) {
      const steps = b - a > 1.2 ? [1] : [1, 2, 5];
      marks = [];
      for (let p = Math.floor(a); p <= Math.ceil(b); p++) {
        for (const m of steps) if (m * 10 ** p >= low * 0.999 && m * 10 ** p <= high * 1.001) marks.push(m * 10 ** p);
      }
      if (marks.length < 2) marks = [low, high];
      return { at, ticks: marks.map((value) => [value, short(value, value / 10)]) };
    }
    const { found, step } = ticks(low, high, count);
    return { at, ticks: found.map((value) => [value, short(value, step)]) };
  }

  function place(tip, host, x, y) {
    tip.hidden = false;
    const room = host.clientWidth - tip.offsetWidth;
    tip.style.left = `${clamp(x + 14 > room ? x - tip.offsetWidth - 14 : x + 14, 0, Math.max(room, 0))}px`;
    tip.style.top = `${Math.max(y, 0)}px`;
  }

  function axes(host, height, x, y, label) {
    const width = host.clientWidth || 600;
    const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": host.getAttribute("aria-label") || "" });
    for (const [value, text] of y.ticks) {
      drawing.append(svg("line", { class: "rule", x1: 52, x2: width - 8, y1: y.at(value), y2: y.at(value) }));
      drawing.append(svg("text", { x: 46, y: y.at(value) + 4, "text-anchor": "end" }, text));
    }
    for (const [value, text] of x.ticks) {
      drawing.append(svg("text", { x: x.at(value), y: height - 22, "text-anchor": "middle" }, text));
    }
    drawing.append(svg("text", { x: width - 8, y: height - 5, "text-anchor": "end" }, label));
    return drawing;
  }

  // Curves: lines over steps, with values under the pointer.
  function curve(host, figure) {
    const hidden = new Set();
    let log = false;
    const tip = html("div", { class: "tip" });
    tip.hidden = true;
    const height = figure.key === "loss" ? 290 : 230;
    let x, y, shown;

    function draw() {
      const width = host.clientWidth || 600;
      const usable = (value) => value !== null && (!log || value > 0);
      shown = figure.series.filter((_, number) => !hidden.has(number));
      const all = shown.flatMap((line) => line.points);
      const values = all.map((point) => point[1]).filter(usable);
      const steps = all.map((point) => point[0]);
      find("svg", host).forEach((node) => node.remove());
      if (!steps.length) return;
      const least = (list) => list.reduce((a, b) => Math.min(a, b));
      const most = (list) => list.reduce((a, b) => Math.max(a, b));
      const [low, high] = values.length ? [least(values), most(values)] : [0, 1];
      const pad = log ? 0 : (high - low) * 0.06;
      x = scale(least(steps), most(steps), 58, width - 14, Math.max(width / 110, 2), false);
      y = scale(low - pad, high + pad, height - 42, 10, 4, log);
      const drawing = axes(host, height, x, y, figure.x);
      for (const mark of figure.marks) {
        const at = x.at(mark.x);
        const line = svg("line", { class: "mark", x1: at, x2: at, y1: 10, y2: height - 42 });
        line.append(svg("title", {}, mark.text));
        drawing.append(line, svg("text", { class: "mark-text", x: at + 4, y: 20 }, mark.label));
      }
      for (const line of shown) {
        let path = "";
        let pen = false;
        const few = line.points.length <= 40;
        line.points.forEach(([step, value], number) => {
          if (!usable(value)) {
            pen = false;
            if (value === null) {
              const at = x.at(step);
              drawing.append(svg("path", { class: "lost", d: `M${at - 4} ${height - 38}l4 -7l4 7z`, style: "fill: var(--bad); stroke: none" }));
            }
            return;
          }
          const [px, py] = [x.at(step).toFixed(1), y.at(value).toFixed(1)];
          path += `${pen ? "L" : "M"}${px} ${py}`;
          const alone = !pen && !usable((line.points[number + 1] || [0, null])[1]);
          pen = true;
          if ((few && line.look !== "faint") || alone) {
            drawing.append(svg("circle", { cx: px, cy: py, r: 3, style: `fill: ${colour(line.colour)}` }));
          }
        });
        drawing.append(svg("path", { class: line.look, d: path, style: `stroke: ${colour(line.colour)}` }));
      }
      drawing.append(svg("line", { class: "guide", y1: 10, y2: height - 42 }));
      host.prepend(drawing);
    }

    const nearest = (points, step) => {
      let [a, b] = [0, points.length - 1];
      while (b - a > 1) { const middle = (a + b) >> 1; if (points[middle][0] < step) a = middle; else b = middle; }
      return Math.abs(points[a][0] - step) <= Math.abs(points[b][0] - step) ? points[a] : points[b];
    };

    function show(px) {
      const lines = shown.filter((line) => line.points.length);
      if (!lines.length) return;
      const near = lines.flatMap((line) => [nearest(line.points, invert(px))]);
      const step = near.reduce((a, b) => (Math.abs(x.at(a[0]) - px) <= Math.abs(x.at(b[0]) - px) ? a : b))[0];
      const head = near.find((point) => point[0] === step);
      tip.replaceChildren(html("b", { text: `step ${step}, epoch ${head[2] + 1}` }));
      lines.slice(0, 12).forEach((line) => {
        const point = nearest(line.points, step);
        const where = point[0] === step ? "" : ` (step ${point[0]})`;
        const row = html("div", {}, html("i"), `${line.label} ${exact(point[1])}${where}`);
        row.firstChild.style.background = colour(line.colour);
        tip.append(row);
      });
      const guide = host.querySelector(".guide");
      guide.setAttribute("x1", x.at(step));
      guide.setAttribute("x2", x.at(step));
      guide.style.visibility = "visible";
      host.dataset.step = step;
      place(tip, host, x.at(step), 12);
    }
    function invert(px) {
      const points = shown.flatMap((line) => [line.points[0], line.points[line.points.length - 1]]).filter(Boolean);
      const [low, high] = [Math.min(...points.map((p) => p[0])), Math.max(...points.map((p) => p[0]))];
      const [a, b] = [x.at(low), x.at(high)];
      return a === b ? low : low + ((px - a) / (b - a)) * (high - low);
    }
    const hide = () => { tip.hidden = true; const guide = host.querySelector(".guide"); if (guide) guide.style.visibility = "hidden"; };

    draw();
    host.append(tip);
    const at = (event) => event.clientX - host.getBoundingClientRect().left;
    host.addEventListener("pointermove", (event) => show(at(event)));
    host.addEventListener("pointerdown", (event) => show(at(event)));
    host.addEventListener("pointerleave", hide);
    host.tabIndex = 0;
    host.addEventListener("blur", hide);
    host.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const steps = [...new Set(shown.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
      const now = steps.indexOf(Number(host.dataset.step));
      show(x.at(steps[clamp(now + move, 0, steps.length - 1)]));
    });
    new ResizeObserver(draw).observe(host);

    const legend = host.parentNode.querySelector(".legend");
    if (figure.series.length > 1) {
      figure.series.forEach((line, number) => {
        const swatch = html("i");
        swatch.style.background = colour(line.colour);
        swatch.style.opacity = line.look === "faint" ? 0.45 : 1;
        const button = html("button", { "aria-pressed": "true", type: "button" }, swatch, line.label);
        button.addEventListener("click", () => {
          if (hidden.has(number)) hidden.delete(number); else hidden.add(number);
          button.setAttribute("aria-pressed", String(!hidden.has(number)));
          draw();
        });
        legend.append(button);
      });
    }
    const toggle = host.parentNode.querySelector(".log");
    const positive = figure.series.every((line) => line.points.every((point) => point[1] === null || point[1] > 0));
    if (toggle && positive) {
      toggle.hidden = false;
      toggle.addEventListener("click", () => { log = !log; toggle.setAttribute("aria-pressed", String(log)); draw(); });
    }
  }

  // Small multiples: one number of each run over one setting, with its interval.
  function dots(host, figure) {
    const tip = html("div", { class: "tip" });
    tip.hidden = true;
    host.append(tip);
    const draw = () => {
      const width = host.clientWidth || 400;
      const names = figure.categories;
      const lines = names && names.map((_, k) => figure.points.filter((p) => p.x === k));
      // Names stand beside their dots: below them there is no room for many.
      const side = names && Math.min(Math.max(...names.map((name) => name.length)) * 6.4 + 18, width * 0.42);
      const heights = names && lines.map((line) => Math.max(26, line.length * 9 + 12));
      const height = names ? heights.reduce((sum, one) => sum + one, 0) + 46 : 220;
      find("svg", host).forEach((node) => node.remove());
      const ends = figure.points.flatMap((p) => [p.y, p.low ?? p.y, p.high ?? p.y]);
      const [low, high] = [Math.min(...ends), Math.max(...ends)];
      const pad = (high - low) * 0.08;
      let drawing, spot;
      if (names) {
        const x = scale(low - pad, high + pad, side + 8, width - 14, Math.max(Math.floor((width - side) / 70), 3), false);
        drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": host.getAttribute("aria-label") || "" });
        for (const [value, text] of x.ticks) {
          drawing.append(svg("line", { class: "rule", x1: x.at(value), x2: x.at(value), y1: 4, y2: height - 42 }));
          drawing.append(svg("text", { x: x.at(value), y: height - 26, "text-anchor": "middle" }, text));
        }
        drawing.append(svg("text", { x: width - 8, y: height - 6, "text-anchor": "end" }, figure.y));
        const cut = Math.max(Math.floor((side - 12) / 6.4), 4);
        let top = 4;
        const middles = heights.map((one) => { top += one; return top - one / 2; });
        names.forEach((name, k) => {
          const shown = svg("text", { x: side - 4, y: middles[k] + 4, "text-anchor": "end" }, name.length > cut ? `${name.slice(0, cut - 1)}…` : name);
          shown.append(svg("title", {}, name));
          drawing.append(shown);
        });
        spot = (p, value) => [x.at(value), middles[p.x] + (lines[p.x].indexOf(p) - (lines[p.x].length - 1) / 2) * 9];
      } else {
        const y = scale(low - pad, high + pad, height - 42, 10, 4, false);
        const all = figure.points.map((p) => p.x);
        const x = scale(Math.min(...all), Math.max(...all), 70, width - 26, 4, figure.log);
        drawing = axes(host, height, x, y, figure.x);
        spot = (p, value) => [x.at(p.x), y.at(value)];
      }
      for (const p of figure.points) {
        const [px, py] = spot(p, p.y);
        if (p.low !== undefined) {
          const [[x1, y1], [x2, y2]] = [spot(p, p.low), spot(p, p.high)];
          drawing.append(svg("line", { x1, x2, y1, y2, style: `stroke: ${colour(p.colour)}; stroke-width: 3; opacity: .3; stroke-linecap: round` }));
        }
        const dot = svg("circle", { cx: px, cy: py, r: p.paper ? 4 : 5, style: p.paper ? "fill: none; stroke: var(--soft); stroke-width: 2" : `fill: ${colour(p.colour)}` });
        dot.addEventListener("pointerenter", () => {
          tip.replaceChildren(html("b", { text: p.label }), html("div", { text: p.text }));
          place(tip, host, px, py - 20);
        });
        dot.addEventListener("pointerleave", () => { tip.hidden = true; });
        drawing.append(dot);
      }
      host.prepend(drawing);
    };
    draw();
    new ResizeObserver(draw).observe(host);
  }

  const byKey = Object.fromEntries(data.figures.map((figure) => [figure.key, figure]));
  find("[data-figure]").forEach((host) => {
    const figure = byKey[host.dataset.figure];
    (figure.points ? dots : curve)(host, figure);
  });

  // Reconstructions over epochs.
  find(".slider").forEach((row) => {
    const input = row.querySelector("input");
    const shown = document.getElementById(row.dataset.of);
    const move = () => {
      const frame = data.frames[row.dataset.of][Number(input.value)];
      shown.dataset.frame = input.value;
      row.querySelector("output").textContent = `epoch ${frame.epoch}`;
      document.getElementById(`${row.dataset.of}-title`).textContent = frame.title;
      input.setAttribute("aria-valuetext", `epoch ${frame.epoch}`);
    };
    input.addEventListener("input", move);
    move();
  });
  find("[data-unfold]").forEach((button) => button.addEventListener("click", () => {
    const open = document.getElementById(button.dataset.unfold).classList.toggle("open");
    button.setAttribute("aria-expanded", String(open));
    button.textContent = open ? button.dataset.less : button.dataset.more;
  }));

  // Patches: how similar all of them are to a clicked one.
  const ramp = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]]; // viridis
  const heat = (share) => {
    const [at, part] = [Math.min(Math.floor(share * 5), 4), share * 5 - Math.min(Math.floor(share * 5), 4)];
    return ramp[at].map((value, k) => Math.round(value + part * (ramp[at + 1][k] - value)));
  };
  find("[data-patches]").forEach((group) => {
    const { grid: [rows, columns], similarity } = data.patches[group.dataset.patches];
    const bytes = similarity.map((text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)));
    find("[data-image]", group).forEach((cell) => {
      const number = Number(cell.dataset.image);
      const canvas = group.querySelector(`[data-similar="${number}"] canvas`);
      const outline = cell.querySelector("canvas");
      Object.assign(canvas, { width: columns, height: rows });
      Object.assign(outline, { width: columns * 8, height: rows * 8 });
      const choose = (patch) => {
        const context = canvas.getContext("2d");
        const picture = context.createImageData(columns, rows);
        for (let k = 0; k < rows * columns; k++) {
          const value = bytes[number][patch * rows * columns + k] / 127.5 - 1;
          picture.data.set([...heat(clamp(value, 0, 1)), 255], 4 * k);
        }
        context.putImageData(picture, 0, 0);
        const pen = outline.getContext("2d");
        pen.clearRect(0, 0, outline.width, outline.height);
        pen.lineWidth = 2;
        const [left, top] = [(patch % columns) * 8, Math.floor(patch / columns) * 8];
        pen.strokeStyle = "#fff"; pen.strokeRect(left + 1, top + 1, 6, 6);
        pen.strokeStyle = "#d11"; pen.lineWidth = 1; pen.strokeRect(left + 0.5, top + 0.5, 7, 7);
        cell.dataset.patch = patch;
      };
      const pick = (event) => {
        const box = event.currentTarget.getBoundingClientRect();
        const column = clamp(Math.floor(((event.clientX - box.left) / box.width) * columns), 0, columns - 1);
        const row = clamp(Math.floor(((event.clientY - box.top) / box.height) * rows), 0, rows - 1);
        choose(row * columns + column);
      };
      cell.addEventListener("click", (event) => { if (event.detail) pick(event); });
      group.querySelector(`[data-similar="${number}"]`).addEventListener("click", pick);
      cell.addEventListener("keydown", (event) => {
        const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
        if (!move) return;
        event.preventDefault();
        choose(clamp(Number(cell.dataset.patch) + move, 0, rows * columns - 1));
      });
      choose(Math.floor(rows / 2) * columns + Math.floor(columns / 2));
    });
  });

  // The map of the images, with the one under the pointer.
  find("[data-map]").forEach((host) => {
    const { x, y, labels, classes, files, columns, rows, sprite } = data.maps[host.dataset.map];
    const drawing = svg("svg", { viewBox: "0 0 800 600", role: "img", "aria-label": host.getAttribute("aria-label") });
    const at = (k) => [30 + 740 * x[k], 30 + 540 * (1 - y[k])];
    const circles = x.map((_, k) => {
      const [cx, cy] = at(k);
      const dot = svg("circle", { cx, cy, r: 6, style: `fill: ${colour(classes && classes[k] !== null ? classes[k] : 0)}; opacity: .8` });
      drawing.append(dot);
      return dot;
    });
    const tip = html("div", { class: "tip" });
    tip.hidden = true;
    host.append(drawing, tip);
    let last = null;
    const leave = () => { tip.hidden = true; if (last !== null) circles[last].setAttribute("r", 6); last = null; };
    const show = (event) => {
      const box = drawing.getBoundingClientRect();
      const [px, py] = [((event.clientX - box.left) / box.width) * 800, ((event.clientY - box.top) / box.height) * 600];
      let [best, least] = [null, 40 ** 2];
      x.forEach((_, k) => { const [cx, cy] = at(k); const far = (cx - px) ** 2 + (cy - py) ** 2; if (far < least) [best, least] = [k, far]; });
      if (best === null) return leave();
      if (last !== null) circles[last].setAttribute("r", 6);
      last = best;
      circles[best].setAttribute("r", 10);
      tip.replaceChildren(
        html("div", { class: `cell ${sprite}`, "--cols": columns, "--rows": rows, "--c": best % columns, "--r": Math.floor(best / columns) }),
        html("b", { text: labels[best] || "no label" }), html("div", { class: "soft", text: files[best] }),
      );
      const [cx, cy] = at(best);
      place(tip, host, (cx / 800) * box.width, (cy / 600) * box.height - 20);
    };
    host.addEventListener("pointermove", show);
    host.addEventListener("pointerdown", show);
    host.addEventListener("pointerleave", leave);
  });

  // Tables that are sorted by a click, or by Enter, on a column's head.
  find("table.sort").forEach((table) => find("th", table).forEach((head, column) => {
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      find("th", table).forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => { const cell = row.children[column]; return cell.dataset.value ?? cell.textContent; };
      const body = table.tBodies[0];
      const order = (a, b) => {
        const [first, second] = [key(a), key(b)];
        if (!first || !second) return first ? -1 : second ? 1 : 0; // what is missing stays last
        const numbers = [Number(first), Number(second)];
        const found = numbers.some(Number.isNaN) ? first.localeCompare(second, undefined, { numeric: true }) : numbers[0] - numbers[1];
        return down ? -found : found;
      };
      body.append(...[...body.rows].sort(order));
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  }));

  find("[data-copy]").forEach((button) => button.addEventListener("click", async () => {
    const code = button.parentNode.querySelector("pre");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "copied";
    } catch { // not allowed for this page: mark it, for Ctrl-C
      getSelection().selectAllChildren(code);
      button.textContent = "marked";
    }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  }));

  const theme = document.getElementById("theme");
  const root = document.documentElement;
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const say = () => { theme.textContent = dark() ? "light" : "dark"; };
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; say(); });
  say();
})();
