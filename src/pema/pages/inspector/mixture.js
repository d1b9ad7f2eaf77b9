// The schedules and the mixture, as in pema.adapter.schedule and pema.generation.mixture.

/** lambda_t of a schedule (its `to_dict`), computed in double precision and rounded to single precision, as in pema. */
function weightAt(schedule, t, sourceLength) {
  const left = Math.max(0, 1 - t / sourceLength);
  switch (schedule.schedule) {
    case "unrolling": {
      const root = schedule.lambda_max * left;
      return Math.fround(root * root);
    }
    case "linear":
      return Math.fround(schedule.lambda_max * left);
    case "constant":
      return Math.fround(schedule.value);
    case "fitted": {
      const bins = schedule.values.length;
      const bin = Math.floor((t * bins) / (schedule.span * sourceLength));
      return Math.fround(schedule.values[Math.min(Math.max(bin, 0), bins - 1)]);
    }
    case "none":
      return 0;
    default:
      throw new Error(`unknown schedule: ${schedule.schedule}`);
  }
}

/** The probability of a stored log-probability; null is -inf. */
const probability = (logP) => (logP === null ? 0 : Math.exp(logP));

/** The indices of `values`, largest first; equal values in their given order, which is that of the token ids. */
const ranked = (values) => [...values.keys()].sort((i, j) => values[j] - values[i] || i - j);

/**
 * P = lambda_t P_PEMA + (1 - lambda_t) P_LM of one stored step with this lambda_t.
 *
 * `plm`, `pema` and `mixed` are probabilities in the order of the candidates, `best` is the index of the likeliest
 * token of the mixture and `alone` that of P_LM. No token that is not stored is likelier than `bound`, so `certain` says
 * whether `best` is the likeliest of the whole vocabulary.
 */
function mixture(step, weight) {
  const plm = step.plm.log_p.map(probability);
  const pema = step.pema.log_p.map(probability);
  const mixed = plm.map((p, i) => weight * pema[i] + (1 - weight) * p);
  const bound = weight * probability(step.pema.rest_log_p) + (1 - weight) * probability(step.plm.rest_log_p);
  // With the weight of the generation the best token is known, and rounding cannot break a tie in another way.
  const asGenerated = weight === step.weight;
  const best = asGenerated ? step.candidates.indexOf(step.token) : ranked(mixed)[0];
  // Log-probabilities are stored with six decimals.
  const certain = asGenerated || mixed[best] > bound * (1 + 1e-5);
  const fromPema = weight * pema[best];
  const fromPLM = (1 - weight) * plm[best];
  const decidedBy = fromPema > fromPLM ? "pema" : "plm";
  return { weight, plm, pema, mixed, bound, best, certain, fromPema, fromPLM, decidedBy, alone: ranked(plm)[0] };
}

/**
 * Every step with another schedule. A step is `reached` while each token before it is certainly the generated one:
 * after another token the contexts differ, and the PLM's distributions for them are not stored. `subject` is the index
 * of the token to describe: the likeliest one, or the generated one if the step is not reached.
 */
function replay(steps, schedule, sourceLength) {
  let reached = true;
  return steps.map((step, t) => {
    const mixed = mixture(step, weightAt(schedule, t, sourceLength));
    const changed = step.candidates[mixed.best] !== step.token;
    const subject = reached ? mixed.best : step.candidates.indexOf(step.token);
    const state = { ...mixed, changed, reached, subject };
    reached &&= !changed && mixed.certain;
    return state;
  });
}
