// The schedule as a curve over the steps, and the adapter's share of every chosen token.

const CHART = { height: 210, left: 34, right: 14, top: 22, bottom: 30 };

/**
 * Draw the curve of lambda_t, `width` pixels wide.
 *
 * `states` are those of `replay`, `weight(t)` is lambda_t, `before(t)` is lambda_t as generated (null if it is the
 * same). SL is marked if it is within reach of the steps, else an arrow points to it.
 */
function chart({ width, states, sourceLength, selected, weight, before, choose }) {
  const near = sourceLength <= 3 * states.length + 8;
  const last = near ? Math.max(states.length - 1, sourceLength) : states.length - 1;
  const column = (width - CHART.left - CHART.right) / (last + 1);
  const floor = CHART.height - CHART.bottom;
  const x = (t) => CHART.left + (t + 0.5) * column;
  const y = (value) => floor - value * (floor - CHART.top);
  const drawing = shape("svg", {
    width,
    height: CHART.height,
    viewBox: `0 0 ${width} ${CHART.height}`,
    role: "img",
    "aria-label": `The weight of the adapter over the steps: from ${weightText(weight(0))} at step 0 to ${weightText(
      weight(states.length - 1),
    )} at step ${states.length - 1}. The input has SL = ${sourceLength} tokens.`,
  });
  drawing.append(
    shape("rect", { class: "here", x: x(selected) - column / 2, y: CHART.top, width: column, height: floor - CHART.top }),
  );
  for (const value of [0, 0.5, 1]) {
    drawing.append(shape("line", { class: "grid", x1: CHART.left, x2: width - CHART.right, y1: y(value), y2: y(value) }));
    drawing.append(shape("text", { class: "tick", x: CHART.left - 8, y: y(value) + 4, "text-anchor": "end" }, value));
  }
  const every = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((n) => n * column >= 26) ?? 2000;
  for (let t = 0; t <= last; t += every)
    drawing.append(shape("text", { class: "tick", x: x(t), y: floor + 18, "text-anchor": "middle" }, t));
  for (const [t, state] of states.entries()) {
    if (!state.reached) continue;
    const share = state.mixed[state.best] ? state.fromPema / state.mixed[state.best] : 0;
    const breadth = Math.max(1, Math.min(26, column * 0.62));
    const rect = { class: "share", x: x(t) - breadth / 2, y: y(share), width: breadth, height: floor - y(share) };
    drawing.append(shape("rect", rect));
  }
  if (near) {
    drawing.append(shape("line", { class: "length", x1: x(sourceLength), x2: x(sourceLength), y1: CHART.top, y2: floor }));
  }
  const right = near && x(sourceLength) < width - 60;
  drawing.append(
    shape(
      "text",
      { class: "tick", x: near ? x(sourceLength) : width - 8, y: CHART.top - 8, "text-anchor": right ? "middle" : "end" },
      `SL = ${sourceLength}${near ? "" : " →"}`,
    ),
  );
  const line = (values) => [...Array(last + 1).keys()].map((t) => `${x(t)},${y(values(t))}`).join(" ");
  if (before) drawing.append(shape("polyline", { class: "before", points: line(before) }));
  drawing.append(shape("polyline", { class: "weight", points: line(weight) }));
  const size = Math.max(1.5, Math.min(4.5, column / 3));
  for (const [t, state] of states.entries()) {
    const at = { cx: x(t), cy: y(state.weight) };
    drawing.append(
      !state.reached
        ? shape("circle", { class: "point", ...at, r: size / 2 })
        : state.decidedBy === "pema"
          ? shape("rect", { class: "point pema", x: at.cx - size, y: at.cy - size, width: 2 * size, height: 2 * size })
          : shape("circle", { class: "point plm", ...at, r: size }),
    );
  }
  drawing.addEventListener("click", (event) => {
    const t = Math.floor((event.clientX - drawing.getBoundingClientRect().left - CHART.left) / column);
    if (t >= 0 && t < states.length) choose(t);
  });
  return drawing;
}
