/* The page: controls to a state, the state to the address, its answer to the screen. */
"use strict";

(() => {
  const data = window.FITCAST_DATA;
  const languages = window.FITCAST_STRINGS;
  const { FITS, TIGHT, DOES_NOT_FIT, OPEN, ...answers } = window.fitcastAnswers;
  const $ = (id) => document.getElementById(id);
  const STOPS = [512, 1024, 2048, 4096, 8192];
  const START = {
    model: Object.keys(data.models)[0], card: "T4", sequence: 2048, batch: 1, padded: false,
    adapters: "attention", levers: "usual", checkpointing: true,
  };
  const SIGNS = { [FITS]: "✓", [TIGHT]: "≈", [DOES_NOT_FIT]: "✗", [OPEN]: "?" };
  let state = { ...START };
  let language = "en";

  // --- words and numbers -----------------------------------------------------------------------

  function t(key, values = {}) {
    const text = languages[language][key] ?? languages.en[key] ?? key;
    return text.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
  }

  const partName = (name) => t(`part.${name}` in languages.en ? `part.${name}` : name); // "adapters" is a control, too

  function bytes(n) {
    const [size, unit] = n >= 2 ** 29 ? [n / 2 ** 30, "GiB"] : [n / 2 ** 20, "MiB"];
    const digits = { minimumFractionDigits: 2, maximumFractionDigits: 2 };
    return `${size.toLocaleString(language, digits)} ${unit}`;
  }

  const nodeName = (node) => node && t("node", { batch: node.batch, sequence: node.sequence.toLocaleString(language) });

  // --- state and address -----------------------------------------------------------------------

  function toAddress() {
    const { padded, checkpointing, ...rest } = state;
    const words = { ...rest, padded: Number(padded), checkpointing: Number(checkpointing), lang: language };
    return `#${new URLSearchParams(words)}`;
  }

  function fromAddress() {
    const said = new URLSearchParams(location.hash.slice(1));
    const whole = (name, low, high) => {
      const n = Math.round(Number(said.get(name)));
      return said.has(name) && Number.isFinite(n) ? Math.min(high, Math.max(low, n)) : START[name];
    };
    const one = (name, names) => (names.includes(said.get(name)) ? said.get(name) : START[name]);
    const yes = (name) => (said.has(name) ? said.get(name) === "1" : START[name]);
    state = {
      model: one("model", Object.keys(data.models)),
      card: one("card", data.cards.map((card) => card.name)),
      sequence: whole("sequence", 512, 8192),
      batch: whole("batch", 1, 8),
      padded: yes("padded"),
      adapters: one("adapters", ["attention", "all-linear"]),
      levers: one("levers", ["usual", "lean"]),
      checkpointing: yes("checkpointing"),
    };
    if (said.get("lang") in languages) language = said.get("lang");
  }

  function change(fields) {
    state = answers.settled(data, { ...state, ...fields });
    show();
    history.replaceState(null, "", toAddress());
  }

  // --- controls --------------------------------------------------------------------------------

  function option(value, text) {
    const made = document.createElement("option");
    made.value = value;
    made.textContent = text;
    return made;
  }

  function fill() {
    $("model").replaceChildren(...Object.entries(data.models).map(([name, model]) => option(name, model.label)));
    $("card").replaceChildren(...data.cards.map((card) =>
      option(card.name, t("cardOption", { name: card.name, memory: bytes(card.total) }))));
    $("language").replaceChildren(...Object.entries(languages).map(([name, strings]) => option(name, strings.name)));
    document.documentElement.lang = language;
    document.title = t("pageTitle");
    for (const element of document.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
    $("stamp").textContent = t("stamp", { ...data.stamp.versions, engine: data.stamp.engine.slice(0, 12) });
  }

  function showControls() {
    for (const name of ["model", "card", "sequence", "batch"]) $(name).value = state[name];
    $("language").value = language;
    $("sequence-slider").value = Math.round(Math.log2(state.sequence));
    $("sequence-slider").setAttribute("aria-valuetext", state.sequence);
    $("sequence-slider").setAttribute("aria-label", t("sequence"));
    $("batch-value").textContent = state.batch;
    $("attention-label").textContent = t("attentionTargets", { targets: data.models[state.model].targets.join(", ") });
    $("usual-label").textContent = data.models[state.model].file ? t("usualFile") : t("usual");
    for (const name of ["adapters", "levers"]) $(state[name]).checked = true;
    for (const name of ["padded", "checkpointing"]) $(name).checked = state[name];
    const hidden = [
      close("padded", { padded: !state.padded }, state.batch === 1),
      close("attention", { adapters: "attention" }), close("all-linear", { adapters: "all-linear" }),
      close("usual", { levers: "usual" }), close("lean", { levers: "lean" }),
      close("checkpointing", { checkpointing: !state.checkpointing }),
    ].some(Boolean);
    $("padded-help").textContent = state.batch === 1 ? t("paddedOne") : "";
    $("levers-help").textContent = hidden ? t("notHere") : "";
  }

  /* Disable a control whose change the data do not know; whether that is so. */
  function close(id, fields, useless = false) {
    const unknown = !answers.known(data, { ...state, ...fields });
    $(id).disabled = useless || (unknown && !$(id).matches("[type=radio]:checked"));
    return unknown && !useless && $(id).disabled;
  }

  // --- the answer ------------------------------------------------------------------------------

  function show() {
    const found = answers.answer(data, state);
    showControls();
    showVerdict(found);
    showBar(found);
    $("cause").textContent = cause(found);
    showChanges();
    showCopies();
  }

  function showVerdict(found) {
    $("verdict").dataset.verdict = found.verdict;
    $("sign").textContent = SIGNS[found.verdict];
    $("word").textContent = t(found.verdict);
    $("says").textContent = says(found);
    $("basis").textContent = basis(found);
  }

  function says(found) {
    const total = answers.cardOf(data, state.card).total;
    const [low, high] = found.device;
    const [under, over] = (found.sides || []).map((verdict) => verdict && t(verdict));
    return t(sentence(found), {
      low: bytes(low), total: bytes(total), retries: found.retries,
      range: t("range", { low: bytes(low), high: bytes(high ?? low) }), margin: bytes(total - (high ?? total)),
      lower: nodeName(found.lower), upper: nodeName(found.upper), under, over,
    });
  }

  /* Which sentence says it: bounded from above or not, retries or none, a node or between two. */
  function sentence({ verdict, device, retries, exact, lower }) {
    if (verdict === FITS) return "fitsSays";
    if (verdict === TIGHT && !exact) return "tightBetween";
    if (verdict === TIGHT) return retries > 1 ? "tightSaysRetries" : retries ? "tightSaysOnce" : "tightSays";
    if (verdict === DOES_NOT_FIT) return device[1] === null ? "noSaysLow" : "noSays";
    return device[1] === null || !lower ? "openSaysLow" : "openSays";
  }

  function basis(found) {
    if (found.exact) return t("exact");
    const names = { lower: nodeName(found.lower), upper: nodeName(found.upper) };
    if (found.weights) return t("weightsAlone");
    return t(!found.upper ? "above" : !found.lower ? "below" : "between", names);
  }

  /* What fills the device at the peak, in the order of the bar: [name, bytes]. */
  function partsOf(found, card) {
    if (!found.node) return [["context", card.context], ["weights", found.weights]];
    const { parts, peak } = found.node;
    const high = Math.max(found.exact ? found.device[1] - card.context : found.node.high, peak);
    return [["context", card.context], ...parts, ["cache", high - peak]].filter(([, n]) => n > 0);
  }

  function showBar(found) {
    const card = answers.cardOf(data, state.card);
    const parts = partsOf(found, card);
    const whole = Math.max(card.total, parts.reduce((sum, [, n]) => sum + n, 0)) * 1.02;
    const share = (n) => `${(100 * n) / whole}%`;
    const segments = parts.map(([name, n]) => {
      const made = document.createElement("span");
      made.dataset.part = name;
      made.style.width = share(n);
      return made;
    });
    const limit = document.createElement("span");
    limit.className = "limit";
    limit.style.left = share(card.total);
    $("bar").replaceChildren(...segments, limit);
    const amount = ([name, n]) => (name === "cache" ? t("cacheUpTo", { high: bytes(n) }) : bytes(n));
    const said = parts.map((part) => `${partName(part[0])} ${amount(part)}`).join(", ");
    $("bar").setAttribute("aria-label", t("barLabel", { parts: said, total: bytes(card.total) }));
    $("parts").replaceChildren(...[...parts, ["limit", card.total]].map((part) => {
      const [row, swatch, value] = ["li", "span", "b"].map((tag) => document.createElement(tag));
      swatch.className = "swatch";
      swatch.dataset.part = part[0];
      value.textContent = amount(part);
      row.append(swatch, partName(part[0]), value);
      return row;
    }));
  }

  function cause(found) {
    if (!found.node) return t("weightsAlone");
    const [phase, operation, module] = found.node.where;
    const where = t("causeWhere", { phase: t(`phase.${phase}`), operation, module: module || t("noModule") });
    const { block } = found.node;
    const largest = block && t("causeBlock", {
      bytes: bytes(block.bytes), shape: block.shape.join(" × "), dtype: block.dtype,
    });
    return where + t(`cause.${answers.causeOf(found.node)}`) + (largest || "");
  }

  function showChanges() {
    const { fits, list } = answers.changes(data, state);
    $("changes-head").textContent = t(fits ? "roomHead" : "changesHead");
    const rows = list.slice(0, 4).map(changeRow);
    if (!rows.length && !fits) rows.push(remark(t("nothing")));
    if (!fits) rows.push(remark(cardRemark()));
    $("changes-head").hidden = !rows.length;
    $("changes").replaceChildren(...rows);
  }

  function remark(text) {
    const row = document.createElement("li");
    row.textContent = text;
    return row;
  }

  function cardRemark() {
    const card = answers.smallestCard(data, state);
    return card ? t("nextCard", { name: card.name, memory: bytes(card.total) }) : t("noCard");
  }

  function changeRow({ name, state: after, after: found, saved }) {
    const row = document.createElement("li");
    const [what, verdict, button] = ["span", "span", "button"].map((tag) => document.createElement(tag));
    what.className = "what";
    const difference = saved === undefined ? 0 : saved;
    const amount = t(difference >= 0 ? "saves" : "costs", { bytes: bytes(Math.abs(difference)) });
    what.textContent = difference ? `${t(name)}: ${amount}` : t(name);
    verdict.className = "verdict";
    verdict.dataset.verdict = found.verdict;
    verdict.textContent = t(found.verdict);
    button.type = "button";
    button.textContent = t("apply");
    button.setAttribute("aria-label", t("applyLabel", { what: t(name) }));
    button.addEventListener("click", () => {
      change(after);
      $("changes").querySelector("button")?.focus();
    });
    row.append(what, verdict, button);
    return row;
  }

  // --- to copy ---------------------------------------------------------------------------------

  /* `fitcast forecast` for the state, in the words of `fitcast.cli.options.command_line`. */
  function command() {
    const model = data.models[state.model];
    const card = state.card === "T4" ? [] : ["--gpu", state.card];
    if (model.file) return ["fitcast forecast run.yaml", ...card].join(" ");
    const fields = data.levers[state.levers];
    const targets = state.adapters === "all-linear" ? "all-linear" : model.targets.join(",");
    const words = ["fitcast", "forecast", "--model", model.asked, ...card];
    if (targets !== "q_proj,k_proj,v_proj,o_proj") words.push("--lora-targets", targets);
    if (state.batch !== 1) words.push("--micro-batch-size", state.batch);
    if (state.sequence !== 512) words.push("--sequence-length", state.sequence);
    if (state.padded) words.push("--padded");
    if (!state.checkpointing) words.push("--checkpointed-layers", "0");
    for (const name of ["attention", "loss", "norm", "mlp", "adapters", "rotary"]) {
      if (name in fields) words.push(`--${name}`, fields[name]);
    }
    if (fields.expandable_segments) words.push("--expandable-segments");
    return words.join(" ");
  }

  function trlFile() {
    const model = data.models[state.model];
    return [
      `model_name_or_path: ${model.hub}`, "dtype: bfloat16", "use_peft: true", "lora_r: 16", "lora_alpha: 32",
      "lora_dropout: 0.05", `lora_target_modules: [${model.targets.join(", ")}]`,
      `per_device_train_batch_size: ${state.batch}`, `max_length: ${state.sequence}`, "bf16: true",
      `gradient_checkpointing: ${state.checkpointing}`, "optim: paged_adamw_8bit",
    ].join("\n");
  }

  function script() {
    const model = data.models[state.model];
    const { dtype } = answers.cardOf(data, state.card);
    const targets = state.adapters === "all-linear" ? '"all-linear"' : `[${model.targets.map((name) => `"${name}"`).join(", ")}]`;
    const lean = state.levers === "lean";
    return [
      ...(lean ? ['os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # before torch is imported'] : []),
      "quantization_config = BitsAndBytesConfig(",
      '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,',
      `    bnb_4bit_compute_dtype=torch.${dtype},`,
      ")",
      `model = AutoModelForCausalLM.from_pretrained(`,
      `    "${model.hub}", quantization_config=quantization_config, dtype=torch.${dtype}`,
      ")",
      "peft_config = LoraConfig(",
      `    r=16, lora_alpha=32, lora_dropout=0.05, target_modules=${targets}, task_type="CAUSAL_LM"`,
      ")",
      "args = TrainingArguments(",
      `    per_device_train_batch_size=${state.batch}, ${dtype === "float16" ? "fp16" : "bf16"}=True, optim="paged_adamw_8bit",`,
      `    gradient_checkpointing=${state.checkpointing ? "True" : "False"}${state.checkpointing ? ', gradient_checkpointing_kwargs={"use_reentrant": False}' : ""},`,
      ")",
      `# rows of at most ${state.sequence} tokens`,
      ...(lean ? ["# once the trainer is made:", "fitcast.apply_levers(trainer.model)"] : []),
    ].join("\n");
  }

  function showCopies() {
    const file = data.models[state.model].file;
    $("command-head").textContent = t(file ? "fileHead" : "commandHead");
    $("command").textContent = file ? `${trlFile()}\n\n${command()}` : command();
    $("script").textContent = file ? "trl sft --config run.yaml --dataset_name YOUR_DATASET" : script();
  }

  async function copy(of) {
    const text = $(of).textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch { // a file's page may have no clipboard: the selection is copied instead
      getSelection().selectAllChildren($(of));
      document.execCommand("copy");
    }
    $("copied").textContent = "";
    setTimeout(() => { $("copied").textContent = t("copied"); }, 50);
  }

  // --- light and dark --------------------------------------------------------------------------

  function remembered() {
    try { return localStorage.getItem("fitcast-theme"); } catch { return null; }
  }

  function toggleTheme() {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
    document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
    try { localStorage.setItem("fitcast-theme", document.documentElement.dataset.theme); } catch { /* not kept */ }
  }

  // --- start -----------------------------------------------------------------------------------

  function number(id, low, high) {
    const n = Math.round(Number($(id).value));
    return Number.isFinite(n) && n >= low ? Math.min(n, high) : null;
  }

  function listen() {
    $("model").addEventListener("change", () => change({ model: $("model").value }));
    $("card").addEventListener("change", () => change({ card: $("card").value }));
    $("sequence-slider").addEventListener("input", () => change({ sequence: STOPS[$("sequence-slider").value - 9] }));
    $("sequence").addEventListener("change", () => change({ sequence: number("sequence", 512, 8192) ?? state.sequence }));
    $("batch").addEventListener("input", () => change({ batch: Number($("batch").value) }));
    for (const name of ["padded", "checkpointing"]) $(name).addEventListener("change", () => change({ [name]: $(name).checked }));
    for (const name of ["adapters", "levers"]) {
      for (const radio of document.getElementsByName(name)) radio.addEventListener("change", () => change({ [name]: radio.value }));
    }
    $("language").addEventListener("change", () => { language = $("language").value; fill(); change({}); });
    $("theme").addEventListener("click", toggleTheme);
    $("question").addEventListener("submit", (event) => event.preventDefault());
    for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", () => copy(button.dataset.of));
    window.addEventListener("hashchange", () => { fromAddress(); fill(); change({}); });
  }

  performance.mark("start");
  if (remembered()) document.documentElement.dataset.theme = remembered();
  language = navigator.language.slice(0, 2) in languages ? navigator.language.slice(0, 2) : "en";
  fromAddress();
  fill();
  listen();
  state = answers.settled(data, state);
  show();
  performance.measure("first answer", "start");
  window.fitcastExplorer = { command, trlFile, state: () => state };
})();
