// The page: three resources, asked for again and again, drawn when they changed.

const EVERY_MS = { status: 1000, series: 1500, rollouts: 4000 };
const FATES = { groups: "green", trained: "green", evaluated: "green", scored: "green", zero_variance: "grey", stale: "red",
  truncated: "orange", invalid: "red", verifier_error: "orange", suspect_label: "red", failed: "red", surplus: "orange", buffered: "blue", in_flight: "purple" };
const LIVE = ["evaluating", "waiting", "training"];
const over = (now) => ["stopped", "done"].includes(now.phase);
const byId = (id) => document.getElementById(id);
const words = (name) => name.replaceAll("_", " ");
const cards = {};
let seen = {}; // the newest answer of each resource

function card(name, title, about) {
  const legend = make("div", { class: "legend" }), plot = make("div", { class: "plot", id: "plot-" + name });
  byId("charts").append(make("section", { class: "card" }, make("h2", {}, title, " ", make("small", {}, about || "")), legend, plot));
  cards[name] = { legend, plot };
}

card("reward", "Reward and held-out accuracy");
card("entropy", "Entropy", "nats per token");
card("change", "Entropy change of a step", "predicted and realised, nats per token");
card("lag", "Lag", "rollouts trained on, over the run");
card("ratio", "Ratio and effective sample", "current / proximal; of the tokens");
card("idle", "Who waits", "share of the time");
card("fates", "Groups by fate", "of a step");
card("speed", "Throughput", "tokens per second");
card("length", "Response length", "tokens");

// -- this moment ----------------------------------------------------------------------------

function time(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const s = Math.floor(seconds), two = (n) => String(n).padStart(2, "0");
  return s >= 3600 ? `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)}` : `${Math.floor(s / 60)}:${two(s % 60)}`;
}

function showStatus(now) {
  byId("title").textContent = now.title || now.run || "run";
  document.title = `${now.title || "run"} · isentrope`;
  const silent = now.silent_s > 0;
  const pill = byId("phase");
  pill.textContent = now.phase ? (silent ? `${now.phase}, silent for ${time(now.silent_s)}` : now.phase) : "waiting for the run";
  pill.className = "pill " + (silent ? "wrong" : over(now) ? "done" : LIVE.includes(now.phase) ? "live" : "");
  const share = now.steps ? now.step / now.steps : 0;
  byId("progress").firstElementChild.style.width = 100 * share + "%";
  byId("clock").textContent = now.phase ? `step ${now.step} of ${now.steps} · ${time(now.seconds)}${over(now) || now.eta_s === null ? "" : `, ${time(now.eta_s)} to go`}` : "";
  showNotes(now);
  if (now.phase) {
    showTiles(now);
    const total = now.lag_histogram.reduce((sum, [, n]) => sum + n, 0) || 1;
    bars(cards.lag, now.lag_histogram.map(([lag, n]) => ["lag " + lag, n / total, percent(n / total)]), "blue", now.max_lag);
  }
  else bars(cards.lag, [], "blue");
  showTickets(now.groups || {}, now.conserved);
  showActors(now.actors);
}

function showNotes(now) {
  const notes = [...now.notes.map((text) => ["calm", text]), ...(over(now) ? [] : (now.warnings || []).map((text) => ["", text]))];
  if (now.conserved === false) notes.unshift(["", "NOT CONSERVED: issued ≠ trained + dropped + buffered + in flight; see isentrope audit"]);
  if (now.redis.words) notes.push(["", now.redis.words]);
  byId("notes").replaceChildren(...notes.map(([kind, text]) => make("li", { class: kind }, text)));
}

function showTiles(now) {
  const curves = (seen.series || {}).curves || {};
  const last = (name) => (curves[name] && curves[name].y.length ? curves[name].y[curves[name].y.length - 1] : null);
  const point = [...now.heldout].sort((a, b) => a.step - b.step).pop();
  const tiles = [
    ["reward", short(now.reward), ""],
    ["held-out", point ? short(point.accuracy) : "–", point ? (point.done < point.of ? `${point.done}/${point.of}` : `at step ${point.step}`) : ""],
    ["entropy", short(now.entropy), now.entropy_target === null ? "" : `target ${short(now.entropy_target)}`],
    ["version", `v${now.version}`, `lag ≤ ${now.max_lag}`],
    ["effective sample", percent(last("ess_share")), ""],
    ["learner idle", percent(now.learner_idle), ""],
    ["actors idle", now.actors.length ? percent(now.actor_idle) : "–", ""],
    ["trained", short(now.tokens_per_s), "tokens/s"],
  ];
  byId("tiles").replaceChildren(...tiles.map(([name, value, unit]) => make("div", { class: "tile" }, make("span", {}, name), make("b", {}, value), make("i", {}, unit))));
}

function showTickets(groups, conserved) {
  const rows = Object.entries(groups).filter(([, counts]) => counts.issued).map(([kind, counts]) => {
    const ends = Object.entries(counts).filter(([fate, n]) => fate !== "issued" && n > 0);
    return make("div", { class: "sum" },
      make("div", {}, make("b", {}, kind), ` ${counts.issued.toLocaleString("en")} issued`),
      make("div", { class: "stack" }, ...ends.map(([fate, n]) => make("div", { class: FATES[fate] || "purple", width: (100 * n) / counts.issued + "%" }))),
      make("div", { class: "legend" }, ...ends.map(([fate, n]) => make("span", {}, make("i", { class: "key " + (FATES[fate] || "purple") }), words(fate), make("b", {}, n.toLocaleString("en"))))));
  });
  if (rows.length) rows.push(make("div", { class: "facts " + (conserved ? "green" : "red") }, conserved ? "✓ conserved: nothing lost, nothing twice" : "✗ not conserved"));
  byId("tickets").replaceChildren(...(rows.length ? rows : [make("div", { class: "none" }, "none yet")]));
}

function meter(share) {
  return make("span", {}, make("span", { class: "meter" }, make("div", { width: Math.min(100, 100 * share) + "%" })), percent(share));
}

function showActors(actors) {
  const silent = (actor) => actor.silent_s > 3;
  byId("actor-count").textContent = actors.length ? `${actors.length}` : "";
  if (!actors.length) {
    byId("actors").replaceChildren(make("caption", { class: "none" }, "no actor is connected"));
    return;
  }
  const heads = ["actor", "version", "tokens/s", "busy", "running", "waiting", "tickets", "KV cache", "pauses", "restarts", "remarks"];
  byId("actors").replaceChildren(
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", head === "remarks" ? { class: "words" } : {}, head)))),
    make("tbody", {}, ...actors.map((actor) => {
      const remarks = [...actor.remarks, ...(silent(actor) ? [`silent for ${time(actor.silent_s)}`] : [])];
      const cells = [actor.name, "v" + actor.version, Math.round(actor.tokens_per_s).toLocaleString("en"), meter(actor.busy), actor.running,
        actor.waiting, `${actor.held}/${actor.capacity}`, percent(actor.kv_use), `${actor.pause_s.toFixed(2)} s`, actor.restarts];
      return make("tr", { class: silent(actor) || !actor.up || actor.alone ? "bad" : "" },
        ...cells.map((cell) => make("td", {}, typeof cell === "object" ? cell : String(cell))),
        make("td", { class: "words" }, remarks.join("; ")));
    })));
}

// -- the curves -----------------------------------------------------------------------------

function showSeries(series) {
  const c = series.curves;
  const curve = (name, label, colour, as, format) => ({ ...(c[name] || { x: [], y: [] }), name: label, colour, as, format });
  const empty = series.note || "no step has ended yet";
  lines(cards.reward, [curve("reward", "reward", "grey", "smooth"), curve("correct", "correct, all groups", "blue", "smooth"),
    curve("heldout", "held-out", "orange", "dots")], { from: 0, to: 1, empty });
  const target = curve("target", "target", "orange", "dashed");
  lines(cards.entropy, [curve("entropy", "entropy", "purple", "line"), target], { from: 0, empty });
  showChange(c, curve, empty);
  lines(cards.ratio, [curve("ratio", "ratio", "blue", "line"), curve("ess_share", "effective sample", "green", "line", percent),
    curve("clipped", "clipped", "red", "line", percent)], { from: 0, to: 1, empty });
  lines(cards.idle, [curve("learner_idle", "learner waits for groups", "blue", "smooth", percent),
    curve("actor_idle", "actors have nothing to decode", "orange", "smooth", percent)], { from: 0, to: 1, axis: percent, empty });
  lines(cards.speed, [curve("sampled_tokens_per_s", "sampled, all actors", "orange", "smooth"), curve("tokens_per_s", "trained on", "blue", "smooth")], { from: 0, empty });
  lines(cards.length, [curve("length", "training", "green", "line"), curve("heldout_length", "held-out", "orange", "dots")], { from: 0, empty });
  byId("curve-note").textContent = empty === series.note ? series.note : "";
  const fates = series.fates;
  const names = Object.keys(fates).filter((name) => name !== "step");
  stacks(cards.fates, fates.step, names.map((name) => ({ name: name === "groups" ? "trained" : words(name), colour: FATES[name] || "purple", y: fates[name] })));
}

// The theory is that of plain gradient descent; an optimiser's steps are larger by a factor, the slope.
function showChange(c, curve, empty) {
  const slopes = (c.entropy_slope || { y: [] }).y;
  const slope = slopes.length && slopes[slopes.length - 1] > 0 ? slopes[slopes.length - 1] : 1;
  const label = slope === 1 ? "predicted, no factor fitted yet" : `predicted × ${short(slope)}`;
  const predicted = curve("entropy_predicted", label, "purple", "line");
  predicted.y = predicted.y.map((value) => value * slope);
  lines(cards.change, [predicted, curve("entropy_realised", "realised", "red", "dots")], { empty, from: 0, to: 0 });
  const found = (c.entropy_correlation || { y: [] }).y;
  if (found.length) cards.change.legend.append(make("span", {}, "correlation", make("b", {}, found[found.length - 1].toFixed(2))));
}

// -- the last rollouts ----------------------------------------------------------------------

function showRollouts(answer) {
  byId("rollout-note").textContent = answer.note;
  const box = byId("rollouts");
  const open = new Set([...box.querySelectorAll("details[open]")].map((node) => node.dataset.ticket));
  const first = !box.querySelector("details");
  const shown = answer.groups.map((group, i) => {
    const node = showGroup(group);
    node.open = open.has(node.dataset.ticket) || (first && i === 0);
    return node;
  });
  box.replaceChildren(...(shown.length ? shown : [make("div", { class: "none" }, "none yet")]));
}

function showGroup(group) {
  const rollouts = group.rollouts || [];
  const right = rollouts.filter((rollout) => rollout.correct >= 1 && !rollout.error).length;
  const facts = `${group.kind || ""} ticket ${group.ticket}, ${right} of ${rollouts.length} right${group.actor ? ", " + group.actor : ""}`;
  const title = group.prompt !== undefined ? group.prompt.trim().split("\n").pop().slice(-160) : group.problem || "";
  const node = make("details", {}, make("summary", {}, title, make("span", { class: "right" }, facts)));
  node.dataset.ticket = group.ticket;
  if (group.wrong) node.append(make("div", { class: "facts red" }, group.wrong));
  if (group.prompt !== undefined) {
    node.append(make("div", { class: "prompt" }, make("div", { class: "facts" }, "prompt" + (group.gold ? ` · answer ${group.gold}` : "")), make("pre", {}, group.prompt)));
  }
  node.append(make("div", { class: "said" }, ...rollouts.map(showRollout)));
  return node;
}

function showRollout(rollout) {
  const kind = rollout.error ? "error" : rollout.correct >= 1 ? "right" : "wrong";
  const [low, high] = rollout.versions;
  const versions = low === undefined ? "" : low === high ? ` · v${low}` : ` · v${low}–${high}`;
  const parts = rollout.parts.map((part) => Object.entries(part).map(([name, value]) => `${name} ${short(value, 2)}`).join(", ")).join(" | ");
  const node = make("div", { class: "rollout " + kind }, make("div", { class: "facts" },
    rollout.error ? "no verdict: " + rollout.error : parts || `correct ${short(rollout.correct, 2)}`, ` · ${rollout.tokens} tokens${versions} · ${rollout.finish}`));
  for (const segment of rollout.segments) {
    if (rollout.segments.length > 1) node.append(make("div", { class: "role" }, `${segment.role}, turn ${segment.turn}`));
    node.append(make("pre", {}, segment.text));
  }
  return node;
}

// -- live -----------------------------------------------------------------------------------

const SHOW = { status: showStatus, series: showSeries, rollouts: showRollouts };
const tags = {};

async function ask(name) {
  try {
    const answer = await fetch("api/" + name, { cache: "no-cache" });
    const tag = answer.headers.get("ETag");
    if (answer.ok && tag !== tags[name]) {
      seen[name] = await answer.json();
      SHOW[name](seen[name]);
      if (name === "series" && seen.status && seen.status.phase) showTiles(seen.status);
      tags[name] = tag;
    }
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    byId("phase").textContent = "the dashboard does not answer";
    byId("phase").className = "pill wrong";
    delete tags.status;
  }
}

async function follow(name) {
  for (;;) {
    if (!document.hidden) await ask(name);
    await new Promise((done) => setTimeout(done, EVERY_MS[name]));
  }
}

function theme(name) {
  document.documentElement.dataset.theme = name;
}

const preferred = window.matchMedia("(prefers-color-scheme: dark)");
theme(location.hash === "#dark" || (location.hash !== "#light" && preferred.matches) ? "dark" : "light");
byId("theme").onclick = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
window.addEventListener("resize", () => { for (const name of ["status", "series"]) if (seen[name]) SHOW[name](seen[name]); });
for (const name of Object.keys(SHOW)) follow(name);
