"use strict";

// What comes from the server or the address is put in as text, never as markup: articles are by strangers.

const $ = (id) => document.getElementById(id);
const clone = (name) => $(`${name}-template`).content.firstElementChild.cloneNode(true);
const parts = (node, ...classes) => classes.map((name) => node.querySelector(`.${name}`));
const counted = (count, noun) => `${count.toLocaleString("en-GB")} ${noun}${count === 1 ? "" : "s"}`;
const fields = { q: $("q"), from: $("from"), to: $("to") };
const [results, welcome, collection, elsewhere] = ["results", "welcome", "collection", "elsewhere"].map($);
const LETTERS = ["A", "B"];
const SHORT = 320; // characters of a passage that are shown at first; with less than half as many more, all are

const answers = new Map(); // address -> the answer as it was left, so that "back" finds choices made and passages opened
let asking = null; // the question whose answer is awaited: its address, and what aborts it
let bar = null; // the address as this page last set it
let current = null; // the passage that a citation led to: what ends that
let needed = null; // choices for a training

function element(name, text, properties = {}) {
  return Object.assign(document.createElement(name), { textContent: text, ...properties });
}

function button(text, action) {
  return element("button", text, { type: "button", onclick: action });
}

// The server

// passing: the same request may succeed later
const failure = (message, passing = true) => Object.assign(new Error(message), { passing });

async function api(path, body = null, { signal = null, seconds = 30, keepalive = false } = {}) {
  const limit = AbortSignal.timeout(1000 * seconds);
  const request = { signal: signal ? AbortSignal.any([signal, limit]) : limit, keepalive };
  const headers = { "Content-Type": "application/json" };
  if (body) Object.assign(request, { method: "POST", headers, body: JSON.stringify(body) });
  let response, answer;
  try {
    response = await fetch(`api/${path}`, request);
    answer = await response.json();
  } catch {
    if (limit.aborted) throw failure(`no answer within ${seconds} seconds`);
    if (!response) throw failure("the server cannot be reached");
    answer = null; // not JSON: perhaps the page of a proxy
  }
  const { ok, status } = response;
  if (!ok) throw failure(answer?.error ?? `the server answered with ${status}`, status >= 500 || status === 429);
  if (!answer) throw failure("the answer of the server cannot be read");
  return answer;
}

// Asking

function here() {
  const given = Object.entries(fields).map(([name, { value }]) => [name, value.trim()]);
  return fields.q.value.trim() && `?${new URLSearchParams(given.filter(([, value]) => value))}`;
}

function limitDates() {
  fields.from.max = fields.to.value;
  fields.to.min = fields.from.value;
}

function show(node, said = "") {
  const focused = document.activeElement;
  results.setAttribute("aria-busy", node.matches(".loading"));
  results.replaceChildren(node);
  $("status").textContent = said;
  $("examples").hidden = !node.matches(".welcome, .nothing") || !$("examples").querySelector("button");
  // what had the focus may have gone: the keyboard goes on from the answer, not from the top of the page
  if (!focused.isConnected || focused.closest("[hidden]")) results.focus({ preventScroll: true });
}

function problem(what, error, again) {
  const node = clone("problem");
  node.firstElementChild.textContent = `${what}: ${error.message}.`;
  if (error.passing) node.append(element("p", "It may work in a moment."), button("Try again", again));
  return node;
}

async function ask() {
  const address = here();
  if (asking?.address === address) return; // pressed twice
  asking?.controller.abort();
  const mine = { address, controller: new AbortController() };
  asking = mine;
  const query = fields.q.value.trim();
  const body = { query, from: fields.from.value || null, to: fields.to.value || null };
  document.title = `${query} – Ask the news`;
  show(clone("loading"), "Searching and summarising");
  try {
    const answer = await api("ask", body, { signal: mine.controller.signal, seconds: 120 });
    if (asking !== mine) return; // late: another question took its place
    answers.set(address, drawn(answer));
    show(answers.get(address), answers.get(address).querySelector(".message").textContent);
  } catch (error) {
    if (asking !== mine) return;
    if (!("passing" in error)) console.error(error);
    show(problem("No answer", error, () => $("ask").requestSubmit()));
  }
  asking = null;
}

function go(event) {
  event.preventDefault();
  if (here() !== bar) history.pushState(null, "", here());
  bar = here();
  elsewhere.replaceChildren();
  ask();
}

// Shows what the address asks for: when the page is loaded, and after "back" and "forward".
function visit() {
  const given = new URLSearchParams(location.search);
  for (const [name, input] of Object.entries(fields)) input.value = given.get(name) ?? "";
  fields.q.value = fields.q.value.trim().slice(0, fields.q.maxLength); // maxlength limits only what is typed
  limitDates();
  bar = here();
  history.replaceState(null, "", (bar || location.pathname) + location.hash);
  asking?.controller.abort();
  asking = null;
  document.title = bar ? `${fields.q.value} – Ask the news` : "Ask the news";
  if (answers.has(bar)) show(answers.get(bar));
  else if (bar && $("ask").reportValidity()) ask();
  else show(welcome);
}

// An answer

function drawn(answer) {
  const node = clone("answer");
  const [question, message, choice, nearest, list] = parts(node, "question", "message", "choice", "nearest", "passages");
  const answered = answer.answered && answer.summaries.length > 0;
  const two = answer.summaries.length > 1;
  const cited = new Set(answer.summaries.flatMap(({ sentences }) => sentences.flatMap(({ citations }) => citations)));
  const unused = answer.passages.filter((entry) => answered && !entry.used && !cited.has(entry.number));
  const passages = new Map(answer.passages.map((entry) => [entry.number, passage(entry, !unused.includes(entry))]));
  question.textContent = answer.query;
  nearest.textContent = answered ? "Passages" : "Nearest, but not enough to answer";
  nearest.hidden = list.hidden = passages.size === 0;
  for (const entry of passages.values()) list.append(entry.node);
  if (!answered) {
    node.classList.add("nothing");
    message.textContent = answer.message || "The collection has nothing that answers this.";
    choice.remove();
    return node;
  }
  const found = `${two ? "Two summaries" : "A summary"} of ${counted(passages.size - unused.length, "passage")}`;
  message.textContent = `${found}, in ${answer.seconds.toFixed(1)} seconds. ${answer.message ?? ""}`;
  choice.querySelector("h3").textContent = two ? "Which is better?" : "Summary";
  const cards = answer.summaries.map((summary, at) => card(answer, summary, at, two, passages));
  choice.querySelector(".summaries").append(...cards);
  const notice = choice.querySelector(":scope > .notice");
  if (!answer.ask) notice.textContent = "This answer could not be recorded, so that it cannot be judged.";
  else if (two) {
    const choosers = cards.map((entry, at) => [entry.querySelector(".choose"), at]);
    keep("choices", { ask: answer.ask }, "chosen", choosers, notice, answer.query, "Your choice", (at, { choices }) => {
      tally(choices);
      return `Thank you. Saved: summary ${LETTERS[at]} is better. You can still change your mind.`;
    });
  }
  return node;
}

function card(answer, summary, at, two, passages) {
  const node = clone("summary");
  const [title, text, model, feedback, notice] = parts(node, "title", "text", "model", "feedback", "notice");
  const [choose, thumbs, up, down] = parts(node, "choose", "thumbs", "up", "down");
  title.textContent = two ? `Summary ${LETTERS[at]}` : "Summary";
  title.hidden = !two;
  for (const sentence of summary.sentences) {
    const whole = element("span", sentence.text, { className: "sentence" });
    whole.append(...sentence.citations.map((cited) => citation(cited, passages.get(cited), sentence.text)));
    text.append(whole, " ");
  }
  // of two it is not said: readers are to judge what is written, not who wrote it
  if (!two) model.textContent = `Written by ${author(summary.model)}.`;
  if (two) choose.textContent = `${LETTERS[at]} is better`;
  else choose.remove();
  thumbs.setAttribute("aria-label", `Rate ${two ? title.textContent : "the summary"}`);
  if (!answer.ask) feedback.remove();
  const body = { ask: answer.ask, summary: at };
  keep("ratings", body, "rating", [[up, 1], [down, -1]], notice, answer.query, "Your rating", (value) =>
    value > 0 ? "Saved: a good summary." : "Saved: a poor summary.");
  return node;
}

// A link, since it leads to a place in the page; and a button could not be kept with its sentence's last word.
function citation(cited, found, sentence) {
  if (!found) return ` [${cited}]`;
  const mark = element("a", `[${cited}]`, { href: `#passage-${cited}`, ariaLabel: `[${cited}], from ${found.title}` });
  mark.onclick = (event) => {
    event.preventDefault(); // no entry in the history
    found.highlight(sentence, mark);
  };
  return mark;
}

// Buttons ([button, value]) of which one is pressed, and the server told. What shows as pressed is what the server has.
function keep(path, body, field, buttons, notice, query, what, thanks) {
  const line = element("p", ""); // stands in for the notice while another answer is shown
  let [wanted, busy] = [null, false];

  function tell(text, failed = false) {
    notice.replaceChildren(text);
    line.replaceChildren(`“${query}”: ${text}`);
    for (const place of [notice, line]) {
      place.classList.toggle("failed", failed);
      if (failed) place.append(button("Send it again", again));
    }
    if (notice.isConnected) line.remove();
    else elsewhere.append(line);
  }

  function again() {
    buttons.find(([, value]) => value === wanted)[0].focus(); // the one that has the focus goes away
    send(wanted);
  }

  async function send(value) {
    wanted = value;
    tell("Saving …");
    if (busy) return; // the loop below sends it: of two requests at once, the older may arrive last
    busy = true;
    for (let sent = null; sent !== wanted; ) {
      sent = wanted;
      try {
        const answer = await api(path, { ...body, [field]: sent }, { keepalive: true });
        for (const [one, value] of buttons) one.setAttribute("aria-pressed", value === sent);
        if (sent === wanted) tell(thanks(sent, answer));
      } catch (error) {
        if (sent === wanted) tell(`${what} was not saved: ${error.message}.`, true);
      }
    }
    busy = false;
  }

  for (const [one, value] of buttons) one.onclick = () => send(value);
}

// A passage

function passage(entry, used) {
  const node = clone("passage");
  const [title, about, text, more, back] = parts(node, "title", "about", "text", "more", "back");
  const short = shortened(entry.text);
  let open = short === entry.text;
  let mark = null; // the citation that led here

  function draw(sentence) {
    const whole = open ? entry.text : short;
    const at = sentence ? whole.indexOf(sentence) : -1;
    if (at < 0) text.textContent = whole;
    else text.replaceChildren(whole.slice(0, at), element("mark", sentence), whole.slice(at + sentence.length));
    const which = element("span", ` of passage ${entry.number}`, { className: "unseen" });
    more.replaceChildren(open ? "Show less" : "Show more", which);
    more.setAttribute("aria-expanded", open);
  }

  function leave() {
    node.removeAttribute("aria-current");
    back.hidden = true;
    draw();
  }

  function highlight(sentence, from) {
    current?.();
    current = leave;
    mark = from;
    open = true;
    draw(sentence);
    node.setAttribute("aria-current", "true");
    back.hidden = false;
    node.focus({ preventScroll: true });
    node.scrollIntoView({ block: "nearest" });
  }

  node.id = `passage-${entry.number}`;
  title.append(`[${entry.number}] `, entry.title);
  if (/^https?:\/\//i.test(entry.url ?? "")) { // what other schemes do is not the reader's wish: javascript:, data:
    const rel = "noopener noreferrer nofollow";
    title.lastChild.replaceWith(element("a", entry.title, { href: entry.url, target: "_blank", rel }));
  }
  const facts = [entry.source || "unknown source", day(entry.published)];
  facts.push(`similarity ${entry.similarity.toPrecision(2)}`, `score ${entry.score.toPrecision(2)}`);
  if (!used) facts.push("not used");
  for (const fact of facts) about.append(" ", fact.nodeType ? fact : element("span", fact));
  more.hidden = open;
  more.onclick = () => {
    open = !open;
    draw();
  };
  back.onclick = () => {
    leave();
    mark.focus();
  };
  node.onkeydown = ({ key }) => {
    if (key === "Escape" && !back.hidden) back.click();
  };
  draw();
  return { node, title: entry.title, highlight };
}

function shortened(text) {
  const letters = [...text]; // no halves of letters
  return letters.length < 1.5 * SHORT ? text : `${letters.slice(0, SHORT).join("").replace(/\s+\S*$/, "")} …`;
}

function day(published) {
  const date = new Date(published ?? NaN);
  const format = { dateStyle: "long", timeZone: "UTC" }; // the server's days are UTC's
  return isNaN(date) ? "undated" : element("time", date.toLocaleDateString("en-GB", format), { dateTime: published });
}

// The collection, and what is missing to train on

function author(model) {
  return model === "extractive" ? "the extractive summariser, which copies sentences" : `a language model (${model})`;
}

function tally(choices) {
  if (needed === null) return; // not known yet
  const all = `${choices} of ${needed} choices`;
  $("tally").textContent = choices < needed ? `${all} that a training needs` : `${all}: enough to train`;
  Object.assign($("progress"), { hidden: false, max: needed, value: choices });
}

async function load() {
  collection.textContent = "Looking into the collection …";
  try {
    const [health, improve] = await Promise.all([api("health"), api("improve")]);
    collection.textContent = health.articles
      ? `There are ${counted(health.articles, "article")}, in ${counted(health.passages, "passage")}.`
      : "The collection is empty: put articles in with “python news.py ingest”.";
    needed = improve.needed;
    tally(improve.choices);
    $("writer").textContent = `Summaries are written by ${author(improve.model)}.`;
    const items = improve.questions.map((question) => button(question, () => {
      fields.q.value = question;
      $("ask").requestSubmit();
    }));
    $("examples").lastElementChild.replaceChildren(...items);
    $("examples").hidden = !results.querySelector(".welcome, .nothing") || !improve.questions.length;
  } catch (error) {
    collection.replaceChildren(problem("The collection cannot be looked into", error, load));
  }
}

$("ask").onsubmit = go;
$("ask").oninput = limitDates;
addEventListener("popstate", () => location.search === bar || visit()); // equal: only what follows # changed
visit();
load();
