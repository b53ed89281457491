// Typesets formulas with the site's own copy of KaTeX, which only pages that have formulas load.
(() => {
  const home = new URL("katex/", document.currentScript.src);
  document.addEventListener("DOMContentLoaded", () => {
    const formulas = document.querySelectorAll(".arithmatex");
    if (!formulas.length) return;
    const style = Object.assign(document.createElement("link"), { rel: "stylesheet", href: new URL("katex.min.css", home) });
    const script = Object.assign(document.createElement("script"), { src: new URL("katex.min.js", home) });
    script.onload = () => {
      for (const formula of formulas) {
        const displayMode = formula.tagName === "DIV";
        // Between \( and \), or \[ and \].
        katex.render(formula.textContent.trim().slice(2, -2), formula, { displayMode, throwOnError: false });
      }
    };
    document.head.append(style, script);
  });
})();
