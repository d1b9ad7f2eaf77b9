// How tokens and numbers look.

const MARKS = { " ": "·", "\n": "↵", "\r": "␍", "\t": "⇥" };

/** A token for the eye: spaces and line breaks visible, invisible characters by their code, names in a frame. */
function shown(surface) {
  if (typeof surface === "object") return element("span", { class: "name" }, surface.name);
  const made = element("bdi", { dir: "auto", class: "piece" });
  let plain = "";
  const flush = () => {
    if (plain) made.append(plain);
    plain = "";
  };
  for (const character of surface) {
    if (!/[\p{C}\p{Z}]/u.test(character)) {
      // An accent without its letter gets a circle to stand on.
      plain += !plain && /\p{M}/u.test(character) ? "◌" + character : character;
      continue;
    }
    flush();
    const code = `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
    made.append(element("span", { class: MARKS[character] ? "blank" : "name" }, MARKS[character] ?? code));
  }
  flush();
  return made;
}

/** A token for the ear. */
function spoken(surface) {
  if (typeof surface === "object") return surface.name;
  return surface.trim() || (surface.includes("\n") ? "line break" : "space");
}

/** A probability with about three digits; the whole number is the element's value. */
function percent(p) {
  let text = `${(100 * p).toFixed(p < 0.0995 ? 2 : 1)} %`;
  if (p === 0) text = "0";
  else if (p < 1e-4) text = p.toExponential(1).replace("-", "−");
  else if (p >= 0.9995 && p < 1) text = "> 99.9 %";
  return element("data", { value: p, class: "number" }, text);
}

/** A weight with three decimals. */
const weightText = (weight) => weight.toFixed(3);

/** A symbol with a subscript, as in the equations. */
const symbol = (letter, subscript) => element("span", { class: "symbol" }, letter, element("sub", {}, subscript));
