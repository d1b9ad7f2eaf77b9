// What an experiment's plots show: quality against cost, learning curves, sweeps.

const COSTS = [
  { key: "train_peak_bytes", name: "Peak training memory", write: write.bytes },
  { key: "train_seconds", name: "Training time", write: write.seconds },
];
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

function spaced(name) {
  return name.replaceAll("_", " ");
}
