// Plots of every experiment and their controls: one choice of metric and methods, also for the samples.

const states = {};
let choices = 0;

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
    experiment.axes.length && oneEntry(experiment)
      ? ` Points are labelled by ${experiment.axes.map(spaced).join(" / ")}.`
      : "";
  const costs = element("div", { class: "pair" });
  part("cost").append(costs);
  for (const cost of COSTS.filter(({ key: name }) => experiment.methods.some(({ costs: spent }) => spent[name]))) {
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
      "Strong lines: mean over seeds, as far as every seed was trained. Faint lines: single seeds.",
    );
    state.listeners.push(() => drawCurves(chart, experiment, state));
  }

  if (part("sweep")) {
    if (experiment.axes.length > 1)
      part("sweep").append(choice("Swept setting", experiment.axes.map(spaced), state, "axis", changed));
    const chart = figure(
      part("sweep"),
      "Mean over seeds; bars: ± one standard deviation. Horizontal lines: methods without this setting.",
    );
    state.listeners.push(() => drawSweep(chart, experiment, state));
  }

  // Charts are drawn for the available width, so that their text stays legible on a phone.
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (entry.contentRect.width === width) return;
    width = entry.contentRect.width;
    changed();
  }).observe(part("cost"));
}

function figure(parent, caption) {
  const chart = element("div", { class: "chart" });
  parent.append(element("figure", {}, chart, element("figcaption", {}, caption)));
  return chart;
}

function choice(title, names, state, field, changed) {
  choices += 1;
  const select = element(
    "select",
    { id: `choice-${choices}` },
    ...names.map((name, value) => element("option", { value }, name)),
  );
  select.value = state[field];
  select.addEventListener("change", () => {
    state[field] = Number(select.value);
    changed();
  });
  return element("span", { class: "choice" }, element("label", { for: select.id }, title), select);
}

function methodChips(experiment, state, changed) {
  const chips = experiment.methods.map(({ label }, method) => {
    const icon = shape("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, mark(method, 8, 8, 5));
    const chip = element("button", { class: "chip", type: "button", "aria-pressed": "true" }, icon, label);
    chip.addEventListener("click", () => {
      const pressed = chip.getAttribute("aria-pressed") !== "true";
      chip.setAttribute("aria-pressed", pressed);
      if (pressed) state.hidden.delete(method);
      else state.hidden.add(method);
      changed();
    });
    return chip;
  });
  return element("div", { class: "chips", role: "group", "aria-label": "Methods in plots and samples" }, ...chips);
}
