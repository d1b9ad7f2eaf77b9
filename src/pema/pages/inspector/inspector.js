// The page: its controls, and everything that depends on them.

const NAMES = {
  unrolling: "Gradual Unrolling",
  linear: "Linear",
  constant: "Constant",
  fitted: "Fitted",
  none: "PLM alone",
};
const DECIDERS = { pema: "the adapter", plm: "the PLM" };
const LETTERS = { pema: "A", plm: "P" };

const at = (id) => document.getElementById(id);
const steps = DATA.steps;
const generated = { kind: DATA.schedule.schedule, lambdaMax: DATA.schedule.lambda_max ?? DATA.schedule.value ?? 0.9 };
const setting = { ...generated };
let states;
let selected = 0;

/** The schedule chosen in the controls, in the form of its `to_dict`. */
function chosenSchedule() {
  const { kind, lambdaMax } = setting;
  if (kind === "fitted") return DATA.fitted;
  if (kind === "none") return { schedule: "none" };
  return kind === "constant" ? { schedule: kind, value: lambdaMax } : { schedule: kind, lambda_max: lambdaMax };
}

const hasLambdaMax = () => !["fitted", "none"].includes(setting.kind);
const isAsGenerated = () =>
  setting.kind === generated.kind && (!hasLambdaMax() || setting.lambdaMax === generated.lambdaMax);

function update() {
  states = replay(steps, chosenSchedule(), DATA.source_length);
  showControls();
  showSummary();
  showTokens();
  showTable();
  showSelected();
}

function showControls() {
  at("schedule").value = setting.kind;
  at("lambda-max").value = setting.lambdaMax;
  at("lambda-max").disabled = !hasLambdaMax();
  at("lambda-max-value").textContent = hasLambdaMax() ? String(Number(setting.lambdaMax.toFixed(4))) : "not used";
  at("reset").disabled = isAsGenerated();
}

/** "1 token", "3 tokens". */
const count = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

function showSummary() {
  const reached = states.filter((state) => state.reached);
  const adapter = reached.filter((state) => state.decidedBy === "pema").length;
  const others = reached.filter((state) => state.alone !== state.best).length;
  const tally =
    `Of ${count(reached.length, "token")} the adapter decided ${adapter} and the PLM ${reached.length - adapter}; ` +
    `at ${others} the PLM alone would have chosen another token.`;
  const t = reached.length - 1;
  const end = states[t];
  const parts = [tally];
  if (end.changed) {
    const was = steps[t].surfaces[steps[t].candidates.indexOf(steps[t].token)];
    parts.push(" At step ", element("strong", {}, t), ", ", tokenElement(was), " becomes ");
    parts.push(tokenElement(steps[t].surfaces[end.best]), end.certain ? "." : " or a token that is not stored.");
  } else if (!end.certain) {
    parts.push(` At step ${t} a token that is not stored may be the likeliest.`);
  } else if (!isAsGenerated()) {
    parts.push(" The text does not change.");
  }
  if (reached.length < states.length) {
    parts.push(" The text after it is unknown without new requests to the PLM; the grey tokens are those of the old text.");
  } else if ((end.changed || !end.certain) && steps.length > 1) {
    parts.push(" The text after it is unknown.");
  }
  at("summary").replaceChildren(...parts);
}

function showTokens() {
  const group = at("tokens");
  const focused = group.contains(document.activeElement);
  group.replaceChildren(...steps.map((step, t) => token(step, states[t], t)));
  if (focused) group.children[selected].focus({ preventScroll: true });
}

function token(step, state, t) {
  const old = step.candidates.indexOf(step.token);
  const other = state.reached && state.alone !== state.best;
  const marks = state.reached ? LETTERS[state.decidedBy] + (other ? " ≠" : "") + (state.certain ? "" : " ?") : "–";
  const spokenParts = [`step ${t}`, spoken(step.surfaces[state.subject])];
  if (!state.reached) spokenParts.push("from the old text, not reached with these settings");
  else {
    spokenParts.push(`decided by ${DECIDERS[state.decidedBy]}`);
    if (other) spokenParts.push(`the PLM alone: ${spoken(step.surfaces[state.alone])}`);
    if (state.changed) spokenParts.push(`was ${spoken(step.surfaces[old])}`);
    if (!state.certain) spokenParts.push("not certain");
  }
  const classes = ["token", state.reached ? state.decidedBy : "unreached", other && "other", state.changed && "changed"];
  return element(
    "button",
    {
      type: "button",
      class: classes.filter(Boolean).join(" "),
      tabindex: t === selected ? 0 : -1,
      "aria-pressed": String(t === selected),
      "aria-label": spokenParts.join(", "),
      onclick: () => choose(t),
      onfocus: () => choose(t),
    },
    element(
      "span",
      { class: "word" },
      state.reached && state.changed ? element("s", {}, tokenElement(step.surfaces[old])) : null,
      tokenElement(step.surfaces[state.subject]),
    ),
    element("span", { class: "tag" }, marks),
  );
}

function choose(t) {
  if (t === selected) return;
  selected = t;
  showSelected();
}

function showSelected() {
  for (const [t, button] of [...at("tokens").children].entries()) {
    button.tabIndex = t === selected ? 0 : -1;
    button.setAttribute("aria-pressed", t === selected);
  }
  showCurve();
  showDetail();
}

function showCurve() {
  const schedule = chosenSchedule();
  const width = Math.floor(at("curve").clientWidth);
  if (!width) return;
  at("curve").replaceChildren(
    chart({
      width,
      states,
      sourceLength: DATA.source_length,
      selected,
      weight: (t) => weightAt(schedule, t, DATA.source_length),
      before: isAsGenerated() ? null : (t) => weightAt(DATA.schedule, t, DATA.source_length),
      choose,
    }),
  );
}

function showDetail() {
  at("detail").replaceChildren(...detail(steps[selected], states[selected], selected));
}

function showTable() {
  at("all").tBodies[0].replaceChildren(
    ...states.map((state, t) =>
      element(
        "tr",
        { class: state.reached ? false : "unreached" },
        element("th", { scope: "row" }, t),
        element("td", {}, tokenElement(steps[t].surfaces[state.subject])),
        element("td", {}, element("data", { value: state.weight, class: "number" }, weightText(state.weight))),
        ...["pema", "plm", "mixed"].map((which) => element("td", {}, percent(state[which][state.subject]))),
        element("td", {}, state.reached ? DECIDERS[state.decidedBy] : "not reached"),
        element("td", {}, state.alone === state.subject ? "the same" : tokenElement(steps[t].surfaces[state.alone])),
      ),
    ),
  );
}

for (const kind of Object.keys(NAMES)) {
  if (kind === "fitted" && !DATA.fitted) continue;
  at("schedule").append(element("option", { value: kind }, NAMES[kind]));
}
at("schedule").addEventListener("change", (event) => {
  setting.kind = event.target.value;
  update();
});
at("lambda-max").addEventListener("input", (event) => {
  setting.lambdaMax = Number(event.target.value);
  update();
});
at("reset").addEventListener("click", () => {
  Object.assign(setting, generated);
  update();
});
at("tokens").addEventListener("keydown", (event) => {
  const to = { ArrowRight: selected + 1, ArrowLeft: selected - 1, Home: 0, End: steps.length - 1 }[event.key];
  if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  at("tokens").children[Math.min(Math.max(to, 0), steps.length - 1)].focus();
});
states = replay(steps, chosenSchedule(), DATA.source_length);
selected = Math.max(0, states.findIndex((state) => state.alone !== state.best));
update();
new ResizeObserver(showCurve).observe(at("curve"));
at("inspector").hidden = false;
