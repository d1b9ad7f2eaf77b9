// Every experiment's plots: quality against cost, learning curves, sweeps. One choice of metric and methods rules them.

const COSTS = [
  { key: "train_peak_bytes", name: "Peak training memory", write: write.bytes },
  { key: "train_seconds", name: "Training time", write: write.seconds },
];
const states = {};

for (const [key, experiment] of Object.entries(DATA)) {
  const state = { metric: 0, hidden: new Set(), curves: 1, axis: 0, listeners: [] };
  states[key] = state;
  const changed = () => state.listeners.forEach((listener) => listener());
  const part = (name) => document.getElementById(`${key}-${name}`);

  part("chooser").append(
    choice(
      "Metric in the plots",
      experiment.metrics.map(({ name }) => name),
      state,
      "metric",
      changed,
    ),
    methodChips(experiment, state, changed),
  );

  const named =
    experiment.axes.length && oneMethod(experiment.runs, experiment.axes)
      ? ` Points are named by ${experiment.axes.map(spaced).join(" / ")}.`
      : "";
  const costs = element("div", { class: "pair" });
  part("cost").append(costs);
  for (const cost of COSTS) {
    const chart = figure(
      costs,
      `Bars: 95 % interval of the mean; ± one standard deviation of the cost over seeds.${named}`,
    );
    state.listeners.push(() => drawCost(chart, key, experiment, state, cost));
  }

  if (part("curves")) {
    part("curves").append(choice("Over", ["epochs", "seconds"], state, "curves", changed));
    const chart = figure(
      part("curves"),
      "Strong lines: mean over seeds, as far as every seed went. Faint lines: one seed each.",
    );
    state.listeners.push(() => drawCurves(chart, experiment, state));
  }

  if (part("sweep")) {
    if (experiment.axes.length > 1)
      part("sweep").append(choice("Swept setting", experiment.axes.map(spaced), state, "axis", changed));
    const chart = figure(
      part("sweep"),
      "Mean over seeds; bars: ± one standard deviation. Level lines: methods without this setting.",
    );
    state.listeners.push(() => drawSweep(chart, experiment, state));
  }

  // Charts are drawn for the width that they have, so that their text stays legible on a telephone.
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (entry.contentRect.width === width) return;
    width = entry.contentRect.width;
    changed();
  }).observe(part("cost"));
}

function spaced(name) {
  return name.replaceAll("_", " ");
}

function figure(parent, caption) {
  const chart = element("div", { class: "chart" });
  parent.append(element("figure", {}, chart, element("figcaption", {}, caption)));
  return chart;
}

function choice(title, names, state, field, changed) {
  const select = element("select", {}, ...names.map((name, value) => element("option", { value }, name)));
  select.value = state[field];
  select.addEventListener("change", () => {
    state[field] = Number(select.value);
    changed();
  });
  return element("label", { class: "choice" }, `${title} `, select);
}

function methodChips(experiment, state, changed) {
  const chips = experiment.methods.map(({ label }, method) => {
    const icon = shape("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, mark(method, 8, 8, 5));
    const chip = element("button", { class: "chip", type: "button", "aria-pressed": "true" }, icon, label);
    chip.addEventListener("click", () => {
      const shown = chip.getAttribute("aria-pressed") !== "true";
      chip.setAttribute("aria-pressed", shown);
      if (shown) state.hidden.delete(method);
      else state.hidden.add(method);
      changed();
    });
    return chip;
  });
  return element("div", { class: "chips", role: "group", "aria-label": "Methods in plots and samples" }, ...chips);
}

/** Draw, or say why there is nothing to draw. */
function drawOrSay(chart, spec) {
  if (spec.points?.length || spec.lines?.length) drawChart(chart, spec);
  else chart.replaceChildren(element("p", { class: "muted" }, "No method that is shown has these values."));
}

function drawCost(chart, key, experiment, state, { key: cost, name, write: writeCost }) {
  const metric = experiment.metrics[state.metric];
  const points = experiment.methods
    .map(({ label, metrics, costs }, method) => ({ label, quality: metrics[metric.key], spent: costs[cost], method }))
    .filter(({ quality, spent, method }) => quality.mean != null && spent && !state.hidden.has(method))
    .map(({ label, quality, spent, method }) => ({
      x: spent.mean,
      y: quality.mean,
      xSpread: spent.std ? [Math.max(spent.mean - spent.std, 0), spent.mean + spent.std] : null,
      ySpread: [quality.low, quality.high],
      series: method,
      label: shortLabel(experiment, method),
      said: `${label}: ${metric.name} ${digits(quality.mean)}, ${name.toLowerCase()} ${writeCost(spent.mean)}`,
      open: () => showRuns(key, method),
    }));
  drawOrSay(chart, {
    title: `${metric.name} against ${name.toLowerCase()}`,
    x: { name, scale: makeScale(points.map(({ x }) => x)), write: writeCost },
    y: { name: metric.name, scale: linearScale(points.flatMap(({ ySpread }) => ySpread)), write: digits },
    points,
  });
}

function drawCurves(chart, experiment, state) {
  const over = state.curves === 0 ? { column: 0, name: "Epoch" } : { column: 1, name: "Seconds of training" };
  const point = (row) => ({ x: row[over.column], y: row[2] });
  const lines = experiment.methods.flatMap(({ label }, series) => {
    const curves = experiment.runs
      .filter(({ method, curve }) => method === series && curve.length && !state.hidden.has(series))
      .map(({ curve }) => curve.filter((row) => row[2] != null));
    if (!curves.some((curve) => curve.length)) return [];
    const shared = Math.min(...curves.map((curve) => curve.length));
    const means = Array.from({ length: shared }, (_, n) =>
      [0, 1, 2].map((column) => mean(curves.map((curve) => curve[n][column]))),
    );
    const lowest = Math.min(...means.map((row) => row[2]));
    const strong = {
      points: means.map(point),
      series,
      label: shortLabel(experiment, series),
      said: `${label}: lowest mean held-out loss ${digits(lowest)}`,
    };
    if (!means.length) return [];
    if (curves.length === 1) return [strong];
    return [...curves.map((curve) => ({ points: curve.map(point), series, faint: true })), strong];
  });
  const all = lines.flatMap((line) => line.points);
  drawOrSay(chart, {
    title: `Held-out loss over ${over.name.toLowerCase()}`,
    x: { name: over.name, scale: linearScale(all.map(({ x }) => x)), write: digits },
    y: { name: "Held-out loss", scale: makeScale(all.map(({ y }) => y)), write: digits },
    lines,
  });
}

function drawSweep(chart, experiment, state) {
  const metric = experiment.metrics[state.metric];
  const axis = experiment.axes[state.axis];
  const swept = experiment.runs.filter(({ settings, method }) => axis in settings && !state.hidden.has(method));
  const values = [...new Set(swept.map(({ settings }) => settings[axis]))];
  const numbers = values.every((value) => typeof value === "number");
  const scale = numbers ? makeScale(values, 4) : placesScale(values.map(String));
  if (numbers) scale.ticks = values.sort((a, b) => a - b);
  const place = (value) => (numbers ? value : String(value));

  const lines = [...grouped(swept, (run) => lineName(run, axis, experiment))].map(([label, runs], line) => ({
    series: line + 1,
    label,
    marks: true,
    points: [...grouped(runs, ({ settings }) => settings[axis])]
      .map(([value, same]) => {
        const scores = same.map((run) => run.scores[metric.key]);
        const middle = mean(scores);
        const off = deviation(scores);
        const said = `${label}, ${spaced(axis)} ${value}: ${metric.name} ${digits(middle)}${off ? ` ± ${digits(off)}` : ""}`;
        return { x: place(value), y: middle, spread: off ? [middle - off, middle + off] : null, said };
      })
      .sort((a, b) => scale.at(a.x) - scale.at(b.x)),
  }));
  const ends = lines.flatMap((line) => line.points.map(({ x }) => x)).sort((a, b) => scale.at(a) - scale.at(b));
  const others = experiment.runs.filter(({ settings, method }) => !(axis in settings) && !state.hidden.has(method));
  for (const [label, runs] of grouped(others, ({ method }) => experiment.methods[method].label)) {
    if (!ends.length) break;
    const y = mean(runs.map((run) => run.scores[metric.key]));
    const said = `${label}: ${metric.name} ${digits(y)}`;
    lines.push({
      series: 0,
      label,
      said,
      level: true,
      points: [
        { x: ends[0], y },
        { x: ends.at(-1), y },
      ],
    });
  }
  const heights = lines.flatMap((line) => line.points.flatMap(({ y, spread }) => [y, ...(spread ?? [])]));
  drawOrSay(chart, {
    title: `${metric.name} over ${spaced(axis)}`,
    x: { name: spaced(axis), scale, write: numbers ? digits : (name) => name },
    y: { name: metric.name, scale: linearScale(heights), write: digits },
    lines,
  });
}

/** What stays the same along a line: the method, where there are several, and the values of the other axes. */
function lineName({ name, settings }, axis, experiment) {
  const others = experiment.axes.filter((other) => other !== axis && other in settings);
  const parts = others.map((other) => `${spaced(other)} ${settings[other]}`);
  return (oneMethod(experiment.runs, experiment.axes) && parts.length ? parts : [name, ...parts]).join(", ");
}

/** A method's name in a plot; in a sweep the values of its axes, where it has them: they are all that differs. */
function shortLabel({ axes, methods, runs }, method) {
  const { settings } = runs.find((run) => run.method === method);
  const swept = axes.length && axes.every((axis) => axis in settings);
  return swept && oneMethod(runs, axes) ? axes.map((axis) => settings[axis]).join(" / ") : methods[method].label;
}

function oneMethod(runs, axes) {
  return (
    new Set(runs.filter(({ settings }) => axes.some((axis) => axis in settings)).map(({ name }) => name)).size === 1
  );
}

function grouped(items, key) {
  const groups = new Map();
  for (const item of items) groups.set(key(item), [...(groups.get(key(item)) ?? []), item]);
  return groups;
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

function deviation(values) {
  if (values.length < 2) return 0;
  const middle = mean(values);
  return Math.sqrt(values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / (values.length - 1));
}
