// One step in detail.

const SHOWN = 5;

/** Details of step t: who decided, the figures, and the likeliest tokens of all three distributions. */
function detail(step, state, t) {
  const word = (i) => tokenElement(step.surfaces[i]);
  const parts = [element("h3", {}, `Step ${t}: `, word(state.subject))];
  if (state.reached) {
    const alone = state.alone === state.best ? ["the same."] : [word(state.alone), "."];
    const fromPema = [symbol("λ", "t"), " ", symbol("P", "PEMA"), " = ", percent(state.fromPema)];
    const fromPLM = ["(1 − ", symbol("λ", "t"), ") ", symbol("P", "LM"), " = ", percent(state.fromPLM)];
    const verdict =
      state.decidedBy === "pema"
        ? ["The adapter decided: ", ...fromPema, " against ", ...fromPLM]
        : ["The PLM decided: ", ...fromPLM, " against ", ...fromPema];
    parts.push(element("p", {}, ...verdict, ". The PLM alone would have chosen ", ...alone));
  } else {
    const text =
      "With these settings the text before this step is or may be different. The figures are those of the old text’s " +
      "context, with the new weight.";
    parts.push(element("p", { class: "note" }, text));
  }
  if (!state.certain) {
    const text = "Not certain: a token that is not stored may have a probability of up to ";
    parts.push(element("p", { class: "note" }, text, percent(state.bound), "."));
  }
  const figures = element("dl", { class: "figures" });
  for (const [name, value] of [
    [symbol("λ", "t"), element("data", { value: state.weight, class: "number" }, weightText(state.weight))],
    [symbol("P", "PEMA"), percent(state.pema[state.subject])],
    [symbol("P", "LM"), percent(state.plm[state.subject])],
    [symbol("P", ""), percent(state.mixed[state.subject])],
  ])
    figures.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  return [
    ...parts,
    figures,
    element(
      "div",
      { class: "tops" },
      top(step, state, "pema", ["Adapter, ", symbol("P", "PEMA")]),
      top(step, state, "plm", ["PLM, ", symbol("P", "LM")]),
      top(step, state, "mixed", ["Mixture, ", symbol("P", "")]),
    ),
  ];
}

/** The five likeliest tokens of a distribution, the chosen one if it is not among them, and the mass of the rest. */
function top(step, state, which, caption) {
  const values = state[which];
  const order = ranked(values);
  const first = order.slice(0, SHOWN);
  const rows = first.map((i) => topRow(step, state, which, i, null));
  const rest = 1 - first.reduce((sum, i) => sum + values[i], 0);
  const { subject } = state;
  if (!first.includes(subject)) {
    const outside = which === "mixed" ? state.bound : probability(step[which].rest_log_p);
    const rank = order.indexOf(subject) + 1;
    const exact = values[subject] > outside;
    rows.push(topRow(step, state, which, subject, exact ? `rank ${rank}` : `rank ${rank} or below`));
  }
  const unsure = which === "mixed" && values[first.at(-1)] <= state.bound && state.weight !== step.weight;
  return element(
    "table",
    { class: `top ${which}` },
    element("caption", {}, ...caption),
    element("thead", { class: "unseen" }, element("tr", {}, element("th", {}, "Token"), element("th", {}, "Probability"))),
    element("tbody", {}, ...rows),
    element(
      "tfoot",
      {},
      element(
        "tr",
        {},
        element("td", {}, unsure ? "all others (one may rank higher)" : "all others"),
        element("td", {}, percent(Math.max(0, rest))),
      ),
    ),
  );
}

function topRow(step, state, which, i, rank) {
  const bar = element("span", { class: "bar-line", "aria-hidden": "true" });
  const parts =
    which === "mixed"
      ? { pema: state.weight * state.pema[i], plm: (1 - state.weight) * state.plm[i] }
      : { [which]: state[which][i] };
  for (const [part, share] of Object.entries(parts)) {
    const piece = element("span", { class: part });
    piece.style.width = `${100 * share}%`;
    bar.append(piece);
  }
  const chosen = i === state.subject;
  return element(
    "tr",
    { class: chosen ? "chosen" : false },
    element(
      "th",
      { scope: "row" },
      tokenElement(step.surfaces[i]),
      chosen ? element("span", { class: "unseen" }, " (this token)") : null,
      rank ? element("small", {}, ` ${rank}`) : null,
    ),
    element("td", {}, percent(state[which][i]), bar),
  );
}
