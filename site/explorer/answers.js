/* What the page knows: from settings to a verdict, out of forecasts that were made before.

   Nothing is estimated here. At a node of the grid the answer is that node's forecast. Elsewhere it
   lies between the forecast of the largest node that asks for no more (its micro batch and its
   sequence are at most the asked ones) and that of the smallest node that asks for no less.
   No DOM here; bytes are integers. */
"use strict";

const FITS = "fits";
const TIGHT = "tight";
const DOES_NOT_FIT = "does not fit";
const OPEN = "open"; // the nodes on both sides disagree, or there is none on one side

/* The key under which the tool keeps a row; state: model, card, adapters, levers, checkpointing,
   padded, batch, sequence. */
function rowKey(data, state) {
  const { kind } = cardOf(data, state.card);
  const levers = state.levers + (state.checkpointing ? "" : "0");
  return [state.model, kind, state.adapters, levers, state.padded ? "padded" : "full"].join("|");
}

function cardOf(data, name) {
  return data.cards.find((card) => card.name === name);
}

function usable(card) {
  return card.total - card.context;
}

/* A node as the tool wrote it, in bytes and words. */
function unpack(data, packed) {
  const [batch, sequence, peak, low, high, parts, where, block, tight] = packed;
  const word = (n) => data.words[n];
  return {
    batch, sequence, low, high,
    peak: peak * data.unit,
    parts: parts.map(([name, units]) => [word(name), units * data.unit]),
    where: where.map(word),
    block: block && {
      bytes: block[0] * data.unit, category: word(block[1]), operation: word(block[2]),
      module: word(block[3]), shape: block[4], dtype: word(block[5]),
    },
    tight: Object.fromEntries(tight.map(([name, ...values]) => [name, values])),
  };
}

/* A node's forecast on a card: verdict, bytes of the device between two bounds, retries. */
function judge(node, card) {
  const device = (low, high) => [low + card.context, high + card.context];
  if (node.high <= usable(card)) {
    return { verdict: FITS, device: device(node.low, node.high), retries: 0 };
  }
  if (card.name in node.tight) {
    const [low, retries] = node.tight[card.name];
    return { verdict: TIGHT, device: device(low, usable(card)), retries };
  }
  return { verdict: DOES_NOT_FIT, device: device(Math.max(node.peak, node.low), node.high), retries: 0 };
}

function pick(nodes, better) {
  return nodes.reduce((best, node) => (best && !better(node, best) ? best : node), null);
}

/* The answer to a state, or null where the data have no such row.
   exact: whether the state is a node. node: the one whose memory is shown. lower, upper: nodes on
   both sides. device: bounds in bytes; the upper one is null where nothing bounds it. */
function answer(data, state) {
  const card = cardOf(data, state.card);
  const row = data.rows[rowKey(data, state)];
  if (!row) return withoutRow(data, state, card);
  const nodes = row.map((packed) => unpack(data, packed));
  const same = nodes.find((n) => n.batch === state.batch && n.sequence === state.sequence);
  if (same) {
    return { exact: true, node: same, lower: same, upper: same, peak: [same.peak, same.peak], ...judge(same, card) };
  }
  const below = nodes.filter((n) => n.batch <= state.batch && n.sequence <= state.sequence);
  const above = nodes.filter((n) => n.batch >= state.batch && n.sequence >= state.sequence);
  const lower = pick(below, (n, best) => n.peak > best.peak);
  const upper = pick(above, (n, best) => n.peak < best.peak);
  return between(lower, upper, card);
}

function between(lower, upper, card) {
  const under = lower && judge(lower, card);
  const over = upper && judge(upper, card);
  return {
    exact: false,
    node: upper || lower,
    lower, upper,
    verdict: verdictBetween(under && under.verdict, over && over.verdict),
    sides: [under && under.verdict, over && over.verdict],
    peak: [lower ? lower.peak : 0, upper ? upper.peak : null],
    device: [under ? under.device[0] : card.context, over ? over.device[1] : null],
    retries: 0,
  };
}

function verdictBetween(under, over) {
  if (under === DOES_NOT_FIT) return DOES_NOT_FIT;
  if (over === FITS) return FITS;
  return under && under === over ? under : OPEN;
}

/* A model that was not forecast on this kind of card: its weights alone may say no. */
function withoutRow(data, state, card) {
  const weights = weightsOf(data, state.model);
  if (!hasKind(data, state.model, card.kind) && weights > usable(card)) {
    return { exact: false, node: null, lower: null, upper: null, verdict: DOES_NOT_FIT, weights,
             peak: [weights, null], device: [weights + card.context, null], retries: 0 };
  }
  return null;
}

function hasKind(data, model, kind) {
  return Object.keys(data.rows).some((key) => key.startsWith(`${model}|${kind}|`));
}

function weightsOf(data, model) {
  const key = Object.keys(data.rows).find((name) => name.startsWith(`${model}|`));
  return key ? new Map(unpack(data, data.rows[key][0]).parts).get("weights") : 0;
}

/* Whether the data have a row for a state. */
function known(data, state) {
  return rowKey(data, state) in data.rows;
}

/* The nearest state that the data know: levers, padding, adapters go back to the usual ones. */
function settled(data, state) {
  const kind = cardOf(data, state.card).kind;
  let next = { ...state, padded: state.padded && state.batch > 1 };
  if (!hasKind(data, state.model, kind)) return { ...next, padded: false, adapters: "attention", levers: "usual" };
  for (const change of [{ padded: false }, { adapters: "attention" }, { levers: "usual" }, { checkpointing: true }]) {
    if (known(data, next)) break;
    next = { ...next, ...change };
  }
  return next;
}

/* Every single change of a state towards less memory: its name, the state after, whether what is
   learnt stays. */
function savings(state) {
  const half = Math.floor(state.batch / 2);
  const shorter = Math.max(512, Math.floor(state.sequence / 2));
  const found = [
    [state.levers === "usual", "toLean", { levers: "lean" }, true],
    [!state.checkpointing, "toCheckpoint", { checkpointing: true }, true],
    [state.levers === "usual" && !state.checkpointing, "toBoth", { levers: "lean", checkpointing: true }, true],
    [state.batch > 1, "toBatch", { batch: half, padded: state.padded && half > 1 }, true],
    [state.padded, "toUnpadded", { padded: false }, true],
    [state.adapters === "all-linear", "toAttention", { adapters: "attention" }, false],
    [state.sequence > 512, "toSequence", { sequence: shorter }, false],
  ];
  return found.filter(([possible]) => possible).map(([, name, change, same]) => ({ name, state: { ...state, ...change }, same }));
}

/* What a run that fits could take on, and still fit. */
function room(state) {
  const found = [
    [state.checkpointing, "noCheckpoint", { checkpointing: false }],
    [state.batch * 2 <= 8, "moreBatch", { batch: state.batch * 2 }],
    [state.adapters === "attention", "moreAdapters", { adapters: "all-linear" }],
    [state.sequence * 2 <= 8192, "moreSequence", { sequence: state.sequence * 2 }],
  ];
  return found.filter(([possible]) => possible).map(([, name, change]) => ({ name, state: { ...state, ...change }, same: true }));
}

/* The changes worth showing, the one that helps most first, with their answers.

   Of a run that fits: what it has room for. Of another, or if there is none: what makes it fit, what leaves the result
   alone before what does not; then what saves most. */
function changes(data, state) {
  const now = answer(data, state);
  if (!now) return { fits: false, list: [] };
  const weigh = (change) => {
    const after = known(data, change.state) ? answer(data, change.state) : null;
    return after && { ...change, after, saved: saved(now, after) };
  };
  if (now.verdict === FITS) {
    const list = room(state).map(weigh).filter((c) => c && c.after.verdict === FITS);
    if (list.length) return { fits: true, list };
  }
  const rank = { [FITS]: 0, [TIGHT]: 1, [OPEN]: 2, [DOES_NOT_FIT]: 3 };
  const list = savings(state).map(weigh).filter((c) => c && c.saved > 0);
  list.sort((a, b) => rank[a.after.verdict] - rank[b.after.verdict] || b.same - a.same || b.saved - a.saved);
  return { fits: false, list };
}

/* Bytes of tensors that a change saves, as far as the nodes shown can say. */
function saved(before, after) {
  const top = (found) => (found.node ? found.node.peak : found.peak[0]);
  return top(before) - top(after);
}

/* The smallest card that a state surely fits, or null. */
function smallestCard(data, state) {
  const fitting = data.cards.filter((card) => {
    const found = answer(data, { ...state, card: card.name });
    return found && found.verdict === FITS;
  });
  return pick(fitting, (card, best) => card.total < best.total);
}

/* What the peak is about: "logits", "attention", "mlp", "optimizer", "load" or "other". */
function causeOf(node) {
  const [phase, operation, module] = node.where;
  if (phase === "optimizer" || phase === "load") return phase;
  if (/log_softmax|nll_loss/.test(operation) || /lm_head|^base_model\.model$/.test(module)) return "logits";
  if (/mlp/.test(module)) return "mlp";
  if (/attn|attention/.test(module + operation)) return "attention";
  return "other";
}

window.fitcastAnswers = {
  FITS, TIGHT, DOES_NOT_FIT, OPEN,
  answer, changes, cardOf, causeOf, hasKind, known, rowKey, settled, smallestCard, usable,
};
