// The workbench: what stands in the forms is the address, and the address is what is shown.
(() => {
  const byId = (id) => document.getElementById(id);
  const unitBox = byId("unit");
  const panes = [];
  const FIELDS = ["model", "prompt", "answer", "foil", "corrupt", "quick", "unit"];
  const ORDER = ["prediction", "direct", "patching", "heads", "neurons", "tokens", "circuit"];
  const PREFIX = ["", "b."]; // the second pane's fields in the address

  // A request whose refusal is a sentence.
  const ask = async (address, how) => {
    const answer = await fetch(address, how);
    if (answer.ok) return answer;
    const text = await answer.text();
    let said = text;
    try { said = JSON.parse(text).error; } catch { /* it is a sentence already */ }
    throw new Error(said);
  };

  const drawIn = (element) => {
    for (const plot of element.querySelectorAll(".plot")) figures.draw(plot);
    for (const wide of element.querySelectorAll(".from-end")) wide.scrollLeft = wide.scrollWidth;
  };

  // The unit that a point of a picture stands for; "" where it stands for none.
  const unitOf = (words) => {
    const of = (pattern) => words.match(pattern)?.slice(1).map(Number);
    let found;
    if ((found = of(/^layer (\d+) head (\d+)$/) ?? of(/\bL(\d+)H(\d+)\b/))) return `L${found[0]}H${found[1]}`;
    if ((found = of(/^layer (\d+) position (\d+)\b/))) return `L${found[0]}T${found[1]}`;
    if ((found = of(/^depth (\d+) position (\d+)\b/))) return found[0] ? `L${found[0] - 1}T${found[1]}` : `T${found[1]}`;
    if ((found = of(/\bL(\d+) mlp\b/) ?? of(/^layer (\d+)$/))) return `L${found[0]}M`;
    if ((found = of(/^query (\d+)\b/) ?? of(/^position (\d+)\b/))) return `T${found[0]}`;
    return "";
  };

  class Pane {
    constructor(number) {
      this.number = number;
      this.root = byId("pane").content.cloneNode(true).querySelector(".pane");
      this.form = this.root.querySelector("form");
      this.head = this.root.querySelector(".head");
      this.sections = this.root.querySelector(".sections");
      this.root.setAttribute("aria-label", number ? "Second prompt" : "Prompt");
      this.form.addEventListener("submit", (event) => { event.preventDefault(); this.go(); });
      this.form.prompt.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); this.form.requestSubmit(); }
      });
      const { unit } = this.form;
      const looked = () => { if (this.shown && (this.shown.unit ?? "") !== unit.value.trim()) this.look(unit.value.trim()); };
      unit.addEventListener("change", looked);
      unit.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && this.shown) { event.preventDefault(); looked(); }
      });
      this.part(".stop").addEventListener("click", () => this.cancel());
      for (const link of this.root.querySelectorAll("[data-take]"))
        link.addEventListener("click", () => { link.href = `/${link.dataset.take}?${this.address()}`; });
      this.root.addEventListener("click", (event) => {
        const link = event.target.closest("a[data-unit]");
        const token = event.target.closest(".strip bdi");
        if (link) { event.preventDefault(); this.look(link.dataset.unit); }
        else if (token) this.look(`T${[...token.parentElement.querySelectorAll("bdi")].indexOf(token)}`);
      });
      byId("panes").append(this.root);
    }

    part(selector) { return this.root.querySelector(selector); }

    // What is asked, by name; what is empty is left out.
    state() {
      const given = new FormData(this.form);
      return Object.fromEntries(FIELDS.map((name) => [name, given.get(name) ?? ""]).filter(([, value]) => value !== ""));
    }

    address(more = {}) { return new URLSearchParams({ ...(this.shown ?? this.state()), ...more }).toString(); }

    fill(state) {
      for (const name of FIELDS) {
        const field = this.form.elements[name];
        if (field.type === "checkbox") field.checked = state[name] === "1";
        else if (state[name] !== undefined || name !== "model") field.value = state[name] ?? "";
      }
    }

    say(text, at, of) {
      const bar = this.part("progress");
      bar.hidden = at === undefined;
      if (at !== undefined) bar.value = (at - 1) / of;
      this.part("[role=status]").textContent = text;
    }

    fail(text) {
      const box = this.part(".error");
      box.textContent = text ?? "";
      box.hidden = !text;
    }

    busy(yes) {
      this.part(".stop").hidden = !yes;
      this.root.classList.toggle("busy", yes);
      this.part(".take").hidden = yes || !this.done;
    }

    cancel() {
      if (!this.running) return;
      this.running.abort();
      this.running = undefined;
      this.busy(false);
      this.say("Cancelled. What was finished stays.");
    }

    // Explain what the form asks. kept: the address says it already.
    async go(kept = false) {
      this.cancel();
      const state = this.state();
      const same = this.shown && FIELDS.every((f) => f === "unit" || (this.shown[f] ?? "") === (state[f] ?? ""));
      this.shown = state;
      this.done = false;
      if (!kept) remember();
      this.fail();
      if (!same) { this.head.replaceChildren(); this.sections.replaceChildren(); }
      const running = (this.running = new AbortController());
      this.busy(true);
      this.say("…");
      const began = performance.now();
      try {
        const answer = await ask(`/explain?${this.address()}`, { signal: running.signal });
        if (state.unit) this.look(state.unit, true);
        await this.read(answer, running);
        if (this.running !== running) return;
        if (this.done) this.say(`Done in ${((performance.now() - began) / 1000).toFixed(1)} s.`);
      } catch (error) {
        if (running.signal.aborted) return;
        this.fail(error.message === "Failed to fetch" ? "The workbench does not answer. Is it still running?" : error.message);
        this.say("");
      }
      this.running = undefined;
      this.busy(false);
    }

    // The events of an explanation, a line each.
    async read(answer, running) {
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines) if (this.running === running) this.take(JSON.parse(line));
      }
    }

    take(event) {
      if (event.step) {
        const count = event.of ? `${event.at}/${event.of} ` : "";
        this.say(`${count}${event.step}${event.left > 2 ? `, about ${Math.ceil(event.left)} s to go` : ""}`, event.at, event.of);
      } else if (event.head !== undefined) {
        this.head.innerHTML = event.head;
      } else if (event.section) {
        this.place(event.section, event.html);
      } else if (event.error) {
        this.fail(event.error);
        this.say("");
      } else if (event.done) {
        this.done = true;
      }
    }

    // Put a section in its place, drawn, its units within reach.
    place(name, html) {
      const box = document.createElement("div");
      box.dataset.section = name;
      box.innerHTML = html;
      box.querySelector("section").removeAttribute("id"); // two panes may show it
      const old = this.sections.querySelector(`[data-section=${name}]`);
      const after = [...this.sections.children].find((x) => ORDER.indexOf(x.dataset.section) > ORDER.indexOf(name));
      if (old) old.replaceWith(box);
      else this.sections.insertBefore(box, after ?? null);
      reach(box);
      drawIn(box);
      for (const plot of box.querySelectorAll(".plot"))
        plot.on?.("plotly_click", ({ points: [point] }) => {
          const unit = unitOf(figures.named(point).replace(/[\u2068\u2069]/g, ""));
          if (unit) this.look(unit);
        });
    }

    // Look at a unit: its pictures and changes, beside this prompt.
    async look(unit, kept = false) {
      this.form.unit.value = unit;
      this.shown = { ...(this.shown ?? this.state()), unit };
      if (!kept) remember();
      if (!unit) { shut(); return; }
      await inspect(this);
    }
  }

  // Every head, MLP and neuron that a text or table names becomes a way to it.
  const reach = (box) => {
    const way = (unit, text) => {
      const link = Object.assign(document.createElement("a"), { href: `#${unit}`, textContent: text });
      link.dataset.unit = unit;
      return link;
    };
    for (const row of box.querySelectorAll(".neurons tbody tr")) {
      const [layer, neuron] = [row.cells[0].textContent.trim(), row.cells[1]];
      neuron.replaceChildren(way(`L${layer}N${neuron.textContent.trim()}`, neuron.textContent.trim()));
    }
    for (const place of box.querySelectorAll(".finding, tbody th")) {
      const texts = document.createTreeWalker(place, NodeFilter.SHOW_TEXT);
      for (const text of Array.from({ length: 99 }, () => texts.nextNode()).filter(Boolean)) {
        const parts = text.data.split(/\b(L\d+H\d+|L\d+ mlp)\b/);
        if (parts.length > 1)
          text.replaceWith(...parts.map((part, at) => (at % 2 ? way(part.replace(" mlp", "M"), part) : part)));
      }
    }
  };

  // The figures take the width that is left.
  const fit = () => window.dispatchEvent(new Event("resize"));

  // The unit's box: one for both panes.
  let asked = 0;
  const inside = unitBox.querySelector(".inside");
  const inspect = async (pane) => {
    const mine = ++asked;
    if (unitBox.hidden) {
      unitBox.hidden = false;
      document.body.classList.add("looking");
      fit();
    }
    unitBox.classList.add("waits");
    try {
      const html = await (await ask(`/unit?${pane.address()}`)).text();
      if (mine !== asked) return;
      inside.innerHTML = html;
      ask(`/pictures?${pane.address()}`).then((answer) => answer.text()).then((pictures) => {
        if (mine !== asked) return;
        const place = inside.querySelector(".pictures");
        place.innerHTML = pictures;
        drawIn(place);
      }, (error) => { if (mine === asked) inside.querySelector(".pictures").textContent = error.message; });
      chance = undefined;
      ask(`/chance?${pane.address()}`).then((answer) => answer.json())
        .catch((error) => ({ reach: null, said: error.message }))
        .then((found) => { if (mine === asked) { chance = found; beside(); } });
      const range = inside.querySelector("input[type=range]");
      range.addEventListener("input", () => { inside.querySelector("output").textContent = range.value; change(pane, range.value); });
      inside.querySelector("button.texts")?.addEventListener("click", (event) => texts(pane, event.target.closest("p")));
    } catch (error) {
      if (mine !== asked) return;
      inside.replaceChildren(Object.assign(document.createElement("p"), { className: "error", textContent: error.message }));
    } finally {
      if (mine === asked) unitBox.classList.remove("waits");
    }
  };
  // What chance reaches comes after; rows that are within it are grey.
  let chance;
  const beside = () => {
    if (chance === undefined) return;
    inside.querySelector(".chance").textContent = chance.said;
    for (const row of inside.querySelectorAll("[data-change]"))
      row.classList.toggle("within", chance.reach !== null && Math.abs(row.dataset.change) <= chance.reach);
  };
  // While the strength moves, the last place it reached is asked, one request at a time.
  let wanted, asking;
  const change = async (pane, factor) => {
    wanted = factor;
    if (asking) return;
    asking = true;
    const mine = asked;
    while (wanted !== undefined && mine === asked) {
      const here = wanted;
      wanted = undefined;
      try {
        const html = await (await ask(`/change?${pane.address({ factor: here })}`)).text();
        if (mine === asked) { inside.querySelector(".changes").innerHTML = html; beside(); }
      } catch (error) {
        if (mine === asked) inside.querySelector(".changes").textContent = error.message;
      }
    }
    asking = false;
    if (mine !== asked) wanted = undefined;
  };
  const texts = async (pane, place) => {
    place.textContent = "Reading the texts …";
    try { place.innerHTML = await (await ask(`/texts?${pane.address()}`)).text(); }
    catch (error) { place.textContent = error.message; }
  };
  const shut = () => {
    asked++;
    if (unitBox.hidden) return;
    unitBox.hidden = true;
    document.body.classList.remove("looking");
    inside.replaceChildren();
    fit();
  };
  unitBox.querySelector(".close").addEventListener("click", () => {
    shut();
    for (const pane of panes) { pane.form.unit.value = ""; if (pane.shown) delete pane.shown.unit; }
    remember();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !unitBox.hidden) unitBox.querySelector(".close").click();
  });

  // The address: what is shown in both panes.
  const remember = () => {
    const all = panes.flatMap((pane, at) => Object.entries(pane.shown ?? {}).map(([name, value]) => [PREFIX[at] + name, value]));
    const address = all.length ? `?${new URLSearchParams(all)}` : "/";
    if (address !== location.search) history.pushState(null, "", address);
    title();
  };
  const title = () => {
    const prompt = panes[0].shown?.prompt;
    document.title = prompt ? `${prompt.slice(0, 60)} – stratoscope` : "stratoscope workbench";
  };
  const restore = () => {
    const given = new URLSearchParams(location.search);
    const of = (prefix) => Object.fromEntries(FIELDS.map((f) => [f, given.get(prefix + f)]).filter(([, v]) => v !== null));
    const states = PREFIX.map(of);
    pair(states[1].prompt !== undefined);
    panes.forEach((pane, at) => {
      pane.cancel();
      pane.fill(states[at]);
      if (states[at].prompt) pane.go(true);
    });
    if (!states.some((state) => state.unit)) shut();
    title();
  };

  const button = byId("compare");
  const pair = (yes) => {
    button.setAttribute("aria-pressed", yes);
    button.textContent = yes ? "Only the first" : "Compare two";
    document.body.classList.toggle("two", yes);
    if (yes && panes.length === 1) panes.push(new Pane(1));
    if (!yes && panes.length === 2) { panes[1].cancel(); panes.pop().root.remove(); }
    fit();
  };
  button.addEventListener("click", () => {
    const yes = panes.length === 1;
    pair(yes);
    if (yes) { panes[1].fill(panes[0].state()); panes[1].form.unit.value = ""; panes[1].form.prompt.focus(); }
    remember();
  });

  const folder = byId("files");
  folder.addEventListener("toggle", async () => {
    if (!folder.open) return;
    const list = folder.querySelector("ul");
    try {
      const names = await (await ask("/files")).json();
      list.replaceChildren(...names.map((name) => {
        const link = Object.assign(document.createElement("a"), { textContent: name, target: "_blank", rel: "noopener" });
        link.href = `/open?${new URLSearchParams({ path: name })}`;
        const item = document.createElement("li");
        item.append(link);
        return item;
      }));
      if (!names.length) list.textContent = "None yet.";
    } catch (error) { list.textContent = error.message; }
  });

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const show = (name) => { figures.theme(name); byId("theme").textContent = name === "dark" ? "Light" : "Dark"; };
  byId("theme").addEventListener("click", () => show(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  dark.addEventListener("change", () => show(dark.matches ? "dark" : "light"));
  show(dark.matches ? "dark" : "light");

  panes.push(new Pane(0));
  window.addEventListener("popstate", restore);
  restore();
  if (!location.search) panes[0].form.prompt.focus();
})();
