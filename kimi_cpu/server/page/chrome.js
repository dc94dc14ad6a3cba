// What is around the conversation: dialogs, the drawer, the theme, shortcuts, short notices.

const $ = (id) => document.getElementById(id);
const THEMES = { "": "Theme: system", light: "Theme: light", dark: "Theme: dark" };

/** Show a dialog; its form's value: what the button pressed says, "" after Escape. */
export function dialog(id, first = null) {
  const element = $(id);
  element.returnValue = "";
  element.showModal();
  if (first) $(first).select?.();
  return new Promise((resolve) => element.addEventListener("close", () => resolve(element.returnValue), { once: true }));
}

let toastTimer = 0;

/** A notice for some seconds, with a way to undo what it tells of. */
export function toast(text, undo = null) {
  clearTimeout(toastTimer);
  $("toast").hidden = false;
  $("toast-text").textContent = text;
  $("undo").hidden = !undo;
  $("undo").onclick = () => {
    $("toast").hidden = true;
    undo();
  };
  toastTimer = setTimeout(() => ($("toast").hidden = true), undo ? 10_000 : 6000);
}

const narrow = window.matchMedia("(max-width: 760px)");

function openSide(opened) {
  $("side").classList.toggle("open", opened);
  $("veil").hidden = !opened;
  $("menu").setAttribute("aria-expanded", String(opened));
  // What is off the screen cannot be reached by the keyboard either.
  $("side").inert = narrow.matches && !opened;
  if (opened && narrow.matches) $("new").focus();
}

/** Close the drawer of narrow screens. */
export function closeSide() {
  openSide(false);
}

/** Keep the default of a button: Enter in a field of a dialog presses its last one. */
function pressLast(event) {
  if (event.key !== "Enter" || event.target.tagName !== "INPUT" || event.isComposing) return;
  const last = event.currentTarget.querySelector(".actions button:last-child");
  event.preventDefault();
  last.click();
}

function nextTheme(recolour) {
  const names = Object.keys(THEMES);
  const theme = names[(names.indexOf(document.documentElement.dataset.theme || "") + 1) % names.length];
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  try {
    localStorage.setItem("kimi-cpu.theme", theme);
  } catch {
    // then it is for this time only
  }
  $("theme").textContent = THEMES[theme];
  recolour();
}

/**
 * stop(): ends the reply, and says whether there was one. recolour(): the colours have changed.
 * shortcuts: what Alt and a key do, by the key's place (KeyN).
 */
export function setUpChrome({ stop, recolour, shortcuts }) {
  $("theme").textContent = THEMES[document.documentElement.dataset.theme || ""];
  $("theme").onclick = () => nextTheme(recolour);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  $("help-open").onclick = () => dialog("help");
  $("menu").onclick = () => openSide(!$("side").classList.contains("open"));
  $("veil").onclick = () => openSide(false);
  narrow.addEventListener("change", () => openSide(false));
  for (const form of document.querySelectorAll("dialog form")) form.addEventListener("keydown", pressLast);
  const all = {
    ...shortcuts,
    KeyC: () => {
      openSide(narrow.matches);
      ($("chats").querySelector("[aria-current]") || $("chats").querySelector("button") || $("new")).focus();
    },
    KeyL: () => nextTheme(recolour),
    KeyK: () => dialog("help"),
  };
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    if (event.altKey && !event.ctrlKey && !event.metaKey && !event.shiftKey && all[event.code]) {
      event.preventDefault();
      all[event.code]();
    } else if (event.key === "Escape") {
      if ($("side").classList.contains("open")) {
        openSide(false);
        $("menu").focus();
      } else {
        stop();
      }
    } else if (event.key === "/" && !event.target.closest("input, textarea, select")) {
      event.preventDefault();
      $("prompt").focus();
    }
  });
}
