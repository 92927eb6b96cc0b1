// Draws figures, and redraws them in the other theme: a theme is one plotly template, nothing more.
const figures = (() => {
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
  // Words in cells are black or white, whichever is read better on the colour of their cell (4.5 to 1 at least).
  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const bright = (rgb) => {
    const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const legible = (plot) => {
    const [{ zmin, zmax, colorscale }] = plot.data;
    const { diverging, sequential } = template().layout.colorscale;
    const scale = colorscale ?? (zmin < 0 ? diverging : sequential);
    for (const label of plot.querySelectorAll(".heatmap-label")) {
      const at = Math.min(Math.max((label.__data__.z - zmin) / (zmax - zmin), 0), 1);
      const next = Math.max(scale.findIndex(([place]) => place >= at), 1);
      const [[from, before], [to, after]] = [scale[next - 1], scale[next]];
      const part = (at - from) / (to - from || 1);
      const here = channels(before).map((c, i) => c + part * (channels(after)[i] - c));
      label.querySelector("text").style.fill = bright(here) > 0.179 ? "#000" : "#fff";
    }
  };
  const touch = matchMedia("(pointer: coarse)").matches; // there a drag must scroll the page, not zoom the figure
  const config = {
    responsive: true,
    displaylogo: false,
    typesetMath: false,
    modeBarButtons: [["toImage", "resetScale2d"]],
  };

  const drawn = new Set();

  // Draw the figure of one `.plot`, whose data stand in the script beside it.
  const draw = (plot) => {
    const figure = JSON.parse(plot.closest("figure").querySelector("script").textContent);
    for (const trace of figure.data)
      if (trace.meta?.rows) trace.hovertext = trace.meta.rows.map((row) => trace.meta.columns.map((c) => `${row} · ${c}`));
    figure.data.forEach(quiet);
    Object.assign(figure.layout, { template: template(), dragmode: touch ? false : "zoom" });
    // A wide lens is shown from its last token: its layers stand at that side too.
    const scroll = plot.parentElement;
    if (scroll.matches(".from-end") && scroll.scrollWidth > scroll.clientWidth) {
      const { l, r } = figure.layout.margin;
      Object.assign(figure.layout.margin, { l: r, r: l });
      figure.layout.yaxis.side = "right";
    }
    Plotly.newPlot(plot, figure.data, figure.layout, config);
    if (figure.data[0]?.texttemplate && figure.data[0].type === "heatmap") {
      legible(plot);
      plot.on("plotly_afterplot", () => legible(plot));
    }
    drawn.add(plot);
  };

  // What a clicked point stands for, in the words of the figure: "layer 3 head 5", "L3H5", ...
  const named = ({ data, pointNumber: at }) =>
    data.meta?.rows ? `${data.meta.rows[at[0]]} ${data.meta.columns[at[1]]}` : data.hovertext?.[at] ?? "";

  const theme = (name) => {
    root.dataset.theme = name;
    for (const plot of drawn) {
      if (!plot.isConnected) { drawn.delete(plot); continue; }
      plot.data.forEach(quiet);
      Plotly.react(plot, plot.data, { ...plot.layout, template: template() }, config);
    }
  };
  return { draw, named, theme };
})();
