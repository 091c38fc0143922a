"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const theme = (name) => { root.dataset.theme = name; };
theme(dark.matches ? "dark" : "light");
dark.addEventListener("change", (event) => theme(event.matches ? "dark" : "light"));
document.querySelector("button.theme").addEventListener("click", () => theme(root.dataset.theme === "dark" ? "light" : "dark"));

const tip = document.createElement("div");
tip.className = "tip";
document.body.append(tip);
const element = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const row = (name, value, tone) => {
  const line = element("div", "row");
  const label = element("span", "", name);
  if (tone) label.prepend(element("i", "key tone " + tone));
  line.append(label, element("span", "", value));
  return line;
};
const place = (x, y) => {
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth ? x - box.width - 12 : x + 16;
  const top = y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = Math.max(8, top) + "px";
  tip.style.opacity = 1;
};
const hide = () => { tip.style.opacity = 0; };
const nats = (value) => value === null ? "no score" : value.toFixed(3).replace("-", "−");

for (const svg of document.querySelectorAll("svg.chart")) {
  const chart = data.charts[svg.dataset.chart];
  const cursor = svg.querySelector(".cursor");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    let nearest = 0;
    chart.at.forEach((at, index) => { if (Math.abs(at - x) < Math.abs(chart.at[nearest] - x)) nearest = index; });
    cursor.setAttribute("x1", chart.at[nearest]);
    cursor.setAttribute("x2", chart.at[nearest]);
    cursor.style.opacity = 0.8;
    tip.replaceChildren(element("div", "head", chart.x + " " + chart.xs[nearest]));
    for (const line of chart.series) {
      const value = line.values[String(chart.xs[nearest])];
      if (value !== undefined) tip.append(row(line.label, value, line.tone));
    }
    place(event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", () => { cursor.style.opacity = 0; hide(); });
}

document.addEventListener("pointerover", (event) => {
  const token = event.target.closest ? event.target.closest(".t") : null;
  if (!token) { if (!event.target.closest || !event.target.closest("svg")) hide(); return; }
  const rollout = data.rollouts[token.closest(".rollout").dataset.rollout];
  const index = Number(token.dataset.i);
  const p = rollout.p[index], q = rollout.q[index];
  const head = element("div", "head", "token " + (index + 1) + "  ");
  head.append(element("b", "", token.textContent));
  tip.replaceChildren(head, row("student log p", nats(p)), row("teacher log q", nats(q)));
  if (p !== null && q !== null) tip.append(row("log q − log p", (q > p ? "+" : "") + nats(q - p)));
  const top = rollout.top[index] || [];
  if (top.length) {
    tip.append(element("hr"), element("div", "head", "teacher would say"));
    for (const [text, logprob] of top) {
      const line = element("div", "alt");
      const track = element("div", "track");
      const fill = element("i");
      fill.style.width = 100 * Math.exp(logprob) + "%";
      track.append(fill);
      const share = 100 * Math.exp(logprob);
      line.append(element("b", "", text), track, element("span", "", share >= 0.1 ? share.toFixed(1) + "%" : "<0.1%"));
      tip.append(line);
    }
  }
  const box = token.getBoundingClientRect();
  place(box.left, box.bottom - 12);
});
