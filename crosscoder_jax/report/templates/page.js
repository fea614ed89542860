"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const options = { responsive: true, displayModeBar: false, displaylogo: false };
  const drawn = [];
  for (const holder of document.querySelectorAll("[data-figure]")) {
    const figure = figures[holder.dataset.figure];
    Plotly.newPlot(holder, figure.data, figure.layout, options);
    drawn.push(holder);
  }
  for (const group of document.querySelectorAll("[data-scale-toggle]")) {
    group.addEventListener("change", (event) => {
      for (const holder of drawn) {
        const meta = figures[holder.dataset.figure].layout.meta;
        if (!meta || !meta.axes) continue;
        const scale = event.target.value;
        const update = { "yaxis.title.text": scale === "log" ? "latents, log scale" : "latents" };
        for (const [key, value] of Object.entries(meta.axes[scale])) update["yaxis." + key] = value;
        Plotly.relayout(holder, update);
      }
    });
  }
  const resizeAll = () => drawn.forEach((holder) => Plotly.Plots.resize(holder));
  window.addEventListener("beforeprint", () => {
    document.body.classList.add("printing");
    resizeAll();
  });
  window.addEventListener("afterprint", () => {
    document.body.classList.remove("printing");
    resizeAll();
  });
})();
