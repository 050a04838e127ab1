// Keeps parts of a page true while somebody looks, and asks before a job is cancelled. Without it every page still works.
"use strict";

const local = new Intl.DateTimeFormat(undefined, { day: "2-digit", month: "short", hour: "2-digit", minute: "2-digit" });

function showTimesHere(part) {
  for (const time of part.querySelectorAll("time[datetime]")) {
    time.title = time.textContent;
    time.textContent = local.format(new Date(time.dateTime));
  }
}

// What the reader had in hand stays there: the focused element and how far tables were scrolled.
function replace(region, html) {
  const focused = region.contains(document.activeElement) ? document.activeElement.id : "";
  const scrolled = [...region.querySelectorAll(".scroll")].map((each) => each.scrollLeft);
  region.innerHTML = html;
  showTimesHere(region);
  region.querySelectorAll(".scroll").forEach((each, number) => { each.scrollLeft = scrolled[number] ?? 0; });
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

function follow(region) {
  const state = document.querySelector("[data-live-state]");
  let source = null;
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
    source.addEventListener("fragment", (event) => replace(region, event.data));
    source.addEventListener("error", () => {
      say("Not live: what you see may be old. Trying again…", true);
      // A refusal ends the stream for good; the page itself knows why (logged out, or the job is gone).
      if (source?.readyState === EventSource.CLOSED) { stop(); setTimeout(start, 3000); }
    });
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
