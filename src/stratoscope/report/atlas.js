// Hides the papers that the filters leave out. The filters stand in the address, so that a view can be sent.
(() => {
  const papers = JSON.parse(document.getElementById("atlas").textContent);
  const form = document.getElementById("filters");
  const rows = [...document.querySelectorAll("[data-key]")];
  const number = (text, otherwise) => (text === "" || text === undefined ? otherwise : Number(text));

  // Whether a paper is shown: all that is asked of claims must be true of one and the same claim.
  const shown = (paper, asked) => {
    const words = (asked.search ?? "").toLowerCase().split(/\s+/).filter(Boolean);
    const null_ = (asked.null ?? "").toLowerCase();
    const most = number(asked.seconds, Infinity);
    const ofClaims = asked.subject || null_ || most < Infinity;
    const claim = (c) =>
      (!asked.subject || c.subject === asked.subject) && c.nulls.toLowerCase().includes(null_) &&
      (most === Infinity || (c.seconds >= 0 && c.seconds <= most));
    return words.every((word) => paper.text.includes(word)) &&
      (!asked.level || paper.level === asked.level) && (!asked.word || paper.words.includes(asked.word)) &&
      paper.year >= number(asked.from, 0) && paper.year <= number(asked.to, 9999) &&
      (!ofClaims || paper.claims.some(claim));
  };

  const update = () => {
    const asked = Object.fromEntries([...new FormData(form)].filter(([, value]) => value !== ""));
    const keys = new Set(papers.filter((paper) => shown(paper, asked)).map((paper) => paper.key));
    for (const row of rows) row.hidden = !keys.has(row.dataset.key);
    document.getElementById("count").textContent = `${keys.size} of ${papers.length} shown`;
    for (const section of document.querySelectorAll("section[data-rows]")) {
      const none = ![...section.querySelectorAll("[data-key]")].some((row) => !row.hidden);
      section.querySelector(".none").hidden = !none;
    }
    history.replaceState(null, "", Object.keys(asked).length ? `#${new URLSearchParams(asked)}` : location.pathname);
  };
  const restore = () => {
    for (const [name, value] of new URLSearchParams(location.hash.slice(1)))
      if (form.elements[name]) form.elements[name].value = value;
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update));
  for (const link of document.querySelectorAll("a[data-open]"))
    link.addEventListener("click", (event) => {
      event.preventDefault(); // the address keeps the filters
      const row = document.getElementById(link.dataset.open);
      row.open = true;
      row.scrollIntoView({ block: "start" });
      row.querySelector("summary").focus();
    });
  form.hidden = false;
  restore();
  update();
})();
