// What the page can do: draw its charts, sort and filter tables, copy commands. All text is set as text, never as HTML.
(() => {
  "use strict";
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  const make = (name, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  };
  const say = (text) => { document.getElementById("said").textContent = text; };

  // --- Charts: Vega with its own interpreter, so that no text is ever run as code ---

  const read = (id) => JSON.parse(document.getElementById(id)?.textContent ?? "{}");
  const data = Object.fromEntries(Object.entries(read("data")).map(([name, [fields, rows]]) => [
    name, rows.map((row) => Object.fromEntries(fields.map((field, place) => [field, row[place]]))),
  ]));
  const charts = read("charts");

  const tip = document.getElementById("tip");
  const show = (handler, event, item, value) => {
    if (value === null || value === undefined || value === "") { tip.hidden = true; return; }
    const lines = Object.entries(value).filter(([, text]) => text !== null && text !== "").map(([name, text], place) => (
      place ? make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: String(text) }))
        : make("div", { className: "head", textContent: String(text) })
    ));
    tip.replaceChildren(make("dl", {}, ...lines));
    tip.hidden = false;
    const { clientWidth, clientHeight } = document.documentElement;
    const x = Math.min(event.clientX + 14, clientWidth - tip.offsetWidth - 8);
    const below = event.clientY + 14 + tip.offsetHeight < clientHeight;
    tip.style.left = `${Math.max(8, x)}px`;
    tip.style.top = `${below ? event.clientY + 14 : Math.max(8, event.clientY - tip.offsetHeight - 14)}px`;
  };
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
  document.addEventListener("scroll", () => { tip.hidden = true; }, { capture: true, passive: true });

  const draw = async (id, spec) => {
    const place = document.getElementById(id);
    const own = Object.fromEntries(spec.datasets.map((name) => [name, data[`${id}/${name}`]]));
    const used = { ...spec, datasets: { layers: data.layers ?? [], ...own } };
    const inner = make("div");
    place.append(inner);
    const { view } = await vegaEmbed(inner, used, {
      ast: true, renderer: "svg", actions: false, defaultStyle: false, tooltip: show, mode: "vega-lite",
    });
    view.addEventListener("click", (event, item) => {
      const row = document.getElementById(`layer-${item?.datum?.i}`);
      if (row) location.hash = row.id;
    });
    return view;
  };

  const drawAll = async () => {
    for (const [id, spec] of Object.entries(charts)) {
      try { await draw(id, spec); } catch (error) {
        document.getElementById(id).append(make("p", { className: "dim", textContent: "This chart could not be drawn; the table below has its figures." }));
        console.error(error);
      }
    }
    document.documentElement.dataset.charts = "drawn";
    // What can be scrolled is reached by the keyboard; what cannot is no stop on the way.
    all(".wide").forEach((box) => { if (box.scrollWidth > box.clientWidth) box.tabIndex = 0; });
  };

  // --- Tables ---

  const orderOf = (cell) => ("order" in cell.dataset ? Number(cell.dataset.order) : null);
  const compare = (one, other, sign) => {
    const [first, second] = [orderOf(one), orderOf(other)];
    if (first !== null && second !== null) return sign * (first - second);
    if (first !== null || second !== null) return first === null ? 1 : -1; // what was not measured comes last
    return sign * one.textContent.localeCompare(other.textContent, "en", { numeric: true });
  };

  const sortable = (table) => {
    const body = table.tBodies[0];
    const original = Array.from(body.rows);
    const heads = Array.from(table.tHead.rows[0].cells);
    const sort = (place) => {
      const now = heads[place].getAttribute("aria-sort");
      // The first press shows what is worst or largest; names and places begin with the first.
      const first = heads[place].classList.contains("n") && place ? "descending" : "ascending";
      const second = first === "ascending" ? "descending" : "ascending";
      const next = now === null ? first : now === first ? second : null;
      heads.forEach((head) => head.removeAttribute("aria-sort"));
      const rows = next === null ? original : [...original].sort((a, b) => (
        compare(a.cells[place], b.cells[place], next === "ascending" ? 1 : -1)
      ));
      if (next !== null) heads[place].setAttribute("aria-sort", next);
      body.append(...rows);
      const name = heads[place].textContent;
      say(next === null ? "In the order of the network" : `Sorted by ${name}, ${next}`);
    };
    heads.forEach((head, place) => {
      const button = make("button", { type: "button" }, ...head.childNodes);
      button.addEventListener("click", () => sort(place));
      head.append(button);
    });
  };

  const filterable = (box) => {
    const form = box.querySelector("form.filter");
    const rows = Array.from(box.querySelector("tbody").rows);
    const standing = rows.map((row) => row.querySelector(".sign")?.classList[1] ?? "");
    const words = rows.map((row) => row.textContent.toLowerCase());
    const count = form.querySelector("output");
    const apply = () => {
      const wanted = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
      const boxes = all("input[name=sign]", form);
      const signs = new Set(boxes.filter((each) => each.checked).map((each) => each.value));
      let left = 0;
      rows.forEach((row, place) => {
        row.hidden = !((!boxes.length || signs.has(standing[place])) && wanted.every((word) => words[place].includes(word)));
        left += row.hidden ? 0 : 1;
      });
      count.textContent = left === rows.length ? `${rows.length} rows` : `${left} of ${rows.length} rows`;
    };
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    apply();
    return () => { form.reset(); apply(); };
  };

  const resets = all(".table.tools").map((box) => { sortable(box.querySelector("table")); return filterable(box); });

  // --- Links to what is folded or filtered away, commands to copy, printing ---

  const arrive = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    if (target.hidden) resets.forEach((reset) => reset());
    for (let each = target; each; each = each.parentElement) if (each.tagName === "DETAILS") each.open = true;
    target.scrollIntoView({ block: "nearest" });
  };
  window.addEventListener("hashchange", arrive);

  all(".code").forEach((box) => {
    const button = box.querySelector("button.copy");
    if (!navigator.clipboard) return;
    button.hidden = false;
    button.addEventListener("click", async () => {
      try { await navigator.clipboard.writeText(box.querySelector("code").textContent); } catch { return; }
      button.textContent = "Copied";
      say("Copied");
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  });

  drawAll().then(arrive);
})();
