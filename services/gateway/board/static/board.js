// Keeps parts of a page true while somebody looks, and asks before a job is cancelled. Without it every page still works.
"use strict";

const local = new Intl.DateTimeFormat(undefined, { day: "2-digit", month: "short", hour: "2-digit", minute: "2-digit" });

function showTimesHere(part) {
  for (const time of part.querySelectorAll("time[datetime]")) {
    time.title = time.textContent;
    time.textContent = local.format(new Date(time.dateTime));
  }
}

// What the reader had in hand stays there: the focused element, by its id or else its place, and how far parts were scrolled.
const SCROLLED = ".scroll, .gantt";
const FOCUSABLE = "a, button, [tabindex]";

function replace(region, html) {
  const active = region.contains(document.activeElement) ? document.activeElement : null;
  const place = active ? [...region.querySelectorAll(FOCUSABLE)].indexOf(active) : -1;
  const scrolled = [...region.querySelectorAll(SCROLLED)].map((each) => [each.scrollLeft, each.scrollTop]);
  region.innerHTML = html;
  showTimesHere(region);
  region.querySelectorAll(SCROLLED).forEach((each, number) => {
    [each.scrollLeft, each.scrollTop] = scrolled[number] ?? [0, 0];
  });
  if (!active) return;
  const next = active.id ? document.getElementById(active.id) : region.querySelectorAll(FOCUSABLE)[place];
  next?.focus({ preventScroll: true });
}

// Nothing moves under a finger that is down, or under a text that is being marked.
let isPressed = false;
document.addEventListener("pointerdown", () => { isPressed = true; });
for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, () => setTimeout(() => { isPressed = false; }));
const isBusy = () => isPressed || !(document.getSelection()?.isCollapsed ?? true);

function follow(region) {
  const state = document.querySelector("[data-live-state]");
  let source = null;
  let waiting = null;
  const show = () => {
    if (waiting === null) return;
    if (isBusy()) { setTimeout(show, 300); return; }
    replace(region, waiting);
    waiting = null;
  };
  const say = (text, isBroken) => {
    state.hidden = false;
    state.textContent = text;
    state.classList.toggle("broken", isBroken);
  };
  const stop = () => { source?.close(); source = null; };
  const start = () => {
    if (source || document.hidden) return;
    source = new EventSource(region.dataset.live);
    source.addEventListener("open", () => say("Live", false));
    source.addEventListener("fragment", (event) => { waiting = event.data; say("Live", false); show(); });
    source.addEventListener("stale", () => say("Not live: the server cannot read what it shows. Trying again…", true));
    source.addEventListener("error", () => {
      say("Not live: what you see may be old. Trying again…", true);
      if (source?.readyState === EventSource.CLOSED) { stop(); setTimeout(again, 3000); }
    });
  };
  // A refusal ends a stream for good. Whether it is for good here, too, the page itself knows: logged out, or the job is gone.
  const again = async () => {
    const page = await fetch(location.href).catch(() => null);
    if (page && (page.redirected || page.status === 404)) location.reload();
    else start();
  };
  document.addEventListener("visibilitychange", () => (document.hidden ? stop() : start()));
  window.addEventListener("pagehide", stop);
  start();
}

document.addEventListener("submit", (event) => {
  const question = event.submitter?.dataset.confirm;
  if (question && !window.confirm(question)) event.preventDefault();
});
showTimesHere(document);
document.querySelectorAll("[data-live]").forEach(follow);
