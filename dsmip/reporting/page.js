"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { mentions, entities, images, runs } = data;
  const at = (id) => document.getElementById(id);
  const PAGE = 20;
  const LARGEST_GROUP = 60; // values; of more, nobody reads the list
  const two = runs.length > 1;
  let found = mentions;
  let alone = null;

  // Everything from the data becomes text; only thumbnails, which the report's writer made, are addresses.
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function picture(place, alternative) {
    if (place >= 0) return make("img", { class: "picture", src: images[place], alt: alternative, loading: "lazy" });
    return make("div", { class: "picture none" }, place === -1 ? "no picture" : "left out");
  }

  const badge = (kind, text) => make("span", { class: `badge ${kind}`, dir: "auto" }, text);
  const isRight = (mention, run) => mention.runs[run].rank <= 1;
  const address = (mention) => `#mention=${encodeURIComponent(mention.id)}`;
  const expertName = (run, number) => (number >= 0 ? runs[run].experts[number] : "");

  function sentence(mention) {
    const text = mention.sentence;
    const start = text.toLowerCase().indexOf(mention.word.toLowerCase());
    const quote = make("blockquote", { dir: "auto", tabindex: "0" });
    if (start < 0 || text.toLowerCase().length !== text.length) quote.append(text);
    else {
      const end = start + mention.word.length;
      quote.append(text.slice(0, start), make("mark", {}, text.slice(start, end)), text.slice(end));
    }
    return quote;
  }

  function entityRow(place, number, score, expert, isGold) {
    const [id, name, attributes, image] = entities[number];
    const title = make("div", {}, make("strong", { dir: "auto" }, name), ` ${id}`);
    if (isGold) title.append(" ", badge("good", "gold"));
    const text = make("div", {}, title, make("div", { class: "attributes", dir: "auto" }, attributes));
    const scored = make("div", { class: "score" }, score === null ? "" : String(score));
    if (expert) scored.append(make("div", { class: "soft" }, expert));
    return make("li", { class: isGold ? "entity gold" : "entity" },
      make("div", { class: "place" }, place), picture(image, ""), text, scored);
  }

  function answer(mention, number) {
    const run = mention.runs[number];
    const box = make("div", { class: "answer" });
    const title = two ? `Run ${number + 1}: ${runs[number].model}, rank ${run.rank}` : `Best entities; the gold's rank is ${run.rank}`;
    const heading = make("h4", {}, title);
    if (run.sure !== undefined) heading.append(`, ${Math.round(100 * run.sure)} % sure`);
    const list = make("ol");
    run.top.forEach(([entity, score, expert], place) =>
      list.append(entityRow(String(place + 1), entity, score, expertName(number, expert), entity === mention.gold)));
    if (!run.top.some(([entity]) => entity === mention.gold)) {
      const expert = run.gold_expert === undefined ? "" : expertName(number, run.gold_expert);
      list.append(entityRow(String(run.rank), mention.gold, null, expert, true));
    }
    box.append(heading, list);
    if (run.own) {
      const own = make("ul", { class: "own" });
      run.own.forEach(([rank, best], expert) => {
        const says = best < 0 ? "" : `, best ${entities[best][1]} (${entities[best][0]})`;
        own.append(make("li", { dir: "auto" }, `${runs[number].experts[expert]} by itself: gold at rank ${rank}${says}`));
      });
      box.append(own);
    }
    return box;
  }

  function card(mention) {
    const right = mention.runs.every((_, run) => isRight(mention, run));
    const heading = make("h3", {}, make("span", { dir: "auto" }, mention.word), " ",
      make("a", { class: "soft", href: address(mention), title: "The address of this mention" }, mention.id));
    const badges = make("div");
    mention.runs.forEach((run, number) => {
      const verdict = isRight(mention, number) ? "right" : `wrong, rank ${run.rank}`;
      badges.append(badge(isRight(mention, number) ? "good" : "bad", two ? `run ${number + 1}: ${verdict}` : verdict));
    });
    for (const [name, value] of Object.entries(mention.groups)) badges.append(badge("calm", `${name}: ${value}`));
    badges.append(badge("calm", `entities with this name: ${mention.meanings}`));
    const about = make("div", { class: "about" }, picture(mention.image, "The mention's picture"),
      make("div", {}, heading, sentence(mention), badges));
    const answers = make("div", { class: "answers" }, ...runs.map((_, run) => answer(mention, run)));
    const article = make("article", { class: right ? "mention right" : "mention", tabindex: "-1" }, about, answers);
    return make("li", {}, article);
  }

  const outcomes = two
    ? { all: ["all", () => true],
        first: ["run 1 right, run 2 wrong", (m) => isRight(m, 0) && !isRight(m, 1)],
        second: ["run 1 wrong, run 2 right", (m) => !isRight(m, 0) && isRight(m, 1)],
        neither: ["both wrong", (m) => !isRight(m, 0) && !isRight(m, 1)],
        both: ["both right", (m) => isRight(m, 0) && isRight(m, 1)] }
    : { all: ["all", () => true],
        wrong: ["wrong", (m) => !isRight(m, 0)],
        right: ["right", (m) => isRight(m, 0)],
        far: ["gold not among the best shown", (m) => !m.runs[0].top.some(([entity]) => entity === m.gold)] };

  const ownOf = (mention) => mention.runs[0].own;
  const agree = (mention) => new Set(ownOf(mention).map(([, best]) => best)).size === 1;
  const someRight = (mention) => ownOf(mention).some(([rank]) => rank <= 1);
  const owns = {
    all: ["all", () => true],
    disagree: ["disagree on the best entity", (m) => !agree(m)],
    agree: ["agree on the best entity", agree],
    missed: ["one is right, the whole is wrong", (m) => someRight(m) && !isRight(m, 0)],
    none: ["none is right", (m) => !someRight(m)],
  };

  const sure = (mention) => mention.runs[0].sure;
  const orders = {
    data: ["of the data", null],
    worst: ["worst rank first", (a, b) => b.runs[0].rank - a.runs[0].rank],
    surest: ["surest first", (a, b) => sure(b) - sure(a)],
    unsure: ["least sure first", (a, b) => sure(a) - sure(b)],
  };

  const option = (value, text) => make("option", { value }, text);

  function fill() {
    for (const [id, choices] of [["outcome", outcomes], ["own", owns]])
      at(id).append(...Object.entries(choices).map(([value, [text]]) => option(value, text)));
    const isSure = mentions.length > 0 && sure(mentions[0]) !== undefined;
    at("order").append(...Object.entries(orders)
      .filter(([value]) => isSure || value === "data" || value === "worst").map(([value, [text]]) => option(value, text)));
    const values = new Map();
    for (const mention of mentions)
      for (const [name, value] of Object.entries(mention.groups)) {
        if (!values.has(name)) values.set(name, new Set());
        values.get(name).add(value);
      }
    at("group").append(option("", "all"));
    for (const [name, some] of values)
      if (some.size <= LARGEST_GROUP)
        at("group").append(make("optgroup", { label: name },
          ...[...some].sort().map((value) => option(JSON.stringify([name, value]), `${name}: ${value}`))));
    at("expert").append(option("", "any expert"));
    runs.forEach((run, number) => run.experts.forEach((name, expert) =>
      at("expert").append(option(`${number} ${expert}`, two ? `run ${number + 1}: ${name}` : name))));
    at("expert-label").hidden = runs.every((run) => run.experts.length === 0);
    at("own-label").hidden = !(mentions.length && ownOf(mentions[0]));
    at("filters").hidden = false;
  }

  function chosen() {
    const group = at("group").value ? JSON.parse(at("group").value) : null;
    const expert = at("expert").value ? at("expert").value.split(" ").map(Number) : null;
    const text = at("text").value.trim().toLowerCase();
    const isOutcome = outcomes[at("outcome").value][1];
    const isOwn = owns[at("own").value][1];
    const some = mentions.filter((mention) =>
      isOutcome(mention)
      && (group === null || mention.groups[group[0]] === group[1])
      && (expert === null || (mention.runs[expert[0]].top[0] || [])[2] === expert[1])
      && isOwn(mention)
      && (!text || [mention.id, mention.word, mention.sentence, ...entities[mention.gold].slice(0, 2)]
        .some((each) => each.toLowerCase().includes(text))));
    const order = orders[at("order").value][1];
    return order ? some.sort(order) : some;
  }

  function showMore() {
    const list = at("list");
    const start = list.children.length;
    list.append(...found.slice(start, start + PAGE).map(card));
    at("more").hidden = list.children.length >= found.length;
    return list.children[start];
  }

  function show() {
    found = alone ? [alone] : chosen();
    at("list").replaceChildren();
    at("all").hidden = alone === null;
    at("state").textContent = alone ? `Mention ${alone.id} alone.` : `${found.length} of ${mentions.length} mentions`;
    return showMore();
  }

  function open() {
    if (!location.hash.startsWith("#mention=")) return;
    let id = location.hash.slice("#mention=".length);
    try { id = decodeURIComponent(id); } catch { /* taken as it is typed */ }
    alone = mentions.find((mention) => mention.id === id) || null;
    const item = show();
    if (alone === null) {
      at("state").textContent = `Mention ${id} is not on this page; all ${mentions.length} mentions`;
      at("mentions").scrollIntoView({ behavior: "instant" });
    } else {
      item.firstChild.focus({ preventScroll: true });
      item.scrollIntoView({ behavior: "instant" });
    }
  }

  fill();
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("filters").addEventListener("input", () => {
    if (alone) history.replaceState(null, "", "#mentions");
    alone = null;
    show();
  });
  at("more").addEventListener("click", () => {
    const first = showMore();
    if (first) first.firstChild.focus();
  });
  at("all").addEventListener("click", () => {
    alone = null;
    history.replaceState(null, "", "#mentions");
    show();
    at("outcome").focus();
  });
  addEventListener("hashchange", open);
  show();
  open();
})();
