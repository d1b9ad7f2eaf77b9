// Common parts of every page: its data, and the switch between light and dark colours.

const DATA = JSON.parse(document.getElementById("data").textContent);

/** Create an element: attributes by name, `on…` as listeners, children as nodes or text (never as HTML). */
function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

/** Create an SVG element; attributes that are null are omitted. */
function shape(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) if (value != null) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

{
  const root = document.documentElement;
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const button = element("button", { class: "button", type: "button", id: "theme" });
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
  const show = () => {
    button.textContent = dark() ? "Light colours" : "Dark colours";
  };
  // Storage may be refused if a page is opened from a file: the choice then lasts until the page is closed.
  try {
    const stored = localStorage.getItem("pema-theme");
    if (stored === "light" || stored === "dark") root.dataset.theme = stored;
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
