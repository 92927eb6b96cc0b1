// Draws every figure of the page, and redraws them in the other theme: a theme is one plotly template, nothing more.
(() => {
  const root = document.documentElement;
  const themes = JSON.parse(document.getElementById("themes").textContent);
  const template = () => themes[root.dataset.theme];
  // Cells no larger than the null's bound are grey: the middle of the scale, up to the bound, is one colour.
  const quiet = (trace) => {
    const far = trace.meta?.quiet;
    if (!far) return;
    const { colorscale } = template().layout;
    const [low, , , , high] = colorscale.diverging;
    const grey = root.dataset.theme === "dark" ? "#4a4f59" : "#c9cacd";
    const middle = colorscale.diverging[2][1];
    const at = Math.min(far / 2, 0.499);
    trace.autocolorscale = false;
    trace.colorscale = [
      [0, low[1]], [0.5 - at, colorscale.diverging[1][1]], [0.5 - at, grey], [0.5, middle], [0.5 + at, grey],
      [0.5 + at, colorscale.diverging[3][1]], [1, high[1]],
    ];
  };
  const touch = matchMedia("(pointer: coarse)").matches; // there a drag must scroll the page, not zoom the figure
  const config = {
    responsive: true,
    displaylogo: false,
    typesetMath: false,
    modeBarButtons: [["toImage", "resetScale2d"]],
  };

  const plots = [...document.querySelectorAll(".plot")];
  for (const plot of plots) {
    const figure = JSON.parse(plot.closest("figure").querySelector("script").textContent);
    for (const trace of figure.data)
      if (trace.meta?.rows) trace.hovertext = trace.meta.rows.map((row) => trace.meta.columns.map((c) => `${row} · ${c}`));
    figure.data.forEach(quiet);
    Object.assign(figure.layout, { template: template(), dragmode: touch ? false : "zoom" });
    Plotly.newPlot(plot, figure.data, figure.layout, config);
  }

  // Where the logit lens is wider than the page, its last token is the one to see first.
  for (const wide of document.querySelectorAll(".from-end")) wide.scrollLeft = wide.scrollWidth;

  const button = document.getElementById("theme");
  const show = (name) => {
    root.dataset.theme = name;
    button.textContent = name === "dark" ? "Light" : "Dark";
    for (const plot of plots) {
      plot.data.forEach(quiet);
      Plotly.react(plot, plot.data, { ...plot.layout, template: template() }, config);
    }
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
