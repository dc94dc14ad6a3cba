// Before the first paint: light, dark, or as the system has it.
(() => {
  let theme = "";
  try {
    theme = localStorage.getItem("kimi-cpu.theme") || "";
  } catch {
    // storage may be forbidden
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
