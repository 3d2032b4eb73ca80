"use strict";
// The page's own script: it unpacks plotly.js when a figure comes near, draws figures in the colours
// of the reader's theme, and draws the two views of a plan (usage, members). It loads nothing.
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const root = document.documentElement;
  const drawn = new Map(); // figure element → how to draw it again
  let plotly = null;

  // --- plotly, unpacked once ---------------------------------------------------------------------

  function unpacked() {
    plotly ??= (async () => {
      const held = document.getElementById("report-plotly");
      const bytes = Uint8Array.from(atob(held.textContent.trim()), (c) => c.charCodeAt(0));
      const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      const script = document.createElement("script");
      script.textContent = await new Response(plain).text();
      document.head.append(script);
      held.remove();
      return window.Plotly;
    })();
    return plotly;
  }

  // --- theme ---------------------------------------------------------------------------------------

  function colour(name) {
    return getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  }

  function scale(name, count) {
    return Array.from({ length: count }, (_, i) => [i / (count - 1), colour(`${name}${i}`)]);
  }

  // The colour of a share from 0 to 1 of a scale, as plotly would mix it.
  function mixed(name, count, share) {
    const at = Math.max(0, Math.min(1, share)) * (count - 1);
    const low = Math.min(count - 2, Math.floor(at));
    const parts = [low, low + 1].map((i) => colour(`${name}${i}`).match(/[0-9a-f]{2}/gi)
      .map((part) => Number.parseInt(part, 16)));
    const whole = parts[0].map((from, i) => Math.round(from + (at - low) * (parts[1][i] - from)));
    return `rgb(${whole.join(",")})`;
  }

  function resolved(value) {
    if (typeof value === "string" && value.startsWith("@")) {
      if (value === "@seq") return scale("seq", 4);
      if (value === "@div") return scale("div", 5);
      return colour(value.slice(1));
    }
    if (Array.isArray(value)) return value.map(resolved);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, resolved(v)]));
    }
    return value;
  }

  function axis(own) {
    const grid = colour("line");
    const base = { gridcolor: grid, zerolinecolor: grid, linecolor: colour("muted"), ticks: "outside",
      tickcolor: grid, automargin: true, fixedrange: true };
    const title = own?.title ? { ...own.title, standoff: 8 } : undefined;
    return { ...base, ...own, ...(title ? { title } : {}) };
  }

  function laidOut(layout) {
    const whole = resolved(layout);
    for (const name of Object.keys(whole)) {
      if (/^[xy]axis\d*$/.test(name)) whole[name] = axis(whole[name]);
    }
    return {
      autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink") },
      margin: { l: 44, r: 14, t: 10, b: 40 },
      hovermode: "closest",
      hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("muted"),
        font: { color: colour("ink") } },
      dragmode: false,
      barmode: "stack",
      ...whole,
      showlegend: false, // ours is of buttons, which a keyboard reaches and a phone wraps
    };
  }

  const CONFIG = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };

  // --- drawing -------------------------------------------------------------------------------------

  const SYMBOLS = { circle: "●", square: "■", diamond: "◆", "triangle-up": "▲", cross: "✚", star: "★",
    x: "✖", pentagon: "⬟" };
  const OPEN = { circle: "○", square: "□", diamond: "◇", "triangle-up": "△", star: "☆",
    pentagon: "⬠" };

  function swatch(trace) {
    const mark = document.createElement("span");
    mark.className = "swatch";
    mark.setAttribute("aria-hidden", "true");
    const symbol = trace.marker?.symbol ?? "circle";
    const line = { dash: "╌", dot: "┈", dashdot: "╌" }[trace.line?.dash] ?? "─";
    const plain = symbol.replace("-open", "");
    const shape = symbol.endsWith("-open") ? OPEN[plain] ?? SYMBOLS[plain] : SYMBOLS[plain];
    const mode = trace.mode ?? "lines";
    mark.textContent = (mode.includes("lines") ? line : "") + (mode.includes("markers") ? shape : "");
    mark.style.color = mode === "lines" ? trace.line?.color : trace.marker?.color;
    return mark;
  }

  function legend(figure, plot, traces) {
    const place = figure.querySelector(".legend");
    place.replaceChildren();
    if (traces.filter((t) => t.name).length < 2) return;
    traces.forEach((trace, index) => {
      if (!trace.name) return;
      const button = document.createElement("button");
      const isShown = figure.dataset[`hidden${index}`] !== "1";
      button.type = "button";
      button.setAttribute("aria-pressed", String(isShown));
      button.append(swatch(trace), trace.name);
      button.addEventListener("click", () => {
        const shows = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(shows));
        figure.dataset[`hidden${index}`] = shows ? "0" : "1";
        window.Plotly.restyle(plot, { visible: shows }, [index]);
      });
      place.append(button);
    });
  }

  function keys(figure, entries) {
    const place = figure.querySelector(".legend");
    place.removeAttribute("role");
    place.removeAttribute("aria-label");
    place.replaceChildren(...entries.map(([name, token]) => {
      const key = document.createElement("span");
      const block = document.createElement("span");
      key.className = "key";
      block.className = "block";
      block.style.background = `var(--${token})`;
      key.append(block, name);
      return key;
    }));
  }

  function show(figure, traces, layout) {
    const plot = figure.querySelector(".plot");
    const shown = resolved(traces).map((trace, index) => (
      figure.dataset[`hidden${index}`] === "1" ? { ...trace, visible: false } : trace
    ));
    return window.Plotly.react(plot, shown, laidOut(layout), CONFIG).then(() => shown);
  }

  async function drawSpec(figure, spec) {
    const shown = await show(figure, spec.data, spec.layout);
    legend(figure, figure.querySelector(".plot"), shown);
  }

  async function draw(figure) {
    await unpacked();
    if (!drawn.has(figure)) {
      const name = figure.dataset.figure;
      const view = data.views[name];
      const again = view ? VIEWS[view.kind](figure, data.plans[view.plan])
        : () => drawSpec(figure, data.figures[name]);
      drawn.set(figure, again);
    }
    await drawn.get(figure)();
  }

  function redraw() {
    return Promise.all([...drawn.values()].map((again) => again()));
  }

  function failed(error) {
    document.getElementById("no-figures").hidden = false;
    throw error;
  }

  // --- what a plan says of an expert ---------------------------------------------------------------

  const FATES = ["stays", "stays, others join it", "merged into another", "dropped",
    "a constant in its place"];

  function experts(layer) {
    const { labels, dominants, count, weights, similarity } = layer;
    const total = count ? count.reduce((a, b) => a + b, 0) : 0;
    const sizes = new Map();
    for (const group of labels) sizes.set(group, (sizes.get(group) ?? 0) + 1);
    const stays = new Set(dominants);
    return labels.map((group, id) => {
      let fate = stays.has(id) ? (sizes.get(group) > 1 ? 1 : 0) : 2;
      if (group < 0) fate = layer.operator === "constant" ? 4 : 3;
      const load = total ? count[id] * labels.length / total : null;
      return { id, group, fate, load, dominant: group < 0 ? null : dominants[group],
        size: sizes.get(group), weight: weights?.[id], alike: similarity?.[id], count: count?.[id] };
    });
  }

  function short(name) {
    return name.replace(/^(model\.)?(language_model\.)?(layers\.)?/, "").replace(/\.(mlp|ffn|moe|block_sparse_moe|feed_forward)$/, "");
  }

  function words(one) {
    const parts = [`expert ${one.id}: ${FATES[one.fate]}`];
    if (one.fate === 2) parts.push(`into ${one.dominant}, weight ${one.weight}, similarity ${one.alike}`);
    if (one.fate === 1) parts.push(`group of ${one.size}, weight ${one.weight ?? 1}`);
    if (one.load !== null) {
      parts.push(one.count ? `${one.load.toFixed(2)} × an even load (${one.count.toLocaleString("en")} choices)` : "never chosen");
    }
    return parts.join("<br>");
  }

  function choose(place, label, options, change) {
    const wrap = document.createElement("label");
    const select = document.createElement("select");
    for (const [value, text] of options) select.add(new Option(text, value));
    wrap.append(`${label} `, select);
    select.addEventListener("change", () => change(select.value));
    place.append(wrap);
    return select;
  }

  // --- view: usage -----------------------------------------------------------------------------

  const ORDERS = {
    number: (a, b) => a.id - b.id,
    load: (a, b) => (b.load ?? 0) - (a.load ?? 0) || a.id - b.id,
    group: (a, b) => (a.group < 0) - (b.group < 0) || a.group - b.group
      || (b.fate < 2) - (a.fate < 2) || a.id - b.id,
  };

  function usage(figure, plan) {
    const layers = plan.layers.map((layer) => ({ name: layer.name, held: experts(layer) }));
    let order = "number";
    const again = () => {
      const rows = layers.map(({ name, held }) => ({ name, held: [...held].sort(ORDERS[order]) }));
      const text = rows.map(({ name, held }) => held.map((one) => `${name}<br>${words(one)}`));
      const heat = (z, more) => ({ type: "heatmap", y: rows.map(({ name }) => short(name)), z, text,
        hovertemplate: "%{text}<extra></extra>", hoverongaps: false, ...more });
      const load = rows.map(({ held }) => held.map((one) => (
        one.load === null ? null : Math.max(-3, Math.min(3, Math.log2(one.load || 1e-9)))
      )));
      const fate = rows.map(({ held }) => held.map((one) => one.fate));
      const steps = FATES.flatMap((_, i) => [[i / 5, `@fate${i}`], [(i + 1) / 5, `@fate${i}`]]);
      const bar = { title: { text: "load", side: "right" }, tickvals: [-3, -2, -1, 0, 1, 2, 3],
        ticktext: ["⅛", "¼", "½", "1", "2", "4", "8"], thickness: 12, len: 0.48, y: 0.76,
        outlinewidth: 0 };
      const columns = { number: "expert", load: "experts, the busiest first",
        group: "experts, group by group, the dominant first" }[order];
      const side = { type: "category", autorange: "reversed", showgrid: false,
        nticks: 16, title: { text: "layer" } };
      return show(figure, [
        heat(load, { colorscale: "@div", zmin: -3, zmax: 3, colorbar: bar }),
        heat(fate, { colorscale: steps, zmin: -0.5, zmax: 4.5, showscale: false, yaxis: "y2" }),
      ], {
        xaxis: { title: { text: columns }, anchor: "y2", showgrid: false, zeroline: false },
        yaxis: { ...side, domain: [0.53, 1] },
        yaxis2: { ...side, domain: [0, 0.47], anchor: "x" },
      });
    };
    choose(figure.querySelector(".controls"), "Experts in the order of their",
      [["number", "number"], ["group", "group"], ["load", "load"]],
      (value) => { order = value; again(); });
    const fates = new Set(layers.flatMap(({ held }) => held.map((one) => one.fate)));
    keys(figure, FATES.map((name, i) => [name, `fate${i}`, i]).filter(([, , i]) => fates.has(i)));
    return again;
  }

  // --- view: members ---------------------------------------------------------------------------

  function members(figure, plan) {
    const changed = plan.layers.filter((layer) => layer.operator !== "keep");
    const place = figure.querySelector(".controls");
    const now = figure.querySelector(".now");
    let index = 0;
    const step = (by, text) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.addEventListener("click", () => go(index + by));
      place.append(button);
      return button;
    };
    const before = step(-1, "← previous");
    const select = choose(place, "Layer", changed.map((layer, i) => [i, layer.name]),
      (value) => go(Number(value)));
    const after = step(1, "next →");
    const again = () => {
      const layer = changed[index];
      const held = experts(layer);
      select.value = String(index);
      before.disabled = index === 0;
      after.disabled = index === changed.length - 1;
      now.textContent = said(layer, held);
      memberTable(figure, layer, held);
      return layer.operator === "merge" ? groups(figure, held) : loads(figure, held);
    };
    const go = (to) => { index = Math.max(0, Math.min(changed.length - 1, to)); again(); };
    return again;
  }

  function said(layer, held) {
    const stays = held.filter((one) => one.fate < 2).length;
    const lost = held.filter((one) => one.fate > 1);
    const share = lost.every((one) => one.load !== null)
      ? `, which had ${(100 * lost.reduce((a, one) => a + one.load, 0) / held.length).toFixed(0)} % of the choices` : "";
    const alike = lost.filter((one) => one.fate === 2).map((one) => one.alike);
    const least = alike.length ? ` The least alike of them has similarity ${Math.min(...alike)}.` : "";
    return `${layer.name}: ${stays} of ${held.length} experts stay; ${lost.length} do not${share}.${least}`;
  }

  function resize(figure, height) {
    figure.querySelector(".plot").style.height = `${height}px`;
  }

  function groups(figure, held) {
    const joined = held.filter((one) => one.fate === 1).sort((a, b) => b.size - a.size || a.id - b.id);
    const names = joined.map((one) => `expert ${one.id}`);
    const most = Math.max(0, ...joined.map((one) => one.size));
    const rows = joined.map((one) => [one, ...held.filter((o) => o.group === one.group && o.fate === 2)
      .sort((a, b) => b.weight - a.weight || a.id - b.id)]);
    const least = Math.min(1, ...held.filter((one) => one.fate === 2).map((one) => one.alike));
    const low = Math.floor(least * 10) / 10;
    const share = (one) => (low < 1 ? (one.alike - low) / (1 - low) : 1);
    const ink = (one) => (share(one) > 0.5 ? "@bg" : "@ink");
    resize(figure, 96 + 24 * Math.max(2, rows.length));
    const traces = Array.from({ length: most }, (_, k) => {
      const own = rows.filter((row) => row.length > k);
      return { type: "bar", orientation: "h", y: own.map((row) => `expert ${row[0].id}`),
        x: own.map((row) => row[k].weight), text: own.map((row) => String(row[k].id)),
        customdata: own.map((row) => words(row[k])), hovertemplate: "%{customdata}<extra></extra>",
        insidetextfont: { color: own.map((row) => ink(row[k])) },
        textposition: "inside", insidetextanchor: "middle", textangle: 0, constraintext: "inside",
        marker: { color: own.map((row) => mixed("seq", 4, share(row[k]))),
          line: { color: "@bg", width: 1.5 } } };
    });
    traces.push({ type: "scatter", mode: "markers", x: [null], y: [null], hoverinfo: "skip",
      marker: { color: [low], coloraxis: "coloraxis" } }); // has the colour bar
    keys(figure, []);
    return show(figure, traces, {
      uniformtext: { minsize: 9, mode: "hide" },
      bargap: 0.18,
      coloraxis: { colorscale: "@seq", cmin: low, cmax: 1,
        colorbar: { title: { text: "similarity", side: "right" }, thickness: 12, outlinewidth: 0 } },
      xaxis: { title: { text: "weight in the merged expert" }, range: [0, 1.001] },
      yaxis: { categoryorder: "array", categoryarray: names, autorange: "reversed", showgrid: false },
    });
  }

  function loads(figure, held) {
    const fates = [...new Set(held.map((one) => one.fate))].sort();
    keys(figure, fates.map((fate) => [FATES[fate], `fate${fate}`]));
    const isKnown = held.some((one) => one.load !== null);
    resize(figure, isKnown ? 300 : 140);
    const traces = fates.map((fate) => {
      const own = held.filter((one) => one.fate === fate);
      return { type: "bar", x: own.map((one) => one.id), y: own.map((one) => (isKnown ? one.load : 1)),
        text: own.map(words), hovertemplate: "%{text}<extra></extra>", textposition: "none",
        marker: { color: `@fate${fate}`, line: { color: "@muted", width: 0.5 } } };
    });
    return show(figure, traces, {
      bargap: 0.15,
      xaxis: { title: { text: "expert" }, showgrid: false },
      yaxis: isKnown ? { title: { text: "load, 1 is even" }, rangemode: "tozero" }
        : { showticklabels: false, showgrid: false, title: { text: "" } },
    });
  }

  function memberTable(figure, layer, held) {
    const names = ["expert", "what becomes of it", "joins", "weight", "similarity", "load"];
    const table = document.createElement("table");
    const caption = table.createCaption();
    caption.textContent = `Experts of ${layer.name}`;
    const head = table.createTHead().insertRow();
    for (const name of names) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = name;
      head.append(cell);
    }
    const body = table.createTBody();
    for (const one of [...held].sort(ORDERS.group)) {
      const row = body.insertRow();
      const first = document.createElement("th");
      first.scope = "row";
      first.textContent = one.id;
      row.append(first);
      const load = one.load === null ? "" : one.load.toFixed(3);
      for (const value of [FATES[one.fate], one.fate === 2 ? one.dominant : "", one.weight, one.fate === 2 ? one.alike : "", load]) {
        row.insertCell().textContent = value ?? "";
      }
    }
    figure.querySelector(".members .scroll").replaceChildren(table);
  }

  const VIEWS = { usage, members };

  // --- when ----------------------------------------------------------------------------------------

  const figures = [...document.querySelectorAll("figure[data-figure]")];
  const observer = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) {
        observer.unobserve(target);
        draw(target).catch(failed);
      }
    }
  }, { rootMargin: "600px 0px" });
  for (const figure of figures) observer.observe(figure);
  if (figures.length && "requestIdleCallback" in window) {
    addEventListener("load", () => requestIdleCallback(() => unpacked().catch(failed)));
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  async function forPrint(prints) {
    if (prints === "print" in root.dataset) return;
    if (prints) root.dataset.print = "1";
    else delete root.dataset.print;
    if (prints) await Promise.all(figures.filter((one) => !drawn.has(one)).map(draw));
    await redraw();
    for (const figure of drawn.keys()) {
      const plot = figure.querySelector(".plot");
      window.Plotly.relayout(plot, prints ? { width: 660, autosize: false } : { width: null, autosize: true });
    }
  }
  addEventListener("beforeprint", () => forPrint(true));
  addEventListener("afterprint", () => forPrint(false));
  matchMedia("print").addEventListener("change", (event) => forPrint(event.matches));
})();
