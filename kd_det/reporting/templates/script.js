"use strict";
(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const find = (id) => document.getElementById(id);
  const words = (text) => text.split(" ").filter(Boolean);

  // Learning curves: a run can be hidden.
  for (const box of all("#runs input")) {
    box.addEventListener("change", () => {
      for (const line of all(`.chart [data-run="${box.dataset.run}"]`)) line.classList.toggle("off", !box.checked);
    });
  }

  // Test images: filters, which the address holds, so that a view can be shared.
  const form = find("filters");
  if (!form) return;
  const kind = find("class"), differ = find("differ"), labels = find("labels"), count = find("count");
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());

  const apply = () => {
    let shown = 0;
    const examples = all(".example");
    for (const example of examples) {
      const differing = words(example.dataset.differ);
      const present = words(example.dataset.classes);
      const relevant = differ.checked ? differing : present;
      example.hidden = kind.value ? !relevant.includes(kind.value) : differ.checked && !differing.length;
      shown += !example.hidden;
    }
    for (const mark of all(".mark")) mark.classList.toggle("off", Boolean(kind.value) && mark.dataset.class !== kind.value);
    // The counts are those of all classes.
    find("gallery").classList.toggle("of-class", Boolean(kind.value));
    find("gallery").classList.toggle("unlabelled", Boolean(labels) && !labels.checked);
    count.textContent = `${shown} of ${examples.length} images`;
  };

  const read = () => {
    const filters = new URLSearchParams(location.hash.slice(1));
    const option = [...kind.options].find((each) => each.value && each.text === filters.get("class"));
    kind.value = option ? option.value : "";
    differ.checked = filters.get("differ") === "1";
    if (labels) labels.checked = filters.get("labels") !== "0";
    apply();
  };

  form.addEventListener("change", () => {
    const filters = new URLSearchParams();
    if (kind.value) filters.set("class", kind.selectedOptions[0].text);
    if (differ.checked) filters.set("differ", "1");
    if (labels && !labels.checked) filters.set("labels", "0");
    history.replaceState(null, "", `#${filters}`);
    apply();
  });
  // Links to sections have a hash, too, but without "=".
  addEventListener("hashchange", () => location.hash.includes("=") && read());
  read();
})();
