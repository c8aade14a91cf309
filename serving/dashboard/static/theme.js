// Before the first paint: the theme that was chosen on this device, or the system's.
"use strict";
try {
  const chosen = localStorage.getItem("taximeter.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Without storage the system's theme holds.
}
