"use strict";
(() => {
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const LOADED = 6; // players with loaded videos: a browser has few decoders
  const status = one(".status");
  const players = new Map(); // article -> Player
  const loaded = []; // players with loaded videos, the last used one at the end
  let current = null; // the article that keys act on

  /** Wait for a video's data block: the blocks are at the end of the page, which may still be loading. */
  const arrived = async (id) => {
    for (;;) {
      const block = document.getElementById(id);
      if (document.readyState !== "loading" || (block && block.nextElementSibling)) return block;
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
  };
  const blobUrl = (block) => {
    const text = atob(block.textContent);
    const bytes = new Uint8Array(text.length);
    for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
    return URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  };

  class Player {
    constructor(job) {
      this.job = job;
      this.data = JSON.parse(one("script.data", job).textContent);
      this.root = one(".player", job);
      this.stage = one(".stage", job);
      this.panes = all(".pane", this.stage);
      this.videos = all("video", this.stage);
      this.videos.forEach((video, at) => {
        const { fps, frames } = this.data.videos[this.panes[at].dataset.of];
        video.timing = { fps, frames };
        video.addEventListener("error", () => video.hasAttribute("src") && this.tell(video));
      });
      this.fps = this.videos[this.videos.length - 1].timing.fps; // of the new video, if there is one
      this.frames = this.data.frames;
      this.frame = clamp(this.data.start, 0, Math.max(this.frames - 1, 0));
      this.playing = false;
      this.scrub = one(".scrub", this.root);
      this.where = one(".where", this.root);
      this.button = one(".play", this.root);
      this.captions = one(".captions", this.root);
      this.curves = all(".curve", job).map((figure) => new Curve(figure, this));
      this.listen();
      this.show();
    }

    listen() {
      this.scrub.addEventListener("input", () => this.seek(Number(this.scrub.value)));
      const wipe = one(".wipe", this.stage);
      if (wipe) wipe.addEventListener("input", () => this.stage.style.setProperty("--wipe", `${wipe.value}%`));
      one(".rate", this.root).addEventListener("change", (event) => {
        this.rate = Number(event.target.value);
        this.videos.forEach((video) => { video.playbackRate = this.rate; });
      });
      this.rate = 1;
      this.stage.addEventListener("pointermove", (event) => {
        const pane = event.target.closest(".pane") || this.panes.at(-1);
        const box = pane.getBoundingClientRect();
        this.stage.style.setProperty("--zx", `${clamp((event.clientX - box.left) / box.width * 100, 0, 100)}%`);
        this.stage.style.setProperty("--zy", `${clamp((event.clientY - box.top) / box.height * 100, 0, 100)}%`);
      });
      this.stage.addEventListener("click", (event) => {
        if (!event.target.closest(".wipe")) this.toggle();
      });
    }

    tell(video) {
      one(".player-note", this.root).textContent =
        `The ${video.parentElement.dataset.of} video cannot be played here` +
        (video.dataset.url ? `: ${video.dataset.url}` : ".");
    }

    load() {
      const at = loaded.indexOf(this);
      if (at >= 0) loaded.splice(at, 1);
      loaded.push(this);
      if (at >= 0) return;
      for (const video of this.videos) {
        if (video.dataset.url) this.begin(video, video.dataset.url);
        else arrived(video.dataset.media).then((block) => {
          if (loaded.includes(this) && !video.hasAttribute("src")) this.begin(video, blobUrl(block));
        });
      }
      while (loaded.length > LOADED) loaded.shift().unload();
    }

    begin(video, url) {
      video.src = url;
      video.preload = "auto";
      video.playbackRate = this.rate;
      video.addEventListener("loadedmetadata", () => this.place(video), { once: true });
      video.load();
    }

    unload() {
      this.pause();
      for (const video of this.videos) {
        if (video.src.startsWith("blob:")) URL.revokeObjectURL(video.src);
        video.removeAttribute("src");
        video.load();
      }
    }

    place(video) {
      // The middle of a frame: after rounding, its edges may belong to a neighbouring frame.
      const last = (video.timing.frames - 0.5) / video.timing.fps;
      video.currentTime = Math.min((this.frame + 0.5) / this.fps, last);
    }

    seek(frame) {
      this.frame = clamp(frame, 0, Math.max(this.frames - 1, 0));
      this.load();
      this.videos.forEach((video) => { if (video.readyState > 0) this.place(video); });
      this.show();
    }

    step(frames) {
      this.pause();
      this.seek(this.frame + frames);
    }

    toggle() {
      if (this.playing) this.pause();
      else this.play();
    }

    async play() {
      players.forEach((other) => { if (other !== this) other.pause(); });
      this.load();
      this.setPlaying(true);
      if (this.frame >= this.frames - 1) this.seek(0);
      try {
        await Promise.all(this.videos.map((video) => this.ready(video)));
        if (!this.playing) return;
        await Promise.all(this.videos.map((video) => video.play()));
        requestAnimationFrame(() => this.tick());
      } catch (error) {
        if (error.name === "AbortError") return; // paused before it began
        this.setPlaying(false);
        this.videos.filter((video) => video.error).forEach((video) => this.tell(video));
      }
    }

    ready(video) {
      if (video.error) return Promise.reject(video.error);
      if (video.readyState >= 2 && !video.seeking) return Promise.resolve();
      return new Promise((resolve, reject) => {
        const check = () => {
          if (video.error) reject(video.error);
          else if (video.readyState >= 2 && !video.seeking) resolve();
          else return;
          for (const name of ["canplay", "seeked", "error"]) video.removeEventListener(name, check);
        };
        for (const name of ["canplay", "seeked", "error"]) video.addEventListener(name, check);
      });
    }

    tick() {
      if (!this.playing) return;
      const lead = this.videos.find((video) => !video.ended);
      if (!lead) {
        this.frame = 0;
        this.videos.forEach((video) => this.place(video));
        this.show();
        this.play();
        return;
      }
      for (const video of this.videos) {
        if (video === lead || video.ended) continue;
        const ahead = video.currentTime - lead.currentTime;
        if (Math.abs(ahead) > 0.25) video.currentTime = lead.currentTime;
        // Within a quarter of a frame the videos are in sync. Otherwise the follower plays a little slower or faster.
        const off = Math.abs(ahead) > 0.25 / this.fps;
        video.playbackRate = this.rate * (off ? 1 - clamp(ahead * 3, -0.2, 0.2) : 1);
      }
      this.frame = clamp(Math.floor(lead.currentTime * this.fps + 1e-6), 0, this.frames - 1);
      this.show();
      requestAnimationFrame(() => this.tick());
    }

    pause() {
      if (!this.playing) return;
      this.setPlaying(false);
      this.videos.forEach((video) => { video.pause(); video.playbackRate = this.rate; });
      this.videos.forEach((video) => { if (video.readyState > 0) this.place(video); });
    }

    setPlaying(playing) {
      this.playing = playing;
      this.button.setAttribute("aria-pressed", String(playing));
      this.button.setAttribute("aria-label", playing ? "Pause" : "Play");
    }

    show() {
      const seconds = (this.frame / this.fps).toFixed(2);
      this.scrub.value = String(this.frame);
      this.where.textContent = `frame ${this.frame} of ${this.frames} · ${seconds} s`;
      this.scrub.setAttribute("aria-valuetext", `frame ${this.frame}, ${seconds} seconds`);
      this.curves.forEach((curve) => curve.show(this.frame));
    }

    setMode(mode) {
      if (this.videos.length < 2) return;
      this.load();
      const before = this.stage.dataset.mode;
      if (mode === before && mode !== "flip") mode = "side";
      if (mode === "flip") {
        // The first press shows the baseline, because the new video was shown until then.
        const next = before === "flip" && this.stage.dataset.shown === "baseline" ? "new" : "baseline";
        this.stage.dataset.shown = next;
        all(".caption", this.captions).forEach((caption) => {
          caption.classList.toggle("shown", caption.dataset.of === next);
        });
      }
      this.stage.dataset.mode = this.captions.dataset.mode = mode;
      all(".modes button", this.root).forEach((button) => {
        button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
      });
      const names = { side: "side by side", slider: "slider", difference: "difference" };
      status.textContent = mode === "flip" ? `${this.stage.dataset.shown} video` : names[mode];
    }

    reset() {
      this.stage.classList.remove("zoomed");
      if (this.stage.dataset.mode !== "side") this.setMode("side");
    }

    zoom() {
      this.stage.classList.toggle("zoomed");
    }
  }

  class Curve {
    constructor(figure, player) {
      this.plot = one("svg", figure);
      this.playhead = one(".playhead", figure);
      this.value = one(".value", figure);
      this.frames = Number(figure.dataset.frames);
      this.unit = figure.dataset.unit;
      this.digits = Number(figure.dataset.digits);
      this.values = player.data[figure.dataset.metric];
      const frameAt = (event) => {
        const box = this.plot.getBoundingClientRect();
        return clamp(Math.round((event.clientX - box.left) / box.width * (this.frames - 1)), 0, this.frames - 1);
      };
      this.plot.addEventListener("click", (event) => { player.pause(); player.seek(frameAt(event)); });
      this.plot.addEventListener("pointermove", (event) => this.tell(frameAt(event)));
      this.plot.addEventListener("pointerleave", () => this.show(player.frame));
    }

    show(frame) {
      const x = (Math.min(frame, this.frames - 1) / Math.max(this.frames - 1, 1) * 1000).toFixed(1);
      this.playhead.setAttribute("d", `M${x} 0V100`);
      this.tell(frame);
    }

    tell(frame) {
      const value = this.values[frame];
      this.value.textContent =
        value === undefined || value === null ? "" : `frame ${frame}: ${value.toFixed(this.digits)} ${this.unit}`;
    }
  }

  // Every job with videos has a player, which loads its videos when it comes into view.
  const jobs = all(".job");
  const inView = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const player = players.get(entry.target.closest(".job"));
      if (entry.isIntersecting) player.load();
      else player.pause();
    }
  }, { rootMargin: "100px" });
  for (const job of jobs) {
    if (!one(".player", job)) continue;
    players.set(job, new Player(job));
    inView.observe(one(".stage", job));
  }

  const shownJobs = () => jobs.filter((job) => !job.hidden);

  const setCurrent = (job) => {
    if (current) current.classList.remove("current");
    current = job;
    if (job) job.classList.add("current");
  };

  const TOP = 60; // pixels: the filters above stay visible
  const inSight = (job) => {
    const box = job.getBoundingClientRect();
    return box.bottom > TOP && box.top < innerHeight;
  };
  const chosen = () => (current && !current.hidden && inSight(current) ? current : null);

  /** The job that keys act on: the last used job if it is visible, else the first visible job. */
  const findCurrent = () => {
    if (!chosen()) setCurrent(shownJobs().find(inSight) || null);
    return current;
  };

  /** Go to the next or previous job; if none is current, to the first that begins below or above the top. */
  const move = (by) => {
    const shown = shownJobs();
    const at = shown.indexOf(chosen());
    const below = (job) => job.getBoundingClientRect().top > TOP;
    const next = at >= 0 ? shown[clamp(at + by, 0, shown.length - 1)]
      : by > 0 ? shown.find(below) : shown.findLast((job) => !below(job));
    if (!next) return;
    setCurrent(next);
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "start" });
  };

  document.addEventListener("focusin", (event) => {
    const job = event.target.closest && event.target.closest(".job");
    if (job) setCurrent(job);
  });
  document.addEventListener("pointerdown", (event) => {
    const job = event.target.closest(".job");
    if (job) setCurrent(job);
  });

  // Filters
  const find = one("#find");
  let wanted = "";
  const filter = () => {
    const text = find.value.trim().toLowerCase();
    let count = 0;
    for (const item of all("[data-verdict]")) {
      const shown = (!wanted || item.dataset.verdict === wanted) && item.dataset.name.includes(text);
      item.hidden = !shown;
      count += shown;
      if (!shown && players.has(item)) players.get(item).pause();
    }
    for (const list of all(".lines")) list.hidden = !one(".line:not([hidden])", list);
    one(".none").hidden = count > 0;
    status.textContent = wanted || text ? `${count} ${count === 1 ? "job is" : "jobs are"} shown` : "";
  };
  find.addEventListener("input", filter);
  for (const chip of all(".chip")) {
    chip.addEventListener("click", () => {
      wanted = chip.dataset.filter;
      all(".chip").forEach((other) => other.setAttribute("aria-pressed", String(other === chip)));
      filter();
    });
  }

  // Buttons
  const copy = async (button) => {
    const source = document.getElementById(button.dataset.from);
    try {
      await navigator.clipboard.writeText(source.textContent);
    } catch {
      getSelection().selectAllChildren(source);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    status.textContent = "The command is copied.";
    setTimeout(() => { button.textContent = "Copy"; status.textContent = ""; }, 2000);
  };
  const enlarge = (button) => {
    const picture = one("img", button), large = one("#large img");
    large.src = picture.src;
    large.alt = picture.alt;
    one("#large").showModal();
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const player = players.get(button.closest(".job"));
    if (button.dataset.mode) player.setMode(button.dataset.mode);
    else if (button.dataset.frame) { player.pause(); player.seek(Number(button.dataset.frame)); player.stage.scrollIntoView({ block: "nearest" }); }
    else switch (button.dataset.action) {
      case "play": player.toggle(); break;
      case "back": player.step(-1); break;
      case "forward": player.step(1); break;
      case "copy": copy(button); break;
      case "enlarge": enlarge(button); break;
      case "help": one("#help").showModal(); break;
    }
  });

  // Keys
  const ofPage = {
    j: () => move(1), k: () => move(-1),
    "/": () => { find.focus(); find.select(); },
    "?": () => one("#help").showModal(),
  };
  const ofPlayer = {
    " ": (player) => player.toggle(),
    ArrowLeft: (player) => player.step(-1), ArrowRight: (player) => player.step(1),
    f: (player) => player.setMode("flip"), s: (player) => player.setMode("slider"),
    d: (player) => player.setMode("difference"), z: (player) => player.zoom(),
    Escape: (player) => player.reset(),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || one("dialog[open]")) return;
    const target = event.target;
    if (target === find) {
      if (event.key === "Escape") { find.value = ""; filter(); find.blur(); }
      return;
    }
    const { key } = event;
    const arrow = key === "ArrowLeft" || key === "ArrowRight";
    if (target.matches("select") && (arrow || key === " " || key.length === 1)) return;
    if (target.matches("input[type=range]") && arrow) return; // the browser moves the slider itself
    if (target.closest("button, a") && key === " ") return;
    const name = key.length === 1 ? key.toLowerCase() : key;
    const player = name in ofPlayer ? players.get(findCurrent()) : null;
    if (!(name in ofPage) && !player) return;
    event.preventDefault();
    if (player) ofPlayer[name](player);
    else ofPage[name]();
  });
  for (const dialog of all("dialog")) {
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  }
})();
