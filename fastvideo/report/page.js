"use strict";
const { runs, colours, charts } = JSON.parse(document.getElementById("data").textContent);

const number = (value) => (value === null ? "not finite" : Number(value.toPrecision(4)));

for (const plot of document.querySelectorAll(".plot")) {
  const { first, last, curves } = charts[plot.dataset.key];
  const [cursor, tip] = [plot.querySelector(".cursor"), plot.querySelector(".tip")];
  const nearest = (x, at) => x.reduce((best, value, i) => (Math.abs(value - at) < Math.abs(x[best] - at) ? i : best), 0);
  const line = (...parts) => tip.appendChild(document.createElement("div")).append(...parts);
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const place = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const found = curves.map((curve) => [curve, nearest(curve.x, first + place * (last - first))]);
    const at = found[0][0].x[found[0][1]];
    tip.replaceChildren();
    line(`iteration ${at}`);
    for (const [curve, i] of found) {
      const key = document.createElement("i");
      key.className = `key ${colours[curve.run]}`;
      const other = curve.x[i] === at ? "" : ` at ${curve.x[i]}`;
      line(key, `${number(curve.value[i])}, mean ${number(curve.mean[i])}${other}${runs.length > 1 ? ` (${runs[curve.run]})` : ""}`);
    }
    const across = (100 * (at - first)) / (last - first);
    cursor.style.left = `${across}%`;
    tip.style.left = across < 50 ? `calc(${across}% + 10px)` : "auto";
    tip.style.right = across < 50 ? "auto" : `calc(${100 - across}% + 10px)`;
    plot.classList.add("hover");
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => plot.classList.remove("hover"));
}

// Clips play while they can be seen, unless the reader wants no motion; those of a few pixels are not smoothed.
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting && !still) target.play().catch(() => {}); // a browser may want a click first
    else target.pause();
  }
});
for (const video of document.querySelectorAll("video")) {
  video.addEventListener("loadedmetadata", () => video.classList.toggle("tiny", video.videoWidth < 128));
  if (video.readyState) video.classList.toggle("tiny", video.videoWidth < 128);
  video.addEventListener("pointerenter", () => (video.controls = true)); // they hide much of a small clip
  video.addEventListener("pointerleave", () => (video.controls = false));
  seen.observe(video);
}
