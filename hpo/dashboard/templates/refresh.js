// Replaces the live part of a page by the server's newest, every data-live seconds, while it is looked at.
(() => {
  "use strict";
  const live = () => document.querySelector("[data-live]");
  const note = document.createElement("p");
  note.className = "problem";
  note.setAttribute("role", "alert");
  note.hidden = true;

  const isBusy = (part) =>
    document.hidden || !getSelection().isCollapsed || part.contains(document.activeElement);

  const swap = (part, text) => {
    const fresh = new DOMParser().parseFromString(text, "text/html").querySelector("[data-live]");
    if (!fresh) return;
    const places = [...part.querySelectorAll(".scroll, pre")].map((one) => [one.scrollLeft, one.scrollTop]);
    part.replaceWith(fresh);
    [...fresh.querySelectorAll(".scroll, pre")].forEach((one, i) => {
      if (places[i]) [one.scrollLeft, one.scrollTop] = places[i];
    });
  };

  const refresh = async () => {
    const part = live();
    if (!isBusy(part)) {
      try {
        const response = await fetch(location.href, { headers: { Accept: "text/html" } });
        if (response.redirected && new URL(response.url).pathname === "/login") return location.reload();
        if (!response.ok) throw new Error(`the server answered ${response.status}`);
        const text = await response.text();
        if (!isBusy(part)) swap(part, text);
        note.hidden = true;
      } catch (error) {
        note.textContent = `Not refreshed: ${error.message}. This is how it was before.`;
        note.hidden = false;
        live().before(note);
      }
    }
    setTimeout(refresh, 1000 * Number(live().dataset.live));
  };
  if (live()) setTimeout(refresh, 1000 * Number(live().dataset.live));
})();
