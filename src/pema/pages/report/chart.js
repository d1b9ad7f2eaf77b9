// Charts as inline SVG: axes, lines, points with error bars, labels. Colours come from the style sheet.

const SERIES = 10;

/** A mark of a series: colour and shape repeat with different periods, so that fifty series have different marks. */
function mark(series, x, y, r = 5.5) {
  const forms = [
    `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
    `M${x - r * 0.9} ${y - r * 0.9}h${1.8 * r}v${1.8 * r}h${-1.8 * r}Z`,
    `M${x} ${y - 1.25 * r}L${x + 1.2 * r} ${y + 0.9 * r}H${x - 1.2 * r}Z`,
    `M${x} ${y - 1.3 * r}L${x + 1.3 * r} ${y}L${x} ${y + 1.3 * r}L${x - 1.3 * r} ${y}Z`,
    `M${x} ${y + 1.25 * r}L${x + 1.2 * r} ${y - 0.9 * r}H${x - 1.2 * r}Z`,
  ];
  return shape("path", {
    class: `mark series-${series % SERIES}`,
    d: forms[(series + Math.floor(series / SERIES)) % forms.length],
  });
}

/**
 * Draw a chart into a box, as wide as the box.
 *
 * `x` and `y` are {name, scale, write}. `points` are {x, y, xSpread, ySpread, series, label, tooltip, open}, `lines`
 * {points: [{x, y, spread}], series, label, tooltip, faint, marks}; a spread is [low, high], `tooltip` is a text.
 */
function drawChart(box, { title, x, y, points = [], lines = [] }) {
  const width = Math.max(box.clientWidth, 240);
  const height = Math.min(Math.max(width * 0.66, 260), 380);
  const ends = lines.filter((line) => line.label);
  const beside = width >= 480 && ends.length > 0;
  const area = { left: 54, right: width - (beside ? Math.min(170, width * 0.32) : 14), top: 14, bottom: height - 48 };
  const at = {
    x: (value) => area.left + x.scale.at(value) * (area.right - area.left),
    y: (value) => area.bottom - y.scale.at(value) * (area.bottom - area.top),
  };
  const svg = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": title });
  box.replaceChildren(svg);
  drawAxes(svg, area, at, x, y);
  const tip = element("div", { class: "tip", "aria-hidden": "true", hidden: true });
  box.append(tip);

  for (const line of [...lines].sort((a, b) => Boolean(b.faint) - Boolean(a.faint))) {
    const kind = `series-${line.series % SERIES}`;
    const placed = line.points.map((point) => ({ ...point, left: at.x(point.x), top: at.y(point.y) }));
    for (const { left, spread } of placed) if (spread) drawBar(svg, kind, left, at.y(spread[0]), left, at.y(spread[1]));
    const d = placed.map(({ left, top }, n) => `${n ? "L" : "M"}${left.toFixed(1)} ${top.toFixed(1)}`).join("");
    svg.append(shape("path", { class: `line ${kind}${line.faint ? " faint" : ""}${line.level ? " level" : ""}`, d }));
    if (line.faint) continue;
    const marked = line.marks ? placed : placed.slice(-1);
    for (const { left, top, tooltip } of marked) {
      const node = mark(line.series, left, top, 4.5);
      svg.append(node);
      addTooltip(node, tooltip ?? line.tooltip, left, top, box, tip);
    }
    Object.assign(line, { endX: placed.at(-1).left, y: placed.at(-1).top });
  }
  if (beside) labelEnds(svg, ends, area);
  drawPoints(svg, points, at, area, box, tip);
}

function drawAxes(svg, area, at, x, y) {
  const axes = shape("g", { class: "axes", "aria-hidden": "true" });
  for (const value of y.scale.ticks) {
    const top = at.y(value);
    axes.append(shape("path", { class: "grid", d: `M${area.left} ${top}H${area.right}` }));
    axes.append(shape("text", { x: area.left - 8, y: top + 4, "text-anchor": "end" }, y.write(value)));
  }
  let free = -Infinity;
  for (const value of x.scale.ticks) {
    const left = at.x(value);
    axes.append(shape("path", { class: "tick", d: `M${left} ${area.bottom}v5` }));
    const tick = value === 0 && x.scale.nearly ? "≈ 0" : x.write(value);
    const text = shape("text", { x: left, y: area.bottom + 19, "text-anchor": "middle" }, tick);
    const half = tick.length * 3.6;
    if (left - half > free) {
      axes.append(text);
      free = left + half + 4;
    }
  }
  axes.append(shape("path", { class: "axis", d: `M${area.left} ${area.bottom}H${area.right}` }));
  if (x.scale.zero != null) {
    const left = area.left + x.scale.zero * (area.right - area.left);
    axes.append(shape("path", { class: "gap", d: `M${left - 3} ${area.bottom}h6` }));
    axes.append(
      shape("path", { class: "axis", d: `M${left - 6} ${area.bottom + 5}l6 -10M${left} ${area.bottom + 5}l6 -10` }),
    );
  }
  const middle = (area.left + area.right) / 2;
  const xName = x.scale.log ? `${x.name}, logarithmic` : x.name;
  axes.append(shape("text", { class: "name", x: middle, y: area.bottom + 40, "text-anchor": "middle" }, xName));
  const centre = (area.top + area.bottom) / 2;
  const turned = { class: "name", transform: `translate(13 ${centre}) rotate(-90)`, "text-anchor": "middle" };
  axes.append(shape("text", turned, y.scale.log ? `${y.name}, logarithmic` : y.name));
  svg.append(axes);
}

function drawBar(svg, kind, x1, y1, x2, y2) {
  const caps = x1 === x2 ? `M${x1 - 3} ${y1}h6M${x2 - 3} ${y2}h6` : `M${x1} ${y1 - 3}v6M${x2} ${y2 - 3}v6`;
  svg.append(shape("path", { class: `bar ${kind}`, d: `M${x1} ${y1}L${x2} ${y2}${caps}` }));
}

function drawPoints(svg, points, at, area, box, tip) {
  const placed = points.map((point) => ({ ...point, left: at.x(point.x), top: at.y(point.y) }));
  const bars = [];
  for (const point of placed) {
    const kind = `series-${point.series % SERIES}`;
    if (point.ySpread) {
      const [low, high] = point.ySpread.map(at.y);
      drawBar(svg, kind, point.left, low, point.left, high);
      bars.push({ left: point.left - 3, right: point.left + 3, top: high, bottom: low });
    }
    if (point.xSpread) {
      const [low, high] = point.xSpread.map((end) => Math.max(at.x(end), area.left));
      drawBar(svg, kind, low, point.top, high, point.top);
      bars.push({ left: low, right: high, top: point.top - 3, bottom: point.top + 3 });
    }
  }
  const texts = placed.map((point) => shape("text", { class: "label" }, point.label));
  svg.append(...texts);
  const items = placed.map((point, n) => ({
    x: point.left,
    y: point.top,
    width: texts[n].getComputedTextLength() + 4,
    height: 16,
  }));
  placeLabels(items, bars, { ...area, right: svg.width.baseVal.value - 2, top: 0 }).forEach((label, n) => {
    if (!label) return texts[n].remove();
    texts[n].setAttribute("x", label.left + 2);
    texts[n].setAttribute("y", label.bottom - 4);
    if (!label.far) return undefined;
    const near = Math.min(Math.max(placed[n].left, label.left), label.right);
    const side = placed[n].top < label.top ? label.top : Math.min(placed[n].top, label.bottom);
    svg.append(shape("path", { class: "leader", d: `M${placed[n].left} ${placed[n].top}L${near} ${side}` }));
    return undefined;
  });
  for (const point of placed) {
    const node = shape("g", {
      class: "point",
      tabindex: "0",
      role: "button",
      "aria-label": `${point.tooltip}. Show its runs`,
    });
    node.append(
      shape("circle", { class: "reach", cx: point.left, cy: point.top, r: 12 }),
      mark(point.series, point.left, point.top),
    );
    node.addEventListener("click", point.open);
    node.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      point.open();
    });
    svg.append(node);
    addTooltip(node, point.tooltip, point.left, point.top, box, tip);
  }
}

function labelEnds(svg, lines, area) {
  spreadEnds(lines, 15, area.top + 4, area.bottom);
  const start = area.right + 28;
  const space = svg.width.baseVal.value - start;
  for (const line of lines) {
    const text = shape("text", { class: "label", x: start, y: line.place + 4 }, line.label);
    const leader = `M${line.endX + 6} ${line.y}L${area.right + 10} ${line.place}`;
    svg.append(
      shape("path", { class: "leader long", d: leader }),
      mark(line.series, area.right + 18, line.place, 4),
      text,
    );
    if (text.getComputedTextLength() > space) {
      const kept = Math.floor((line.label.length * space) / text.getComputedTextLength()) - 1;
      text.textContent = `${line.label.slice(0, kept)}…`;
      text.append(shape("title", {}, line.label));
    }
  }
}

/** Show a tooltip while the pointer or the focus is on a mark; Escape hides it. */
function addTooltip(node, tooltip, left, top, box, tip) {
  const show = () => {
    tip.textContent = tooltip;
    tip.hidden = false;
    const space = box.clientWidth - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(left - tip.offsetWidth / 2, space))}px`;
    tip.style.top = `${top - tip.offsetHeight - 12 < 0 ? top + 14 : top - tip.offsetHeight - 12}px`;
  };
  const hide = () => {
    tip.hidden = true;
  };
  for (const event of ["pointerenter", "focus"]) node.addEventListener(event, show);
  for (const event of ["pointerleave", "blur"]) node.addEventListener(event, hide);
  node.addEventListener("keydown", (event) => event.key === "Escape" && hide());
}
