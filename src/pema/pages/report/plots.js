// Plots of an experiment: quality against cost, learning curves, sweeps.

const COSTS = [
  { key: "train_peak_bytes", name: "Peak training memory", write: write.bytes },
  { key: "train_peak_accelerator_bytes", name: "Peak accelerator memory", write: write.bytes },
  { key: "train_seconds", name: "Training time", write: write.seconds },
];
/** Draw a chart, or explain why there is nothing to draw. */
function drawOrExplain(chart, spec) {
  if (spec.points?.length || spec.lines?.length) drawChart(chart, spec);
  else chart.replaceChildren(element("p", { class: "muted" }, "No visible method has these values."));
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
      tooltip: `${label}: ${metric.name} ${quality.text}, ${name.toLowerCase()} ${writeCost(spent.mean)}`,
      open: () => showRuns(key, method),
    }));
  // Bars may leave the plot on the left; including them would stretch a logarithmic axis.
  const reached = points.flatMap(({ x, xSpread }) => (xSpread ? [Math.max(xSpread[0], x / 4), xSpread[1]] : [x]));
  drawOrExplain(chart, {
    title: `${metric.name} against ${name.toLowerCase()}`,
    x: { name, scale: makeScale(reached), write: writeCost },
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
      tooltip: `${label}: lowest mean held-out loss ${digits(lowest)}`,
    };
    if (!means.length) return [];
    if (curves.length === 1) return [strong];
    return [...curves.map((curve) => ({ points: curve.map(point), series, faint: true })), strong];
  });
  const all = lines.flatMap((line) => line.points);
  drawOrExplain(chart, {
    title: `Held-out loss over ${over.name.toLowerCase()}`,
    x: { name: over.name, scale: linearScale(all.map(({ x }) => x)), write: digits },
    y: {
      name: "Held-out loss",
      scale: makeScale(
        all.map(({ y }) => y),
        4,
      ),
      write: digits,
    },
    lines,
  });
}

function drawSweep(chart, experiment, state) {
  const metric = experiment.metrics[state.metric];
  const axis = experiment.axes[state.axis];
  const visible = experiment.methods.filter(({ metrics }, n) => !state.hidden.has(n) && metrics[metric.key].mean != null);
  const swept = visible.filter(({ settings }) => axis in settings);
  const values = [...new Set(swept.map(({ settings }) => settings[axis]))];
  const numbers = values.every((value) => typeof value === "number");
  const scale = numbers ? makeScale(values, 4) : placesScale(values.map(String));
  if (numbers) scale.ticks = values.sort((a, b) => a - b);

  const lines = [...grouped(swept, (method) => lineName(method, axis, experiment))].map(([label, methods], line) => ({
    series: line + 1,
    label,
    marks: true,
    points: methods
      .map(({ settings, metrics }) => {
        const { mean: middle, std, spread_text: text } = metrics[metric.key];
        const spread = std ? [middle - std, middle + std] : null;
        const tooltip = `${label}, ${spaced(axis)} ${settings[axis]}: ${metric.name} ${text}`;
        const x = numbers ? settings[axis] : String(settings[axis]);
        return { x, y: middle, spread, tooltip };
      })
      .sort((a, b) => scale.at(a.x) - scale.at(b.x)),
  }));
  const ends = lines.flatMap(({ points }) => points.map(({ x }) => x)).sort((a, b) => scale.at(a) - scale.at(b));
  for (const { label, metrics } of visible.filter(({ settings }) => swept.length && !(axis in settings))) {
    const { mean: y, text } = metrics[metric.key];
    const points = [ends[0], ends.at(-1)].map((x) => ({ x, y }));
    lines.push({ series: 0, label, tooltip: `${label}: ${metric.name} ${text}`, level: true, points });
  }
  const heights = lines.flatMap(({ points }) => points.flatMap(({ y, spread }) => [y, ...(spread ?? [])]));
  drawOrExplain(chart, {
    title: `${metric.name} over ${spaced(axis)}`,
    x: { name: spaced(axis), scale, write: numbers ? digits : (name) => name },
    y: { name: metric.name, scale: linearScale(heights), write: digits },
    lines,
  });
}

/** The name of a line: the entry, if there are several, and the values of the other axes. */
function lineName({ entry, settings }, axis, experiment) {
  const parts = experiment.axes.filter((other) => other !== axis && other in settings);
  const values = parts.map((other) => `${spaced(other)} ${settings[other]}`);
  return (oneEntry(experiment) && values.length ? values : [entry, ...values]).join(", ");
}

/** A method's name in a plot; in a sweep of one entry the values of its axes, in which alone its lines differ. */
function shortLabel(experiment, method) {
  const { label, settings } = experiment.methods[method];
  const swept = experiment.axes.length && experiment.axes.every((axis) => axis in settings);
  return swept && oneEntry(experiment) ? experiment.axes.map((axis) => settings[axis]).join(" / ") : label;
}

function oneEntry({ methods }) {
  return new Set(methods.filter(({ settings }) => Object.keys(settings).length).map(({ entry }) => entry)).size === 1;
}

function grouped(items, key) {
  const groups = new Map();
  for (const item of items) groups.set(key(item), [...(groups.get(key(item)) ?? []), item]);
  return groups;
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

function spaced(name) {
  return name.replaceAll("_", " ");
}
