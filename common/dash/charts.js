"use strict";
// Small pictures in SVG: lines, bars, stacked bars. Text goes in as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "class") node.className = value;
    else if (key === "width") node.style.width = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function draw(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function short(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6) return (value / 1e6).toFixed(1) + " M";
  if (size >= 1e4) return (value / 1e3).toFixed(1) + " k";
  if (size >= 100) return Math.round(value).toLocaleString("en");
  if (size >= 10) return value.toFixed(1);
  if (size > 0 && size < 0.001) return value.toExponential(1);
  return value.toFixed(digits);
}

const whole = (value) => (Math.abs(value) >= 1e5 ? short(value) : String(Math.round(value)));
const percent = (share) => (share === null || share === undefined ? "–" : Math.round(100 * share) + " %");

// Round numbers that cover [low, high], about `count` of them.
function ticks(low, high, count, integers) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  if (integers) step = Math.max(1, Math.ceil(step));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

// As many digits as the step between two marks needs.
function axisText(value, step) {
  if (Math.abs(value) >= 1e4) return short(value);
  if (step < 1e-4) return value === 0 ? "0" : value.toExponential(1);
  let digits = 0;
  while (digits < 6 && Math.abs(step * 10 ** digits - Math.round(step * 10 ** digits)) > 1e-6) digits++;
  return value.toFixed(digits);
}

// The frame of a picture: axes and grid. Returns the svg and the two scales.
function frame(box, xs, ys, labels, format) {
  const width = Math.max(220, box.clientWidth), height = box.clientHeight || 190;
  const top = 8, bottom = height - 20, right = width - 8;
  const yTicks = ticks(ys[0], ys[1], 4, false);
  const yStep = yTicks.length > 1 ? yTicks[1] - yTicks[0] : 1;
  const names = yTicks.map((value) => (format ? format(value) : axisText(value, yStep)));
  const left = 10 + 6.6 * Math.max(2, ...names.map((name) => name.length));
  const x = (v) => left + ((v - xs[0]) / (xs[1] - xs[0] || 1)) * (right - left);
  const y = (v) => bottom - ((v - ys[0]) / (ys[1] - ys[0] || 1)) * (bottom - top);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  yTicks.forEach((value, i) => {
    svg.append(draw("line", { class: value === 0 ? "zero" : "grid", x1: left, x2: right, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, names[i]));
  });
  const marks = labels || ticks(xs[0], xs[1], Math.max(2, Math.floor(width / 90)), true).map((v) => [v, whole(v)]);
  if (!labels) svg.append(draw("text", { x: left - 6, y: height - 4, "text-anchor": "end" }, "step"));
  marks.filter(([value]) => labels || x(value) > left + 12).forEach(([value, name]) => svg.append(draw("text", { x: x(value), y: height - 4, "text-anchor": "middle" }, name)));
  return { svg, x, y, left, right, top, bottom };
}

function extent(values, fallback) {
  const good = values.filter((v) => Number.isFinite(v));
  return good.length ? [Math.min(...good), Math.max(...good)] : fallback;
}

// Means of a few neighbours, narrower at the ends.
function smooth(y, half) {
  return y.map((_, i) => {
    const part = y.slice(Math.max(0, i - half), i + half + 1);
    return part.reduce((a, b) => a + b, 0) / part.length;
  });
}

// curves: [{name, colour, x, y, as: "line" | "dashed" | "dots" | "smooth", format}]
function lines(card, curves, options = {}) {
  const there = curves.filter((curve) => curve.x && curve.x.length);
  card.legend.replaceChildren(...there.map((curve) => make("span", {}, make("i", { class: "key " + curve.colour }),
    curve.name, make("b", {}, (curve.format || short)(curve.y[curve.y.length - 1])))));
  if (!there.length) return nothing(card.plot, options.empty);
  let xs = extent(there.flatMap((curve) => curve.x), [0, 1]);
  if (xs[0] === xs[1]) xs = [xs[0] - 1, xs[1] + 1];
  let ys = extent(there.flatMap((curve) => curve.y), [0, 1]);
  if (options.from !== undefined) ys[0] = Math.min(options.from, ys[0]);
  if (options.to !== undefined) ys[1] = Math.max(options.to, ys[1]);
  const room = (ys[1] - ys[0] || Math.abs(ys[1]) || 1) * 0.06;
  ys = [options.from !== undefined && ys[0] === options.from ? ys[0] : ys[0] - room,
    options.to !== undefined && ys[1] === options.to ? ys[1] : ys[1] + room];
  const f = frame(card.plot, xs, ys, undefined, options.axis);
  for (const curve of there) shape(f, curve);
  card.plot.replaceChildren(f.svg);
  hover(card.plot, f, xs, there);
}

function shape(f, curve) {
  const path = (y) => "M" + curve.x.map((v, i) => `${f.x(v).toFixed(1)},${f.y(y[i]).toFixed(1)}`).join("L");
  if (curve.as === "dots" || curve.x.length === 1) {
    if (curve.x.length > 2) f.svg.append(draw("path", { class: `curve thin ${curve.colour}`, d: path(curve.y) }));
    curve.x.forEach((v, i) => f.svg.append(draw("circle", { class: `fill ${curve.colour}`, cx: f.x(v), cy: f.y(curve.y[i]), r: curve.x.length > 60 ? 2 : 3.5 })));
  } else if (curve.as === "smooth" && curve.x.length > 8) {
    f.svg.append(draw("path", { class: `curve thin ${curve.colour}`, d: path(curve.y) }));
    f.svg.append(draw("path", { class: `curve ${curve.colour}`, d: path(smooth(curve.y, Math.ceil(curve.x.length / 60) + 1)) }));
  } else {
    f.svg.append(draw("path", { class: `curve ${curve.as === "dashed" ? "dashed" : ""} ${curve.colour}`, d: path(curve.y) }));
  }
}

function nothing(plot, words) {
  plot.replaceChildren(make("div", { class: "none" }, words || "no step has ended yet"));
  plot.onpointermove = plot.onpointerleave = null;
}

// The value of a curve at or before step x.
function at(curve, x) {
  let low = 0, high = curve.x.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (curve.x[middle] <= x) low = middle + 1; else high = middle;
  }
  return low ? curve.y[low - 1] : undefined;
}

function hover(plot, f, xs, curves) {
  const cross = draw("line", { class: "cross", y1: f.top, y2: f.bottom, visibility: "hidden" });
  f.svg.append(cross);
  const tip = make("div", { class: "tip" });
  tip.hidden = true;
  plot.append(tip);
  plot.onpointermove = (event) => {
    const place = event.clientX - plot.getBoundingClientRect().left;
    const step = Math.round(xs[0] + ((place - f.left) / (f.right - f.left)) * (xs[1] - xs[0]));
    const shown = Math.min(Math.max(step, Math.ceil(xs[0])), Math.floor(xs[1]));
    for (const side of ["x1", "x2"]) cross.setAttribute(side, f.x(shown));
    cross.setAttribute("visibility", "visible");
    tip.replaceChildren(make("div", { class: "dim" }, "step " + shown), ...curves.map((curve) => make("div", {},
      make("span", { class: curve.colour }, curve.name), (curve.format || short)(at(curve, shown)))));
    tip.hidden = false;
    const left = f.x(shown) + 10;
    tip.style.left = Math.min(left, plot.clientWidth - tip.offsetWidth - 4) + "px";
  };
  plot.onpointerleave = () => { tip.hidden = true; cross.setAttribute("visibility", "hidden"); };
}

// rows: [[label, share, words]]
function bars(card, rows, colour, last) {
  card.legend.replaceChildren();
  if (!rows.some((row) => row[1] > 0)) return nothing(card.plot);
  const most = Math.max(...rows.map((row) => row[1]));
  const f = frame(card.plot, [-0.6, rows.length - 0.4], [0, most * 1.12], rows.map((row, i) => [i, row[0]]), percent);
  const wide = Math.min(70, ((f.right - f.left) / rows.length) * 0.7);
  rows.forEach(([, value, words], i) => {
    const late = last !== undefined && i > last;
    f.svg.append(draw("rect", { class: `fill ${late ? "red" : colour}`, x: f.x(i) - wide / 2, y: f.y(value), width: wide, height: Math.max(0, f.y(0) - f.y(value)), rx: 3 }));
    f.svg.append(draw("text", { x: f.x(i), y: f.y(value) - 5, "text-anchor": "middle" }, words));
  });
  card.plot.replaceChildren(f.svg);
  card.plot.onpointermove = card.plot.onpointerleave = null;
}

// parts: [{name, colour, y}], one bar for each x
function stacks(card, x, parts) {
  card.legend.replaceChildren(...parts.map((part) => make("span", {}, make("i", { class: "key " + part.colour }), part.name)));
  if (!x.length) return nothing(card.plot);
  const tops = x.map((_, i) => parts.reduce((sum, part) => sum + part.y[i], 0));
  const last = x.length - 1, gap = x.length > 1 ? (x[last] - x[0]) / last : 1;
  const f = frame(card.plot, [x[0] - gap / 2, x[last] + gap / 2], [0, Math.max(...tops, 1) * 1.04]);
  const wide = Math.max(1, f.x(gap) - f.x(0) - (x.length > 50 ? 0.5 : 2));
  x.forEach((step, i) => {
    let below = 0;
    for (const part of parts) {
      if (!part.y[i]) continue;
      f.svg.append(draw("rect", { class: `fill ${part.colour}`, x: f.x(step) - wide / 2, width: Math.min(wide, 46), y: f.y(below + part.y[i]), height: f.y(below) - f.y(below + part.y[i]) }));
      below += part.y[i];
    }
  });
  card.plot.replaceChildren(f.svg);
  hover(card.plot, f, [x[0], x[last]], parts.map((part) => ({ ...part, x })));
}
