// Draws every figure of the page (figures.js), and makes ways from one to another.
(async () => {
  // plotly.js lies in the page packed, at a third of its size.
  const unpack = async (base64) => {
    const packed = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const ready = "DecompressionStream" in window;
  document.getElementById("old").hidden = ready;
  if (ready) {
    const library = document.createElement("script");
    library.textContent = await unpack(document.getElementById("plotly").textContent);
    document.head.append(library);
    library.remove();
  }

  const plots = ready ? [...document.querySelectorAll(".plot")] : [];
  plots.forEach(figures.draw);

  // A head that has a row in the table is a way there, from every sentence and picture that names it.
  const rows = new Map([...document.querySelectorAll("#heads tbody th")].map((th) => [th.firstChild.textContent.trim(), th]));
  for (const [name, th] of rows) th.id = name;
  for (const sentence of document.querySelectorAll(".finding")) {
    const texts = document.createTreeWalker(sentence, NodeFilter.SHOW_TEXT);
    for (const text of Array.from({ length: 99 }, () => texts.nextNode()).filter(Boolean)) {
      const parts = text.data.split(/(L\d+H\d+)/).map((part) => {
        const link = rows.has(part) && sentence.closest("section").id !== "heads" && document.createElement("a");
        return link ? Object.assign(link, { href: `#${part}`, textContent: part }) : part;
      });
      text.replaceWith(...parts);
    }
  }
  for (const plot of plots.filter((plot) => !plot.closest("#heads")))
    plot.on?.("plotly_click", ({ points: [point] }) => {
      const words = figures.named(point);
      const [, layer, head] = words.match(/L(\d+)H(\d+)|^layer (\d+) head (\d+)$/)?.filter((x) => x !== undefined) ?? [];
      if (rows.has(`L${layer}H${head}`)) location.hash = `L${layer}H${head}`;
    });

  // Where the logit lens is wider than the page, its last token is the one to see first.
  for (const wide of document.querySelectorAll(".from-end")) wide.scrollLeft = wide.scrollWidth;

  const button = document.getElementById("theme");
  const root = document.documentElement;
  const show = (name) => {
    figures.theme(name);
    button.textContent = name === "dark" ? "Light" : "Dark";
  };
  button.textContent = root.dataset.theme === "dark" ? "Light" : "Dark";
  button.addEventListener("click", () => show(root.dataset.theme === "dark" ? "light" : "dark"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => show(event.matches ? "dark" : "light"));

  // The table of contents marks the section that is being read.
  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
  const watch = new IntersectionObserver(
    (entries) => entries.forEach((entry) => links.get(entry.target.id)?.classList.toggle("here", entry.isIntersecting)),
    { rootMargin: "-30% 0px -65% 0px" },
  );
  for (const id of links.keys()) watch.observe(document.getElementById(id));
})();
