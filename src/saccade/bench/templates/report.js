"use strict";
const { figures, styles } = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const shorten = (text) => (text.length > 34 ? text.slice(0, 33) + "\u2026" : text);
const number = (value) => String(Number(value.toPrecision(6)));

const multiples = (steps) => Array.from({ length: 18 }, (_, i) => i - 8).flatMap((power) => steps.map((step) => step * 10 ** power));
/* Candidate ticks, the finest first. */
const TICKS = {
  length: (values) => [[...new Set(values)].sort((a, b) => a - b)],
  bytes: () => [Array.from({ length: 50 }, (_, power) => 2 ** power)],
  ms: () => [[1, 2, 5], [1, 3], [1]].map(multiples),
};

function tickText(kind, value) {
  if (kind === "length") return value.toLocaleString("en");
  if (kind === "ms") return value < 1000 ? `${number(value)} ms` : `${number(value / 1000)} s`;
  const power = Math.floor(Math.log2(value) / 10);
  return `${number(value / 1024 ** power)} ${UNITS[power]}`;
}

/* A logarithmic axis around the values with at most `most` ticks, kept from the largest down. */
function logAxis(kind, values, most) {
  const [low, high] = [Math.min(...values), Math.max(...values)].map(Math.log10);
  const margin = Math.max(0.06 * (high - low), 0.1);
  const within = (ticks) => ticks.filter((t) => Math.log10(t) >= low - margin && Math.log10(t) <= high + margin);
  const choices = TICKS[kind](values).map(within);
  const inside = choices.find((ticks) => ticks.length <= most) || choices.at(-1);
  const step = Math.ceil(inside.length / most);
  const tickvals = inside.reverse().filter((_, i) => i % step === 0);
  return { type: "log", range: [low - margin, high + margin], tickvals, ticktext: tickvals.map((t) => tickText(kind, t)) };
}

function axis({ kind, title }, values, most) {
  const look = {
    title: { text: title, font: { size: 12 }, standoff: 10 },
    automargin: true, fixedrange: true, zeroline: false, ticks: "", showgrid: true,
    gridcolor: color("--grid"), linecolor: color("--rule"), tickfont: { color: color("--muted") },
  };
  if (kind === "share") return { ...look, range: [-0.03, 1.05], tickformat: ".0%", dtick: 0.25 };
  if (kind === "count") return { ...look, tickformat: "~s", nticks: 6 };
  if (kind === "bits") return { ...look, nticks: 7, tickformat: ".2f" };
  return { ...look, ...logAxis(kind, values, most) };
}

function traceOf(line, figure) {
  const style = styles[line.name];
  const ink = color(style.color);
  const [x, y, told] = [0, 1, 2].map((i) => line.points.map((point) => point[i]));
  const crowded = line.points.length > 12;
  return {
    type: "scatter", name: plain(line.name), x, y, customdata: told.map(plain),
    mode: figure.labels ? "markers" : crowded ? "lines" : "lines+markers",
    visible: !hidden.has(line.name),
    hovertemplate: "<b>%{fullData.name}</b><br>%{customdata}<extra></extra>",
    line: { color: ink, dash: style.dash, width: 2 },
    marker: { color: ink, symbol: style.symbol, size: figure.labels ? 11 : 7, line: { color: ink, width: style.symbol.endsWith("open") ? 2 : 0 } },
    error_y: line.spread ? { type: "data", array: [line.spread], thickness: 1.2, width: 0, color: ink } : undefined,
    cliponaxis: false,
  };
}

function guideOf({ text, points, at }) {
  const muted = color("--muted"), named = at === "left" ? 0 : points.length - 1;
  return {
    type: "scatter", mode: "lines+text", x: points.map((p) => p[0]), y: points.map((p) => p[1]),
    text: points.map((_, i) => (i === named ? plain(text) : "")),
    textposition: points.length === 1 ? "top center" : at === "left" ? "top right" : "top left",
    textfont: { color: muted, size: 11 }, hoverinfo: "skip", line: { color: muted, dash: "dot", width: 1.2 },
  };
}

/* Names beside the marks of a quality chart, each where it covers least; a name with no room is left to the key. */
function nameMarks(traces, layout, width, height) {
  const seen = traces.filter((trace) => trace.visible);
  const [left, right] = layout.xaxis.range, [bottom, top] = layout.yaxis.range;
  const at = seen.map(({ x, y }) => [
    (width * (Math.log10(x[0]) - left)) / (right - left),
    height - (height * (y[0] - bottom)) / (top - bottom),
  ]);
  const marks = at.map(([x, y]) => [x - 8, y - 8, x + 8, y + 8]);
  const names = [];
  const overlap = (a, b) =>
    Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  const covered = (box, boxes) => boxes.reduce((sum, other) => sum + overlap(box, other), 0);
  seen.forEach((trace, i) => {
    const [x, y] = at[i], text = shorten(trace.plainName), long = 7.5 * text.length;
    const columns = { left: x - 9 - long, center: x - long / 2, right: x + 9 };
    const rows = { middle: y - 9, top: y - 27, bottom: y + 9 };
    const places = ["middle right", "middle left", "top center", "bottom center", "top right", "top left", "bottom right", "bottom left"];
    const boxes = places.map((place) => {
      const [row, column] = place.split(" ");
      return [columns[column], rows[row], columns[column] + long, rows[row] + 18];
    });
    const costs = boxes.map((box) => {
      const outside = Math.max(0, -box[0]) + Math.max(0, box[2] - width) + Math.max(0, -box[1]) + Math.max(0, box[3] - height);
      return 18 * outside + covered(box, marks) + covered(box, names);
    });
    const best = costs.indexOf(Math.min(...costs));
    if (covered(boxes[best], names)) return;
    names.push(boxes[best]);
    Object.assign(trace, { mode: "markers+text", text: [plain(text)], textposition: places[best], textfont: { size: 12, color: color("--ink") } });
  });
}

function draw(node) {
  const figure = figures[node.id];
  const points = figure.lines.flatMap((line) => line.points).concat(figure.guide ? figure.guide.points : []);
  const [width, height] = [node.clientWidth, node.clientHeight];
  const ink = color("--ink");
  const layout = {
    xaxis: axis(figure.x, points.map((p) => p[0]), width < 420 ? 5 : 8),
    yaxis: axis(figure.y, points.map((p) => p[1]), 6),
    margin: { l: 8, r: 14, t: 10, b: 8 }, showlegend: false, dragmode: false, hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: color("--panel"), bordercolor: color("--rule"), font: { color: ink }, align: "left" },
    shapes: [],
  };
  const traces = figure.lines.map((line) => ({ ...traceOf(line, figure), plainName: line.name }));
  if (figure.guide && figure.guide.points.length) traces.unshift(guideOf(figure.guide));
  if (figure.labels) {
    const ys = figure.lines.flatMap(({ points: [[, y]], spread }) => [y - (spread || 0), y + (spread || 0)]).concat(figure.band || []);
    const [low, high] = [Math.min(...ys), Math.max(...ys)];
    const margin = 0.1 * (high - low) || 0.1;
    layout.yaxis.range = [low - margin, high + margin];
    if (width >= 460) nameMarks(traces, layout, width - 70, height - 60);
  }
  if (figure.band) {
    const [y0, y1] = figure.band;
    layout.shapes.push({ type: "rect", xref: "paper", x0: 0, x1: 1, y0, y1, layer: "below", fillcolor: color("--band"), line: { width: 0 } });
  }
  for (const trace of traces) delete trace.plainName;
  Plotly.react(node, traces, layout, { displayModeBar: false });
}

const charts = [...document.querySelectorAll(".chart")];
const drawAll = () => charts.forEach(draw);
for (const button of document.querySelectorAll(".key button")) {
  button.addEventListener("click", () => {
    const name = button.dataset.name;
    if (!hidden.delete(name)) hidden.add(name);
    for (const twin of document.querySelectorAll(".key button")) {
      if (twin.dataset.name === name) twin.setAttribute("aria-pressed", String(!hidden.has(name)));
    }
    drawAll();
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
const widths = new Map();
const watcher = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    if (widths.get(target) === contentRect.width) continue;
    widths.set(target, contentRect.width);
    draw(target);
  }
});
charts.forEach((node) => watcher.observe(node));
