// What every page of pema shares: its data, and the switch between light and dark.

const DATA = JSON.parse(document.getElementById("data").textContent);

/** Make an element: attributes by name, `on…` as listeners, children as nodes or text (never as HTML). */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value != null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

/** Make an element of a drawing; attributes that are null are left out. */
function shape(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) if (value != null) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

{
  const root = document.documentElement;
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const button = element("button", { class: "button", type: "button", id: "theme" });
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
  const show = () => {
    button.textContent = dark() ? "Light colours" : "Dark colours";
  };
  // Storage may be refused where a page is opened from a file: the choice then holds until the page is closed.
  try {
    const kept = localStorage.getItem("pema-theme");
    if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  } catch {}
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try {
      localStorage.setItem("pema-theme", root.dataset.theme);
    } catch {}
    show();
  });
  systemDark.addEventListener("change", show);
  show();
  document.querySelector(".bar").append(button);
}
