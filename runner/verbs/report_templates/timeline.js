/** The timeline: spans in sight are elements; spans narrower than two pixels that touch are merged into one. */
(() => {
  const NARROW = 2; // pixels
  const LARGEST = 8e6; // pixels of the whole timeline: browsers lay out no more than some 30 million
  const CLOSEST = 60; // pixels of one second at the largest zoom
  const EDGE = 12; // pixels left free at the end, so that the last mark is seen
  const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400];
  const root = one(".tracks");
  if (!root) return;
  const inner = one(".inner", root), axis = one(".time-axis", root), tip = one("#tip"), slider = one("#zoom");
  const began = Date.parse(data.began);
  const length = Math.max(data.seconds, ...data.processes.map((process) => process.end), 1);
  const NAMES = { load: "loading the model", prepare: "prepare", generate: "generate", deliver: "deliver" };

  const processes = all(".process", root).map((element, number) => {
    const { spans, ...known } = data.processes[number];
    const ranks = new Map(); // of jobs in the process: neighbours differ in colour
    const generated = spans.filter(([stage]) => data.stages[stage] === "generate");
    for (const [, job] of [...generated, ...spans]) if (job >= 0 && !ranks.has(job)) ranks.set(job, ranks.size);
    const lanes = all(".lane", element).map((lane) => {
      const own = spans.filter(([stage]) => {
        const name = data.stages[stage];
        return (name === "load" ? "generate" : name) === lane.dataset.lane; // loading uses the device too
      });
      return { name: lane.dataset.lane, track: one(".track", lane), spans: own.sort((a, b) => a[2] - b[2]) };
    });
    return { ...known, element, lanes, ranks, inView: false };
  });

  let zoom = 1, scale = 1, gutter = 0, drawn = null, chosen = null;
  const view = () => Math.max(root.clientWidth - gutter - EDGE, 50); // pixels of the timeline in sight
  const largest = () => Math.max(1, Math.min(LARGEST, length * CLOSEST) / view());
  const jobName = ([, job, , , other]) => (job >= 0 ? data.jobs[job].id : word(other));
  const failed = ([, job]) => job >= 0 && word(data.jobs[job].status) === "failed";

  const layOut = () => {
    gutter = one(".lane-name", root).offsetWidth;
    root.style.setProperty("--seen", `${root.clientWidth}px`);
    zoom = clamp(zoom, 1, largest());
    scale = view() * zoom / length;
    inner.style.width = zoom === 1 ? "100%" : `${gutter + length * scale + EDGE}px`;
    slider.value = largest() > 1 ? String(Math.round(100 * Math.log(zoom) / Math.log(largest()))) : "0";
    one("#zoomed").textContent = zoom === 1 ? "" : `${zoom < 10 ? zoom.toFixed(1) : Math.round(zoom)}×`;
    drawn = null;
    draw();
  };

  /** Zoom so that the time at x pixels of the view stays where it is. */
  const zoomTo = (wanted, x = view() / 2) => {
    const time = (root.scrollLeft + x) / scale;
    zoom = wanted;
    layOut();
    root.scrollLeft = time * scale - x;
    draw();
  };

  const draw = () => {
    const from = root.scrollLeft, to = from + view();
    if (drawn && from >= drawn.from && to <= drawn.to) return;
    drawn = { from: Math.max(0, from - view() / 2), to: to + view() / 2 };
    drawAxis();
    for (const process of processes) {
      process.stale = true;
      if (process.inView) drawProcess(process);
    }
  };

  const drawAxis = () => {
    const step = STEPS.find((seconds) => seconds * scale >= 70) || Math.ceil(70 / scale / 86400) * 86400;
    const marks = [];
    for (let at = Math.ceil(drawn.from / scale / step) * step; at * scale <= drawn.to && at <= length; at += step) {
      const mark = make("span", "tick", (length - at) * scale < 50 ? "" : clock(at)); // a label is not cut
      mark.style.left = `${gutter + at * scale}px`;
      marks.push(mark);
    }
    axis.replaceChildren(...marks);
  };

  /** Groups of spans of a lane that are in sight: [first, last, left, right], places in the lane and pixels. */
  const groups = (lane) => {
    const found = [];
    let open = null;
    lane.spans.forEach(([stage, , begin, end], place) => {
      const left = begin * scale, right = end * scale;
      if (right < drawn.from || left > drawn.to) return;
      const narrow = right - left < NARROW && data.stages[stage] !== "load";
      if (narrow && open && left - open[3] < NARROW) {
        open[1] = place;
        open[3] = Math.max(open[3], right);
        return;
      }
      const group = [place, place, left, right];
      found.push(group);
      open = narrow ? group : null;
    });
    return found;
  };

  const drawProcess = (process) => {
    process.stale = false;
    const held = document.activeElement;
    const focused = held && held.classList.contains("span") && process.element.contains(held);
    for (const lane of process.lanes) {
      const marks = groups(lane).map(([first, last, left, right]) => spanElement(process, lane, first, last, left, right));
      const end = make("i", process.finished ? "end" : "end killed");
      end.style.left = `${process.end * scale}px`;
      lane.track.replaceChildren(...marks, end);
    }
    if (focused && chosen && chosen.process === process) focusChosen(false);
  };

  const spanElement = (process, lane, first, last, left, right) => {
    const span = lane.spans[first];
    const element = make("button", "span");
    element.type = "button";
    element.tabIndex = -1;
    element.style.left = `${left}px`;
    element.style.width = `${right - left > 4 ? right - left - 1 : Math.max(right - left, 1)}px`; // neighbours are apart
    if (first !== last) element.classList.add("merged");
    else if (data.stages[span[0]] === "load") element.classList.add("load");
    else {
      element.classList.add(`c-${(process.ranks.get(span[1]) || 0) % 3}`);
      element.dataset.of = span[1];
    }
    if (lane.spans.slice(first, last + 1).some(failed)) element.classList.add("failed");
    element.place = { process, lane, first, last };
    element.setAttribute("aria-label", lines(element.place).join(", "));
    return element;
  };

  const lines = ({ process, lane, first, last }) => {
    const spans = lane.spans.slice(first, last + 1);
    const [stage, job] = spans[0], begin = spans[0][2], end = Math.max(...spans.map((span) => span[3]));
    const when = Number.isFinite(began) ? ` (${new Date(began + Math.round(begin) * 1000).toISOString().slice(11, 19)} UTC)` : "";
    const where = `${process.host}, shard ${process.shard}`;
    const time = `${clock(begin)} to ${clock(end)}${when}`;
    if (first !== last) {
      const busy = spans.reduce((sum, span) => sum + span[3] - span[2], 0);
      return [`${spans.length} spans, merged: zoom in to see each one`, `${lane.name}, ${jobName(spans[0])} to ${jobName(spans[spans.length - 1])}`, time, `${duration(busy)} of ${duration(end - begin)}`, where];
    }
    const name = NAMES[data.stages[stage]];
    const title = data.stages[stage] === "load" ? [name] : [jobName(spans[0]), failed(spans[0]) ? `${name}, failed` : name];
    return [...title, time, duration(end - begin), where];
  };

  const show = (element) => {
    const [title, ...rest] = lines(element.place);
    const strong = make("b");
    strong.append(foreign(title));
    tip.replaceChildren(strong, ...rest.map((text) => make("span", "", text)));
    tip.hidden = false;
    const box = element.getBoundingClientRect(), inside = root.getBoundingClientRect();
    const middle = (Math.max(box.left, inside.left + gutter) + Math.min(box.right, inside.right)) / 2;
    tip.style.left = `${clamp(middle - tip.offsetWidth / 2, 4, Math.max(4, document.documentElement.clientWidth - tip.offsetWidth - 4))}px`;
    const above = box.top - tip.offsetHeight - 6;
    tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
    mark(element.dataset.of);
  };
  const mark = (job) => {
    for (const span of all(".span.same", root)) span.classList.remove("same");
    if (job !== undefined && job !== "-1") for (const span of all(`.span[data-of="${job}"]`, root)) span.classList.add("same");
  };
  const hide = () => {
    tip.hidden = true;
    mark();
  };

  /** Go to the job, or zoom in on merged spans. */
  const follow = (element, x) => {
    const { lane, first, last } = element.place;
    if (first !== last) {
      const box = element.getBoundingClientRect(), left = root.getBoundingClientRect().left + gutter;
      const middle = x === undefined ? (box.left + box.right) / 2 - left : x - left;
      hide();
      zoomTo(zoom * clamp(8 * (last - first + 1) / box.width, 2, 64), clamp(middle, 0, view()));
    } else if (lane.spans[first][1] >= 0) {
      hide();
      jobs.show(lane.spans[first][1]);
    }
  };

  // Keys: one span is chosen and has the focus; the arrows move it.
  const elementOf = ({ lane, first }) =>
    all(".span", lane.track).find(({ place }) => place.first <= first && first <= place.last);
  const focusChosen = (scroll = true) => {
    if (scroll) {
      const [, , begin, end] = chosen.lane.spans[chosen.first];
      const left = begin * scale, right = Math.min(end * scale, left + view());
      if (left < root.scrollLeft) root.scrollLeft = Math.max(0, left - 20);
      else if (right > root.scrollLeft + view()) root.scrollLeft = right - view() + 20;
      draw();
      if (chosen.process.stale || !elementOf(chosen)) drawProcess(chosen.process);
    }
    const element = elementOf(chosen);
    if (!element) return;
    chosen.last = element.place.last;
    chosen.first = element.place.first;
    element.focus({ preventScroll: !scroll });
  };
  const move = (across, down) => {
    const lanes = processes.flatMap((process) => process.lanes.map((lane) => ({ process, lane }))).filter(({ lane }) => lane.spans.length);
    if (!lanes.length) return;
    const at = chosen ? lanes.findIndex(({ lane }) => lane === chosen.lane) : -1;
    if (at < 0) {
      const first = Math.max(0, lanes[0].lane.spans.findIndex((span) => span[3] * scale >= root.scrollLeft));
      chosen = { ...lanes[0], first, last: first };
    } else if (down) {
      const next = lanes[clamp(at + down, 0, lanes.length - 1)], time = chosen.lane.spans[chosen.first][2];
      if (next.lane !== chosen.lane) {
        const near = next.lane.spans.reduce((best, span, place) =>
          (Math.abs(span[2] - time) < Math.abs(next.lane.spans[best][2] - time) ? place : best), 0);
        chosen = { ...next, first: near, last: near };
      }
    } else {
      const place = clamp(across > 0 ? chosen.last + 1 : chosen.first - 1, 0, chosen.lane.spans.length - 1);
      chosen = { ...chosen, first: place, last: place };
    }
    focusChosen();
  };
  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const acts = {
      ArrowRight: () => move(1, 0), ArrowLeft: () => move(-1, 0), ArrowDown: () => move(0, 1), ArrowUp: () => move(0, -1),
      "+": () => zoomTo(zoom * 2), "-": () => zoomTo(zoom / 2), 0: () => zoomTo(1), Escape: hide,
    };
    if (!(event.key in acts)) return;
    event.preventDefault();
    acts[event.key]();
  });

  root.addEventListener("pointerover", (event) => {
    const span = event.target.closest(".span");
    if (span) show(span);
  });
  root.addEventListener("pointerout", (event) => { if (event.target.closest(".span")) hide(); });
  root.addEventListener("focusin", (event) => {
    const span = event.target.closest(".span");
    if (!span) return;
    chosen = { ...span.place };
    show(span);
  });
  root.addEventListener("focusout", hide);
  root.addEventListener("click", (event) => {
    const span = event.target.closest(".span");
    if (span) follow(span, event.detail ? event.clientX : undefined);
  });
  root.addEventListener("scroll", () => {
    if (!tip.hidden && !(document.activeElement && document.activeElement.classList.contains("span"))) hide();
    requestAnimationFrame(draw);
  });
  root.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return; // the wheel alone scrolls
    event.preventDefault();
    zoomTo(zoom * Math.exp(-event.deltaY / 300), clamp(event.clientX - root.getBoundingClientRect().left - gutter, 0, view()));
  }, { passive: false });
  slider.addEventListener("input", () => zoomTo(largest() ** (Number(slider.value) / 100)));
  for (const button of all("[data-zoom]")) {
    button.addEventListener("click", () => zoomTo({ in: zoom * 2, out: zoom / 2, fit: 1 }[button.dataset.zoom]));
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const process = processes.find(({ element }) => element === entry.target);
      process.inView = entry.isIntersecting;
      if (process.inView && process.stale !== false) drawProcess(process);
      else if (!process.inView && !process.element.contains(document.activeElement)) {
        for (const { track } of process.lanes) track.replaceChildren();
        process.stale = true;
      }
    }
  }, { rootMargin: "200px" });
  layOut();
  for (const { element } of processes) seen.observe(element);
  let width = root.clientWidth;
  new ResizeObserver(() => {
    if (root.clientWidth === width) return;
    width = root.clientWidth;
    layOut();
  }).observe(root);
})();
