"use strict";

// A click on a column's head sorts its table; cells say by data-value what they are sorted by.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === ""); // what is not known comes last
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}

// The values under the pointer, read back from the paths.
const shown = (value) => Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
const names = [...document.querySelectorAll("#runs-legend li")].map((item) => item.textContent.trim());
for (const plot of document.querySelectorAll(".plot")) {
  const svg = plot.querySelector("svg");
  const numbers = (text) => text.split(" ").map(Number);
  const [left, top, right, bottom] = numbers(plot.dataset.box);
  const [first, last] = numbers(plot.dataset.x);
  const [low, high] = numbers(plot.dataset.y);
  const log = plot.dataset.log === "true";
  const step = (x) => first + ((x - left) / (right - left)) * (last - first);
  const level = (y) => {
    const part = (bottom - y) / (bottom - top);
    return log ? low * (high / low) ** part : low + part * (high - low);
  };
  const series = [...svg.querySelectorAll("[data-run]")].map((group) => ({
    run: Number(group.dataset.run),
    points: [...group.querySelector("path").getAttribute("d").matchAll(/(-?[\d.]+) (-?[\d.]+)/g)].map((m) => [+m[1], +m[2]]),
  }));
  const rule = document.createElementNS(svg.namespaceURI, "line");
  rule.setAttribute("style", "stroke: var(--mark); stroke-width: 0.8");
  const reading = document.createElement("div");
  reading.className = "reading";
  reading.hidden = true;
  plot.append(reading);
  const leave = () => { reading.hidden = true; rule.remove(); };
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("pointermove", (event) => {
    const area = svg.getBoundingClientRect();
    const at = ((event.clientX - area.left) / area.width) * svg.viewBox.baseVal.width;
    const near = series.map(({ run, points }) => ({
      run, point: points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)),
    }));
    const closest = near.reduce((a, b) => (Math.abs(b.point[0] - at) < Math.abs(a.point[0] - at) ? b : a));
    const x = closest.point[0];
    rule.setAttribute("x1", x); rule.setAttribute("x2", x);
    rule.setAttribute("y1", top); rule.setAttribute("y2", bottom);
    svg.append(rule);
    const heading = document.createElement("div");
    heading.textContent = `${plot.dataset.axis} ${Math.round(step(x)).toLocaleString("en")}`;
    reading.replaceChildren(heading);
    for (const { run, point } of near) {
      const line = document.createElement("div");
      const swatch = document.createElement("i");
      swatch.style.borderTopColor = `var(--c${run % Number(plot.dataset.colours)})`;
      line.append(swatch, shown(level(point[1])), names[run] ? `  ${names[run]}` : "");
      reading.append(line);
    }
    reading.hidden = false;
    const place = (x / svg.viewBox.baseVal.width) * area.width;
    const onTheLeft = place > area.width / 2;
    reading.style.left = onTheLeft ? "auto" : `${place + 10}px`;
    reading.style.right = onTheLeft ? `${area.width - place + 10}px` : "auto";
  });
}

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
