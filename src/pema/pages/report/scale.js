// Scales: from values to positions between 0 and 1, with round ticks.

const NEGLIGIBLE = 10_000;

/** Three digits, or all digits of the integer part, as for costs in the table. */
function digits(value) {
  if (value === 0) return "0";
  const places = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  return value.toLocaleString("en", { maximumFractionDigits: Math.min(places, 20) });
}

function scaled(value, unit = "") {
  for (const [power, prefix] of [
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    if (value >= 0.9995 * power) return `${digits(value / power)} ${prefix}${unit}`;
  }
  return `${digits(value)} ${unit}`.trimEnd();
}

const write = {
  number: digits,
  bytes: (value) => (value === 0 ? "0" : scaled(value, "B")),
  seconds: (value) => (value > 0 && value < 0.1 ? `${digits(value * 1000)} ms` : `${digits(value)} s`),
};

/** A logarithmic scale if values are positive (or almost zero) and `far` times apart; else a linear one. */
function makeScale(values, far = 20) {
  const most = Math.max(...values);
  const least = Math.min(...values.filter((value) => value > most / NEGLIGIBLE));
  return Math.min(...values) >= 0 && most / least >= far ? logScale(values) : linearScale(values);
}

function linearScale(values) {
  let low = Math.min(...values);
  let high = Math.max(...values);
  const slack = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  // Values that begin near zero are shown with zero, and with space to the left of a mark at zero.
  low = low >= 0 && low < (high - low) * 0.4 ? -slack / 2 : low - slack;
  high += slack;
  const step = niceStep((high - low) / 5);
  const ticks = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high; n += 1) ticks.push(Number((n * step).toPrecision(12)));
  return { log: false, ticks, zero: null, at: (value) => (value - low) / (high - low) };
}

/**
 * A logarithmic scale. Zeros, which have no logarithm, get their own position before a break in the axis, and so do
 * values that are almost zero compared with the rest, such as the memory of a process that trained nothing.
 */
function logScale(values) {
  const least = Math.max(...values) / NEGLIGIBLE;
  const zeros = values.some((value) => value <= least);
  const first = zeros ? 0.13 : 0;
  let low = Math.log10(Math.min(...values.filter((value) => value > least)));
  let high = Math.log10(Math.max(...values));
  const slack = (high - low) * 0.08;
  low -= slack;
  high += slack;
  const steps = high - low > 2.2 ? [1] : [1, 2, 5];
  const every = Math.max(1, Math.round((high - low) / 6));
  const ticks = zeros ? [0] : [];
  for (let power = Math.floor(low); power <= high; power += 1) {
    for (const step of steps) {
      const exponent = power + Math.log10(step);
      if (power % every === 0 && exponent >= low && exponent <= high) ticks.push(step * 10 ** power);
    }
  }
  const at = (value) =>
    value <= least ? first * 0.4 : first + ((1 - first) * (Math.log10(value) - low)) / (high - low);
  return {
    log: true,
    ticks,
    zero: zeros ? first * 0.75 : null,
    nearly: values.some((value) => value > 0 && value <= least),
    at,
  };
}

/** One position per value, in their order: for a swept setting that is not a number. */
function placesScale(names) {
  return { log: false, ticks: names, zero: null, at: (name) => (names.indexOf(name) + 0.5) / names.length };
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((step) => step * power >= rough * 0.999);
}
