// The three ways a picture comes in: dropped anywhere on the page, pasted, or chosen from a file dialog.
// All of them end in one callback with one File; the service decides whether it is a picture.
import { $ } from "./dom.js";

export function choosePicture() {
  $("file").click();
}

export function acceptPictures(take, describe) {
  const overlay = $("drop");
  let depth = 0; // dragenter and dragleave also fire for every child that the pointer crosses
  const show = (on) => overlay.classList.toggle("on", on);
  const carriesFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");

  addEventListener("dragenter", (event) => {
    if (!carriesFile(event)) return;
    depth += 1;
    overlay.firstElementChild.textContent = describe();
    show(true);
  });
  addEventListener("dragleave", () => {
    depth = Math.max(0, depth - 1);
    if (depth === 0) show(false);
  });
  addEventListener("dragover", (event) => carriesFile(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    depth = 0;
    show(false);
    if (!carriesFile(event)) return;
    event.preventDefault();
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    const file = event.clipboardData?.files[0];
    if (!file) return;
    event.preventDefault();
    take(file);
  });
  $("file").addEventListener("change", () => {
    const file = $("file").files[0];
    $("file").value = ""; // choosing the same file again must count as a change
    if (file) take(file);
  });
}
