// What the page does in the browser: move through slices, set opacity and window, take pictures from the clipboard.
// Everything is delegated from the document, because Gradio puts answers in and takes them out as it likes.
(() => {
  "use strict";
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  // --- several slices ---
  function show(answer, index) {
    const slices = answer.querySelectorAll(".slice");
    index = clamp(index, 0, slices.length - 1);
    slices.forEach((slice, i) => (slice.hidden = i !== index));
    answer.querySelectorAll(".bar").forEach((bar, i) => bar.classList.toggle("shown", i === index));
    const pick = answer.querySelector(".pick");
    if (pick) {
      pick.value = index + 1;
      pick.setAttribute("aria-valuetext", `slice ${index + 1}, ${slices[index].dataset.headline}`);
      answer.querySelector(".which").textContent = index + 1;
    }
  }
  const current = (answer) => [...answer.querySelectorAll(".slice")].findIndex((slice) => !slice.hidden);

  // --- display window: the picture's red and green hold HU + 1024 as two bytes ---
  const hounsfield = new WeakMap();
  async function levels(pictures) {
    if (!hounsfield.has(pictures)) {
      const image = new Image();
      image.src = pictures.dataset.hu;
      await image.decode();
      const canvas = document.createElement("canvas");
      canvas.width = image.width;
      canvas.height = image.height;
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      const data = context.getImageData(0, 0, image.width, image.height);
      const hu = new Int16Array(image.width * image.height);
      for (let i = 0; i < hu.length; i++) hu[i] = data.data[4 * i] * 256 + data.data[4 * i + 1] - 1024;
      const plain = [...pictures.querySelectorAll("img.ct")].map((img) => img.src);
      hounsfield.set(pictures, { hu, data, canvas, context, plain });
    }
    return hounsfield.get(pictures);
  }
  async function setWindow(pictures, level, width) {
    const { hu, data, canvas, context } = await levels(pictures);
    // DICOM PS3.3 C.11.2.1.2.1
    const scale = 255 / Math.max(1, width - 1);
    const offset = 127.5 - scale * (level - 0.5);
    for (let i = 0; i < hu.length; i++) {
      const gray = clamp(hu[i] * scale + offset, 0, 255);
      data.data[4 * i] = data.data[4 * i + 1] = data.data[4 * i + 2] = gray;
      data.data[4 * i + 3] = 255;
    }
    context.putImageData(data, 0, 0);
    const uri = canvas.toDataURL("image/png");
    pictures.querySelectorAll("img.ct").forEach((img) => (img.src = uri));
  }
  let drawing = 0;
  function windowChanged(pictures, level, width) {
    const inputs = { level: pictures.querySelector("input.level"), width: pictures.querySelector("input.width") };
    if (level !== undefined) [inputs.level.value, inputs.width.value] = [level, width];
    for (const input of Object.values(inputs)) input.closest("label").querySelector("output").textContent = input.value;
    cancelAnimationFrame(drawing);
    drawing = requestAnimationFrame(() => setWindow(pictures, Number(inputs.level.value), Number(inputs.width.value)));
  }
  async function resetWindow(pictures) {
    const { plain } = await levels(pictures);
    pictures.querySelectorAll("img.ct").forEach((img, i) => (img.src = plain[i]));
    pictures.querySelectorAll(".window input").forEach((input) => {
      input.value = input.defaultValue;
      input.closest("label").querySelector("output").textContent = input.value;
    });
  }

  document.addEventListener("input", (event) => {
    const input = event.target;
    if (!(input instanceof HTMLInputElement)) return;
    const answer = input.closest(".answer");
    if (!answer) return;
    if (input.matches(".opacity")) answer.style.setProperty("--opacity", input.value / 100);
    if (input.matches(".pick")) show(answer, Number(input.value) - 1);
    if (input.matches(".level, .width")) windowChanged(input.closest(".pictures"));
  });

  document.addEventListener("click", (event) => {
    const target = event.target instanceof Element ? event.target.closest("[data-go],[data-step],.preset") : null;
    const answer = target && target.closest(".answer");
    if (!answer) return;
    if (target.dataset.go) show(answer, Number(target.dataset.go));
    else if (target.dataset.step) show(answer, current(answer) + Number(target.dataset.step));
    else if (target.dataset.reset) resetWindow(target.closest(".pictures"));
    else windowChanged(target.closest(".pictures"), target.dataset.level, target.dataset.width);
  });

  // --- pictures from the clipboard go the way of chosen files ---
  document.addEventListener("paste", (event) => {
    const files = event.clipboardData && event.clipboardData.files;
    const input = document.querySelector("#drop input[type=file]");
    if (!files || !files.length || !input) return;
    const transfer = new DataTransfer();
    for (const file of files) transfer.items.add(file);
    input.files = transfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
    event.preventDefault();
  });

  // --- what changed is said aloud, and brought into view on small screens ---
  const live = document.createElement("p");
  live.className = "vh";
  live.setAttribute("role", "status");
  let told = null;
  function noticed() {
    if (!live.isConnected) (document.querySelector("main, .gradio-container") || document.body).append(live);
    name();
    const answer = document.querySelector("#result .answer, #result .waiting");
    if (!answer || answer === told) return;
    const first = told === null;
    told = answer;
    if (answer.dataset.count) show(answer, Number(answer.dataset.first));
    const slice = answer.querySelector(".slice:not([hidden])");
    const headline = (slice || answer.querySelector("[data-headline]") || answer).dataset.headline;
    const said = slice && slice.querySelector(".verdict p");
    live.textContent = headline ? `${headline}. ${said ? said.textContent : ""}` : answer.querySelector("p")?.textContent || "";
    if (!first && answer.getBoundingClientRect().top > innerHeight * 0.7) {
      const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
      answer.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
    }
  }
  // Gradio's upload button has no text that says what it takes.
  function name() {
    const button = document.querySelector("#drop button");
    if (button && !button.dataset.named) {
      button.dataset.named = "1";
      button.setAttribute("aria-label", "Choose chest CT slices: PNG, JPEG, TIFF, DICOM or a zip of them");
      button.removeAttribute("aria-dropeffect");
    }
  }
  new MutationObserver(noticed).observe(document.documentElement, { childList: true, subtree: true });
})();
