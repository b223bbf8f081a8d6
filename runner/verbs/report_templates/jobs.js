/** The table of jobs: bodies of a hundred rows, of which those near the screen are filled. */
const jobs = (() => {
  const CHUNK = 100; // rows
  const table = one("#table"), head = one("thead", table), find = one("#find"), sort = one("#sort"), status = one(".status");
  const away = (value) => Math.max(value, 1 / value);
  const part = (measured, expected) => (measured > 0 && expected > 0 ? measured / expected : undefined);
  for (const [place, job] of data.jobs.entries()) {
    job.place = place;
    job.state = word(job.status);
    job.warnings ||= [];
    job.ratio = part(job.gpu, job.forecast);
    job.memory_ratio = part(job.memory, job.memory_forecast);
    job.text = [job.id, word(job.host), word(job.shard), word(job.code)].join("\n").toLowerCase();
  }

  // What the table shows. `value` sorts; jobs without one come last in both directions.
  const every = [
    { key: "order", name: "manifest's order", value: (job) => job.place },
    { key: "id", name: "id", title: "Job", value: (job) => job.id },
    { key: "state", name: "status", title: "Status", value: (job) => job.state },
    { key: "warnings", name: "warnings", title: "!", value: (job) => job.warnings.length || undefined },
    { key: "wall", name: "wall seconds", title: "Wall", number: true, value: (job) => job.wall },
    { key: "gpu", name: "GPU seconds", title: "GPU", number: true, value: (job) => job.gpu },
    { key: "ratio", name: "GPU seconds of forecast", title: "of forecast", number: true, value: (job) => job.ratio, order: (job) => job.ratio && away(job.ratio) },
    { key: "memory", name: "device memory", title: "Memory", number: true, value: (job) => job.memory },
    { key: "memory_ratio", name: "memory of forecast", title: "of forecast", number: true, value: (job) => job.memory_ratio, order: (job) => job.memory_ratio && away(job.memory_ratio) },
    { key: "cost", name: "cost", title: "Cost", number: true, value: (job) => job.cost },
  ];
  const COLUMNS = every.filter(({ key, value }) => ["order", "id", "state"].includes(key) || data.jobs.some((job) => value(job) !== undefined));
  const SHOWN = { wall: duration, gpu: duration, ratio, memory: bytes, memory_ratio: ratio, cost: money };
  const titled = COLUMNS.filter(({ title }) => title);
  const WIDTH = titled.length + 3; // columns: picture, the above, output, details
  const by = Object.fromEntries(COLUMNS.map((column) => [column.key, column]));

  let sorted = { key: "order", down: false }, wanted = "", shown = data.jobs, chunks = [], height = 66;
  const unfolded = new Set(); // places of jobs whose details are shown

  // -- previews
  const blocks = new Map();
  const pictureOf = (job) => {
    const number = Math.floor(job.place / data.block);
    if (!blocks.has(number)) {
      const block = document.getElementById(`pictures-${number}`);
      if (!block || (document.readyState === "loading" && !block.nextElementSibling)) return null; // not loaded yet
      blocks.set(number, JSON.parse(block.textContent));
    }
    return blocks.get(number)[job.place % data.block];
  };
  const frame = (job) => {
    const box = make("div", "frame");
    if (job.picture) {
      const picture = make("img");
      picture.alt = `Preview of ${job.id}`;
      picture.decoding = "async";
      const source = pictureOf(job);
      if (source) picture.src = `data:image/jpeg;base64,${source}`;
      else picture.dataset.waiting = "";
      picture.place = job.place;
      box.append(picture);
    } else if (job.code !== undefined && job.state !== "succeeded" && job.state !== "skipped") {
      box.append(make("span", "place-holder s-failed", word(job.code)));
    } else if (job.without !== undefined) {
      box.append(make("span", "place-holder", `no picture: ${word(job.without)}`));
    } else box.append(make("span", "place-holder", job.output ? "no picture" : job.state));
    return box;
  };

  // -- rows
  const cell = (names, label, ...children) => {
    const made = make("td", names);
    if (label) made.dataset.label = label;
    made.append(...children);
    return made;
  };
  const row = (job) => {
    const made = make("tr", `row s-${job.state}`);
    made.tabIndex = -1;
    made.id = `job-${job.place}`;
    const name = make("th", "name");
    name.scope = "row";
    name.append(foreign(job.id));
    const cells = titled.slice(1).map(({ key, title, value, number }) => {
      if (key === "state") return cell("state", "", make("span", `badge s-${job.state}`, job.state));
      if (key === "warnings") {
        if (!job.warnings.length) return cell("warnings empty", "");
        const sign = make("span", "badge warned", job.warnings.length === 1 ? "!" : `! ${job.warnings.length}`);
        sign.title = job.warnings.join("\n");
        sign.setAttribute("role", "img");
        sign.setAttribute("aria-label", counted(job.warnings.length, "warning"));
        return cell("warnings", "", sign);
      }
      const known = value(job);
      return cell(`${number ? "number" : ""}${known === undefined ? " empty" : ""}`, title, known === undefined ? "" : SHOWN[key](known));
    });
    const output = cell(job.output ? "output" : "output empty", "");
    if (job.link) {
      const link = make("a", "", "open");
      link.href = job.link;
      link.target = "_blank";
      link.rel = "noreferrer noopener";
      link.setAttribute("aria-label", `Open the output of ${job.id}`);
      output.append(link);
    }
    const more = make("button", "more-button", "Details");
    more.type = "button";
    more.setAttribute("aria-expanded", String(unfolded.has(job.place)));
    more.setAttribute("aria-label", `Details of ${job.id}`);
    more.place = job.place;
    made.append(cell("picture", "", frame(job)), name, ...cells, output, cell("details", "", more));
    return made;
  };

  const fact = (list, name, ...values) => {
    const shown = values.filter((value) => value !== undefined && value !== "");
    if (!shown.length) return;
    const entry = make("div"), what = make("dd");
    what.append(foreign(shown.join(", ")));
    entry.append(make("dt", "", name), what);
    list.append(entry);
  };
  const bar = (share) => {
    const space = "http://www.w3.org/2000/svg", picture = document.createElementNS(space, "svg");
    const full = document.createElementNS(space, "rect");
    picture.setAttribute("viewBox", "0 0 100 10");
    picture.setAttribute("preserveAspectRatio", "none");
    picture.setAttribute("aria-hidden", "true");
    full.setAttribute("class", "full");
    full.setAttribute("width", (100 * share).toFixed(2));
    full.setAttribute("height", "10");
    picture.append(full);
    return picture;
  };
  const details = (job) => {
    const made = make("tr", `more s-${job.state}`), box = make("td"), list = make("dl", "about");
    box.colSpan = WIDTH;
    if (job.error) box.append(make("pre", "error", job.error));
    fact(list, "Why", word(job.reason));
    fact(list, "Where", word(job.host), job.shard === undefined ? "" : `shard ${word(job.shard)}`, job.attempt === undefined ? "" : `attempt ${job.attempt}`);
    fact(list, "Output", job.output);
    fact(list, "Film", job.film === undefined ? "" : duration(job.film), job.frames === undefined ? "" : `${job.frames} frames`, job.fps === undefined ? "" : `${job.fps} fps`, job.size ? `${job.size[0]} × ${job.size[1]}` : "");
    fact(list, "GPU", job.gpu === undefined ? "" : duration(job.gpu), job.forecast === undefined ? "" : `forecast ${duration(job.forecast)}`);
    fact(list, "Memory", job.memory === undefined ? "" : `device ${bytes(job.memory)}`, job.memory_forecast === undefined ? "" : `forecast ${bytes(job.memory_forecast)}`, job.host_memory === undefined ? "" : `host ${bytes(job.host_memory)}`);
    job.warnings.forEach((note) => fact(list, "Warning", note));
    if (job.without !== undefined) fact(list, "Preview", `no picture: ${word(job.without)}`);
    box.append(list);
    if (job.stages) {
      const stages = make("table", "numbers"), body = make("tbody"), longest = Math.max(...job.stages.map(([, seconds]) => seconds), 1e-9);
      for (const [name, seconds] of job.stages) {
        const line = make("tr"), title = make("th", "", word(name)), shown = cell("bar", "");
        title.scope = "row";
        shown.append(bar(seconds / longest));
        line.append(title, shown, make("td", "", duration(seconds)));
        body.append(line);
      }
      stages.append(make("caption", "", "Seconds by stage"), body);
      box.append(stages);
    }
    made.append(box);
    return made;
  };
  const rows = (job) => (unfolded.has(job.place) ? [row(job), details(job)] : [row(job)]);

  // -- bodies of rows, filled when they come near the screen
  const fill = (chunk) => {
    if (chunk.filled) return;
    chunk.filled = true;
    chunk.body.replaceChildren(...chunk.jobs.flatMap(rows));
  };
  const empty = (chunk) => {
    if (!chunk.filled || chunk.body.contains(document.activeElement)) return;
    const measured = chunk.body.offsetHeight;
    if (measured) chunk.height = measured;
    hold(chunk);
  };
  const hold = (chunk) => {
    chunk.filled = false;
    const line = make("tr", "hold"), space = make("td");
    space.colSpan = WIDTH;
    space.style.height = `${chunk.height || chunk.jobs.length * height}px`;
    line.append(space);
    chunk.body.replaceChildren(line);
  };
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const chunk = chunks.find(({ body }) => body === entry.target);
      if (!chunk) continue;
      if (entry.isIntersecting) fill(chunk);
      else empty(chunk);
    }
  }, { rootMargin: "1500px" });

  const collator = new Intl.Collator("en", { numeric: true });
  const draw = () => {
    const column = by[sorted.key], value = column.order || column.value, sign = sorted.down ? -1 : 1;
    const text = find.value.trim().toLowerCase();
    shown = data.jobs.filter((job) => (!wanted || job.state === wanted) && job.text.includes(text));
    if (sorted.key !== "order" || sorted.down) {
      const keyed = shown.map((job) => [value(job), job]);
      keyed.sort(([a, one], [b, other]) => {
        if (a === undefined || b === undefined) return a === b ? one.place - other.place : a === undefined ? 1 : -1;
        return sign * (typeof a === "string" ? collator.compare(a, b) : a - b) || one.place - other.place;
      });
      shown = keyed.map(([, job]) => job);
    }
    near.disconnect();
    for (const { body } of chunks) body.remove();
    chunks = [];
    for (let at = 0; at < shown.length; at += CHUNK) chunks.push({ body: make("tbody"), jobs: shown.slice(at, at + CHUNK), filled: false, height: 0 });
    chunks.forEach((chunk, number) => (number ? hold(chunk) : fill(chunk)));
    table.append(...chunks.map(({ body }) => body));
    const first = chunks.length && chunks[0].body.rows.length ? chunks[0].body.offsetHeight / chunks[0].body.rows.length : 0;
    if (first) {
      height = first;
      chunks.slice(1).forEach(hold);
    }
    for (const { body } of chunks) near.observe(body);
    table.hidden = !shown.length;
    one(".none").hidden = shown.length > 0;
    for (const chip of all(".chip")) chip.setAttribute("aria-pressed", String(chip.dataset.filter === wanted));
    status.textContent = wanted || text ? `${counted(shown.length, "job")} shown` : "";
    sort.value = `${sorted.key} ${sorted.down ? "down" : "up"}`;
    for (const { key } of titled) {
      const cells = one(`th[data-key="${key}"]`, head);
      if (key === sorted.key) cells.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
      else cells.removeAttribute("aria-sort");
    }
  };

  const sortBy = (key, down) => {
    sorted = { key, down };
    draw();
  };

  /** Show and focus the row of a job, even if a filter hides it. */
  const show = (place) => {
    const job = data.jobs[place];
    if (!shown.includes(job)) {
      wanted = "";
      find.value = "";
      draw();
    }
    fill(chunks[Math.floor(shown.indexOf(job) / CHUNK)]);
    const found = document.getElementById(`job-${place}`);
    found.focus({ preventScroll: true });
    found.scrollIntoView({ block: "center" });
    for (const other of all(".row.current", table)) other.classList.remove("current");
    found.classList.add("current");
  };

  const titles = make("tr");
  const plain = (text, names) => {
    const made = make("th", names, text);
    made.scope = "col";
    return made;
  };
  titles.append(plain("Preview", "picture"));
  for (const { key, name, title, number } of titled) {
    const made = plain("", number ? "number" : ""), button = make("button", "sorter", title);
    made.dataset.key = key;
    button.type = "button";
    button.title = `Sort by ${name}`;
    button.setAttribute("aria-label", `Sort by ${name}`);
    // The second click reverses the order; the third restores the manifest's order.
    button.addEventListener("click", () => {
      const largest = number || key === "warnings"; // numbers are sorted with the largest first
      if (sorted.key !== key) sortBy(key, largest);
      else if (sorted.down === largest) sortBy(key, !largest);
      else sortBy("order", false);
    });
    made.append(button);
    titles.append(made);
  }
  titles.append(plain("Output", "output"), plain("", "details"));
  head.append(titles);
  for (const { key, name, number } of COLUMNS) {
    for (const down of key === "order" ? [false] : number || key === "warnings" ? [true, false] : [false, true]) {
      const option = make("option", "", key === "order" ? name : `${name} ${down ? "↓" : "↑"}`);
      option.value = `${key} ${down ? "down" : "up"}`;
      sort.append(option);
    }
  }

  find.addEventListener("input", draw);
  sort.addEventListener("change", () => {
    const [key, way] = sort.value.split(" ");
    sortBy(key, way === "down");
  });
  for (const chip of all(".chip")) {
    chip.addEventListener("click", () => {
      wanted = chip.dataset.filter;
      draw();
      if (chip.closest(".top")) one("#jobs").scrollIntoView({ block: "start" });
    });
  }
  table.addEventListener("click", (event) => {
    const button = event.target.closest(".more-button");
    if (!button) return;
    const job = data.jobs[button.place], line = button.closest("tr"), open = !unfolded.has(job.place);
    button.setAttribute("aria-expanded", String(open));
    if (open) {
      unfolded.add(job.place);
      line.after(details(job));
    } else {
      unfolded.delete(job.place);
      line.nextElementSibling.remove();
    }
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-job], a[data-sort]");
    if (!link) return;
    event.preventDefault();
    if (link.dataset.job) show(Number(link.dataset.job));
    else {
      sortBy(link.dataset.sort, true);
      one("#jobs").scrollIntoView({ block: "start" });
      one(`th[data-key="${link.dataset.sort}"] button`, head).focus({ preventScroll: true });
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === find && event.key === "Escape") {
      find.value = "";
      draw();
    } else if (event.key === "/" && !event.target.matches("input, select")) {
      event.preventDefault();
      find.focus();
      find.select();
    }
  });
  document.addEventListener("DOMContentLoaded", () => {
    for (const picture of all("img[data-waiting]", table)) {
      picture.src = `data:image/jpeg;base64,${pictureOf(data.jobs[picture.place])}`;
      delete picture.dataset.waiting;
    }
  });
  draw();
  return { show };
})();
